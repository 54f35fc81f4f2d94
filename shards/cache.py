"""Local copies of remote files: fetched once per machine, verified on arrival, never more than a set size together.

    file of a manifest (name, bytes, sha256) -> CACHE/SHA256, there already, or: room -> download -> sha256 -> rename

Processes of one machine share the folder. A lock lets one of them fetch a file while the others wait for it. A process
that maps a file holds a shared lock on it. Locked files are not evicted; of the others, the least recently used first.

Invariant: a file named by a hash has that content, and the files of the folder, unfinished ones included, never take
more than the limit.
"""

from __future__ import annotations

import errno
import fcntl
import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, TypeVar
from uuid import uuid4

from schemas.dataset import DatasetError, FileDigest, Shard
from schemas.episode import STRICT
from schemas.files import home_expanded, sha256_of
from shards.folder import Folder

T = TypeVar("T")
STRIPES = 256
SHA256_HEX = re.compile(r"[0-9a-f]{64}")
PART = re.compile(r"\.[0-9a-f]{64}\.(\d+)\.[0-9a-f]{8}\.tmp")
POLL_SECONDS = 0.02
FIRST_PAUSE = 0.25
FINAL = (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError)


@dataclass(frozen=True)
class CacheConfig:
    """Local copies of remote datasets."""

    __pydantic_config__ = STRICT

    folder: Path = field(default_factory=lambda: Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "gato" / "shards")
    """Folder for copies of remote shards; processes of one machine share it."""
    gigabytes: float = 50.0
    """All copies together never take more."""
    attempts: int = 6
    """Tries per download; the pause between them starts at a quarter of a second and doubles."""
    stall_seconds: float = 30.0
    """A download that brings no new byte for this long is given up and tried again."""


class BadFile(DatasetError):
    """A file of a dataset is missing, cut or damaged, or its origin does not give it."""


class CacheFull(DatasetError):
    """There is no room, and every file in the cache is in use."""


@dataclass
class Counts:
    """Since the start: files found here and fetched, bytes fetched, tries that failed, files evicted."""

    hits: int = 0
    misses: int = 0
    bytes: int = 0
    retries: int = 0
    evicted: int = 0


