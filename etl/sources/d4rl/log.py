"""One HDF5 file in D4RL's layout: its arrays checked, its episodes found.

file -> `Log`: arrays by key -> flags, seams and jumps of its rows -> `split`; layouts of its pictures; actions, returns

Invariant: what is read has the shape and dtype that was checked, or an EpisodeError says what is wrong with the file.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np

from etl.sources import EpisodeRef, _hdf5
from etl.sources._hdf5 import AGAIN, DAMAGE, Rows, damage
from etl.sources._numbers import as_float32
from etl.sources._oddities import Split, differing, distances, split
from etl.sources._pictures import PictureLayout, picture_layout
from schemas.episode import EpisodeError, TaskSpec

REQUIRED = ("observations", "actions", "rewards", "terminals")
GOAL = "infos/goal"
OPTIONAL = ("timeouts", "episode_terminals", "next_observations", GOAL)
WIDEST = 2**16  # values per timestep: more is damage, and would not fit any context
MOST_ROWS = 2**24  # D4RL's longest have 2M: flags and rewards are held whole
ALL = slice(None)
PIECE = 2**24  # bytes of observations at a time
BLOCK = 16  # rows at a time beside a damaged chunk


class Log:
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
        """Rows where a flag ("terminals", ...) is set, bool; None where the file has no such key."""
        return self.arrays[key][rows].reshape(-1).astype(bool, copy=False) if key in self.arrays else None

    def split(self, limit: int | None) -> Split:
        """Ends of its episodes. EpisodeError where nothing shows them."""
        key = "timeouts" if "timeouts" in self.arrays or "episode_terminals" not in self.arrays else "episode_terminals"
        terminals = self.flags("terminals")
        assert terminals is not None  # a required key
        try:
            return split(terminals, self.flags(key), limit, self, key)
        except ValueError as error:
            raise EpisodeError("no time limit", str(error)) from None

    def seams(self) -> np.ndarray | None:
        """Rows after which the next one is not what they led to; see `_oddities.Evidence`."""
        now, after = self.arrays["observations"], self.arrays.get("next_observations")
        return None if after is None else differing(pieces(now), pieces(after), len(now))

    def jumps(self) -> np.ndarray | None:
        """Distance of each row from the next one; see `_oddities.Evidence`."""
        rows = self.arrays["observations"]
        return None if rows.dtype == np.uint8 else distances(lambda: pieces(rows), len(rows))

    @cached_property
    def unit(self) -> bool:
        """True if pictures that are stored as floats lie in [0, 1], by the first rows."""
        rows = self.arrays["observations"]
        return rows.dtype.kind == "f" and float(np.nanmax(next(pieces(rows)))) <= 1.0

    def layout(self, shape: tuple[int, ...]) -> PictureLayout | None:
        """How a row of observations is a picture of that shape; of its own where () is given, None where it is none."""
        stored = self.arrays["observations"].shape[1:]
        if shape and len(stored) == 1:
            return PictureLayout(stored, (shape[0], shape[1], shape[2]), unit=self.unit)
        return picture_layout(stored, self.arrays["observations"].dtype)

    def actions(self, ref: EpisodeRef, task: TaskSpec) -> np.ndarray:
        """(T, A) float32; discrete ones (T,) int64, of several values (T, A)."""
        values = self.arrays["actions"][ref.start : ref.stop]
        assert task.action is not None
        if task.action.kind == "continuous":
            return as_float32(values, copy=False).reshape(len(values), -1)
        return values.astype(np.int64).reshape((-1,) if task.action.size == 1 else (-1, task.action.size))

    def totals(self, bounds: list[tuple[int, int]]) -> list[float]:
        """Raw return of each episode."""
        rewards = self.arrays["rewards"][:].reshape(-1)
        return np.add.reduceat(rewards, [start for start, _ in bounds], dtype=np.float64).tolist()

    def environment(self) -> str | None:
        """The environment that the file itself names."""
        name = self.file.attrs.get("env_id")
        return name.decode() if isinstance(name, bytes) else name if isinstance(name, str) else None

    def _checked(self) -> dict[str, Rows]:
        arrays: dict[str, Rows] = {}
        for key in (*REQUIRED, *OPTIONAL):
            dataset = _hdf5.dataset(self.file, *key.split("/"))
            if dataset is None and key in REQUIRED:
                raise EpisodeError(
                    "missing key", f"no dataset '{key}' in it; D4RL logs hold {', '.join(REQUIRED)} (and timeouts)"
                )
            if dataset is None or (key == GOAL and not _is_goal(dataset)):
                continue
            shape, dtype, rows = dataset.shape, dataset.dtype, len(arrays["observations"]) if arrays else len(dataset)
            if key == "next_observations":
                if (shape, dtype.kind) == (arrays["observations"].shape, arrays["observations"].dtype.kind):
                    arrays[key] = Rows(dataset)
                continue
            matrix = key in ("observations", "actions", GOAL)
            flat = key == "actions" and len(shape) == 1  # one number each, or one choice
            discrete = key == "actions" and dtype.kind in "iu"
            picture = key == "observations" and dtype == np.uint8 and len(shape) > 1
            if dtype.kind not in ("f" if matrix else "fiub") and not discrete and not picture:
                raise EpisodeError("wrong dtype", f"'{key}' is {dtype}; record it as float32")
            if picture and len(shape) > 2:
                if picture_layout(shape[1:], dtype) is None or math.prod(shape[1:]) > PIECE:
                    raise EpisodeError("wrong shape", f"'{key}' is {shape}; expected pictures (N, H, W, C)")
                arrays[key] = Rows(dataset)
                continue
            matrix = matrix and not flat
            if matrix and (len(shape) != 2 or not 0 < shape[1] <= WIDEST):
                remedy = "; save one number per row as (N, 1)" if len(shape) == 1 else ""
                raise EpisodeError("wrong shape", f"'{key}' is {shape}, expected (N, size){remedy}")
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


def _is_goal(dataset: _hdf5.Dataset) -> bool:
    return dataset.dtype.kind == "f" and dataset.ndim == 2 and 0 < dataset.shape[1] < WIDEST


def pieces(rows: Rows) -> Iterator[np.ndarray]:
    """All rows (n, ...), a bounded number at a time. Damaged ones are NaN, or 0 in bytes: their episodes are rejected
    when they are read."""
    step = max(1, PIECE // max(1, math.prod(rows.shape[1:]) * rows.dtype.itemsize))
    for start in range(0, len(rows), step):
        stop = min(start + step, len(rows))
        try:
            piece = rows[start:stop]
        except DAMAGE:
            piece = np.concatenate([_whole(rows, n, min(n + BLOCK, stop)) for n in range(start, stop, BLOCK)])
        yield piece


def _whole(rows: Rows, start: int, stop: int) -> np.ndarray:
    try:
        return rows[start:stop]
    except DAMAGE:
        return np.full((stop - start, *rows.shape[1:]), np.nan if rows.dtype.kind == "f" else 0, rows.dtype)
