"""Writing files so that a reader sees the old file or the complete new one, never a part.

temporary name in the same folder -> write -> flush -> fsync -> rename -> fsync of the folder.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4


def temporary_name(path: Path) -> Path:
    """A hidden name beside `path` that no other writer has, on this machine or another one."""
    return path.with_name(f".{path.name}.{os.getpid()}.{uuid4().hex[:8]}.tmp")


@contextmanager
def atomic_write(path: Path, durable: bool = True) -> Iterator[BinaryIO]:
    """Open a temporary file that becomes `path` when the block ends without an exception. Unless `durable`, a crash
    of the machine (not of the process) may lose it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    try:
        with open(temporary, "wb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    if durable:
        sync_folder(path.parent)


@contextmanager
def exclusive_name(path: Path, remedy: str) -> Iterator[None]:
    """Keep other processes from writing `path` while the block runs.

    Raises:
        ValueError: another one writes it; the message ends with `remedy`.
    """
    lock = path.with_name(f".{path.name}.lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    with open(lock, "wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            alone = os.path.samestat(os.fstat(file.fileno()), os.stat(lock))  # else its owner has just removed it
        except (BlockingIOError, FileNotFoundError):
            alone = False
        if not alone:
            raise ValueError(f"{path}: another process is writing it; wait for it to end, or {remedy}")
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def replace_folder(temporary: Path, final: Path) -> None:
    """Give a complete folder its name; one of that name before is removed once the new one is there."""
    earlier = temporary_name(final)
    with suppress(FileNotFoundError):
        os.replace(final, earlier)
    os.replace(temporary, final)
    sync_folder(final.parent)
    shutil.rmtree(earlier, ignore_errors=True)


def parse_json(data: bytes | str, unique: bool = False) -> Any:
    """The value in a JSON text. `unique`: refuse an object that names a field twice, whose first value is lost.

    Raises:
        ValueError: it is no JSON (json.JSONDecodeError), no Unicode, or nested too deeply.
    """

    def pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in found]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"field '{twice}' is there twice")
        return dict(found)

    try:
        return json.loads(data, object_pairs_hook=pairs if unique else None)
    except RecursionError:
        raise ValueError("nested too deeply") from None


FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
BARRED = {errno.EROFS, errno.EACCES, errno.EPERM}
IN_THE_WAY = {errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENOTEMPTY}
REMEDIES = dict.fromkeys(BARRED, "change its rights, or give another folder")
REMEDIES |= dict.fromkeys(IN_THE_WAY, "move it away, or give another folder")
REMEDIES |= {errno.ENAMETOOLONG: "give a shorter name", errno.ELOOP: "it is a link to itself; give another folder"}


def disk_fault(error: BaseException, folder: Path | str) -> str:
    """The line for the user if an error says that the disk of `folder` is full, that a file may not be written or read,
    or that another one is in its way; else ''. Libraries of C (HDF5) give the system's words alone."""
    if isinstance(error, FileNotFoundError) and error.filename is None and error.strerror:
        return "the current folder is gone (removed, or replaced by another one): cd to it again, or to another one"
    if isinstance(error, FileNotFoundError) and str(error.filename).endswith(".tmp"):
        return gone(Path(error.filename).parent)
    number = error.errno if isinstance(error, OSError) else None
    if number not in FULL:
        number = next((one for one in FULL if f"{os.strerror(one)}" in str(error)), None)
    if isinstance(error, OSError) and error.errno in REMEDIES:
        return f"{error.filename2 or error.filename or folder}: {error.strerror}; {REMEDIES[error.errno]}"
    if number is None:
        return ""
    return f"{folder}: the disk is full ({os.strerror(number)}); make room, then run the same command to go on"


def gone(folder: Path | str) -> str:
    """The line for the user if a folder vanished while it was written."""
    return f"{folder}: was removed or renamed while it was written; see to its place, then run the same command again"


def require_room(folder: Path, size: int) -> None:
    """Reserve `size` bytes in `folder` and give them back: HDF5 ends the process where it meets a full disk itself.

    Raises:
        OSError: as the disk gives it, of a quota too.
    """
    path = temporary_name(folder / "room")
    try:
        with open(path, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, size)
    finally:
        path.unlink(missing_ok=True)


def safe_name(name: str) -> str:
    """A file's name for what data call `name`, which may hold '/' and '..': it stays in its folder. Names that differ
    give names that differ; a plain one stays as it is."""
    plain = re.sub(r"[^\w.-]", "_", name)
    if plain == name and len(plain) <= 150 and plain.strip("."):
        return name
    return f"{plain[:150]}-{hashlib.sha256(name.encode(errors='replace')).hexdigest()[:8]}"


def write_rows(path: Path, rows: Mapping[str, Any]) -> None:
    """A JSON object of dataclasses by name, sorted, one row per line."""
    lines = (f"{json.dumps(name)}: {json.dumps(asdict(row))}" for name, row in sorted(rows.items()))
    with atomic_write(path) as file:
        file.write(("{\n" + ",\n".join(lines) + "\n}\n").encode())


def home_expanded(place: Path | str) -> Path:
    """A path whose '~' or '~USER' is replaced by that home folder. ValueError where there is none."""
    try:
        return Path(place).expanduser()
    except RuntimeError:
        raise ValueError(f"{place}: no such home folder is known here; set HOME, or give the whole path") from None


def require_folder(option: str, place: Path | str) -> None:
    """ValueError names `option` if `place` cannot be a folder: it, or what it lies in, is a file, or a link to
    nothing."""
    path = home_expanded(place)
    if link := next((one for one in (path, *path.parents) if one.is_symlink() and not one.exists()), None):
        raise ValueError(
            f"--{option} {place}: {link} is a link to nothing; make the folder that it names, or remove it"
        )
    found = next((one for one in (path, *path.parents) if one.exists()), path)
    if found.exists() and not found.is_dir():
        raise ValueError(f"--{option} {place}: {found} is a file; give a folder")


def require_unicode(option: str, place: Path | str) -> None:
    """ValueError names `option` if `place` cannot be written as Unicode, and so not into a JSON file."""
    try:
        str(place).encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"--{option} {os.fsencode(place)!r}: this name is not in the encoding of file names here "
            f"({sys.getfilesystemencoding()}); rename it, or set LC_ALL=C.UTF-8"
        ) from None


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path | str) -> str:
    """sha256 of a file's bytes, 64 hex digits."""
    with open(path, "rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