class Cache:
    """One for a process. Thread-safe."""

    def __init__(self, config: CacheConfig):
        self.config = config
        self.folder = home_expanded(config.folder)
        if not 0 < config.gigabytes < 1e9:
            raise DatasetError(f"--data.cache.gigabytes {config.gigabytes} is no size; give a positive number")
        self.limit = int(config.gigabytes * 1e9)
        self.counts = Counts()
        self._counting = threading.Lock()

    def read(self, place: Folder, name: str) -> bytes | None:
        """A small file, tried again where its store fails; None where there is none."""
        try:
            return self._tried(place.path(name), lambda: self._watched(lambda: place.read(name), lambda: None))
        except FINAL as error:
            raise BadFile(f"{place.path(name)}: {_line(error)}; check the address and the credentials") from error

    def fetch(self, place: Folder, file: Shard | FileDigest) -> Path:
        """The local copy of a remote file. BadFile where the origin does not give what the manifest says, CacheFull
        where everything that could make room is in use."""
        path = self.folder / file.sha256
        if self._touched(path, file.bytes):
            self._count(hits=1)
            return path
        if file.bytes > self.limit:
            raise DatasetError(f"{self.folder}: {place.path(file.name)} alone, {file.bytes} bytes, is more than its "
                               f"limit of {self.limit}; raise --data.cache.gigabytes")  # fmt: skip
        with self._locked(f".fetch-{int(file.sha256[:8], 16) % STRIPES:03d}"):
            if self._touched(path, file.bytes):  # another process was first
                self._count(hits=1)
                return path
            try:
                self._tried(place.path(file.name), lambda: self._download(place, file, path))
            except FINAL as error:
                raise BadFile(f"{place.path(file.name)}: {_line(error)}; upload it again, or build it again") from error
        self._count(misses=1, bytes=file.bytes)
        return path

    def discard(self, file: Shard | FileDigest) -> None:
        """Remove a copy that is not what its name says."""
        (self.folder / file.sha256).unlink(missing_ok=True)

    def _tried(self, what: str, call: Callable[[], T]) -> T:
        pause = FIRST_PAUSE
        for attempt in range(1, self.config.attempts + 1):
            try:
                return call()
            except (CacheFull, *FINAL):
                raise
            except Exception as error:  # every store has exceptions of its own
                if isinstance(error, DatasetError) and not isinstance(error, BadFile):
                    raise
                if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
                    raise DatasetError(f"{self.folder}: {error.strerror}; free some of the disk, or name another "
                                       "folder by --data.cache.folder") from error  # fmt: skip
                if attempt == self.config.attempts:
                    kind = BadFile if isinstance(error, BadFile) else DatasetError
                    tried = f"{_line(error)} ({attempt} attempts)"
                    raise kind(f"{what}: {tried}; check the store and the network") from error
            self._count(retries=1)
            time.sleep(pause * random.uniform(0.5, 1.5))
            pause = min(2 * pause, 30.0)
        raise AssertionError("at least one attempt")

    def _download(self, place: Folder, file: Shard | FileDigest, path: Path) -> None:
        with self._room(file.bytes, file.sha256) as temporary:
            self._watched(
                lambda: place.store.get_file(f"{place.root}/{file.name}", str(temporary)),
                lambda: temporary.stat().st_size,
            )
            size = temporary.stat().st_size
            if size != file.bytes or sha256_of(temporary) != file.sha256:
                sizes = f"{size} bytes arrived, the manifest says {file.bytes}"
                raise BadFile(f"{place.path(file.name)}: {sizes if size != file.bytes else 'sha256 differs'}")
            os.replace(temporary, path)

    def _watched(self, call: Callable[[], T], progress: Callable[[], object]) -> T:
        """The result of `call`, which runs in a thread that is abandoned if `progress` does not change for too long."""
        results: list[T] = []
        errors: list[BaseException] = []

        def run() -> None:
            try:
                results.append(call())
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        seen, since = progress(), time.monotonic()
        while thread.is_alive():
            thread.join(POLL_SECONDS)
            now = progress()
            if now != seen:
                seen, since = now, time.monotonic()
            elif time.monotonic() - since > self.config.stall_seconds and thread.is_alive():
                raise TimeoutError(f"no byte came for {self.config.stall_seconds:g} s")
        if errors:
            raise errors[0]
        return results[0]

    @contextmanager
    def _room(self, size: int, name: str) -> Iterator[Path]:
        """A temporary file for which there is room; gone afterwards unless it was renamed. Its name says how much it
        will hold, and it is locked as long as its process lives."""
        with self._locked(".room"):
            free = self.limit
            candidates = []
            for entry in os.scandir(self.folder):  # other files are not ours
                if part := PART.fullmatch(entry.name):
                    free -= 0 if self._removed(Path(entry.path)) else int(part[1])
                elif SHA256_HEX.fullmatch(entry.name):
                    status = entry.stat()
                    free -= status.st_size
                    candidates.append((status.st_mtime_ns, status.st_size, Path(entry.path)))
            for _, bytes_, path in sorted(candidates):
                if free >= size:
                    break
                if self._removed(path):
                    free += bytes_
                    self._count(evicted=1)
            if free < size:
                raise CacheFull(
                    f"{self.folder}: {size} bytes more do not fit into its limit of {self.limit}, what it holds is in "
                    "use; raise --data.cache.gigabytes, or lower --data.stream.working-set"
                )
            temporary = self.folder / f".{name}.{size}.{uuid4().hex[:8]}.tmp"
            file = open(temporary, "wb")  # noqa: SIM115
            fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield temporary
        finally:
            file.close()
            temporary.unlink(missing_ok=True)

    def _removed(self, path: Path) -> bool:
        """Remove a file that nobody holds a lock on."""
        try:
            with open(path, "rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
        except BlockingIOError:
            return False
        except FileNotFoundError:
            pass
        return True

    def _touched(self, path: Path, size: int) -> bool:
        """True if a file is there; it is then the most recently used."""
        try:
            os.utime(path)
            return path.stat().st_size == size
        except (FileNotFoundError, NotADirectoryError):
            return False

    @contextmanager
    def _locked(self, name: str) -> Iterator[BinaryIO]:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            file = open(self.folder / name, "wb")  # noqa: SIM115
        except OSError as error:
            raise DatasetError(
                f"{self.folder}: cannot hold the cache ({error.strerror}); name another folder by --data.cache.folder"
            ) from error
        with file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file

    def _count(self, **more: int) -> None:
        with self._counting:
            for name, value in more.items():
                setattr(self.counts, name, getattr(self.counts, name) + value)


def _line(error: Exception) -> str:
    """The first line of a message, or the error's name."""
    return (str(error).splitlines() or [""])[0][:300] or type(error).__name__
