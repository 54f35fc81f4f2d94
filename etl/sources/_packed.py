"""Packed files (.gz, .zst, .xz, .bz2) as plain ones: a stream of bytes that can be read by lines and moved to a place.

path -> `opened` -> io.BufferedReader over the unpacked bytes; going back starts over, or at a mark of gzip's

A process keeps the packed file that it read last open, so that shards one after the other unpack it once.

Invariant: memory is bounded, whatever the file says: xz dictionaries of more than 256 MiB are refused. What is wrong
with the bytes is an exception of DAMAGE.
"""

from __future__ import annotations

import bz2
import io
import lzma
import threading
from pathlib import Path
from typing import Any

import pyarrow as pa

from etl.sources import _gzip
from etl.sources._gzip import Gunzip

DAMAGE: tuple[type[Exception], ...] = (*_gzip.DAMAGE, lzma.LZMAError, pa.ArrowException, ValueError)
SUFFIXES = (".gz", ".zst", ".xz", ".bz2")
XZ_MEMORY = 2**28
CHUNK = 2**16
PIECE = 2**20

_local = threading.local()


def plain_name(path: Path) -> str:
    """The name without the ending of the packing: 'part.jsonl.zst' -> 'part.jsonl'."""
    return path.stem if path.suffix in SUFFIXES else path.name


def opened(path: Path) -> io.BufferedReader[Any]:
    """The file's unpacked bytes, at any position: `seek` first. It stays this module's: do not close it."""
    status = path.stat()
    stamp = (path, status.st_ino, status.st_size, status.st_mtime_ns)
    held = getattr(_local, "held", None)
    if held is None or held[0] != stamp:
        if held is not None:
            held[1].close()
        raw: io.RawIOBase = _Unpacked(path) if path.suffix in SUFFIXES else io.FileIO(path)
        _local.held = held = (stamp, io.BufferedReader(raw, PIECE))
    return held[1]


class _Unpacked(io.RawIOBase):
    """Unpacked bytes of one file. Going back unpacks it again from the beginning, but for gzip's marks."""

    def __init__(self, path: Path):
        self.path, self.position = path, 0
        self.stream: Any = _stream(path)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        view = memoryview(buffer).cast("B")
        data = self.stream.read(min(len(view), PIECE))
        view[: len(data)] = data
        self.position += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        if whence == io.SEEK_CUR:
            offset += self.position
        elif whence != io.SEEK_SET:
            raise io.UnsupportedOperation("the end of a packed file is not known")
        if isinstance(self.stream, Gunzip):
            self.stream.seek(offset)
            self.position = offset
        elif offset < self.position:
            self.stream.close()
            self.stream, self.position = _stream(self.path), 0
        while self.position < offset:
            skipped = len(self.stream.read(min(PIECE, offset - self.position)))
            if not skipped:
                raise EOFError(f"ends at byte {self.position} of {offset}")
            self.position += skipped
        return self.position

    def tell(self) -> int:
        return self.position

    def close(self) -> None:
        if not self.closed:
            self.stream.close()
        super().close()


class _Decompressed:
    """Bytes of an xz or bz2 file, of several streams too."""

    def __init__(self, path: Path, make: Any):
        self.file, self.make = open(path, "rb"), make  # noqa: SIM115
        self.inflate = make()

    def read(self, count: int) -> bytes:
        """Up to `count` bytes; none at the end."""
        while True:
            if self.inflate.eof:
                rest = (self.inflate.unused_data or self.file.read(CHUNK)).lstrip(b"\0")  # zeros may pad the end
                if not rest:
                    return b""
                self.inflate = self.make()
            else:
                rest = self.file.read(CHUNK) if self.inflate.needs_input else b""
                if not rest and self.inflate.needs_input:
                    raise EOFError("the packed file ends in the middle")
            if data := self.inflate.decompress(rest, count):
                return data

    def close(self) -> None:
        self.file.close()


def _stream(path: Path) -> Any:
    if path.suffix == ".gz":
        return Gunzip(path)
    if path.suffix == ".zst":
        return pa.CompressedInputStream(pa.OSFile(str(path)), "zstd")
    if path.suffix == ".xz":
        return _Decompressed(path, lambda: lzma.LZMADecompressor(memlimit=XZ_MEMORY))
    return _Decompressed(path, bz2.BZ2Decompressor)
