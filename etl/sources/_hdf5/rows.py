"""Rows of a dataset, a band of whole chunks at a time; plain chunks are unpacked here.

Dataset -> `Rows` -> rows [start, stop)

Invariant: rows equal what h5py gives, or an exception of DAMAGE says that the bytes make no sense.
"""

from __future__ import annotations

import math
import os
from itertools import product
from typing import Any

import numpy as np
from h5py import h5d, h5i, h5t, h5z
from zlib_ng import zlib_ng

from etl.sources._hdf5.dataset import DAMAGE, Dataset

BAND, BAND_ROWS = 2**20, 2**16  # bytes and rows read at once, at least one row of chunks
WIDEST_BAND = 2**28
SLACK = 2**16  # bytes by which packing may have lengthened a chunk
OWN_FILTERS = {h5z.FILTER_DEFLATE, h5z.FILTER_SHUFFLE}


class Rows:
    """Rows of a dataset, read forwards: the last band is kept, since the next slice often starts in it."""

    def __init__(self, dataset: Dataset):
        self.dataset, self.shape, self.dtype = dataset, dataset.shape, dataset.dtype
        self.filters = own_filters(dataset)
        if self.filters is not None:
            self.chunks, self.chunk_bytes = dataset.chunks, math.prod(dataset.chunks) * self.dtype.itemsize
            self.descriptor, self.places = h5i.get_file_id(dataset.id).get_vfd_handle(), places_of(dataset)
            self.corner = (0,) * (len(self.shape) - 1)
        row = max(1, math.prod(self.shape[1:]) * self.dtype.itemsize)
        self.step = dataset.chunks[0] if self.filters is not None else 1
        self.band = self.step * max(1, min(BAND // row, BAND_ROWS) // self.step)
        if min(self.band, self.shape[0]) * row > WIDEST_BAND:
            raise ValueError(f"chunks of {dataset.chunks} are too large; repack them with h5repack")
        self.kept: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> np.ndarray:
        start, stop, _ = rows.indices(self.shape[0])
        first, last = start // self.band, max(start, stop - 1) // self.band
        try:
            bands = [self._band(n) for n in range(first, last + 1)] if last - first < 2 else []
        except DAMAGE:  # in these rows, or only in their neighbours
            bands = []
        if not bands:
            start -= (skipped := start % self.step)
            return self._read(start, stop)[skipped:]
        start, stop = start - first * self.band, stop - first * self.band
        if len(bands) == 1:
            return bands[0][start:stop]
        return np.concatenate([bands[0][start:], bands[1][: stop - self.band]])

    def _band(self, number: int) -> np.ndarray:
        if self.kept is None or self.kept[0] != number:
            start = number * self.band
            self.kept = number, self._read(start, min(start + self.band, self.shape[0]))
        return self.kept[1]

    def _read(self, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop); `start` is at the edge of a chunk."""
        if self.filters is None:
            return self.dataset.read() if stop - start == self.shape[0] else self.dataset[start:stop]
        out = np.empty((stop - start, *self.shape[1:]), self.dtype)
        if not self.filters and self.chunks[1:] == self.shape[1:]:
            self._read_plain(start, out)
            return out
        for low in product(*(range(0, n, side) for n, side in zip(out.shape, self.chunks))):
            chunk = self._chunk((start + low[0], *low[1:]))
            part = out[tuple(slice(at, at + side) for at, side in zip(low, self.chunks))]
            whole = not isinstance(chunk, np.ndarray) or chunk.shape == part.shape
            part[...] = chunk if whole else chunk[tuple(map(slice, part.shape))]
        return out

    def _read_plain(self, start: int, out: np.ndarray) -> None:
        """Rows from `start` on, out of unpacked chunks of whole rows: neighbours in the file are read at once."""
        view = out.reshape(-1).view(np.uint8).data
        runs: list[list[int]] = []  # byte of the file, first byte of `out`, the one after the last
        for row in range(0, len(out), self.step):
            where, stored, _ = self.places.get((start + row, *self.corner), (None, 0, 0))
            low = row // self.step * self.chunk_bytes
            if where is None:
                out[row : row + self.step] = self.dataset.as_h5py.fillvalue
            elif stored != self.chunk_bytes:
                raise ValueError(f"the chunk of row {start + row} has {stored} bytes, expected {self.chunk_bytes}")
            elif runs and runs[-1][2] == low and runs[-1][0] + low - runs[-1][1] == where:
                runs[-1][2] = low + stored
            else:
                runs.append([where, low, low + stored])
        for where, low, high in runs:
            high = min(high, len(view))
            while low < high:
                count = os.preadv(self.descriptor, [view[low:high]], where)
                if not count:
                    raise ValueError(f"the file ends at byte {where}, in a chunk")
                where, low = where + count, low + count

    def _chunk(self, at: tuple[int, ...]) -> np.ndarray | Any:
        """The chunk that begins there, or the value that fills it where it was never written."""
        where, packed, mask = self.places.get(at, (None, 0, 0))
        if where is None:
            return self.dataset.as_h5py.fillvalue
        size = self.chunk_bytes
        if packed > size + SLACK:
            raise ValueError(f"the chunk at {at} has {packed} bytes packed, {size} unpacked")
        data = os.pread(self.descriptor, packed, where)
        for kind in reversed(self.filters or []):
            if mask == 0 and kind == h5z.FILTER_DEFLATE:
                inflate = zlib_ng.decompressobj()
                data = inflate.decompress(data, size + 1)
                if not inflate.eof:
                    raise ValueError(f"the chunk at {at} does not end")
            elif mask == 0 and len(data) == size:
                data = np.frombuffer(data, np.uint8).reshape(self.dtype.itemsize, -1).T.tobytes()
        if mask or len(data) != size:
            raise ValueError(f"the chunk at {at} has {len(data)} bytes, expected {size}")
        return np.frombuffer(data, self.dtype).reshape(self.chunks)


def places_of(dataset: Dataset) -> dict[tuple[int, ...], tuple[int, int, int]]:
    """Corner of each chunk -> where its bytes begin in the file, how many there are, which filters they skipped."""
    found = {}

    def note(chunk: h5d.StoreInfo) -> None:
        found[chunk.chunk_offset] = chunk.byte_offset, chunk.size, chunk.filter_mask

    dataset.id.chunk_iter(note)
    return found


def own_filters(dataset: Dataset) -> list[int] | None:
    """Filters of the chunks that are unpacked here, in the order of writing; None where h5py reads the dataset."""
    if dataset.chunks is None or dataset.dtype.hasobject:
        return None
    if h5i.get_file_id(dataset.id).get_create_plist().get_userblock():
        return None
    plist = dataset.properties
    filters = [plist.get_filter(n)[0] for n in range(plist.get_nfilters())]
    plain = dataset.id.get_type().equal(h5t.py_create(dataset.dtype, logical=True))
    return filters if plain and OWN_FILTERS.issuperset(filters) else None
