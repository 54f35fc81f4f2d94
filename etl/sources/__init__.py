"""Sources: one file a log format, registered by being in this folder.

A source module defines `SOURCE`, an object of the `Source` protocol:

    files = SOURCE.resolve(input, dataset, cache)   paths on disk, downloading where there is no input
    scans = SOURCE.scan(files, options)             tasks and where each episode lies; reads lengths, not payloads
    SOURCE.parts(file)                              every file on disk that a ref's `file` stands for
    SOURCE.read(task, refs)                         the episodes themselves, or why one is unusable

Invariant: `scan` is a pure function of the files' contents and the options, in
whatever order the files are named; `read` yields exactly one result a ref, in order.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from schemas.episode import RawEpisode, TaskSpec


class SourceError(ValueError):
    """A file or name cannot be used at all; the message names it and the remedy."""


@dataclass(frozen=True)
class EpisodeRef:
    """Rows [start, stop) of `file` (a full path), the `position`-th episode in it."""

    file: str
    position: int
    start: int
    stop: int

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
    """One task, its usable episodes in log order, and what `scan` already had to reject."""

    task: TaskSpec | None
    episodes: tuple[EpisodeRef, ...] = ()
    rejected: tuple[Rejection, ...] = ()


@dataclass(frozen=True)
class ScanOptions:
    """What the command line may override. `environment`: a gymnasium id where the log names none."""

    environment: str | None = None
    max_episode_steps: int | None = None


class Source(Protocol):
    name: str
    default_dataset: str

    def resolve(self, input: Path | None, dataset: str | None, cache: Path) -> list[Path]: ...

    def scan(self, files: list[Path], options: ScanOptions) -> list[TaskScan]: ...

    def parts(self, file: str) -> list[Path]: ...

    def read(self, task: TaskSpec, refs: Iterable[EpisodeRef]) -> Iterator[RawEpisode | Rejection]: ...


def names() -> list[str]:
    """Names of all sources: the modules of this folder that define SOURCE."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def load(name: str) -> Source:
    """The named source. SourceError lists the known names."""
    if name not in names():
        raise SourceError(f"unknown source '{name}'; known: {', '.join(names())}")
    return importlib.import_module(f"{__name__}.{name}").SOURCE
