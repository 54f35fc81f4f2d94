"""HDF5 and .npz files of robot and pixel logs: an episode per file, or a few; the files of a folder are one task.

ALOHA     observations/{qpos,qvel,images/CAM}, action
V-D4RL    .npz: image, action, reward, is_first, is_last, is_terminal; .hdf5: observation, action, reward, step_type
OGBench   .npz: observations, actions, terminals; NAME-val.npz is held out
others    --action-key, --observation-keys, --reward-key, --terminal-key name the arrays

    file -> arrays by path -> keys -> rows of each episode -> StoredEpisode

In logs of dm_env and Dreamer (`step_type`, `is_first`) the action of a row is the one that led to it: action and
reward are taken from the row after. Where a log has terminals and neither rewards nor timeouts (OGBench), the last row
of a trajectory is the state after the last action.

Invariant: what a file's rows mean is a function of the file and of the keys in its place.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from etl.sources import _hdf5
from etl.sources._arrays import ArrayOptions, ArraySource, Column, Log, Part, StoredEpisode, names_of, path_of
from etl.sources._hdf5 import AGAIN
from etl.sources._hdf5_log import columns
from etl.sources._npz import Npz
from etl.sources._recognition import FALLBACK, LAYOUT, Recognition, below, files_below, first_with, hdf5_keys
from schemas.episode import EpisodeError

ACTION, REWARD = ("action", "actions"), ("reward", "rewards")
TERMINAL = ("is_terminal", "terminal", "terminals", "terminated", "terminations", "dones", "done")
TIMEOUT = ("timeout", "timeouts", "truncated", "truncations")
ROOTS = ("observations", "observation", "obs")
OTHER = {"is_first", "is_last", "step_type", "discount", "step_num", *ACTION, *REWARD, *TERMINAL, *TIMEOUT}
HELD_OUT = "-val"
MOST_ROWS = 2**24


@dataclass(frozen=True)
class Options(ArrayOptions):
    """Options for reading such files."""

    action_key: str = ""
    """Array of the actions; action or actions where not given."""
    reward_key: str = ""
    """Array of the rewards; reward or rewards where not given, zeros where there is none."""
    terminal_key: str = ""
    """Flags of the rows in which the environment ended an episode."""
    action_row: str = "auto"
    """Whether a row's action follows its observation (same) or led to it (previous); auto: previous in logs with
    step_type or is_first."""

    def check(self) -> None:
        super().check()
        if self.action_row not in ("auto", "same", "previous"):
            raise ValueError(f"--action-row {self.action_row}: give auto, same or previous")


class HDF5(ArraySource):
    """Source of HDF5 and .npz files of an episode each (ALOHA, V-D4RL, OGBench)."""

    name = "hdf5"
    options = Options
    suffixes = (".hdf5", ".h5", ".npz")
    keys = ("action_key", "reward_key", "terminal_key", "action_row")
    what = ".hdf5, .h5 or .npz file"
    hub = "OWNER/NAME"
    fetch = "download the files"

    def recognise(self, input: Path) -> Recognition | None:
        """By ALOHA's and V-D4RL's keys in HDF5, and by files of numpy; by other keys where flags show the episodes."""
        files = files_below(input)
        for path in first_with(files, ".hdf5", ".h5"):
            keys = hdf5_keys(path)
            flagged = all({*group} & {*keys} for group in (ACTION, REWARD, (*TERMINAL, *TIMEOUT)))
            if {*ROOTS} & {*keys} and ("action" in keys or flagged):
                certainty = LAYOUT if "action" in keys else FALLBACK
                return Recognition(f"{below(input, path)} has keys {', '.join(keys[:6])}", certainty)
        for path in first_with(files, ".npz"):
            names = _npz_keys(path)
            if set(ACTION) & set(names):
                return Recognition(f"{below(input, path)} has arrays {', '.join(names[:6])}", LAYOUT)
        return None

    def tasks(self, files: list[Path]) -> dict[str, list[Path]]:
        """A task per folder, named by it; NAME.npz with NAME-val.npz beside it is one of its own."""
        files = sorted(map(Path, files))
        stems = {path.with_suffix("") for path in files}
        common = Path(os.path.commonpath([path.parent for path in files])) if files else Path()
        named: dict[str, list[Path]] = {}
        for path in files:
            stem = path.with_suffix("")
            main = stem.with_name(stem.name.removesuffix(HELD_OUT))
            paired = main in stems and main.with_name(main.name + HELD_OUT) in stems
            folder = path.parent.relative_to(common).parts or (common.name,)
            name = main.name if paired else stem.name if len(files) == 1 else "-".join(folder)
            named.setdefault(name, []).append(path)
        return dict(sorted(named.items()))

    def tried(self, files: list[Path]) -> Mapping[Path, EpisodeError]:
        return _hdf5.tried(path for path in files if path.suffix.lower() != ".npz")

    def open(self, place: str) -> Log:
        return _FileLog(path_of(place), names_of(place))


SOURCE = HDF5()


class _FileLog(Log):
    """The arrays of one file, and the rows of each of its episodes."""

    def __init__(self, path: Path, given: dict[str, str]):
        self.file: Any = Npz(path) if path.suffix.lower() == ".npz" else _hdf5.opened(path)
        try:
            self._read_keys(given)
        except BaseException:
            self.close()
            raise
        if path.with_suffix("").name.endswith(HELD_OUT):
            self.held_out = dict.fromkeys(range(len(self.bounds)), True)

    def positions(self) -> Iterable[int]:
        return range(len(self.bounds))

    def episode(self, position: int) -> StoredEpisode:
        start, stop = self.bounds[position]
        shift = int(self.previous)
        T = stop - start - max(shift, self.final_row)
        ended, cut = self._ends(stop)
        observation = {key: Part(column, start, stop) for key, column in self.observation.items()}
        action = Part(self.action, start + shift, stop)
        reward = None if self.reward is None else Part(self.reward, start + shift, stop)
        return StoredEpisode(T, observation, action, reward, ended, cut and not ended, start)

    def close(self) -> None:
        self.file.close()

    def _read_keys(self, given: dict[str, str]) -> None:
        self.arrays: dict[str, Any] = dict(self.file.columns if isinstance(self.file, Npz) else columns(self.file))
        self.action: Any = self._named("action", given.get("action_key"), ACTION)
        if self.action is None:
            raise EpisodeError("missing key", f"no array '{ACTION[0]}' or '{ACTION[1]}'; there are {self._few()}: name "
                               "it by --action-key")  # fmt: skip
        self.reward = self._named("reward", given.get("reward_key"), REWARD)
        self.terminal = self._named("terminal", given.get("terminal_key"), TERMINAL)
        rows = self.action.shape[0]
        if rows > MOST_ROWS:
            raise EpisodeError("too large", f"{rows} rows, more than {MOST_ROWS}; split the file")
        self.observation = self._observation(rows)
        self.notes = self._unread(rows)
        first, step_type = (self._flags(key, rows) for key in ("is_first", "step_type"))
        how = given.get("action_row", "auto")
        begins = first if step_type is None else step_type == 0
        self.previous = how == "previous" or (how == "auto" and begins is not None)
        terminal, timeout = self._flags(self.terminal, rows), self._flags(self._named("", None, TIMEOUT), rows)
        if begins is None:
            ends = np.zeros(rows, bool)
            for flags in (terminal, timeout):
                ends |= False if flags is None else flags.astype(bool)
            starts = np.flatnonzero(ends) + 1
        else:
            starts = np.flatnonzero(begins)
        inner = [int(row) for row in starts if 0 < row < rows]
        self.bounds = list(pairwise([0, *inner, rows]))
        states = self.reward is None and terminal is not None and timeout is None and bool(inner)
        self.final_row = int(not self.previous and states)
        self.flags = {"terminal": terminal, "timeout": timeout, "step_type": step_type}
        self.flags |= {key: self._flags(key, rows) for key in ("is_last", "discount")}
        if self.previous and how == "auto":
            self.notes += ("a row's action and reward are taken from the row after it, as dm_env and Dreamer log "
                           "them; --action-row same takes them as they are",)  # fmt: skip

    def _named(self, role: str, given: str | None, known: tuple[str, ...]) -> Any:
        if given and given not in self.arrays:
            raise EpisodeError("missing key", f"no array '{given}'; there are {self._few()}: give another --{role}-key")
        name = given or next((name for name in known if name in self.arrays), None)
        return self.arrays[name] if name else None

    def _observation(self, rows: int) -> dict[str, Column]:
        """Arrays below the first of ROOTS, by their path below it; else all others of as many rows."""
        for root in ROOTS:
            if root in self.arrays:
                return {"observation": self.arrays[root]}
            inside = {k.removeprefix(f"{root}/"): v for k, v in self.arrays.items() if k.startswith(f"{root}/")}
            if inside:
                return inside
        return self._rest(rows, ())

    def _rest(self, rows: int, observed: Iterable[Column]) -> dict[str, Column]:
        """Arrays of as many rows, by path, that are neither `observed` nor have a part of their own."""
        used = {id(one) for one in (self.action, self.reward, self.terminal, *observed)}
        return {
            key: column
            for key, column in self.arrays.items()
            if key not in OTHER and id(column) not in used and column.shape and column.shape[0] in (rows, rows + 1)
        }

    def _unread(self, rows: int) -> tuple[str, ...]:
        """A line that names arrays of one value or more per row that mean nothing here."""
        left = list(self._rest(rows, self.observation.values()))
        remedy = "--action-key, --reward-key and --terminal-key name those of other names"
        return (f"arrays that are not read: {', '.join(left[:8])}; {remedy}",) if left else ()

    def _flags(self, array: Any, rows: int) -> np.ndarray | None:
        """(rows,) numbers of an array, or of the one of that name; None where there is none."""
        column = self.arrays.get(array) if isinstance(array, str) else array
        if column is None:
            return None
        if column.dtype.kind not in "fiub" or int(np.prod(column.shape)) != rows:
            given = f"{column.dtype} {column.shape}"
            raise EpisodeError("wrong shape", f"flags are {given}, expected one for each of {rows} rows; {AGAIN}")
        return column[:rows].reshape(rows)

    def _ends(self, stop: int) -> tuple[bool, bool]:
        """(terminated, truncated) of the episode whose rows end at `stop`."""
        last = {key: None if values is None else values[stop - 1] for key, values in self.flags.items()}
        if self.final_row:  # a trajectory's end, which no environment declared
            return False, bool(last["terminal"])
        terminal = bool(last["terminal"])
        if last["terminal"] is None and last["discount"] is not None and self.previous:
            terminal = last["discount"] == 0
        cut = bool(last["timeout"]) or bool(last["is_last"]) or last["step_type"] == 2
        unmarked = all(last[key] is None for key in ("terminal", "timeout", "is_last", "step_type"))
        return terminal, cut or unmarked  # without any flag, the file's end is taken for the episode's

    def _few(self) -> str:
        return ", ".join(list(self.arrays)[:8]) or "none"


def _npz_keys(path: Path) -> list[str]:
    try:
        file = Npz(path)
    except EpisodeError:
        return []
    file.close()
    return list(file.columns)
