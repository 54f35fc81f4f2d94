"""D4RL's HDF5 logs (arXiv 2004.07219): one file, one task.

observations (N, D), actions (N, A) or integers (N,), rewards (N,) or (N, 1), terminals (N,), timeouts (N,) if any
    -> episodes: rows up to and with one where terminals or timeouts is set

Without `timeouts` (v0 files) a trajectory ends at a terminal or at the time limit. Rows after the last end are an
episode too, cut by the log. The mazes' `infos/goal` (N, G), which their observations leave out, is a field of its
own, before `observation`; the kitchen's goal is a part of its observations; other `infos` and `metadata` are not
read. `scan` reads flags, rewards and shapes; `read` slices one episode at a time. How the bytes are read, and what
becomes of damaged ones, is in etl/sources/_hdf5.py.

Invariant: the episodes of a file are disjoint, in order, and cover all its rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import groupby, pairwise
from pathlib import Path

import h5py
import numpy as np

import simulators
from etl.fetch.download import fetch
from etl.sources import (
    EpisodeRef,
    Known,
    LogOptions,
    Recognition,
    Rejection,
    SourceError,
    TaskScan,
    _catalogue,
    _hdf5,
    _recognition,
    by_task,
    environment_warnings,
)
from etl.sources._hdf5 import AGAIN, Rows, damage
from etl.sources.d4rl.actions import action_space
from etl.sources.d4rl.writer import D4RLWriter
from schemas.episode import ActionSpec, EnvironmentSpec, EpisodeError, FieldSpec, RawEpisode, TaskSpec
from simulators.registry import environment as environment_of_id
from simulators.registry import suite_of_id

SUFFIXES = (".hdf5", ".h5")
REQUIRED = ("observations", "actions", "rewards", "terminals")
GOAL = "infos/goal"
WIDEST = 2**16  # values a timestep: more is damage, and would not fit any context
LONGEST = 2**16  # timesteps an episode: a log without any end is cut here, so that memory stays bounded
ALL = slice(None)
KNOWN = ((-1.0,), (1.0,))  # of the actions in D4RL's own datasets
MOST_ROWS = 2**24  # D4RL's longest have 2M: flags and rewards are held whole


@dataclass(frozen=True)
class Options(LogOptions):
    """What the command line says about D4RL logs."""

    action_low: tuple[float, ...] = ()
    """Lowest value of an action, one for all dimensions or one each; of the environment where not given."""
    action_high: tuple[float, ...] = ()
    """Highest value of an action."""

    def check(self) -> None:
        super().check()
        if len(self.action_low) != len(self.action_high) or any(
            a >= b for a, b in zip(self.action_low, self.action_high)
        ):
            given = f"--action-low {self.action_low} and --action-high {self.action_high}"
            raise ValueError(f"{given}: give as many of both, each low below its high")


class D4RL:
    """Source of D4RL HDF5 files, D4RL's own or written in its layout."""

    name = "d4rl"
    default_dataset = "hopper-medium-v2"
    options = Options
    writer = D4RLWriter

    def known(self, cache: Path) -> list[Known]:
        """D4RL's own datasets."""
        rows = []
        for one in _catalogue.d4rl_datasets().values():
            file = cache / self.name / one.url.rsplit("/", 1)[-1]
            environment = one.environment.id if one.environment else "-"
            rows.append(Known(one.id, environment, one.url, file if file.is_file() else None))
        return rows

    def recognise(self, input: Path) -> Recognition | None:
        """By the keys of an HDF5 file."""
        for path in _recognition.first_with(_recognition.files_below(input), *SUFFIXES):
            if set(REQUIRED) <= set(_recognition.hdf5_keys(path)):
                where = _recognition.below(input, path)
                return Recognition(f"{where} has keys {', '.join(REQUIRED)}", _recognition.LAYOUT)
        return None

    def resolve(self, input: Path | None, dataset: str | None, cache: Path) -> list[Path]:
        """The input file, or all HDF5 files below the input folder (`dataset` picks one of them), sorted;
        without an input, `dataset` is downloaded. SourceError where there is none."""
        if input is None:
            return [self._download(dataset or self.default_dataset, cache)]
        found = [input] if input.is_file() else sorted(p for p in input.rglob("*") if p.suffix in SUFFIXES)
        if not found:
            raise SourceError(f"{input}: no .hdf5 file in it; give --input a folder of D4RL logs, or leave it out")
        files = [p for p in found if dataset is None or task_name(p) == dataset]
        if not files:
            names = [task_name(p) for p in found]
            raise SourceError(f"{input}: no dataset '{dataset}' in it{_catalogue.suggest(str(dataset), names)}")
        return files

    def scan(self, files: list[Path], options: Options) -> list[TaskScan]:
        """One TaskScan a file, by task name. SourceError where two files have one name."""
        named = by_task(files, task_name)
        wrong = _hdf5.tried(named.values())
        return [
            TaskScan(None, (), (_rejection(name, EpisodeRef(str(path), -1, 0, 0), wrong[path]),))
            if path in wrong
            else _scan_file(name, path, options)
            for name, path in named.items()
        ]

    def parts(self, file: str) -> list[Path]:
        """The file itself."""
        return [Path(file)]

    def read(self, task: TaskSpec, refs: Iterable[EpisodeRef]) -> Iterator[RawEpisode | Rejection]:
        """Episodes in the order of refs: observation {'observation': (T, D)} float32, for mazes also 'goal' (T, G),
        action (T, A) float32."""
        for file, group in groupby(refs, key=lambda ref: ref.file):
            try:
                log = _Log(Path(file))
            except EpisodeError as error:
                yield from (_rejection(task.name, ref, error) for ref in group)
                continue
            with log.file:
                for ref in group:
                    yield _read_episode(log, task, ref)

    def _download(self, dataset: str, cache: Path) -> Path:
        known = _catalogue.d4rl_datasets()
        if dataset not in known:
            raise SourceError(f"unknown D4RL dataset '{dataset}'{_catalogue.suggest(dataset, known)}")
        return fetch(known[dataset].url, cache / self.name)


