"""Logs whose episodes are named arrays: what their sources share.

log file -> `Log` of its format: StoredEpisode by position, arrays not yet read -> `ArraySource`
    scan: `_survey.Survey` decides fields, actions and bounds -> TaskScan
    read: `read_episode`, by the task alone -> RawEpisode

A format gives `tasks` (which files are one task), `open` (a Log) and whatever else it knows: environment, time limit,
which episodes are held out. A place, the `file` of a ref, is the path, with the keys that the user named after KEYS.

Invariant: a field's meaning is in its FieldSpec; an array that does not fit it is a Rejection of its episode.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any, Protocol
from urllib.parse import parse_qsl, urlencode

import numpy as np

from etl.sources import (
    ActionOptions,
    EpisodeRef,
    Known,
    Rejection,
    SourceError,
    TaskScan,
    _catalogue,
    _pictures,
    by_task,
)
from etl.sources._hdf5 import AGAIN, DAMAGE
from etl.sources._numbers import float32, integers
from etl.sources._recognition import all_files_below
from schemas.episode import EnvironmentSpec, EpisodeError, FieldSpec, RawEpisode, TaskSpec
from schemas.ranges import require

KEYS = "?keys:"  # in a ref's file, before the names that the user gave
EPISODE_BYTES = 2**32  # of one array, unpacked
TIMESTEP_VALUES = 2**16
INSTRUCTION = "instruction"  # key of a text that holds for all of an episode


class Column(Protocol):
    """An array of an episode, on disk or in memory: one row per timestep."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype: ...

    def __getitem__(self, rows: slice, /) -> np.ndarray: ...


class Part:
    """Rows [start, stop) of a column."""

    def __init__(self, column: Column, start: int, stop: int):
        self.column, self.start, self.stop = column, start, max(start, min(stop, column.shape[0]))

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stop - self.start, *self.column.shape[1:]

    @property
    def dtype(self) -> np.dtype:
        return self.column.dtype

    def __getitem__(self, rows: slice, /) -> np.ndarray:
        start, stop, _ = rows.indices(self.stop - self.start)
        return self.column[self.start + start : self.start + stop]


@dataclass(frozen=True)
class StoredEpisode:
    """One episode as its format stores it, T timesteps from row `start` of its file on.

    `observation`: key -> (T, ...) or (T + 1, ...), of which the first T count; `action` (T, ...) or longer; `reward`
    (T,) or longer, None where the log has none; `texts`: key -> a string that holds for all timesteps."""

    timesteps: int
    observation: Mapping[str, Column]
    action: Column
    reward: Column | None
    terminated: bool
    truncated: bool
    start: int = 0
    texts: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ArrayOptions(ActionOptions):
    """Options for reading logs of named arrays."""

    observation_keys: tuple[str, ...] = ()
    """Arrays of the observation to use; all of them where not given."""
    text_tokens: int = 16
    """Tokens of a text inside a timestep; longer ones are cut, and counted."""

    def check(self) -> None:
        super().check()
        require("text-tokens", self.text_tokens, 1, 2**15)


class Log:
    """One open log file of a format. Its methods raise EpisodeError, or what DAMAGE lists, for what cannot be used."""

    environment: EnvironmentSpec | None = None
    max_episode_steps: int | None = None
    held_out: Mapping[int, bool] = {}  # position -> whether the log itself holds the episode out
    warnings: tuple[str, ...] = ()  # of what may be read wrongly
    notes: tuple[str, ...] = ()

    def positions(self) -> Iterable[int]:
        """The positions of its episodes, ascending. A format that is read as a stream overrides scan and read."""
        return ()

    def episode(self, position: int) -> StoredEpisode:
        """The episode at a position."""
        raise NotImplementedError

    def scan(self) -> Iterator[tuple[int, StoredEpisode | EpisodeError]]:
        """Every episode, or why it cannot be used; arrays that `scan` has no need of may be without rows."""
        for position in self.positions():
            yield position, self._tried(position)

    def read(self, refs: list[EpisodeRef]) -> Iterator[StoredEpisode | EpisodeError]:
        """The episodes of refs of this file, in their order."""
        for ref in refs:
            yield self._tried(ref.position)

    def close(self) -> None:
        """Close the file."""

    def _tried(self, position: int) -> StoredEpisode | EpisodeError:
        try:
            with damage():
                return self.episode(position)
        except EpisodeError as error:
            return error


