"""Datasets of an HDF5 file: found without leaving the file, and described once.

group, key -> `holds`: no link to elsewhere -> `member` -> `Dataset`: shape, type and storage, asked for once

Invariant: what counts as a dataset lies in its own file, with all the bytes that its shape says.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import h5py
import numpy as np
from h5py import h5d, h5g, h5l, h5o, h5s, h5t
from zlib_ng import zlib_ng

from schemas.episode import EpisodeError

AGAIN = "download or record the file again"
# What h5py, numpy and zlib raise for bytes that make no sense.
DAMAGE: tuple[type[Exception], ...] = (OSError, EOFError, LookupError, ValueError, TypeError, AttributeError)
DAMAGE += (RuntimeError, ArithmeticError, MemoryError, zlib_ng.error)
DEFLATE_RATIO = 1100  # gzip packs 1032 times at best
VALUES = 64  # of variable length that are read at once
USUAL = tuple((h5t.py_create(np.dtype(name)), np.dtype(name)) for name in ("<f4", "<f8", "<i8", "<i4", "|u1"))


class Dataset:
    """A dataset of a file that is only read, as h5py has it; what describes it costs a third of h5py's time."""

    def __init__(self, id: h5d.DatasetID):
        self.id = id

    @cached_property
    def shape(self) -> tuple[int, ...]:
        return self.id.shape

    @cached_property
    def dtype(self) -> np.dtype:
        kind = self.id.get_type()
        return next((dtype for known, dtype in USUAL if kind.equal(known)), None) or kind.dtype

    @cached_property
    def properties(self) -> Any:
        """How it is stored."""
        return self.id.get_create_plist()

    @cached_property
    def as_h5py(self) -> h5py.Dataset:
        """h5py's own object of it."""
        return h5py.Dataset(self.id, readonly=True)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        """Values; 0 where it has no dataspace."""
        return 0 if self.shape is None else math.prod(self.shape)

    @cached_property
    def plain(self) -> bool:
        """True if its values lie in this very file one after the other, unpacked."""
        return self.id.get_offset() is not None

    @property
    def chunks(self) -> Any:
        """Sides of a chunk; None where it is not stored in chunks."""
        if self.plain or self.properties.get_layout() != h5d.CHUNKED:
            return None
        return self.properties.get_chunk()

    @property
    def elsewhere(self) -> bool:
        """True if its values lie in other files or datasets."""
        if self.plain:
            return False
        return self.properties.get_layout() == h5d.VIRTUAL or self.properties.get_external_count() > 0

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> Any:
        return self.as_h5py[rows]

    def read(self) -> Any:
        """All values, as h5py gives them; numbers in half the time."""
        if self.dtype.kind not in "fiub" or 0 in self.shape:
            return self.as_h5py[()]
        out = np.empty(self.shape, self.dtype)
        self.id.read(h5s.ALL, h5s.ALL, out)
        return out[()]


def dataset(group: h5py.Group, *keys: str) -> Dataset | None:
    """The dataset at that path in this very file, with all the bytes that its shape says; None where there is none:
    links to elsewhere and data in other files do not count. EpisodeError where its bytes cannot be all there."""
    node: Any = group
    for key in keys:
        if not isinstance(node, h5py.Group) or not holds(node, key):
            return None
        node = member(node, key)
    return node if stores_rows(node, "/".join(keys)) else None


def stores_rows(node: Any, name: str) -> bool:
    """True if an object of a file is a dataset with rows in this very file. EpisodeError where the bytes of the one
    called `name` cannot be all there."""
    if not isinstance(node, Dataset) or not (shape := node.shape) or node.elsewhere:
        return False
    width = node.id.get_type().get_size() if node.dtype.hasobject else node.dtype.itemsize
    packed = not node.plain and node.properties.get_nfilters() > 0
    if math.prod(shape) * width > node.id.get_storage_size() * (DEFLATE_RATIO if packed else 1):
        raise EpisodeError("wrong length", f"'{name}' has fewer bytes than its shape {shape}; {AGAIN}")
    return True


def holds(group: h5py.Group, key: str) -> bool:
    """True if the group itself holds something of that name, not a link to elsewhere."""
    links, name = group.id.links, key.encode()
    try:
        return links.get_info(name).type == h5l.TYPE_HARD
    except (KeyError, RuntimeError):  # what it raises says nothing
        if links.exists(name):
            raise
        return False


def member(group: h5py.Group, key: str) -> Dataset | h5py.Group | None:
    """A group's member of that name."""
    found = h5o.open(group.id, key.encode())
    if isinstance(found, h5d.DatasetID):
        return Dataset(found)
    return h5py.Group(found) if isinstance(found, h5g.GroupID) else None


def values(dataset: Dataset, rows: int) -> Iterator[Any]:
    """The first `rows` values of variable length, a few in memory at a time."""
    for start in range(0, rows, VALUES):
        yield from dataset[start : min(start + VALUES, rows)]


@contextmanager
def damage() -> Iterator[None]:
    """Turns what is raised for damaged bytes into an EpisodeError."""
    try:
        yield
    except EpisodeError:
        raise
    except DAMAGE as error:
        raise corrupt(str(error) or type(error).__name__) from error


def corrupt(why: str) -> EpisodeError:
    """Error for a file or a dataset whose bytes make no sense, `why` of h5py's or our own."""
    if "unable to lock file" in why:
        return EpisodeError("locked HDF5", "another process has it open for writing; wait until it has closed the file")
    if "already open for write" in why or "consistency flags" in why:
        remedy = "let its writer close it; if the writer was killed, repair a copy by h5clear -s"
        return EpisodeError("unfinished HDF5", f"it was not closed after writing; {remedy}")
    reason = "truncated HDF5" if "truncated file" in why else "corrupt HDF5"
    return EpisodeError(reason, f"{' '.join(why.split())[:200]}; {AGAIN}")
