"""Unpacked copies of gzip files: what a build's scan leaves to the writing of its shards, in one temporary file.

path -> `opened` -> Unpacked: bytes of gzip, copied as they are read; once the file's end was read, bytes of the copy

A build reads each file twice, and to unpack RL Unplugged's is a fifth of its time. Copies are there within `copies()`
alone, for the threads of this process; everywhere else a file is unpacked again.

Invariant: the bytes are those of the gzip file, copied or not. All copies take at most a quarter of the memory that is
free, so that they stay in the disk's cache, and a tenth of what is free on the disk of temporary files.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from etl.sources._gzip import Gunzip

MEMORY_SHARE, DISK_SHARE = 4, 10
GATHERED = 2**16  # bytes that one call writes, at least

Stamp = tuple[Path, int, int, int]


class _Store:
    """The temporary file. One gzip file at a time is copied to its end."""

    def __init__(self) -> None:
        folder = tempfile.gettempdir()
        self.room = min(psutil.virtual_memory().available // MEMORY_SHARE, shutil.disk_usage(folder).free // DISK_SHARE)
        self.file = tempfile.TemporaryFile(buffering=0, dir=folder)  # noqa: SIM115
        self.process, self.size = os.getpid(), 0
        self.owner: Unpacked | None = None
        self.lock = threading.Lock()
        self.copies: dict[Stamp, tuple[int, int]] = {}  # first byte, size

    def offer(self, file: Unpacked) -> None:
        """Let it copy what it reads, unless another one does."""
        with self.lock:
            self.owner = self.owner or file


_store: _Store | None = None


@contextmanager
def copies() -> Iterator[None]:
    """Keep copies of the gzip files that are read to their end while the block runs."""
    global _store
    try:
        kept = _store = _Store()
    except OSError:  # no folder of temporary files, or a full disk
        yield
        return
    try:
        yield
    finally:
        _store = None
        kept.file.close()


def opened(path: Path) -> Unpacked:
    """The file's unpacked bytes. OSError where it cannot be opened."""
    status = path.stat()
    return Unpacked(path, (path.absolute(), status.st_size, status.st_ino, status.st_mtime_ns))


class Unpacked:
    """A gzip file as a plain one. `read` and `seek` raise what `_gzip.DAMAGE` lists."""

    def __init__(self, path: Path, stamp: Stamp):
        self.stamp, self.position = stamp, 0
        self.store = _store if _store is not None and _store.process == os.getpid() else None
        self.place = self.store.copies.get(stamp) if self.store else None
        self.gunzip = Gunzip(path) if self.place is None else None
        self.copied, self.waiting = 0, list[bytes]()
        if self.store is not None and self.place is None:
            self.store.offer(self)

    def read(self, count: int) -> bytes:
        """Up to `count` bytes, fewer only at the end."""
        if self.place is not None and self.store is _store and self.store is not None:
            start, size = self.place
            left = max(0, min(count, size - self.position))
            data = os.pread(self.store.file.fileno(), left, start + self.position)
            if len(data) < left:
                raise EOFError("a temporary file was cut")
            self.position += len(data)
            return data
        data = self._gunzip().read(count)
        if self.store is not None and self.store.owner is self:
            self._copy(data, len(data) < count)
        self.position += len(data)
        return data

    def seek(self, position: int) -> None:
        """Move to a position; one beyond the end raises now, or when it is read."""
        if self.place is None:
            self._gunzip().seek(position)
        self.position = position

    def close(self) -> None:
        self._abandon()
        if self.gunzip is not None:
            self.gunzip.close()

    def _gunzip(self) -> Gunzip:
        """The gzip file at this position; that of a copy that is no longer kept is opened again."""
        if self.place is not None:
            self.place = self.store = None
        if self.gunzip is None:
            self.gunzip = Gunzip(self.stamp[0])
        self.gunzip.seek(self.position)
        return self.gunzip

    def _copy(self, data: bytes, ends: bool) -> None:
        """Append what is not copied yet of the bytes at this position."""
        store = self.store
        assert store is not None
        if self.position > self.copied or self.copied + len(data) > store.room - store.size:
            self._abandon()
            return
        if new := data[self.copied - self.position :]:
            self.waiting.append(new)
            self.copied += len(new)
        try:
            if ends or sum(map(len, self.waiting)) >= GATHERED:
                written = os.writev(store.file.fileno(), self.waiting)
                if written < sum(map(len, self.waiting)):
                    raise OSError("no space is left")
                self.waiting = []
        except OSError:
            self._abandon()
            return
        if ends and self.position + len(data) == self.copied:
            self.place = store.copies[self.stamp] = store.size, self.copied
            store.size += self.copied
            store.owner = None

    def _abandon(self) -> None:
        """Leave it uncopied."""
        if self.store is not None and self.store.owner is self:
            self.store.owner, self.waiting = None, []
            os.lseek(self.store.file.fileno(), self.store.size, os.SEEK_SET)