class damage:
    """Turns what libraries raise for damaged bytes into an EpisodeError."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, DAMAGE) and not isinstance(error, EpisodeError):
            why = " ".join(str(error).split())[:200] or type(error).__name__
            raise EpisodeError("corrupt file", f"{why}; {AGAIN}") from error


class ArraySource:
    """A source of such logs. Subclasses define `name`, `suffixes`, `open`, and what differs."""

    name: str
    default_dataset = ""
    options: type[Any] = ArrayOptions
    writer = None
    suffixes: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()  # options that name a log's keys, which a place carries
    what = "log"  # in messages
    fetch = "download it"  # what to do where there is no --input
    hub = ""  # an example of such logs on the Hugging Face hub; '' where there are none
    listed: tuple[str, ...] = ()  # datasets there, for --list

    def known(self, cache: Path) -> list[Known]:
        """Those of `listed`, and what is in the cache; any other of the hub can be asked for by its repository's id."""
        from etl.fetch import hub  # which needs this package

        return hub.known(cache / self.name, self.listed)

    def resolve(self, input: Path | None, dataset: str | None, cache: Path) -> list[Path]:
        """The input file, or all files of the format below the input folder, sorted; `dataset` picks one task. Without
        an input, `dataset`, a repository of the hub or a folder in one, is downloaded. SourceError: there is none."""
        if input is None and self.hub and dataset is not None:
            from etl.fetch import hub  # which needs this package

            return hub.logs(dataset, cache / self.name, self.hub, self.what, self.wanted, self.below)
        if input is None:
            by_name = f"give --dataset with a repository of the Hugging Face hub ({self.hub}); or " if self.hub else ""
            raise SourceError(f"source {self.name} needs --input; {by_name}{self.fetch}, and give --input that file or "
                              "folder")  # fmt: skip
        found = [input] if input.is_file() else self.below(input)
        if not found:
            raise SourceError(f"{input}: no {self.what} in it; give --input a {self.what} or a folder of them")
        if dataset is None:
            return found
        named = self.tasks(found)
        if dataset not in named:
            raise SourceError(f"{input}: no dataset '{dataset}' in it{_catalogue.suggest(dataset, named)}")
        return named[dataset]

    def wanted(self, name: str) -> bool:
        """True if a file of a repository belongs to logs of this format."""
        return PurePosixPath(name).suffix.lower() in (*self.suffixes, ".json")

    def below(self, folder: Path) -> list[Path]:
        """Files of the format at and below a folder, sorted."""
        return sorted(path for path in all_files_below(folder) if path.suffix.lower() in self.suffixes)

    def tasks(self, files: list[Path]) -> dict[str, list[Path]]:
        """Files of each task, by the tasks' names: here a task per file. SourceError where two share a name."""
        return {name: [path] for name, path in by_task(files, lambda path: path.stem).items()}

    def tried(self, files: list[Path]) -> Mapping[Path, EpisodeError]:
        """Files that must not be opened, and why."""
        return {}

    def place(self, path: Path, options: Any) -> str:
        """The `file` of a path's refs."""
        named = {key: getattr(options, key) for key in self.keys}
        given = {key: value for key, value in named.items() if value != getattr(self.options, key)}
        return f"{path}{KEYS}{urlencode(sorted(given.items()))}" if given else str(path)

    def label(self, path: Path) -> str:
        """How a path is named in rejections and in the index: unique in its task."""
        return path.name

    @abstractmethod
    def open(self, place: str) -> Log:
        """The log at a place. EpisodeError says what is wrong with all of it."""

    def parts(self, file: str) -> list[Path]:
        """The file itself."""
        return [path_of(file)]

    def scan(self, files: list[Path], options: Any) -> list[TaskScan]:
        """One TaskScan per task, by name."""
        from etl.sources._survey import Survey  # which needs this module

        wrong = self.tried(files)
        scans = []
        for name, paths in self.tasks(files).items():
            survey = Survey(name, self.name, options)
            for path in paths:
                survey.add(self, path, wrong.get(path))
            scans.append(survey.finish())
        return scans

    def read(self, task: TaskSpec, refs: Iterable[EpisodeRef]) -> Iterator[RawEpisode | Rejection]:
        """Episodes in the order of refs."""
        for place, group in groupby(refs, key=lambda ref: ref.file):
            own = list(group)
            label = self.label(path_of(place))
            try:
                with damage():
                    log = self.open(place)
            except EpisodeError as error:
                yield from (rejection(task.name, label, ref.position, ref.start, error) for ref in own)
                continue
            try:
                for ref, stored in zip(own, log.read(own), strict=True):
                    yield self._read(task, ref, stored, label)
            finally:
                log.close()

    def _read(
        self, task: TaskSpec, ref: EpisodeRef, stored: StoredEpisode | EpisodeError, label: str
    ) -> RawEpisode | Rejection:
        try:
            if isinstance(stored, EpisodeError):
                raise stored
            with damage():
                return read_episode(task, stored, ref, label)
        except EpisodeError as error:
            return rejection(task.name, label, ref.position, ref.start, error)


