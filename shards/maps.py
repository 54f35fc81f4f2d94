"""Open maps of files, a limited number at a time: the least recently used is closed.

An array made of a map keeps it alive, so letting one go never takes memory from under a reader. A map holds a file
descriptor, hence the limit, and with it a shared lock, which keeps a cached file from being evicted.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import resource
import threading
from collections import OrderedDict
from collections.abc import Hashable
from pathlib import Path

import numpy as np


def mapped_bytes(path: Path | str) -> np.ndarray:
    """The bytes (n,) uint8 of a file, mapped and locked. OSError as `open` gives it, ValueError for an empty file."""
    with open(path, "rb", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_SH)  # of the open file, which the map keeps open
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)


class Maps:
    """Maps by key. `limit`: half of the descriptors that the process may open, unless given; fewer where these turn
    out to be taken. Thread-safe."""

    def __init__(self, limit: int | None = None):
        allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self.limit = limit or (allowed // 2 if allowed != resource.RLIM_INFINITY else 2**15)
        self._open: OrderedDict[Hashable, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable) -> np.ndarray | None:
        """The bytes (n,) uint8 of an open map."""
        with self._lock:
            found = self._open.get(key)
            if found is not None:
                self._open.move_to_end(key)
            return found

    def open(self, key: Hashable, path: Path | str) -> np.ndarray:
        """Map a file and keep it open under a key; see `mapped_bytes`."""
        while True:
            try:
                mapped = mapped_bytes(path)
                break
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOMEM) or not self.drop_oldest():
                    raise
        with self._lock:
            self._open[key] = mapped
            while len(self._open) > self.limit:
                self._open.popitem(last=False)
        return mapped

    def drop_oldest(self) -> bool:
        """Let the least recently used map go; False where none is open."""
        with self._lock:
            if self._open:
                self._open.popitem(last=False)
                return True
            return False
