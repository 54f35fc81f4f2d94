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
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise
from pathlib import Path

import h5py
import numpy as np

from etl.sources import _hdf5
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


@dataclass(frozen=True)
class _Outline:
    """Contents of a file. `names`: its groups, by their first step; `arrays`: key -> row after the last of each group,
    shape of a row, dtype; `bounds`: rows of each episode; `late`: positions of those that lack their first steps."""

    names: list[str]
    arrays: dict[str, tuple[list[int], tuple[int, ...], np.dtype]]
    bounds: list[tuple[int, int]]
    late: list[int]


@lru_cache(maxsize=1)
def _outline(path: Path, size: int, changed: int) -> _Outline:
    """Of a file of that size, last changed then: all shards of it need the same. EpisodeError says what is wrong."""
    with _hdf5.opened(path) as file:
        names = sorted((key for key in file if _GROUP.fullmatch(key)), key=lambda key: int(key.split("-")[0]))
        if not names:
            raise EpisodeError("empty", f"no group FIRST-LAST in it; {AGAIN}")
        groups = [{key: required(group, key) for key in ARRAYS} for group in (group_of(file, name) for name in names)]
        arrays = {}
        for key in ARRAYS:
            nodes = [group[key] for group in groups]
            shapes, dtypes = {node.shape[1:] for node in nodes}, {node.dtype for node in nodes}
            if len(shapes) > 1 or len(dtypes) > 1:
                raise EpisodeError("wrong shape", f"groups of unequal arrays, {sorted(shapes)[:3]}; {AGAIN}")
            arrays[key] = list(accumulate(map(len, nodes))), shapes.pop(), dtypes.pop()
        rows = arrays["step_num"][0][-1]
        if rows > MOST_ROWS:
            raise EpisodeError("too large", f"{rows} rows, more than {MOST_ROWS}; split the file")
        for key, (stops, _, _) in arrays.items():
            if stops[-1] != rows:
                raise EpisodeError("wrong length", f"'{key}' has {stops[-1]} rows, 'step_num' {rows}; {AGAIN}")
        return _Outline(names, arrays, *_episodes([HDF5Column(group["step_num"]) for group in groups], rows))


def _episodes(columns: list[HDF5Column], rows: int) -> tuple[list[tuple[int, int]], list[int]]:
    """Rows of each episode, and the positions of those that lack their first steps; `columns`: step_num of each
    group, `rows` in all."""
    starts: list[int] = []
    steps: list[float] = []  # of the rows at `starts`
    before, first = -1.0, 0
    for column in columns:
        if column.dtype.kind not in "fiu" or column.node.size != len(column.node):
            raise EpisodeError("wrong dtype", f"'step_num' is {column.dtype} {column.shape}, expected integers; "
                               f"{AGAIN}")  # fmt: skip
        own = column[:].reshape(-1).astype(np.float64)
        column.rows = None  # a band of every group would be all of the file
        at = np.flatnonzero((np.diff(own, prepend=before) != 1) | (own == 0))
        starts, steps = starts + (first + at).tolist(), steps + own[at].tolist()
        before, first = own[-1] if len(own) else before, first + len(own)
    if not rows:
        return [], []
    begins = min(steps)  # 0, or 1 where steps are counted from there
    return list(pairwise([*starts, rows])), [n for n, step in enumerate(steps) if step != begins]


class _Trajectory(HDF5Log):
    """One file: the rows of its groups, one after the other."""

    def __init__(self, path: Path):
        super().__init__(path)
        try:
            status = path.stat()
            outline = _outline(path, status.st_size, status.st_mtime_ns)
        except BaseException:
            self.close()
            raise
        self.bounds, late = outline.bounds, outline.late
        self.arrays = [_Joined(self.file, key, outline) for key in ARRAYS[:-1]]
        self.cut = {len(self.bounds) - 1, *late, *(n - 1 for n in late)}
        if late:
            count = f"{len(late)} of {len(self.bounds)}"
            self.warnings = (f"{path.name}: {count} pieces do not begin with the first step of an episode, since "
                             "step_num leaves some out: they and those before them count as cut, without a "
                             "return; download or record the file again",)  # fmt: skip

    def positions(self) -> Iterable[int]:
        return range(len(self.bounds))

    def episode(self, position: int) -> StoredEpisode:
        start, stop = self.bounds[position]
        seen, action, reward = (Part(array, start, stop) for array in self.arrays)
        whole = position not in self.cut  # nothing says whether a limit or the environment ended it
        return StoredEpisode(stop - start, {"observation": seen}, action, reward, False, whole, start)


class _Joined:
    """Arrays of successive groups as one. A group is opened when its rows are asked for, and left when others are."""

    def __init__(self, file: h5py.File, key: str, outline: _Outline):
        self.file, self.key, self.names = file, key, outline.names
        self.stops, shape, dtype = outline.arrays[key]
        self.shape, self.dtype = (self.stops[-1], *shape), dtype
        self.opened: dict[int, HDF5Column] = {}

    def __getitem__(self, rows: slice, /) -> np.ndarray:
        start, stop, _ = rows.indices(self.shape[0])
        groups = range(bisect_right(self.stops, start), bisect_left(self.stops, stop) + 1)
        self.opened = {number: self.opened.get(number) or self._column(number) for number in groups}
        found = []
        for number, column in self.opened.items():
            first = self.stops[number - 1] if number else 0
            found.append(column[max(0, start - first) : stop - first])
        return found[0] if len(found) == 1 else np.concatenate([np.empty((0, *self.shape[1:]), self.dtype), *found])

    def _column(self, number: int) -> HDF5Column:
        return HDF5Column(required(group_of(self.file, self.names[number]), self.key))
