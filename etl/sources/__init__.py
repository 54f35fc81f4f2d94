"""Sources: one file or folder per log format.

registered by --import, entry points `gato.sources`, etl/sources/* -> Source by name

A source is an object of the `Source` protocol; a module or folder here defines one as `SOURCE`:

    SOURCE.options                                  dataclass of what the command line says about its logs
    SOURCE.recognise(input)                         why a file or folder is of its format, or None; by names and keys
    files = SOURCE.resolve(input, dataset, cache)   paths on disk, downloading where there is no input
    scans = SOURCE.scan(files, options)             tasks and where each episode lies; reads lengths, not payloads
    SOURCE.known(cache)                             datasets that can be asked for by name, for --list
    SOURCE.parts(file)                              every file on disk that a ref's `file` stands for
    SOURCE.read(task, refs)                         the episodes themselves, or why one cannot be read
    SOURCE.writer                                   what etl.record writes such logs with, or None
    read(SOURCE, task, refs)                        as SOURCE.read, and each fits its task

Invariant: `scan` is a pure function of the files' contents and the options, in whatever order the files are named;
`read` yields exactly one result per ref, in order.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import pkgutil
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import gymnasium

import simulators
from etl.sources._recognition import LAYOUT, Recognition, seen
from schemas.episode import Document, EnvironmentSpec, EpisodeError, RawEpisode, TaskSpec
from schemas.ranges import require
from simulators.rollout import Step

ENTRY_POINTS = "gato.sources"
DEFAULT = "d4rl"
STALE = "stale rows"  # reason of a rejection: rows that are no episode's
ENDS = ("terminated", "truncated", "cut")  # by the environment, by its time limit, by the log


class SourceError(ValueError):
    """A file or name cannot be used at all; the message names it and the remedy."""


class EpisodeRef(NamedTuple):
    """Rows [start, stop) of `file` (a full path), the `position`-th episode in it (of a text document: its place in
    bytes). `total`: its raw return, None where its log has no rewards or they cannot be read. `held_out`: what the log
    itself says of it; None leaves it to a hash. `end`: how it ended, where `scan` knows that better than the rows
    themselves: one of ENDS."""

    file: str
    position: int
    start: int
    stop: int
    total: float | None = None
    end: str = ""
    held_out: bool | None = None

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
    """One task, its usable episodes in log order, what `scan` already had to reject, how many good episodes a filter
    left out. `warnings`: what may be read wrongly, with numbers and a remedy; `--strict` refuses it. `notes`: what
    else the user should know. One line each."""

    task: TaskSpec | None
    episodes: tuple[EpisodeRef, ...] = ()
    rejected: tuple[Rejection, ...] = ()
    filtered: int = 0
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class NoOptions:
    """Options of a source that has none. Others are frozen dataclasses with docstrings, and this `check`."""

    def check(self) -> None:
        """ValueError names an option whose value makes no sense."""


@dataclass(frozen=True)
class LogOptions(NoOptions):
    """Options common to sources of simulators' logs."""

    environment: str | None = None
    """gymnasium id of the simulator, MODULE:Id for one of your own, gym/ID of the old gym or d4rl. It overrides
    what the logs name."""
    max_episode_steps: int | None = None
    """Time limit, for logs without timeouts."""

    def check(self) -> None:
        if self.max_episode_steps is not None:
            require("max-episode-steps", self.max_episode_steps, 1, 2**30)


@dataclass(frozen=True)
class ActionOptions(LogOptions):
    """Options common to sources of logs with real-valued actions; etl/sources/_ranges.py decides by them."""

    action_low: tuple[float, ...] = ()
    """Lowest value of an action, one for all dimensions or one each. Without it: the environment's or what the log
    states."""
    action_high: tuple[float, ...] = ()
    """Highest value of an action."""
    action_bounds: Literal["declared", "log"] = "declared"
    """log: take each dimension's range from the values in the log, whatever the log or its environment states."""

    def check(self) -> None:
        super().check()
        if len(self.action_low) != len(self.action_high) or not all(
            -math.inf < a < b < math.inf for a, b in zip(self.action_low, self.action_high)
        ):
            given = f"--action-low {self.action_low} and --action-high {self.action_high}"
            raise ValueError(f"{given}: give as many of both, finite, each low below its high")
        if self.action_low and self.action_bounds == "log":
            raise ValueError("--action-low goes with --action-bounds declared; leave out one of them")


@dataclass(frozen=True)
class Known:
    """A dataset that can be asked for by name. `where`: its address; `cached`: the file, if it is here."""

    id: str
    environment: str
    where: str
    cached: Path | None


class LogWriter(Protocol):
    """Writes one log, row by row, under a temporary name; `close` gives it its own, `discard` removes what has not
    got it. A class of this protocol is a source's `writer`."""

    folder: str
    """Default folder of such logs."""

    @staticmethod
    def path(folder: Path, name: tuple[str, str], level: str, run: int) -> Path:
        """The log's own path. `name`: an environment's, as its suite's `log_name` gives it."""
        ...

    def __init__(self, path: Path, environment: EnvironmentSpec, algorithm: str): ...

    def wrap(self, raw: gymnasium.Env) -> gymnasium.Env:
        """The simulator below our preprocessing, where the log needs its raw observations."""
        ...

    def append(self, step: Step) -> None: ...

    def close(self) -> None: ...

    def discard(self) -> None: ...


