"""Vintix's trajectories (github.com/dunnolab/vintix): a folder of HDF5 files with a JSON, one task.

TASK/trajectories_*.h5   groups FIRST-LAST of 10,000 steps: proprio_observation (N, D), action (N, A), reward (N,),
                         step_num (N,), which counts within an episode; expert_action and others are not read
TASK/TASK.json           task_name, action_space_type, reward_scale and more
    -> an episode of successive steps, across groups; cut are the last of a file, one that does not begin with the first
       step, and one that is followed by such a one

Episodes of a log of training runs, where every policy from the first to the last has its own.

Invariant: the episodes of a file are disjoint, in order, and cover all its rows.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from itertools import accumulate, pairwise
from pathlib import Path

import h5py
import numpy as np

from etl.sources._arrays import Log, Part, StoredEpisode
from etl.sources._hdf5 import AGAIN
from etl.sources._hdf5_log import HDF5Column, HDF5Log, HDF5Source, group_of, required
from etl.sources._recognition import MARK, Recognition, below, files_below, first_with, hdf5_keys
from schemas.episode import EpisodeError

ARRAYS = ("proprio_observation", "action", "reward", "step_num")
MOST_ROWS = 2**28
_GROUP = re.compile(r"(\d{1,12})-(\d{1,12})")


class Vintix(HDF5Source):
    """Source of Vintix's trajectories."""

    name = "vintix"
    suffixes = (".h5",)
    what = ".h5 file of trajectories"
    hub = "OWNER/NAME/ant_v4"
    fetch = "download a task's folder (the README of github.com/dunnolab/vintix says from where)"

    def recognise(self, input: Path) -> Recognition | None:
        """By groups FIRST-LAST."""
        for path in first_with(files_below(input), *self.suffixes):
            keys = hdf5_keys(path)
            if keys and all(map(_GROUP.fullmatch, keys)):
                return Recognition(f"{below(input, path)} has groups such as {keys[0]}", MARK)
        return None

    def tasks(self, files: list[Path]) -> dict[str, list[Path]]:
        """A task per folder, named by it."""
        named: dict[str, list[Path]] = {}
        for path in sorted(map(Path, files)):
            named.setdefault(path.parent.name, []).append(path)
        return dict(sorted(named.items()))

    def open(self, place: str) -> Log:
        return _Trajectory(Path(place))


SOURCE = Vintix()


class _Trajectory(HDF5Log):
    """One file: the rows of its groups, one after the other."""

    def __init__(self, path: Path):
        super().__init__(path)
        try:
            names = sorted((key for key in self.file if _GROUP.fullmatch(key)), key=lambda key: int(key.split("-")[0]))
            if not names:
                raise EpisodeError("empty", f"no group FIRST-LAST in it; {AGAIN}")
            self.arrays = {key: _Joined([_in(self.file, name, key) for name in names]) for key in ARRAYS}
            rows = self.arrays["step_num"].shape[0]
            if rows > MOST_ROWS:
                raise EpisodeError("too large", f"{rows} rows, more than {MOST_ROWS}; split the file")
            for key, array in self.arrays.items():
                if array.shape[0] != rows:
                    raise EpisodeError("wrong length", f"'{key}' has {array.shape[0]} rows, 'step_num' {rows}; {AGAIN}")
            self.bounds, late = self._episodes(rows)
            self.cut = {len(self.bounds) - 1, *late, *(n - 1 for n in late)}
            if late:
                count = f"{len(late)} of {len(self.bounds)}"
                self.warnings = (f"{path.name}: {count} pieces do not begin with the first step of an episode, since "
                                 "step_num leaves some out: they and those before them count as cut, without a "
                                 "return; download or record the file again",)  # fmt: skip
        except BaseException:
            self.close()
            raise

    def positions(self) -> Iterable[int]:
        return range(len(self.bounds))

    def episode(self, position: int) -> StoredEpisode:
        start, stop = self.bounds[position]
        seen, action, reward, _ = (Part(self.arrays[key], start, stop) for key in ARRAYS)
        whole = position not in self.cut  # nothing says whether a limit or the environment ended it
        return StoredEpisode(stop - start, {"observation": seen}, action, reward, False, whole, start)

    def _episodes(self, rows: int) -> tuple[list[tuple[int, int]], list[int]]:
        """Rows of each episode, and the positions of those that lack their first steps."""
        numbers = self.arrays["step_num"]
        if numbers.dtype.kind not in "fiu" or int(np.prod(numbers.shape)) != rows:
            raise EpisodeError("wrong dtype", f"'step_num' is {numbers.dtype} {numbers.shape}, expected integers; "
                               f"{AGAIN}")  # fmt: skip
        starts: list[int] = []
        steps: list[float] = []  # of the rows at `starts`
        before = -1.0
        for first, part in numbers.parts():
            own = part.reshape(-1).astype(np.float64)
            at = np.flatnonzero((np.diff(own, prepend=before) != 1) | (own == 0))
            starts, steps = starts + (first + at).tolist(), steps + own[at].tolist()
            before = own[-1] if len(own) else before
        if not rows:
            return [], []
        begins = min(steps)  # 0, or 1 where steps are counted from there
        return list(pairwise([*starts, rows])), [n for n, step in enumerate(steps) if step != begins]


class _Joined:
    """Arrays of successive groups as one."""

    def __init__(self, columns: list[HDF5Column]):
        self.columns = columns
        shapes = {tuple(column.shape[1:]) for column in columns}
        if len(shapes) > 1 or len({column.dtype for column in columns}) > 1:
            raise EpisodeError("wrong shape", f"groups of unequal arrays, {sorted(shapes)[:3]}; {AGAIN}")
        self.stops = list(accumulate(column.shape[0] for column in columns))
        self.shape = (self.stops[-1], *columns[0].shape[1:])
        self.dtype: np.dtype = columns[0].dtype
        self.opened = range(0)  # groups of which a band may be in memory

    def parts(self) -> Iterable[tuple[int, np.ndarray]]:
        """(first row, rows) of each group."""
        for column, stop in zip(self.columns, self.stops):
            yield stop - column.shape[0], column[: column.shape[0]]
            column.rows = None  # a band of every group would be all of the file

    def __getitem__(self, rows: slice, /) -> np.ndarray:
        start, stop, _ = rows.indices(self.shape[0])
        groups = range(bisect_right(self.stops, start), bisect_left(self.stops, stop) + 1)
        for number in set(self.opened).difference(groups):
            self.columns[number].rows = None
        self.opened = groups
        found = []
        for number in groups:
            column = self.columns[number]
            first = self.stops[number] - column.shape[0]
            found.append(column[max(0, start - first) : stop - first])
        return found[0] if len(found) == 1 else np.concatenate(found or [self.columns[0][:0]])


def _in(file: h5py.File, name: str, key: str) -> HDF5Column:
    return HDF5Column(required(group_of(file, name), key))
