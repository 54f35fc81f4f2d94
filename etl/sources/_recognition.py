"""Format of a file or folder of logs: facts that sources recognise their format by, and what to say where none does.

    input -> files_below: names, bounded -> hdf5_keys, json_of: a look into few of them -> Recognition or None

Invariant: nothing here raises for foreign or damaged files, reads payloads, or looks at more than `MOST_FILES` names.
"""

from __future__ import annotations

import json
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # imported where needed: the process that tries HDF5 files has to start fast
    import h5py
    import pyarrow as pa

MOST_FILES = 10_000  # names looked at
FEW = 3  # files opened
JSON_BYTES = 2**24
HDF5_SUFFIXES = (".hdf5", ".h5")
MARK, LAYOUT, FALLBACK = 2, 1, 0


@dataclass(frozen=True)
class Recognition:
    """Why an input is of a source's format. `evidence`: what was seen, such as "meta/info.json, codebase_version
    v3.0". `certainty`: MARK, the format's own mark; LAYOUT, its keys or endings; FALLBACK, it could be read so."""

    evidence: str
    certainty: int


def files_below(input: Path) -> list[Path]:
    """The input file itself, or the files at and below the input folder: shallow ones first, by name, hidden ones
    and what lies in linked folders left out; at most `MOST_FILES`."""
    if input.is_file():
        return [input]
    found: list[Path] = []
    folders = deque([input])
    while folders and len(found) < MOST_FILES:
        try:
            with os.scandir(folders.popleft()) as listing:
                entries = sorted((entry for entry in listing if entry.name[0] != "."), key=lambda entry: entry.name)
        except OSError:
            continue
        folders.extend(Path(entry.path) for entry in entries if entry.is_dir(follow_symlinks=False))
        found += [Path(entry.path) for entry in entries if entry.is_file()]
    return found[:MOST_FILES]


def all_files_below(folder: Path) -> Iterator[Path]:
    """All files below a folder but hidden ones, and pipes and devices, whose reading may never end; links to folders
    are not followed."""
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        paths = (Path(root, name) for name in sorted(files) if not name.startswith("."))
        yield from (path for path in paths if path.is_file() or not path.exists())


def below(input: Path, path: Path) -> str:
    """The path as the user sees it: from the input folder on; a file's own name."""
    return path.name if path == input else Path(os.path.relpath(path, input)).as_posix()


def first_with(files: Iterable[Path], *suffixes: str) -> list[Path]:
    """The first few files of these endings."""
    return [path for path in files if path.suffix.lower() in suffixes][:FEW]


def hdf5_keys(path: Path, group: str = "/") -> list[str]:
    """Sorted names in a group of an HDF5 file; none where there is no such group, or it cannot be read."""
    return _of_hdf5(path, group, sorted) or []


def hdf5_attributes(path: Path, group: str = "/") -> dict[str, Any]:
    """Attributes of a group of an HDF5 file; none where there is no such group, or it cannot be read."""
    return _of_hdf5(path, group, lambda node: dict(node.attrs)) or {}


def _of_hdf5(path: Path, group: str, look: Callable[[h5py.Group], Any]) -> Any:
    import h5py

    from etl.sources import _hdf5

    try:
        about = path.stat()
        if _harmless(path, about.st_size, about.st_mtime_ns):
            with h5py.File(path, "r") as file:
                return look(file[group]) if isinstance(file.get(group), h5py.Group) else None
    except _hdf5.DAMAGE:
        pass
    return None


@lru_cache
def _harmless(path: Path, size: int, changed: int) -> bool:
    """True if a file can be opened without harm; the sources that ask share the answer."""
    from etl.sources import _hdf5

    return not _hdf5.tried([path])


def json_of(path: Path) -> Any:
    """Content of a JSON file; None where it is none, or too large to be a description."""
    try:
        return read_json(path, JSON_BYTES)
    except (OSError, ValueError, RecursionError):
        return None


def read_json(path: Path, most: int) -> Any:
    """Content of a JSON file of up to `most` bytes. ValueError where it is larger, or no JSON."""
    require_file(path)
    if path.stat().st_size > most:
        raise ValueError(f"{path.stat().st_size} bytes")
    return json.loads(path.read_bytes())


def require_file(path: Path) -> None:
    """ValueError for what is there and no file: reading a pipe may never end."""
    if path.exists() and not path.is_file():
        raise ValueError("no file")


def first_line(path: Path) -> str:
    """The first line of a text file, cut at `JSON_BYTES`; empty where it cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.readline(JSON_BYTES).decode(errors="replace")
    except OSError:
        return ""


def parquet_schema(path: Path) -> pa.Schema | None:
    """The columns of a Parquet file; None where it is no such file."""
    import pyarrow as pa
    import pyarrow.parquet

    try:
        return pa.parquet.read_schema(path)
    except (OSError, pa.ArrowException, ValueError):
        return None


def seen(input: Path) -> str:
    """Description of an unknown input: files by suffix, and the first keys in it."""
    files = files_below(input)
    if not files:
        return "no file"
    counts = Counter(_ending(path) for path in files).most_common(8)
    more = "the first " if len(files) == MOST_FILES else ""
    lines = [f"{more}{len(files)} files: " + ", ".join(f"{n} {suffix}" for suffix, n in counts)]
    if len(files) == 1:
        lines = [f"one file, {files[0].name}"]
    for path in first_with(files, *HDF5_SUFFIXES, ".json", ".parquet")[:1]:
        keys = _keys(path)
        lines.append(f"keys in {below(input, path)}: {', '.join(keys[:8])}" if keys else _unreadable(path))
    return "; ".join(lines)


def _unreadable(path: Path) -> str:
    from etl.sources import _hdf5

    wrong = _hdf5.tried([path]).get(path) if path.suffix.lower() in HDF5_SUFFIXES else None
    return f"{path.name} cannot be read" + (f": {wrong.reason}: {wrong.detail}" if wrong else "")


def _ending(path: Path) -> str:
    packed = path.suffix.lower() in (".gz", ".xz", ".zst", ".bz2")
    return "".join(path.suffixes[-2:] if packed else path.suffixes[-1:]).lower() or path.name


def _keys(path: Path) -> list[str]:
    if path.suffix.lower() == ".json":
        value = json_of(path)
        return list(value) if isinstance(value, dict) else []
    if path.suffix.lower() == ".parquet":
        schema = parquet_schema(path)
        return schema.names if schema else []
    return hdf5_keys(path)
