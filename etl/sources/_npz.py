"""Arrays of an .npz file, read as a stream: rows forwards, however long the array.

zip member NAME.npy -> header -> NpzColumn: rows [start, stop) of it, unpacked up to there and no further

Going back means starting again, which reading episodes in order never does.

Invariant: nothing is unpickled; memory is that of the rows asked for; a member with fewer bytes than its shape says is
an EpisodeError.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from pathlib import Path
from typing import IO, Any

import numpy as np

from etl.sources._hdf5 import AGAIN
from schemas.episode import EpisodeError

SKIP = 2**20  # bytes at a time
MOST_ARRAYS = 1024
DAMAGE: tuple[type[Exception], ...] = (OSError, EOFError, ValueError, LookupError, TypeError, SyntaxError)
DAMAGE += (zlib.error, zipfile.BadZipFile, NotImplementedError, RuntimeError, MemoryError, ArithmeticError)


class NpzColumn:
    """One array of the file."""

    def __init__(self, archive: zipfile.ZipFile, member: str):
        self.archive, self.member = archive, member
        self.name = member.removesuffix(".npy")
        self.stream: IO[bytes] | None = None
        with archive.open(member) as stream:
            self.shape, self.dtype = _header(stream, self.name)
            self.data = stream.tell()
        self.row = math.prod(self.shape[1:]) * self.dtype.itemsize
        if archive.getinfo(member).file_size < self.data + math.prod(self.shape) * self.dtype.itemsize:
            raise EpisodeError("wrong length", f"'{self.name}' has fewer bytes than its shape {self.shape}; {AGAIN}")

    def __getitem__(self, rows: slice, /) -> np.ndarray:
        start, stop, _ = rows.indices(self.shape[0])
        count = max(0, stop - start)
        data = self._bytes(start * self.row, count * self.row)
        return np.frombuffer(data, self.dtype).reshape(count, *self.shape[1:])

    def _bytes(self, at: int, count: int) -> bytes:
        """Bytes [at, at + count) of the array."""
        try:
            if self.stream is None or self.stream.tell() > self.data + at:
                if self.stream is not None:
                    self.stream.close()
                self.stream = self.archive.open(self.member)
            while (missing := self.data + at - self.stream.tell()) > 0:
                if not self.stream.read(min(missing, SKIP)):
                    break
            data = self.stream.read(count)
        except DAMAGE as error:
            why = " ".join(str(error).split())[:200]
            raise EpisodeError("corrupt npz", f"'{self.name}': {why}; {AGAIN}") from error
        if len(data) < count:
            raise EpisodeError("truncated npz", f"'{self.name}' ends before its shape {self.shape} does; {AGAIN}")
        return data


class Npz:
    """An open .npz file: `columns`, its arrays by name. EpisodeError says what is wrong with it."""

    def __init__(self, path: Path):
        try:
            self.archive = zipfile.ZipFile(path)
        except DAMAGE as error:
            raise _corrupt(path, error) from error
        try:
            members = [name for name in self.archive.namelist() if name.endswith(".npy")][:MOST_ARRAYS]
            self.columns = {name.removesuffix(".npy"): NpzColumn(self.archive, name) for name in sorted(members)}
        except EpisodeError:
            self.archive.close()
            raise
        except DAMAGE as error:
            self.archive.close()
            raise _corrupt(path, error) from error

    def close(self) -> None:
        for column in self.columns.values():
            if column.stream is not None:
                column.stream.close()
        self.archive.close()


def _corrupt(path: Path, error: Exception) -> EpisodeError:
    if isinstance(error, FileNotFoundError):
        return EpisodeError("missing file", f"{path.name} is no file; {AGAIN}")
    return EpisodeError("corrupt npz", f"{' '.join(str(error).split())[:200]}; {AGAIN}")


def _header(stream: IO[bytes], name: str) -> tuple[tuple[int, ...], np.dtype]:
    version = np.lib.format.read_magic(stream)
    read: Any = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(stream)
    if dtype.hasobject:
        raise EpisodeError("wrong dtype", f"'{name}' holds pickled objects, which are not read; save it as numbers")
    if fortran and len(shape) > 1:
        raise EpisodeError("wrong shape", f"'{name}' is in Fortran's order; save it as np.ascontiguousarray gives it")
    return shape, dtype
