"""Groups of HDF5 files as the arrays of an episode.

group -> `columns`: every array at and below it, by its path -> Column: rows read by etl/sources/_hdf5,
strings, and pictures that are stored as PNG or JPEG bytes

Invariant: looking at a group reads no rows, but the first one of an array of bytes that may be coded pictures.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from etl.sources import _hdf5, _pictures
from etl.sources._arrays import ArraySource, Log
from etl.sources._hdf5 import AGAIN, VALUES, Dataset
from schemas.episode import EpisodeError

TEXT_BYTES = 4096  # of one timestep
MOST_ARRAYS = 1024  # below one group
DEEPEST = 8
MAGIC = (b"\xff\xd8\xff", b"\x89PNG")
ATTRIBUTE_BYTES = 2**24


class HDF5Column:
    """An array of numbers."""

    def __init__(self, node: Dataset):
        self.node = node
        self.shape: tuple[int, ...] = node.shape
        self.dtype: np.dtype = node.dtype
        self.rows: _hdf5.Rows | None = None

    def __getitem__(self, rows: slice, /) -> np.ndarray:
        self.rows = self.rows or _hdf5.Rows(self.node)
        return self.rows[rows]


class Strings(HDF5Column):
    """An array of one string per row."""

    def __init__(self, node: Dataset):
        super().__init__(node)
        self.dtype = np.dtype(object)

    def __getitem__(self, rows: slice, /) -> np.ndarray:
        start, stop, _ = rows.indices(len(self.node))
        lines = [
            _text(line) for first in range(start, stop, VALUES) for line in self.node[first : min(first + VALUES, stop)]
        ]
        return np.array(lines, np.str_)


class CodedPictures(HDF5Column):
    """An array of one PNG or JPEG per row: bytes of variable length, or padded to the longest."""

    def __init__(self, node: Dataset, picture: tuple[int, int, int], name: str):
        super().__init__(node)
        self.picture, self.name = picture, name
        self.shape, self.dtype = (len(node), *picture), np.dtype(np.uint8)

    def __getitem__(self, rows: slice, /) -> np.ndarray:
        start, stop, _ = rows.indices(len(self.node))
        return _pictures.decode_all(_codes(self.node, start, stop), stop - start, self.name, self.picture)


class HDF5Source(ArraySource):
    """A source of logs in HDF5 files."""

    def tried(self, files: list[Path]) -> Mapping[Path, EpisodeError]:
        return _hdf5.tried(files)


class HDF5Log(Log):
    """A log in one HDF5 file, tried before."""

    def __init__(self, path: Path):
        self.path = path
        self.file = _hdf5.opened(path)

    def close(self) -> None:
        self.file.close()


def columns(group: h5py.Group, prefix: str = "") -> dict[str, HDF5Column]:
    """Arrays at and below a group by path ("images/top"), in the order of their paths; scalars are left out."""
    found: dict[str, HDF5Column] = {}
    for name, node in _walk(group, prefix, DEEPEST):
        found[name] = column(node, name)
        if len(found) > MOST_ARRAYS:
            raise EpisodeError("too large", f"more than {MOST_ARRAYS} arrays in {group.name}; name some by "
                               "--observation-keys")  # fmt: skip
    return dict(sorted(found.items(), key=lambda item: item[0].split("/")))


def column(node: Dataset, name: str) -> HDF5Column:
    """Kind of an array: numbers, strings or coded pictures."""
    if h5py.check_string_dtype(node.dtype) is not None and node.ndim == 1:
        return Strings(node)
    coded = h5py.check_vlen_dtype(node.dtype) == np.uint8 or (node.dtype == np.uint8 and node.ndim == 2)
    if coded and len(node) and (code := next(_codes(node, 0, 1))).startswith(MAGIC):
        return CodedPictures(node, _pictures.size_of(code, name), name)
    return HDF5Column(node)


def required(group: h5py.Group, *keys: str) -> Dataset:
    """The array at a path. EpisodeError where there is none."""
    node = _hdf5.dataset(group, *keys)
    if node is None:
        raise EpisodeError("missing key", f"no array '{'/'.join(keys)}' in {group.name}; there are "
                           f"{few(group)}; {AGAIN}")  # fmt: skip
    return node


def optional(group: h5py.Group, *keys: str) -> HDF5Column | None:
    """The array at a path, if there is one."""
    node = _hdf5.dataset(group, *keys)
    return None if node is None else HDF5Column(node)


def group_of(group: h5py.Group, key: str) -> h5py.Group:
    """A group in a group. EpisodeError where there is none."""
    node = _hdf5.member(group, key) if _hdf5.holds(group, key) else None
    if not isinstance(node, h5py.Group):
        raise EpisodeError("missing group", f"no group '{key}' in {group.name}; there are {few(group)}; {AGAIN}")
    return node


def few(group: h5py.Group) -> str:
    """Some names in a group, for messages."""
    names = [name[:40] for name in group][:8]
    return ", ".join(names) or "none"


def attribute(group: h5py.Group, key: str) -> str | None:
    """A string attribute; None where there is none."""
    try:
        value = group.attrs.get(key)
    except Exception:  # h5py raises what it likes for odd types
        return None
    if isinstance(value, bytes):
        value = value.decode(errors="replace")
    return value if isinstance(value, str) and len(value) <= ATTRIBUTE_BYTES else None


def json_attribute(group: h5py.Group, key: str) -> dict[str, Any]:
    """An attribute that holds a JSON object; empty where there is none."""
    try:
        value = json.loads(attribute(group, key) or "{}")
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def last_flag(flags: HDF5Column | None, T: int, name: str) -> bool:
    """True if the flag of the last timestep is set; False without flags. EpisodeError where there are too few."""
    if flags is None:
        return False
    if flags.shape[0] < T or flags.dtype.kind not in "fiub" or len(flags.node.shape) > 2:
        given = f"{flags.dtype} {flags.node.shape}"
        raise EpisodeError("wrong length", f"'{name}' is {given}, expected a flag for each of {T} timesteps; {AGAIN}")
    return bool(np.any(flags[T - 1 : T]))


def _walk(group: h5py.Group, prefix: str, depth: int) -> Iterator[tuple[str, Dataset]]:
    for key in group:
        if not _hdf5.holds(group, key):
            continue
        node, name = _hdf5.member(group, key), f"{prefix}{key}"
        if isinstance(node, h5py.Group):
            if depth:
                yield from _walk(node, f"{name}/", depth - 1)
        elif isinstance(node, Dataset) and _hdf5.stores_rows(node, name):
            yield name, node


def _codes(node: Dataset, start: int, stop: int) -> Iterator[bytes]:
    if node.ndim == 2:
        yield from (row.tobytes() for row in _hdf5.Rows(node)[start:stop])
    else:
        for first in range(start, stop, VALUES):
            yield from (bytes(np.asarray(c, np.uint8)) for c in node[first : min(first + VALUES, stop)])


def _text(line: Any) -> str:
    data = line if isinstance(line, bytes) else str(line).encode(errors="replace")
    if len(data) > TEXT_BYTES:
        raise EpisodeError("too large", f"a text of more than {TEXT_BYTES} bytes in a timestep")
    return data.decode("utf-8", errors="replace").rstrip("\0")
