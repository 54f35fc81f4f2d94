"""d3rlpy's HDF5 (d3rlpy.readthedocs.io), one file one task.

v2.1  `version`, `columns`, `num_episodes`; observations_N (observations_N_J for tuples), actions_N, rewards_N,
      terminated_N: a bool per episode
v1    observations, actions, rewards, terminals (rows of all episodes) and episode_terminals, their last rows
    -> an episode each; one that d3rlpy calls not terminated was ended by its limit, or by the log

Actions are of any range, or integers (discrete_action in v1). v2.0 is obsolete to d3rlpy itself, and refused. Before
1.0 (no `version`) a row's reward was that of the action one row before: --reward-row next pairs them so.

Invariant: the episodes of a v1 file are disjoint, in order, and cover all its rows.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from etl.sources import _hdf5
from etl.sources._arrays import ArrayOptions, Log, Part, StoredEpisode, names_of, path_of
from etl.sources._hdf5 import AGAIN, Dataset
from etl.sources._hdf5_log import HDF5Column, HDF5Log, HDF5Source, few, last_flag, required
from etl.sources._recognition import MARK, Recognition, below, files_below, first_with, hdf5_keys
from schemas.episode import EpisodeError

MOST_ROWS = 2**26
MOST_EPISODES = 2**22
SAMPLED = 64  # episodes whose first reward is looked at
KNOWN_VERSION = "2.1"
_ACTIONS = re.compile(r"actions_(0|[1-9]\d{0,8})")


@dataclass(frozen=True)
class Options(ArrayOptions):
    """Options for reading d3rlpy's files."""

    reward_row: str = "same"
    """In which row of a v1 file an action's reward is: its own (same), or the next one, as d3rlpy had it before 1.0;
    then the last row of an episode, which no reward follows, is left out."""

    def check(self) -> None:
        super().check()
        if self.reward_row not in ("same", "next"):
            raise ValueError(f"--reward-row {self.reward_row}: give same or next")


class D3rlpy(HDF5Source):
    """Source of d3rlpy's HDF5 files, v1 and v2.1."""

    name = "d3rlpy"
    options = Options
    suffixes = (".h5", ".hdf5")
    keys = ("reward_row",)
    what = ".h5 file"
    hub = "OWNER/NAME"
    fetch = "save one with ReplayBuffer.dump or MDPDataset.dump"

    def recognise(self, input: Path) -> Recognition | None:
        """By the keys of v2.1, or v1's episode_terminals."""
        for path in first_with(files_below(input), *self.suffixes):
            keys = set(hdf5_keys(path))
            for marks in ({"columns", "num_episodes", "version"}, {"episode_terminals", "observations", "actions"}):
                if marks <= keys:
                    return Recognition(f"{below(input, path)} has keys {', '.join(sorted(marks))}", MARK)
        return None

    def open(self, place: str) -> Log:
        path, given = path_of(place), names_of(place)
        file = _hdf5.opened(path)
        known = "num_episodes" in file or any(map(_ACTIONS.fullmatch, file))
        file.close()
        return _V2(path) if known else _V1(path, given.get("reward_row") == "next")


SOURCE = D3rlpy()


class _V2(HDF5Log):
    """A file of v2.1: the arrays of each episode have its number."""

    def __init__(self, path: Path):
        super().__init__(path)
        try:
            version = _scalar(self.file, "version")
            version = version.decode(errors="replace") if isinstance(version, bytes) else version
            if version is not None and str(version) != KNOWN_VERSION:
                raise EpisodeError("wrong version", f"d3rlpy's dataset version {str(version)[:20]}, {KNOWN_VERSION} is "
                                   "read; load and dump it with d3rlpy 2.1 or later")  # fmt: skip
            count = _scalar(self.file, "num_episodes")
            if not isinstance(count, int | np.integer) or not 0 <= int(count) <= MOST_EPISODES:
                raise EpisodeError("missing key", f"no number in 'num_episodes'; {AGAIN}")
            self.count = int(count)
        except BaseException:
            self.close()
            raise

    def positions(self) -> Iterable[int]:
        return range(self.count)

    def episode(self, position: int) -> StoredEpisode:
        actions = required(self.file, f"actions_{position}")
        T = len(actions)
        key = f"observations_{position}"
        observation: dict[str, Any] = {}
        if (seen := _hdf5.dataset(self.file, key)) is not None:
            observation["observation"] = HDF5Column(seen)
        else:
            while (node := _hdf5.dataset(self.file, f"{key}_{len(observation)}")) is not None:
                observation[str(len(observation))] = HDF5Column(node)
        if not observation:
            raise EpisodeError("missing key", f"no array '{key}' in it; there are {few(self.file)}; {AGAIN}")
        _equal(observation, T)
        terminated = _flag(self.file, f"terminated_{position}")
        if terminated is None:
            raise EpisodeError("missing key", f"no 'terminated_{position}' in it; {AGAIN}")
        reward = HDF5Column(required(self.file, f"rewards_{position}"))
        return StoredEpisode(T, observation, HDF5Column(actions), reward, bool(terminated), not terminated)


