"""HDF5 files of unknown origin: tried first by a process that may die of them, then read a band of rows at a time.

files -> `tried`: a child process opens each and touches all that describes its contents -> what is wrong with it
dataset -> `Rows`: bands of whole chunks, unpacked here -> rows [start, stop)

libhdf5 believes what it reads: damaged bytes can crash it, keep it busy forever or make it ask for any memory. So
everything that it parses is parsed once in the child, under a limit of time and of memory. Chunks of the plain kind
(native types, gzip, shuffle) are not libhdf5's to unpack: that is where a chunk shorter than its shape kills it, and
doing it here is twice as fast. Other filters, and values of variable length, are read by libhdf5, in the child too.

Invariant: rows equal what h5py gives, or an exception of DAMAGE says that the bytes make no sense.
"""

from __future__ import annotations

import math
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from h5py import h5a, h5d, h5g, h5i, h5l, h5o, h5s, h5t, h5z
from zlib_ng import zlib_ng

from schemas.episode import EpisodeError

AGAIN = "download or record the file again"
# What h5py, numpy and zlib raise for bytes that make no sense.
DAMAGE: tuple[type[Exception], ...] = (OSError, EOFError, LookupError, ValueError, TypeError, AttributeError)
DAMAGE += (RuntimeError, ArithmeticError, MemoryError, zlib_ng.error)
DEFLATE_RATIO = 1100  # gzip packs 1032 times at best
BAND, BAND_ROWS = 2**20, 2**16  # bytes and rows read at once, at least one row of chunks
WIDEST_BAND = 2**28
ADDRESSES = 2**32  # bytes of address space of the child
SECONDS, RATE, NODES = 20, 2**24, 100  # of the child: for a file, for its bytes, for what lies in it
SLACK = 2**16  # bytes by which packing may have lengthened a chunk
VALUES, VALUE_BYTES = 64, 2**24  # of variable length: so many are read at once, of so many bytes
USUAL = tuple((h5t.py_create(np.dtype(name)), np.dtype(name)) for name in ("<f4", "<f8", "<i8", "<i4", "|u1"))
NUMBERS = (h5t.INTEGER, h5t.FLOAT, h5t.ENUM)
OWN_FILTERS = {h5z.FILTER_DEFLATE, h5z.FILTER_SHUFFLE}


def tried(paths: Iterable[Path]) -> dict[Path, EpisodeError]:
    """What is wrong with the files that cannot be opened, or that killed the process that opened them."""
    found: dict[Path, EpisodeError] = {}
    waiting = []
    for path in dict.fromkeys(paths):
        if (error := _refused(path)) is not None:
            found[path] = error
        else:
            waiting.append(path)
    while waiting:
        # -m finds this module wherever the parent did
        child = subprocess.run(
            [sys.executable, "-m", "etl.sources._hdf5"],
            input=b"\0".join(map(os.fsencode, waiting)),
            capture_output=True,
            env=os.environ
            | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONIOENCODING": "utf-8:replace"},
        )
        done = child.stdout.decode(errors="replace").splitlines()
        for path, line in zip(waiting, done):
            if line != "fine":
                found[path] = corrupt(line)
        if len(done) == len(waiting):
            break
        if child.returncode >= 0:
            raise RuntimeError(f"{waiting[len(done)]}: {child.stderr.decode(errors='replace').strip()[-300:]}")
        name = signal.Signals(-child.returncode).name
        why = "reading it does not end" if name == "SIGALRM" else f"reading it kills the process that does ({name})"
        found[waiting[len(done)]] = corrupt(why)
        waiting = waiting[len(done) + 1 :]
    return found


def opened(path: Path) -> h5py.File:
    """The file, which was tried before. EpisodeError says what is wrong with it now."""
    try:
        return h5py.File(path)
    except DAMAGE as error:
        raise _refused(path) or corrupt(str(error) or type(error).__name__) from error


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
    """What to say of a file or a dataset whose bytes make no sense, `why` of h5py's or our own."""
    if "unable to lock file" in why:
        return EpisodeError("locked HDF5", "another process has it open for writing; wait until it has closed the file")
    if "already open for write" in why or "consistency flags" in why:
        remedy = "let its writer close it; if the writer was killed, repair a copy by h5clear -s"
        return EpisodeError("unfinished HDF5", f"it was not closed after writing; {remedy}")
    reason = "truncated HDF5" if "truncated file" in why else "corrupt HDF5"
    return EpisodeError(reason, f"{' '.join(why.split())[:200]}; {AGAIN}")


def _refused(path: Path) -> EpisodeError | None:
    """What is wrong before any parsing."""
    try:
        if not path.is_file():
            return EpisodeError("missing file", f"{path.name} is no file; {AGAIN}")
        if path.stat().st_size == 0:
            return EpisodeError("empty", f"0 bytes; {AGAIN}")
        if not h5py.is_hdf5(path):
            return EpisodeError("not HDF5", f"no HDF5 signature; {AGAIN}")
    except OSError as error:
        return EpisodeError("missing file", f"{path.name} cannot be opened ({error.strerror}); {AGAIN}")
    return None


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
        """Whether its values lie in this very file one after the other, unpacked."""
        return self.id.get_offset() is not None

    @property
    def chunks(self) -> Any:
        """Sides of a chunk; None where it is not stored in chunks."""
        if self.plain or self.properties.get_layout() != h5d.CHUNKED:
            return None
        return self.properties.get_chunk()

    @property
    def elsewhere(self) -> bool:
        """Whether its values lie in other files or datasets."""
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
    """Whether an object of a file is a dataset with rows in this very file. EpisodeError where the bytes of the one
    called `name` cannot be all there."""
    if not isinstance(node, Dataset) or not (shape := node.shape) or node.elsewhere:
        return False
    width = node.id.get_type().get_size() if node.dtype.hasobject else node.dtype.itemsize
    packed = not node.plain and node.properties.get_nfilters() > 0
    if math.prod(shape) * width > node.id.get_storage_size() * (DEFLATE_RATIO if packed else 1):
        raise EpisodeError("wrong length", f"'{name}' has fewer bytes than its shape {shape}; {AGAIN}")
    return True


