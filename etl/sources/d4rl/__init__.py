"""D4RL's HDF5 logs (arXiv 2004.07219): one file, one task.

observations (N, D), actions (N, A), rewards (N,) or (N, 1), terminals (N,), timeouts (N,) if there are any
    -> episodes: rows up to and with one where terminals or timeouts is set

Without `timeouts` (v0 files) a trajectory ends at a terminal or at the time limit. Rows behind the last end are an
episode too, cut by the log. The mazes' `infos/goal` (N, G), which their observations leave out, is a field of its
own, before `observation`; the kitchen's goal is a part of its observations; other `infos` and `metadata` are not
read. `scan` reads flags, rewards and shapes; `read` slices one episode at a time. How the bytes are read, and what
becomes of damaged ones, is in etl/sources/_hdf5.py.

Invariant: the episodes of a file are disjoint, in order, and cover all its rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache
from itertools import groupby, pairwise
from pathlib import Path

import h5py
import numpy as np

from etl.fetch.download import fetch
from etl.sources import EpisodeRef, Known, Rejection, ScanOptions, SourceError, TaskScan, _catalogue, _hdf5, by_task
from etl.sources._hdf5 import AGAIN, Rows, damage
from schemas.episode import ActionSpec, EnvironmentSpec, EpisodeError, FieldSpec, RawEpisode, TaskSpec

SUFFIXES = (".hdf5", ".h5")
REQUIRED = ("observations", "actions", "rewards", "terminals")
GOAL = "infos/goal"
WIDEST = 2**16  # values a timestep: more is damage, and would not fit any context
LONGEST = 2**16  # timesteps an episode: a log without any end is cut here, so that memory stays bounded
ALL = slice(None)
MOST_ROWS = 2**24  # D4RL's longest have 2M: flags and rewards are held whole


class D4RL:
    """Source of D4RL HDF5 files, D4RL's own or written in its layout."""

    name = "d4rl"
    default_dataset = "hopper-medium-v2"

    def known(self, cache: Path) -> list[Known]:
        """D4RL's own datasets."""
        rows = []
        for one in _catalogue.d4rl_datasets().values():
            file = cache / self.name / one.url.rsplit("/", 1)[-1]
            environment = one.environment.id if one.environment else "-"
            rows.append(Known(one.id, environment, one.url, file if file.is_file() else None))
        return rows

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

    def scan(self, files: list[Path], options: ScanOptions) -> list[TaskScan]:
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
    """Row behind each episode's last one, ascending, the final one is N. terminals, timeouts: (N,) bool;
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
            if dtype.kind not in ("f" if matrix else "fiub"):
                raise EpisodeError("wrong dtype", f"'{key}' is {dtype}; record it as float32")
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


def _scan_file(name: str, path: Path, options: ScanOptions) -> TaskScan:
    known = _catalogue.d4rl_datasets().get(name)
    try:
        log = _Log(path)
        with log.file, damage():
            environment = _environment(log.environment(), known.environment if known else None, options)
            limit = options.max_episode_steps or (known.max_episode_steps if known else None)
            if limit is None and environment is not None:
                limit = _catalogue.time_limit(environment.id)
            terminals, timeouts = log.flags("terminals"), log.flags("timeouts")
            assert terminals is not None  # a required key
            if limit is None and timeouts is None:
                raise EpisodeError("no time limit", "no 'timeouts', and no known time limit; give --max-episode-steps")
            bounds = list(pairwise([0, *episode_stops(terminals, timeouts, limit)]))
            totals = log.totals(bounds)
    except EpisodeError as error:
        return TaskScan(None, (), (_rejection(name, EpisodeRef(str(path), -1, 0, 0), error),))
    fields = tuple(FieldSpec(key, "continuous", rows.shape[1:]) for key, rows in sorted(log.fields.items()))
    score = known.score if known else _catalogue.body_reference(environment.id) if environment else None
    task = TaskSpec(
        name,
        D4RL.name,
        fields,
        ActionSpec("continuous", log.arrays["actions"].shape[1]),
        environment,
        score,
        limit or max(stop - start for start, stop in bounds),
    )
    refs = tuple(EpisodeRef(str(path), n, *bound, total) for n, (bound, total) in enumerate(zip(bounds, totals)))
    return TaskScan(task, refs)


def _environment(own: str | None, known: EnvironmentSpec | None, options: ScanOptions) -> EnvironmentSpec | None:
    """What the file says, else what the catalogue knows, else what the command line says; of the old gym's
    environments, which nothing else names, the command line has the first word."""
    if options.environment and _catalogue.is_old(options.environment):
        return _catalogue.environment(options.environment)
    if own is not None:
        return _catalogue.environment(own)
    if known is None and options.environment:
        return _catalogue.environment(options.environment)
    return known


def _read_episode(log: _Log, task: TaskSpec, ref: EpisodeRef) -> RawEpisode | Rejection:
    def rows(array: Rows) -> np.ndarray:
        with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite, and is refused as such
            return array[ref.start : ref.stop].astype(np.float32, copy=False)

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
                action=rows(log.arrays["actions"]),
                reward=rows(log.arrays["rewards"]).reshape(-1),
                terminated=terminated,
                truncated=truncated,
                file=log.path.name,
                position=ref.position,
                row=ref.start,
            )
    except EpisodeError as error:
        return _rejection(task.name, ref, error)


def _rejection(task: str, ref: EpisodeRef, error: EpisodeError) -> Rejection:
    return Rejection(task, Path(ref.file).name, ref.position, ref.start, error.reason, error.detail)


@cache
def _downloads() -> dict[str, str]:
    """File stem -> dataset id, for the names of D4RL's downloads."""
    return {Path(dataset.url).stem: dataset.id for dataset in _catalogue.d4rl_datasets().values()}