class _V1(HDF5Log):
    """A file of v1: rows of all episodes."""

    def __init__(self, path: Path, late: bool):
        super().__init__(path)
        self.late = int(late)
        try:
            keys = ("observations", "actions", "rewards", "terminals")
            self.arrays = {key: HDF5Column(required(self.file, key)) for key in keys}
            rows = self.arrays["observations"].shape[0]
            if rows > MOST_ROWS:
                raise EpisodeError("too large", f"{rows} rows, more than {MOST_ROWS}; split the file")
            if rows == 0:
                raise EpisodeError("empty", f"no row in 'observations'; {AGAIN}")
            _equal(self.arrays, rows)
            node = _hdf5.dataset(self.file, "episode_terminals")
            flags = HDF5Column(node) if node is not None else self.arrays["terminals"]
            if flags.dtype.kind not in "fiub" or flags.node.size != rows:
                raise EpisodeError("wrong shape", f"'episode_terminals' is {flags.dtype} {flags.shape}, expected "
                                   f"({rows},); {AGAIN}")  # fmt: skip
            ends = np.flatnonzero(flags[:rows].reshape(rows)) + 1
            self.unclosed = not len(ends) or int(ends[-1]) < rows
            self.bounds = list(pairwise([0, *ends.tolist(), *([rows] if self.unclosed else [])]))
            if node is None:
                self.warnings = ("no 'episode_terminals' in it: an episode is taken to end at terminals only; dump it "
                                 "again with d3rlpy if some ended by a limit",)  # fmt: skip
            if _scalar(self.file, "discrete_action") and self.arrays["actions"].dtype.kind == "f":
                self.arrays["actions"] = _Choices(self.arrays["actions"].node)
            if _scalar(self.file, "version") is None and not late:
                self.warnings += (self._unversioned(),)
        except BaseException:
            self.close()
            raise

    def positions(self) -> Iterable[int]:
        return range(len(self.bounds))

    def episode(self, position: int) -> StoredEpisode:
        start, stop = self.bounds[position]
        terminated = last_flag(self.arrays["terminals"], stop, "terminals")
        cut = self.unclosed and position + 1 == len(self.bounds)
        seen, action = (Part(self.arrays[key], start, stop) for key in ("observations", "actions"))
        reward, T = Part(self.arrays["rewards"], start + self.late, stop), stop - start - self.late
        return StoredEpisode(T, {"observation": seen}, action, reward, terminated, not terminated and not cut, start)

    def _unversioned(self) -> str:
        """Note for a file that may be older than 1.0: only then all episodes begin with a reward of 0."""
        rewards = self.arrays["rewards"]
        sample = self.bounds[:: max(1, len(self.bounds) // SAMPLED)]
        zero = sum(not np.any(rewards[start : start + 1]) for start, _ in sample)
        line = (
            "no 'version' in it: d3rlpy before 1.0 wrote an action's reward into the row after it. The first reward of"
        )
        return f"{line} {zero} of {len(sample)} episodes looked at is 0; if all are, give --reward-row next"


class _Choices(HDF5Column):
    """Discrete actions that were recorded as floats."""

    def __init__(self, node: Dataset):
        super().__init__(node)
        self.dtype = np.dtype(np.int64)

    def __getitem__(self, rows: slice, /) -> np.ndarray:
        values = super().__getitem__(rows)
        if not (np.isfinite(values) & (values == np.rint(values))).all():
            raise EpisodeError("wrong dtype", f"'actions' holds fractions, and 'discrete_action' is set; {AGAIN}")
        return values.astype(np.int64)


def _equal(arrays: Mapping[str, HDF5Column], rows: int) -> None:
    for key, array in arrays.items():
        if array.shape[0] != rows:
            raise EpisodeError("wrong length", f"'{key}' has {array.shape[0]} rows, expected {rows}; {AGAIN}")


def _flag(file: h5py.File, key: str) -> Any:
    """A dataset of a single truth value; None where there is none. A byte is read as it is stored: h5py spends more on
    the type of a bool than on all else of an episode."""
    node = _hdf5.member(file, key) if _hdf5.holds(file, key) else None
    if isinstance(node, Dataset) and node.plain and node.id.get_storage_size() == 1:
        kind = node.id.get_type()
        if kind.get_class() in (h5py.h5t.ENUM, h5py.h5t.INTEGER) and kind.get_size() == node.size == 1:
            byte = np.empty(node.shape, np.uint8)
            node.id.read(h5py.h5s.ALL, h5py.h5s.ALL, byte, kind)
            return bool(byte)
    return _scalar(file, key)


def _scalar(file: h5py.File, key: str) -> Any:
    """A dataset of a single value; None where there is none."""
    node = _hdf5.member(file, key) if _hdf5.holds(file, key) else None
    if not isinstance(node, Dataset) or node.size != 1 or node.dtype.kind not in "fiubOS":
        return None
    if node.elsewhere:
        return None
    value = node.read()
    return np.ravel(value)[0] if node.shape else value