def holds(group: h5py.Group, key: str) -> bool:
    """Whether the group itself holds something of that name, not a link to elsewhere."""
    links, name = group.id.links, key.encode()
    try:
        return links.get_info(name).type == h5l.TYPE_HARD
    except (KeyError, RuntimeError):  # what it raises says nothing
        if links.exists(name):
            raise
        return False


def member(group: h5py.Group, key: str) -> Dataset | h5py.Group | None:
    """What a group holds under that name."""
    found = h5o.open(group.id, key.encode())
    if isinstance(found, h5d.DatasetID):
        return Dataset(found)
    return h5py.Group(found) if isinstance(found, h5g.GroupID) else None


def values(dataset: Dataset, rows: int) -> Iterator[Any]:
    """The first `rows` values of variable length, a few in memory at a time."""
    for start in range(0, rows, VALUES):
        yield from dataset[start : min(start + VALUES, rows)]


class Rows:
    """Rows of a dataset, read forwards: the last band is kept, since the next slice often starts in it."""

    def __init__(self, dataset: Dataset):
        self.dataset, self.shape, self.dtype = dataset, dataset.shape, dataset.dtype
        self.filters = _own_filters(dataset)
        if self.filters is not None:
            self.chunks, self.chunk_bytes = dataset.chunks, math.prod(dataset.chunks) * self.dtype.itemsize
            self.descriptor, self.places = h5i.get_file_id(dataset.id).get_vfd_handle(), _places(dataset)
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


def _places(dataset: Dataset) -> dict[tuple[int, ...], tuple[int, int, int]]:
    """Corner of each chunk -> where its bytes begin in the file, how many there are, which filters they skipped."""
    found = {}

    def note(chunk: h5d.StoreInfo) -> None:
        found[chunk.chunk_offset] = chunk.byte_offset, chunk.size, chunk.filter_mask

    dataset.id.chunk_iter(note)
    return found


def _own_filters(dataset: Dataset) -> list[int] | None:
    """Filters of the chunks that are unpacked here, in the order of writing; None where h5py reads the dataset."""
    if dataset.chunks is None or dataset.dtype.hasobject:
        return None
    if h5i.get_file_id(dataset.id).get_create_plist().get_userblock():
        return None
    plist = dataset.properties
    filters = [plist.get_filter(n)[0] for n in range(plist.get_nfilters())]
    plain = dataset.id.get_type().equal(h5t.py_create(dataset.dtype, logical=True))
    return filters if plain and OWN_FILTERS.issuperset(filters) else None


def _touch(path: Path) -> None:
    """Everything that libhdf5 parses when the file is read, once."""
    with h5py.File(path) as file:
        list(file.attrs.items())
        seen: list[str] = []
        file.visit(seen.append)
        _allow(path, len(seen))
        for name in seen:
            try:
                if (node := member(file, name)) is None:  # a type that has a name
                    continue
                if h5a.get_num_attrs(node.id):
                    list(h5py.AttributeManager(node).items())
                if isinstance(node, Dataset) and node.plain and node.id.get_type().get_class() in NUMBERS:
                    continue
                if stores_rows(node, name):  # links to elsewhere are not visited
                    _touch_data(node)
            except MemoryError:
                raise
            except DAMAGE:  # the reader meets it too, if it reads this node at all
                continue


def _touch_data(node: Dataset) -> None:
    if node.size == 0:  # of any number of rows
        return
    if h5py.check_vlen_dtype(node.dtype) is not None or h5py.check_string_dtype(node.dtype) is not None:
        if any(len(item) > VALUE_BYTES for value in values(node, len(node)) for item in np.atleast_1d(value)):
            raise MemoryError
    elif node.chunks is not None and _own_filters(node) is not None:
        _places(node)
    elif node.chunks is not None:
        for start in range(0, len(node), node.chunks[0]):
            np.asarray(node[start : start + node.chunks[0]])


def _allow(path: Path, nodes: int = 0) -> None:
    """The process has so many seconds from now."""
    signal.alarm(SECONDS + path.stat().st_size // RATE + nodes // NODES)


def main() -> None:
    """The child: paths on stdin, a verdict a line on stdout. Dies of what it reads."""
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESSES, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for name in sys.stdin.buffer.read().split(b"\0"):
        path = Path(os.fsdecode(name))
        _allow(path)
        try:
            _touch(path)
        except MemoryError:
            print("asks for more memory than it can hold", flush=True)
        except DAMAGE as error:
            print(" ".join(str(error).split())[:200] or type(error).__name__, flush=True)
        else:
            print("fine", flush=True)


if __name__ == "__main__":
    main()