class Source(Protocol):
    name: str
    default_dataset: str
    options: type[Any]
    writer: type[LogWriter] | None

    def known(self, cache: Path) -> list[Known]: ...

    def recognise(self, input: Path) -> Recognition | None:
        """Why the input is of this format; None where it is not. Looks at names and a few files' keys, reads no
        payload, and raises nothing for foreign or damaged files. May be missing: such a source has to be named."""
        ...

    def resolve(self, input: Path | None, dataset: str | None, cache: Path) -> list[Path]: ...

    def scan(self, files: list[Path], options: Any) -> list[TaskScan]: ...

    def parts(self, file: str) -> list[Path]: ...

    def read(self, task: TaskSpec, refs: Iterable[EpisodeRef]) -> Iterator[RawEpisode | Document | Rejection]: ...


_registered: dict[str, Source] = {}


def register(source: Source) -> None:
    """Make a source known; replaces one of the same name. For a module that `--import` names."""
    _registered[source.name] = source


def names() -> list[str]:
    """Names of all sources."""
    return sorted({*_built_in(), *_entry_points(), *_registered})


def load(name: str) -> Source:
    """The named source. SourceError lists the known names."""
    if name in _registered:
        return _registered[name]
    if name in _built_in():
        return importlib.import_module(f"{__name__}.{name}").SOURCE
    if name not in _entry_points():
        remedy = "install the package that provides it, or name its module by --import"
        raise SourceError(f"unknown source '{name}'; known: {', '.join(names())}; {remedy}")
    point = _entry_points()[name]
    try:
        return point.load()
    except Exception as error:  # another project's module may raise anything
        detail = f"{type(error).__name__}: {error}"
        raise SourceError(f"entry point {name} = {point.value} of {ENTRY_POINTS} cannot be loaded ({detail}); "
                          "repair or uninstall its package") from error  # fmt: skip


def recognise(input: Path) -> tuple[Source, str]:
    """The source whose format a file or folder is of, and the evidence, with what looks like logs of another one beside
    them. SourceError where none fits, with what was seen, or where several fit equally well."""
    found: list[tuple[Source, Recognition]] = []
    for source in map(load, names()):
        recognition = source.recognise(input) if hasattr(source, "recognise") else None
        if recognition is not None:
            found.append((source, recognition))
    if not found:
        formats = "".join(f"\n  {name}: {_about(load(name))}" for name in names())
        remedy = f"give --source if it is one of these, or write your own (docs/your-data.md):{formats}"
        raise SourceError(f"{input}: holds no log of a known format ({seen(input)}); {remedy}")
    highest = max(recognition.certainty for _, recognition in found)
    best = [(source, recognition) for source, recognition in found if recognition.certainty == highest]
    if len(best) > 1:
        reasons = " and ".join(f"{source.name} ({recognition.evidence})" for source, recognition in best)
        raise SourceError(f"{input}: looks like {reasons}; give --source, or --input a folder of one format")
    source, chosen = best[0]
    others = [
        f"{other.name} ({recognition.evidence})"
        for other, recognition in found
        if LAYOUT <= recognition.certainty < highest and _folder(recognition) != _folder(chosen)
    ]
    beside = f"; not read is what looks like {' and '.join(others)}: give it as --input by itself" if others else ""
    return source, chosen.evidence + beside


def _folder(recognition: Recognition) -> str:
    """Of the file that the evidence begins with: one file may look like two formats."""
    return re.split(r"[ ,]", recognition.evidence)[0].rpartition("/")[0]


def of_dataset(dataset: str | None, cache: Path) -> str:
    """The name of the source that knows a dataset by that name; d4rl where nothing is asked for. SourceError where
    several do, or none knows a name with a slash, which d4rl's have not."""
    if dataset is None:
        return DEFAULT
    found = [name for name in names() if dataset in {one.id for one in load(name).known(cache)}]
    if len(found) > 1:
        raise SourceError(f"dataset '{dataset}' is known to sources {' and '.join(found)}; give --source")
    if not found and "/" in dataset:
        remedy = "give --source, such as --source lerobot for a repository of the Hugging Face hub"
        raise SourceError(f"no source lists dataset '{dataset}'; {remedy}")
    return found[0] if found else DEFAULT


def _about(source: Source) -> str:
    lines = (type(source).__doc__ or source.name).strip().splitlines()
    return lines[0].split(". ")[0].removeprefix("Source of ").rstrip(".")


def owners(option: str) -> list[str]:
    """Names of the sources that have this option, a field of their dataclass."""
    return [name for name in names() if option in {field.name for field in dataclasses.fields(load(name).options)}]


@cache
def _built_in() -> frozenset[str]:
    return frozenset(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


@cache
def _entry_points() -> dict[str, metadata.EntryPoint]:
    return {point.name: point for point in metadata.entry_points(group=ENTRY_POINTS)}


def read(source: Source, task: TaskSpec, refs: Sequence[EpisodeRef]) -> Iterator[RawEpisode | Document | Rejection]:
    """The episode of each ref, or the reason why it cannot be tokenized under `task`."""
    for ref, found in zip(refs, source.read(task, refs), strict=True):
        try:
            if not isinstance(found, Rejection):
                found.check(task)
            if isinstance(found, RawEpisode) and ref.end:
                found = replace(found, terminated=ref.end == "terminated", truncated=ref.end == "truncated")
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


def environment_warnings(environment: EnvironmentSpec | None) -> tuple[str, ...]:
    """A line where a log names an environment that there is not."""
    try:
        if environment is not None and simulators.suite_of_id(environment.id).time_limit(environment.id) is None:
            simulators.require(environment)
    except simulators.UnknownEnvironment as error:
        return (f"{error}. Until then the task can be trained on, and not played",)
    except simulators.SimulatorError:
        pass  # its package is not needed to build
    return ()
