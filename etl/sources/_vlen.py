"""Variable-length values (strings, coded pictures) of an HDF5 dataset, as bytes.

dataset -> references, 16 bytes a row (length, address, index) -> global heap collection at the address -> object

HDF5's own reader of these heaps can run forever, or ask for gigabytes, when their bytes are damaged; so they are
parsed here, after the format specification (III.E, "Global Heap"). Layouts that Minari does not write (filters,
user blocks, addresses that are not of 8 bytes) are left to HDF5.

Invariant: no read is larger than the file; every value's bytes lie within its own collection.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import BinaryIO

import h5py
import numpy as np

REFERENCE = np.dtype([("length", "<u4"), ("address", "<u8"), ("index", "<u4")])
_HEAP = struct.Struct("<4sB3xQ")  # signature, version, size of the collection with this header
_OBJECT = struct.Struct("<HH4xQ")  # index, references to it, size of the data behind
ALIGNMENT = 8


def values(dataset: h5py.Dataset, rows: int) -> Iterator[bytes]:
    """The first `rows` values of a one-dimensional dataset of variable-length type, of items of one byte.
    ValueError where the file's bytes contradict each other."""
    plist = dataset.file.id.get_create_plist()
    filters = dataset.id.get_create_plist().get_nfilters()
    if filters or plist.get_sizes() != (8, 8) or plist.get_userblock():
        yield from (bytes(value) for value in dataset[:rows])
        return
    with open(dataset.file.filename, "rb") as file:
        address, objects = None, {}
        for length, where, index in _references(dataset, file, rows).tolist():
            if length and where != address:
                address, objects = where, _collection(file, where)
            value = objects.get(index, b"") if length else b""
            if len(value) < length:
                raise ValueError(f"object {index} of the heap at {where} has {len(value)} bytes of {length}")
            yield value[:length]


def _references(dataset: h5py.Dataset, file: BinaryIO, rows: int) -> np.ndarray:
    if dataset.chunks is None:
        start = dataset.id.get_offset()
        return _array(_bytes(file, start, rows * REFERENCE.itemsize) if start is not None else b"", rows)
    found = []
    for start in range(0, rows, dataset.chunks[0]):
        count = min(dataset.chunks[0], rows - start)
        chunk = dataset.id.get_chunk_info_by_coord((start,))
        if chunk.byte_offset is None:
            raise ValueError(f"no chunk at row {start}")
        found.append(_array(_bytes(file, chunk.byte_offset, count * REFERENCE.itemsize), count))
    return np.concatenate(found)


def _array(content: bytes, rows: int) -> np.ndarray:
    return np.frombuffer(content, REFERENCE, rows)


def _collection(file: BinaryIO, address: int) -> dict[int, bytes]:
    """Objects of the heap collection at that address, by index."""
    signature, version, size = _HEAP.unpack(_bytes(file, address, _HEAP.size))
    if signature != b"GCOL" or version != 1:
        raise ValueError(f"no heap at {address}")
    content = _bytes(file, address, size)
    objects = {}
    at = _HEAP.size
    while at + _OBJECT.size <= size:
        index, _, length = _OBJECT.unpack_from(content, at)
        at += _OBJECT.size
        if index == 0:  # what is free, to the end
            break
        if at + length > size:
            raise ValueError(f"object {index} leaves the heap at {address}")
        objects[index] = content[at : at + length]
        at += -(-length // ALIGNMENT) * ALIGNMENT
    return objects


def _bytes(file: BinaryIO, start: int, count: int) -> bytes:
    end = file.seek(0, 2)
    if not 0 <= start <= start + count <= end:
        raise ValueError(f"bytes {start} to {start + count} of a file of {end}")
    file.seek(start)
    return file.read(count)