SOURCE = D4RL()


def task_name(path: Path) -> str:
    """D4RL's id where the file has the name of its download or of the id ('hopper_medium-v2.hdf5' is
    'hopper-medium-v2'), else the file's stem."""
    return _downloads().get(path.stem, path.stem)


def episode_stops(terminals: np.ndarray, timeouts: np.ndarray | None, limit: int | None) -> list[int]:
    """Row after each episode's last one, ascending, the final one is N. terminals, timeouts: (N,) bool;
    `limit` is the time limit in timesteps, used where timeouts is None."""
    ends = terminals if timeouts is None else terminals | timeouts
    stops = [int(row) + 1 for row in np.flatnonzero(ends)]
    if not stops or stops[-1] < len(ends):
        stops.append(len(ends))
    if timeouts is not None or limit is None:
        limit = LONGEST
    return [row for start, stop in pairwise([0, *stops]) for row in [*range(start + limit, stop, limit), stop]]


class _Log:
    """One open file whose keys, dtypes and shapes were checked. EpisodeError says what is wrong with it."""

    def __init__(self, path: Path):
        self.path = path
        self.file = _hdf5.opened(path)
        try:
            with damage():
                self.arrays = self._checked()
        except EpisodeError:
            self.file.close()
            raise
        self.fields = {"observation": self.arrays["observations"]}
        if GOAL in self.arrays:
            self.fields["goal"] = self.arrays[GOAL]

    def flags(self, key: str, rows: slice = ALL) -> np.ndarray | None:
        """Whether 'terminals' or 'timeouts' are set, bool; None where the file has no such key."""
        return self.arrays[key][rows].reshape(-1).astype(bool, copy=False) if key in self.arrays else None

    def actions(self, ref: EpisodeRef, task: TaskSpec) -> np.ndarray:
        """(T, A) float32; discrete ones (T,) int64, of several values (T, A)."""
        values = self.arrays["actions"][ref.start : ref.stop]
        assert task.action is not None
        if task.action.kind == "continuous":
            return _float32(values)
        return values.astype(np.int64).reshape((-1,) if task.action.size == 1 else (-1, task.action.size))

    def totals(self, bounds: list[tuple[int, int]]) -> list[float]:
        """Raw return of each episode."""
        rewards = self.arrays["rewards"][:].reshape(-1)
        return np.add.reduceat(rewards, [start for start, _ in bounds], dtype=np.float64).tolist()

    def environment(self) -> str | None:
        """What the file itself says."""
        name = self.file.attrs.get("env_id")
        return name.decode() if isinstance(name, bytes) else name if isinstance(name, str) else None

    def _checked(self) -> dict[str, Rows]:
        arrays: dict[str, Rows] = {}
        for key in (*REQUIRED, "timeouts", GOAL):
            dataset = _hdf5.dataset(self.file, *key.split("/"))
            if dataset is None and key in REQUIRED:
                raise EpisodeError(
                    "missing key", f"no dataset '{key}' in it; D4RL logs hold {', '.join(REQUIRED)} (and timeouts)"
                )
            if dataset is None or (key == GOAL and not _is_goal(dataset)):
                continue
            shape, dtype, rows = dataset.shape, dataset.dtype, len(arrays["observations"]) if arrays else len(dataset)
            matrix = key in ("observations", "actions", GOAL)
            discrete = key == "actions" and dtype.kind in "iu"
            if dtype.kind not in ("f" if matrix else "fiub") and not discrete:
                raise EpisodeError("wrong dtype", f"'{key}' is {dtype}; record it as float32")
            matrix = matrix and not (discrete and len(shape) == 1)
            if matrix and (len(shape) != 2 or not 0 < shape[1] <= WIDEST):
                raise EpisodeError("wrong shape", f"'{key}' is {shape}, expected (N, size)")
            if not matrix and shape[1:] not in ((), (1,)):
                raise EpisodeError("wrong shape", f"'{key}' is {shape}, expected (N,) or (N, 1)")
            if len(dataset) != rows:
                raise EpisodeError("wrong length", f"'{key}' has {len(dataset)} rows, 'observations' {rows}; {AGAIN}")
            if rows > MOST_ROWS:
                raise EpisodeError("too large", f"{rows} rows, more than {MOST_ROWS}; split the file")
            arrays[key] = Rows(dataset)
        if len(arrays["observations"]) == 0:
            raise EpisodeError("empty", f"no row in 'observations'; {AGAIN}")
        return arrays


