"""A folder of finished files, on this machine or on an object store (any fsspec URL).

bytes or a local file -> temporary name -> rename (local), or one upload (remote) -> a name others may read

Invariant: a name in the folder is a complete file. A local one is renamed into place after an fsync, a remote one
appears when its upload ends, as object stores do it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from fnmatch import fnmatch
from pathlib import Path

import fsspec

from schemas.dataset import DatasetError
from schemas.files import atomic_write, sha256_of, sync_folder, temporary_name


def is_url(place: str | Path) -> bool:
    """True for an fsspec URL (s3://bucket/...), False for a path."""
    return "://" in str(place)


class Folder:
    """`place`: a path or an fsspec URL. DatasetError where the URL's protocol is unknown or needs a package."""

    def __init__(self, place: str | Path):
        self.local = None if is_url(place) else Path(place)
        self.place = str(place).rstrip("/") if self.local is None else str(self.local)
        if self.local is None:
            try:
                self.store, self.root = fsspec.core.url_to_fs(self.place, use_listings_cache=False)
            except (ImportError, ValueError, OSError) as error:
                raise DatasetError(f"{place}: {error}") from error

    def __str__(self) -> str:
        return self.place

    @property
    def name(self) -> str:
        """Last part of the place."""
        return Path(self.place).name

    def path(self, name: str) -> str:
        """`name` as messages and fsspec show it."""
        return f"{self.place}/{name}"

    def temporary(self, name: str) -> Path:
        """A local file name to write `name` under, before `publish`."""
        base = self.local or Path(tempfile.gettempdir())
        base.mkdir(parents=True, exist_ok=True)
        return temporary_name(base / name)

    def publish(self, temporary: Path, name: str) -> None:
        """Give a finished and flushed local file its name here; the temporary one is gone after it. `sync` makes the
        name outlive a crash of the machine."""
        if self.local is not None:
            os.replace(temporary, self.local / name)
            return
        self.store.put_file(str(temporary), f"{self.root}/{name}")
        temporary.unlink()

    def sync(self) -> None:
        """Names given so far outlive a crash of the machine."""
        if self.local is not None:
            sync_folder(self.local)

    def write(self, name: str, data: bytes, durable: bool = True) -> None:
        """Write a small file in one step. One that is not `durable` may be lost in a crash of the machine."""
        if self.local is not None:
            with atomic_write(self.local / name, durable) as file:
                file.write(data)
        else:
            self.store.pipe_file(f"{self.root}/{name}", data)

    def read(self, name: str) -> bytes | None:
        """The bytes of a file, None where there is none."""
        try:
            if self.local is not None:
                return (self.local / name).read_bytes()
            return self.store.cat_file(f"{self.root}/{name}")
        except (FileNotFoundError, NotADirectoryError):
            return None

    def holds(self, name: str, size: int, sha256: str | None = None) -> bool:
        """True if a file of that size and, where given, hash is there. Remote files are not read back: their store
        checked what arrived, so only the size is compared."""
        if self.local is not None:
            path = self.local / name
            same = path.is_file() and path.stat().st_size == size
            return same and (sha256 is None or sha256_of(path) == sha256)
        try:
            return self.store.info(f"{self.root}/{name}")["size"] == size
        except FileNotFoundError:
            return False

    def names(self, pattern: str, below: str = "") -> list[str]:
        """Sorted names of files that match a shell pattern, in the folder `below` it."""
        try:
            if self.local is not None:
                found = os.listdir(self.local / below)
            else:
                found = [path.rsplit("/", 1)[-1] for path in self.store.ls(f"{self.root}/{below}", detail=False)]
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(name for name in found if fnmatch(name, pattern))

    def remove(self, name: str) -> None:
        """Remove a file or a folder, if it is there."""
        if self.local is not None:
            path = self.local / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        elif self.store.exists(f"{self.root}/{name}"):
            self.store.rm(f"{self.root}/{name}", recursive=True)


def digest_of(data: bytes) -> str:
    """sha256 of bytes, 64 hex digits."""
    return hashlib.sha256(data).hexdigest()
