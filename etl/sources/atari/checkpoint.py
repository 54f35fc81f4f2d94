"""The arrays of one checkpoint of a replay buffer: gzipped .npy files in lockstep.

$store$_{observation,action,reward,terminal}_ckpt.N.gz -> Rows: header first, then ranges of rows -> Checkpoint

A process keeps the checkpoint that it reads open from one shard to the next, with points to resume from, so that no
order of shards makes it decompress a file twice.

Invariant: what is returned are rows of the shape that the header says, or an EpisodeError says what is wrong.
"""

from __future__ import annotations

import re
import threading
import tokenize
from pathlib import Path

import numpy as np

from etl.sources import SourceError
from etl.sources._gzip import DAMAGE, Gunzip
from schemas.episode import EpisodeError

ARRAYS = ("action", "reward", "terminal", "observation")
SIDES = range(16, 1025)  # pixels
MOST_ROWS = 2**26  # a checkpoint has 1M
PIECE = 2**18
LITERAL_ERRORS = (ValueError, SyntaxError, TypeError, RecursionError, OverflowError, tokenize.TokenError)
STORE = re.compile(r"\$store\$_(?:action|reward|terminal|observation)_ckpt\.(\d+)\.gz")
AGAIN = "download it again"


class Rows:
    """A gzipped .npy: shape and dtype first, then ranges of rows. EpisodeError says what is wrong."""

    def __init__(self, path: Path):
        self.path = path
        if path.exists() and not path.is_file():
            raise EpisodeError("missing file", f"{path.name} is no file; {AGAIN}")
        try:
            self.file = Gunzip(path)
        except OSError as error:
            raise EpisodeError("missing file", f"{path.name} cannot be opened ({error.strerror}); {AGAIN}") from error
        try:
            self.shape, self.dtype = self._header()
        except EpisodeError:
            self.file.close()
            raise
        self.first = self.file.position
        self.row_bytes = int(np.prod(self.shape[1:], dtype=np.int64)) * self.dtype.itemsize

    def _header(self) -> tuple[tuple[int, ...], np.dtype]:
        try:
            version = np.lib.format.read_magic(self.file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, column_major, dtype = read(self.file)
        except DAMAGE as error:
            raise self._corrupt(error) from error
        except (*LITERAL_ERRORS, MemoryError) as error:
            # numpy evaluates the header as a Python literal
            why = str(error).splitlines()[0][:100] if str(error) else type(error).__name__
            raise EpisodeError("not npy", f"{self.path.name} holds no .npy array ({why}); {AGAIN}") from error
        if dtype.hasobject or (column_major and len(shape) > 1) or any(n < 0 for n in shape):
            raise EpisodeError("not npy", f"{self.path.name} holds {dtype} in an order or form that is not read")
        return shape, dtype

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) as (stop - start, ...)."""
        out = np.empty((stop - start, *self.shape[1:]), self.dtype)
        try:
            self.file.seek(self.first + start * self.row_bytes)
            view = out.data.cast("B") if out.size else memoryview(b"")
            while view:
                count = self.file.readinto(view[:PIECE])
                if not count:
                    raise EOFError(f"ends before row {stop} of {self.shape[0]}")
                view = view[count:]
            if stop == self.shape[0] and self.file.read(1):  # at the end, this is what checks the checksum
                raise OSError("bytes after the last row")
        except DAMAGE as error:
            raise self._corrupt(error) from error
        return out

    def scalar(self) -> np.ndarray:
        """The value of an array without dimensions."""
        self.shape = (1,)
        return self.rows(0, 1)

    def _corrupt(self, error: Exception) -> EpisodeError:
        return EpisodeError("corrupt gzip", f"{self.path.name}: {error}; {AGAIN}")

    def close(self) -> None:
        self.file.close()


_local = threading.local()


def opened(action_file: Path) -> Checkpoint:
    """The checkpoint, kept open by this thread as long as it reads no other one and its files stay as they are."""
    paths = parts(action_file)
    stamp = [(p.stat().st_ino, p.stat().st_size, p.stat().st_mtime_ns) for p in paths if p.is_file()]
    held = getattr(_local, "held", None)
    if held is None or held[:2] != (action_file, stamp):
        if held is not None:
            held[2].close()
        _local.held = held = (action_file, stamp, Checkpoint(action_file))
    return held[2]


class Checkpoint:
    """The arrays of one checkpoint, opened at first use."""

    def __init__(self, action_file: Path):
        self.action_file = action_file
        self.arrays: dict[str, Rows] = {}

    def __getitem__(self, array: str) -> Rows:
        if array not in self.arrays:
            self.arrays[array] = Rows(sibling(self.action_file, f"$store$_{array}"))
        return self.arrays[array]

    def check(self) -> int:
        """Rows of each array. EpisodeError where arrays do not fit together."""
        rows = self["action"].shape[:1]
        kinds = {"action": "iu", "reward": "f", "terminal": "iub", "observation": "u"}
        for array in ARRAYS:
            name, shape, dtype = self[array].path.name, self[array].shape, self[array].dtype
            if dtype.kind not in kinds[array] or (array == "observation" and dtype != np.uint8):
                raise EpisodeError("wrong dtype", f"{name} is {dtype}")
            if array == "observation":
                grey = len(shape) == 3 or shape[3:] == (1,)
                if not ((grey or shape[3:] == (3,)) and shape[1] in SIDES and shape[2] in SIDES):
                    raise EpisodeError("wrong shape", f"{name} is {shape}, expected (N, 84, 84), or RGB (N, H, W, 3)")
            elif len(shape) != 1:
                raise EpisodeError("wrong shape", f"{name} is {shape}, expected (N,)")
            if shape[:1] != rows:
                raise EpisodeError("wrong length", f"{name} has {shape[0]} rows, actions {rows[0]}; {AGAIN}")
        if rows[0] > MOST_ROWS:
            raise EpisodeError("wrong length", f"{rows[0]} rows, more than {MOST_ROWS}; {AGAIN}")
        return rows[0]

    @property
    def frame(self) -> tuple[int, int, int]:
        """(H, W, C)."""
        height, width, *channels = self["observation"].shape[1:]
        return height, width, channels[0] if channels else 1

    def written(self, rows: int) -> int:
        """Rows before the write position: all where the log says nothing of it."""
        count = self._small("add_count")
        if count is not None and count.size == 1:
            value = int(count.reshape(-1)[0])
            return value if 0 <= value < rows else value % rows or rows
        invalid = self._small("invalid_range")
        if invalid is not None and invalid.size > 1 and (np.diff(invalid.reshape(-1)) % rows == 1).all():
            return (int(invalid.reshape(-1)[0]) + 1) % rows or rows  # the range starts one row before the position
        return rows

    def marks_limits(self) -> bool:
        """True if the writer kept the ends of episodes apart from the terminals; the file is a pickle, and not read."""
        return sibling(self.action_file, "episode_end_indices").is_file()

    def _small(self, stem: str) -> np.ndarray | None:
        """One of the few integers beside the arrays, None where the log has none."""
        path = sibling(self.action_file, stem)
        if not path.is_file():
            return None
        array = Rows(path)
        try:
            if array.dtype.kind not in "iu" or len(array.shape) > 1 or sum(array.shape) > 64:
                raise EpisodeError("wrong shape", f"{path.name} is {array.dtype} {array.shape}, expected few integers")
            return array.rows(0, array.shape[0]) if array.shape else array.scalar()
        finally:
            array.close()

    def close(self) -> None:
        for array in self.arrays.values():
            array.close()


def sibling(action_file: Path, stem: str) -> Path:
    return action_file.with_name(f"{stem}_ckpt.{number_of(action_file)}.gz")


def number_of(store: Path) -> int:
    match = STORE.fullmatch(store.name)
    if match is None:
        raise SourceError(f"{store}: not a $store$_*_ckpt.N.gz of DQN-Replay; give one, or a folder of them")
    return int(match[1])


def parts(action_file: Path) -> list[Path]:
    """The four arrays of a checkpoint."""
    return [sibling(action_file, f"$store$_{array}") for array in ARRAYS]