def _is_goal(dataset: h5py.Dataset) -> bool:
    return dataset.dtype.kind == "f" and dataset.ndim == 2 and 0 < dataset.shape[1] < WIDEST


def _scan_file(name: str, path: Path, options: Options) -> TaskScan:
    known = _catalogue.d4rl_datasets().get(name)
    try:
        log = _Log(path)
        with log.file, damage():
            environment = _environment(log.environment(), known.environment if known else None, options)
            limit = options.max_episode_steps or (known.max_episode_steps if known else None)
            if limit is None and environment is not None:
                limit = suite_of_id(environment.id).time_limit(environment.id)
            terminals, timeouts = log.flags("terminals"), log.flags("timeouts")
            assert terminals is not None  # a required key
            if limit is None and timeouts is None:
                raise EpisodeError("no time limit", "no 'timeouts', and no known time limit; give --max-episode-steps")
            bounds = list(pairwise([0, *episode_stops(terminals, timeouts, limit)]))
            totals = log.totals(bounds)
            action, warnings = _action(log, environment, options, known is not None)
    except EpisodeError as error:
        return TaskScan(None, (), (_rejection(name, EpisodeRef(str(path), -1, 0, 0), error),))
    fields = tuple(FieldSpec(key, "continuous", rows.shape[1:]) for key, rows in sorted(log.fields.items()))
    score = simulators.reference(environment) if environment else None
    if known and environment == known.environment:
        score = known.score
    longest = max(stop - start for start, stop in bounds)
    task = TaskSpec(name, D4RL.name, fields, action, environment, score, limit or longest)
    refs = tuple(EpisodeRef(str(path), n, *bound, total) for n, (bound, total) in enumerate(zip(bounds, totals)))
    warnings += environment_warnings(environment)
    return TaskScan(task, refs, warnings=tuple(f"{name}: {line}" for line in warnings))


def _action(
    log: _Log, environment: EnvironmentSpec | None, options: Options, known: bool
) -> tuple[ActionSpec, tuple[str, ...]]:
    given = (options.action_low, options.action_high) if options.action_low else None
    return action_space(log.arrays["actions"], log.file.attrs, environment, given or (KNOWN if known else None))


def _environment(own: str | None, known: EnvironmentSpec | None, options: Options) -> EnvironmentSpec | None:
    """What the command line says, else what the file says, else what the catalogue knows."""
    if options.environment or own:
        return environment_of_id(options.environment or own or "")
    return known


def _read_episode(log: _Log, task: TaskSpec, ref: EpisodeRef) -> RawEpisode | Rejection:
    def rows(array: Rows) -> np.ndarray:
        return _float32(array[ref.start : ref.stop])

    last = slice(ref.stop - 1, ref.stop)
    try:
        with damage():
            terminated, timeout = bool(log.flags("terminals", last)), log.flags("timeouts", last)
            if timeout is None:
                truncated = not terminated and ref.timesteps == task.max_episode_steps
            else:
                truncated = bool(timeout)
            return RawEpisode(
                observation={key: rows(array) for key, array in log.fields.items()},
                action=log.actions(ref, task),
                reward=rows(log.arrays["rewards"]).reshape(-1),
                terminated=terminated,
                truncated=truncated,
                file=log.path.name,
                position=ref.position,
                row=ref.start,
            )
    except EpisodeError as error:
        return _rejection(task.name, ref, error)


def _float32(values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite, and is refused as such
        return values.astype(np.float32, copy=False)


def _rejection(task: str, ref: EpisodeRef, error: EpisodeError) -> Rejection:
    return Rejection(task, Path(ref.file).name, ref.position, ref.start, error.reason, error.detail)


@cache
def _downloads() -> dict[str, str]:
    """File stem -> dataset id, for the names of D4RL's downloads."""
    return {Path(dataset.url).stem: dataset.id for dataset in _catalogue.d4rl_datasets().values()}
