"""Sources: one file a log format, registered by being in this folder.

A source module defines `SOURCE`, an object of the `Source` protocol:

    files = SOURCE.resolve(input, dataset, cache)   paths on disk, downloading where there is no input
    scans = SOURCE.scan(files, options)             tasks and where each episode lies; reads lengths, not payloads
    SOURCE.known(cache)                             datasets that can be asked for by name, for --list
    SOURCE.parts(file)                              every file on disk that a ref's `file` stands for
    SOURCE.read(task, refs)                         the episodes themselves, or why one cannot be read
    read(SOURCE, task, refs)                        the same, and each fits its task

Invariant: `scan` is a pure function of the files' contents and the options, in
whatever order the files are named; `read` yields exactly one result a ref, in order.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

from schemas.episode import Document, EpisodeError, RawEpisode, TaskSpec

STALE = "stale rows"  # reason of a rejection: rows that are no episode's


class SourceError(ValueError):
    """A file or name cannot be used at all; the message names it and the remedy."""


class EpisodeRef(NamedTuple):
    """Rows [start, stop) of `file` (a full path), the `position`-th episode in it (of a text document: its place in
    bytes). `total`: its raw return, None where its log has no rewards or they cannot be read."""

    file: str
    position: int
    start: int
    stop: int
    total: float | None = None

    @property
    def timesteps(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Rejection:
    """Something that could not be used: a whole file (position -1) or one episode of it."""

    task: str
    file: str  # name, without folder
    position: int
    row: int
    reason: str
    detail: str


@dataclass(frozen=True)
class TaskScan:
    """One task, its usable episodes in log order, what `scan` already had to reject, and how many good episodes
    a filter left out."""

    task: TaskSpec | None
    episodes: tuple[EpisodeRef, ...] = ()
    rejected: tuple[Rejection, ...] = ()
    filtered: int = 0


@dataclass(frozen=True)
class ScanOptions:
    """What the command line says about the logs."""

    environment: str | None = None
    """gymnasium id, for logs that name none; or gym/ID of the old gym or d4rl, also in the place of a D4RL log's."""
    max_episode_steps: int | None = None
    """Time limit, for logs without timeouts."""
    frames: Literal["80x64", "padded"] = "80x64"
    """Atari frames: filtered to 80x64 (20 patches), or kept at 84x84 and padded with zeros to 96x96 (36 patches)."""
    text_tokens: int = 16
    """Tokens of a text inside a timestep; longer ones are cut, and counted."""
    text_field: str = "text"
    """Field of JSON lines and column of Parquet files that holds the text."""


@dataclass(frozen=True)
class Known:
    """A dataset that can be asked for by name. `where`: its address; `cached`: the file, if it is here."""

    id: str
    environment: str
    where: str
    cached: Path | None


class Source(Protocol):
    name: str
    default_dataset: str

    def known(self, cache: Path) -> list[Known]: ...

    def resolve(self, input: Path | None, dataset: str | None, cache: Path) -> list[Path]: ...

    def scan(self, files: list[Path], options: ScanOptions) -> list[TaskScan]: ...

    def parts(self, file: str) -> list[Path]: ...

    def read(self, task: TaskSpec, refs: Iterable[EpisodeRef]) -> Iterator[RawEpisode | Document | Rejection]: ...


def names() -> list[str]:
    """Names of all sources: the modules of this folder that define SOURCE."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def load(name: str) -> Source:
    """The named source. SourceError lists the known names."""
    if name not in names():
        raise SourceError(f"unknown source '{name}'; known: {', '.join(names())}")
    return importlib.import_module(f"{__name__}.{name}").SOURCE


def read(source: Source, task: TaskSpec, refs: Sequence[EpisodeRef]) -> Iterator[RawEpisode | Document | Rejection]:
    """The episode of each ref, or the reason why it cannot be tokenized under `task`."""
    for ref, found in zip(refs, source.read(task, refs), strict=True):
        try:
            if not isinstance(found, Rejection):
                found.check(task)
            yield found
        except EpisodeError as error:
            yield Rejection(task.name, found.file, ref.position, ref.start, error.reason, error.detail)


def by_task(files: Iterable[Path], name_of: Callable[[Path], str]) -> dict[str, Path]:
    """Files that are a task each, by their sorted names. SourceError where two have one name."""
    named: dict[str, Path] = {}
    for path in sorted(map(Path, files)):
        other = named.setdefault(name_of(path), path)
        if other is not path:
            raise SourceError(f"{other} and {path} are both dataset '{name_of(path)}'; rename one or leave it out")
    return dict(sorted(named.items()))