def read_episode(task: TaskSpec, stored: StoredEpisode, ref: EpisodeRef, label: str) -> RawEpisode:
    """The arrays of a stored episode as the task's fields say. EpisodeError names an array that does not fit."""
    T, action = ref.timesteps, task.action
    assert action is not None
    if stored.timesteps != T:
        raise EpisodeError("wrong length", f"{stored.timesteps} timesteps, {T} when it was scanned; build again")
    observation = {spec.key: _values(spec, stored, T) for spec in task.observation}
    actions = rows_of(stored.action, "action", T)
    if action.kind == "discrete":
        actions = integers(actions, "action").reshape((T,) if action.size == 1 else (T, action.size))
    else:
        actions = float32(actions, "action").reshape(T, action.size)
    reward = np.zeros(T, np.float32)
    if stored.reward is not None:
        reward = float32(rows_of(stored.reward, "reward", T), "reward").reshape(T)
    return RawEpisode(observation, actions, reward, stored.terminated, stored.truncated, label, ref.position, ref.start)


def _values(spec: FieldSpec, stored: StoredEpisode, T: int) -> np.ndarray:
    if spec.kind == "text" and spec.key in stored.texts:
        return np.full(T, stored.texts[spec.key])
    if spec.key not in stored.observation:
        raise EpisodeError("missing key", f"no observation '{spec.key}' in this episode; {AGAIN}")
    values = rows_of(stored.observation[spec.key], spec.key, T)
    if spec.kind == "text":
        return values.astype(np.str_)
    if spec.kind == "image":
        layout = layout_of_picture(values.shape[1:], values.dtype, spec.shape)
        if layout is None:
            given = f"{values.dtype} {values.shape[1:]}"
            raise EpisodeError("wrong shape", f"'{spec.key}' is {given} a timestep, expected a picture of {spec.shape}")
        unit = layout if values.dtype.kind != "f" else None  # of floats, the values themselves say
        return _pictures.as_pictures(values, spec.key, unit)
    if values.shape[1:] != spec.shape:
        raise EpisodeError("wrong shape", f"'{spec.key}' is {values.shape}, expected {(T, *spec.shape)}; {AGAIN}")
    return integers(values, spec.key) if spec.kind == "discrete" else float32(values, spec.key)


def layout_of_picture(
    stored: tuple[int, ...], dtype: np.dtype, shape: tuple[int, ...]
) -> _pictures.PictureLayout | None:
    """The layout of an array that is a picture of `shape`; None where it cannot be one."""
    layout = _pictures.picture_layout(stored, dtype, 0, 255)
    return layout if layout is not None and layout.shape == shape else None


def rows_of(column: Column, name: str, T: int) -> np.ndarray:
    """The first T rows. EpisodeError where there are fewer, or more bytes than an episode may have."""
    if not column.shape or column.shape[0] < T:
        count = column.shape[0] if column.shape else 0
        raise EpisodeError("wrong length", f"'{name}' has {count} rows of {T}; {AGAIN}")
    if math.prod(column.shape[1:]) * T * max(1, column.dtype.itemsize) > EPISODE_BYTES:
        raise EpisodeError("too large", f"'{name}' has {T} rows of {column.shape[1:]}; record shorter episodes")
    return column[:T]


def rejection(task: str, label: str, position: int, row: int, error: EpisodeError) -> Rejection:
    """The line of an episode, or of a file where the position is -1."""
    return Rejection(task, label, position, row, error.reason, error.detail)


def path_of(place: str) -> Path:
    """The file on disk of a place."""
    return Path(place.partition(KEYS)[0])


def names_of(place: str) -> dict[str, str]:
    """The keys that the user named, by option."""
    return dict(parse_qsl(place.partition(KEYS)[2]))
