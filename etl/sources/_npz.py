"""Arrays of an .npz file, read as a stream: rows forwards, however long the array.

zip member NAME.npy -> `_Member`: its bytes, unpacked as they are asked for -> header -> NpzColumn: rows [start, stop)

Going back means starting again, which reading episodes in order never does. Members are unpacked here, in two thirds
to four fifths of zipfile's time.

Invariant: nothing is unpickled; memory is that of the rows asked for; a member with fewer bytes than its shape says is
an EpisodeError.
"""

from __future__ import annotations

import io
import math
import os
import zipfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from zlib_ng import zlib_ng

from etl.sources._hdf5 import AGAIN
from schemas.episode import EpisodeError

SKIP = 2**20  # bytes at a time
PACKED = 2**18  # bytes that are unpacked at a time
MOST_ARRAYS = 1024
HEADER_BYTES = 10_000  # of an array, as numpy reads at most
LOCAL_HEADER = 30  # bytes of it before a member's name
ENCRYPTED = 1
DAMAGE: tuple[type[Exception], ...] = (OSError, EOFError, ValueError, LookupError, TypeError, SyntaxError)
DAMAGE += (zipfile.BadZipFile, NotImplementedError, RuntimeError, MemoryError, ArithmeticError, zlib_ng.error)


class _Member:
    """The unpacked bytes of one file in an archive, forwards."""

    def __init__(self, archive: zipfile.ZipFile, name: str):
        info = archive.getinfo(name)
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or info.flag_bits & ENCRYPTED:
            raise NotImplementedError(f"packed by method {info.compress_type}; save it by np.savez_compressed")
        assert archive.fp is not None
        self.descriptor = archive.fp.fileno()
        header = os.pread(self.descriptor, LOCAL_HEADER, info.header_offset)
        if len(header) < LOCAL_HEADER or not header.startswith(b"PK\3\4"):
            raise zipfile.BadZipFile(f"no member begins at byte {info.header_offset}")
        lengths = int.from_bytes(header[26:28], "little"), int.from_bytes(header[28:30], "little")
        self.where, self.packed = info.header_offset + LOCAL_HEADER + sum(lengths), info.compress_size
        self.inflate: Any = zlib_ng.decompressobj(-15) if info.compress_type == zipfile.ZIP_DEFLATED else None
        self.position, self.size = 0, info.file_size
        self.sum, self.expected = 0, info.CRC

    def read(self, count: int) -> bytes:
        """The next bytes; fewer than `count` at the end, which its checksum must fit."""
        parts: list[bytes] = []
        missing = count = min(count, self.size - self.position)
        while missing and (data := self._next(missing)):
            parts.append(data)
            self.sum = zlib_ng.crc32(data, self.sum)
            missing -= len(data)
        self.position += count - missing
        if count and self.position == self.size and self.sum != self.expected:
            raise zipfile.BadZipFile("its checksum does not fit")
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _next(self, most: int) -> bytes:
        while True:
            if self.inflate is None:
                return self._pread(most)
            code = self.inflate.unconsumed_tail or self._pread(PACKED)
            data = self.inflate.decompress(code, most)  # of no code too: some may be waiting in it
            if data or not code:
                return data

    def _pread(self, most: int) -> bytes:
        data = os.pread(self.descriptor, min(most, self.packed), self.where)
        self.where, self.packed = self.where + len(data), self.packed - len(data)
        return data


class NpzColumn:
    """One array of the file."""

    def __init__(self, archive: zipfile.ZipFile, member: str):
        self.archive, self.member = archive, member
        self.name = member.removesuffix(".npy")
        self.stream = _Member(archive, member)
        self.shape, self.dtype = _header(self.stream, self.name)
        self.data = self.stream.position
        self.row = math.prod(self.shape[1:]) * self.dtype.itemsize
        if self.stream.size < self.data + math.prod(self.shape) * self.dtype.itemsize:
            raise EpisodeError("wrong length", f"'{self.name}' has fewer bytes than its shape {self.shape}; {AGAIN}")

    def __getitem__(self, rows: slice, /) -> np.ndarray:
        start, stop, _ = rows.indices(self.shape[0])
        count = max(0, stop - start)
        data = self._bytes(start * self.row, count * self.row)
        return np.frombuffer(data, self.dtype).reshape(count, *self.shape[1:])

    def _bytes(self, at: int, count: int) -> bytes:
        """Bytes [at, at + count) of the array."""
        try:
            if self.stream.position > self.data + at:
                self.stream = _Member(self.archive, self.member)
            while (missing := self.data + at - self.stream.position) > 0:
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
        self.archive.close()


def _corrupt(path: Path, error: Exception) -> EpisodeError:
    if isinstance(error, FileNotFoundError):
        return EpisodeError("missing file", f"{path.name} is no file; {AGAIN}")
    return EpisodeError("corrupt npz", f"{' '.join(str(error).split())[:200]}; {AGAIN}")


def _header(stream: _Member, name: str) -> tuple[tuple[int, ...], np.dtype]:
    start = stream.read(np.lib.format.MAGIC_LEN)
    version = np.lib.format.read_magic(io.BytesIO(start))
    length = stream.read(2 if version == (1, 0) else 4)
    size = int.from_bytes(length, "little")
    if size > HEADER_BYTES:
        raise ValueError(f"a header of {size} bytes")
    shape, fortran, dtype = _parsed(version, length + stream.read(size))
    if dtype.hasobject:
        raise EpisodeError("wrong dtype", f"'{name}' holds pickled objects, which are not read; save it as numbers")
    if fortran and len(shape) > 1:
        raise EpisodeError("wrong shape", f"'{name}' is in Fortran's order; save it as np.ascontiguousarray gives it")
    return shape, dtype


@lru_cache(maxsize=256)
def _parsed(version: tuple[int, int], header: bytes) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Of the files of one task most headers are the same, and numpy compiles each."""
    read: Any = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(io.BytesIO(header))
