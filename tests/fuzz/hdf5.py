"""HDF5 files whose bytes are sound and whose meaning is not: keys, types, shapes, links, storage, attributes.

Invariant: every mutation is written by libhdf5 itself, so it passes all of its own checks of form.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from random import Random
from typing import Any

import h5py
import numpy as np
from h5py import h5d, h5s, h5t

from tests.fuzz.mutate import NAMES, NUMBERS, Tree

COUNTS = [0, 1, 2, 2**16, 2**20, 2**24, 2**25, 2**27, 2**31, 2**32 + 1, 2**40, 2**62]
DTYPES: list[Any] = ["f2", "f8", ">f4", "g", "i1", "i8", ">u8", "?", "c8", "S4", "S0", "V8", "3f4", "(1048576,)f4"]
DTYPES += [np.dtype([("a", "f4"), ("b", "i1")]), h5py.vlen_dtype(h5py.string_dtype())]
DTYPES += [h5py.string_dtype(), h5py.string_dtype("ascii", 3), h5py.ref_dtype, h5py.regionref_dtype]
DTYPES += [h5py.vlen_dtype("f4"), h5py.enum_dtype({"a": 0, "b": 1}, "i4")]
DTYPES += [h5py.opaque_dtype(np.dtype("M8[ns]"))]
LOW_TYPES = [h5t.STD_B8LE, h5t.STD_B64BE, h5t.UNIX_D32LE, h5t.IEEE_F16BE]
for _base, _fields in [(h5t.IEEE_F32LE, (8, 4, 4, 0, 4)), (h5t.IEEE_F64LE, (63, 40, 23, 0, 40))]:
    LOW_TYPES.append(_base.copy())
    LOW_TYPES[-1].set_fields(*_fields)  # sign, exponent, mantissa as no processor has them
ATTRIBUTES = [b"Hopper-v4", "Hopper-v4", "", b"\xff\xfe", b"a\0b", "line\nline", "x" * 60_000, 3, -0.5, np.nan, True]
ATTRIBUTES += [[], ["Hopper-v4", "Ant-v4"], np.zeros((2, 2)), h5py.Empty("f"), h5py.Empty("S10"), 1j, "ALE/Pong-v5"]
VALUES = [np.nan, np.inf, -np.inf, 1e38, -1e300, 1e-45, -0.0, 0, 1, 2, -1, 255, 2**31]
OUTSIDE = ["missing.hdf5", "pipe", "/dev/zero", ".", "../log.hdf5", "log.hdf5", "x" * 5000]


def hdf5(tree: Tree, name: str, rng: Random) -> str:
    """One mutation of the file `name`; beside it, now and then, a pipe that links may lead to."""
    how = rng.choice(list(REPLACE) * 3 + [claim_together, claim_together, claim_together, extra, attribute, attribute])
    with h5py.File.in_memory(tree[name]) as file:
        paths: list[str] = []
        file.visititems(lambda path, node: paths.append(path) if isinstance(node, h5py.Dataset) else None)
        path = rng.choice(sorted(paths))
        if isinstance(how, str):
            old = file[path][...] if file[path].size < 10**6 else np.zeros((2, 2), np.float32)
            del file[path]
            REPLACE[how](file, path, old, rng)
        else:
            how(file, path, rng)
        file.flush()
        tree[name] = file.id.get_file_image()
    if rng.random() < 0.2:
        tree["pipe"] = "fifo"
    return f"{how if isinstance(how, str) else how.__name__} {path}"


def extra(file: h5py.File, path: str, rng: Random) -> None:
    """Another key, or a copy of a group or dataset under another name."""
    parent, new = (
        path.rpartition("/")[0],
        rng.choice(["timeouts", "metadata", "x" * 5000, "episode_99999999999", *NAMES]),
    )
    new = f"{parent}/{new}" if rng.random() < 0.5 else new
    file.copy(path.split("/")[0], file, new) if rng.random() < 0.5 else file.copy(path, file, new)


def attribute(file: h5py.File, path: str, rng: Random) -> None:
    key = rng.choice(["env_id", "env_id", "env_id", "total_episodes", "seed"])
    rng.choice([file, file, file[path]]).attrs[key] = rng.choice([*ATTRIBUTES, rng.choice(NUMBERS)])


def claim_together(file: h5py.File, path: str, rng: Random) -> None:
    """The same number of rows for all datasets of a group, with no storage behind it, or behind one of them."""
    rows, parent, kept = rng.choice(COUNTS), file[path].parent, rng.choice([None, path])
    paths: list[str] = []
    parent.visititems(
        lambda key, node: paths.append(node.name) if isinstance(node, h5py.Dataset) and node.ndim else None
    )
    for each in paths:
        if each != f"/{kept}":
            shape, dtype = (rows, *file[each].shape[1:]), file[each].dtype
            del file[each]
            _claim(file, each, shape, dtype, rng)


def _claim(file: h5py.File, path: str, shape: tuple[int, ...], dtype: np.dtype, rng: Random) -> None:
    chunks = tuple(max(1, min(n, 2 ** rng.randrange(28))) for n in shape)
    layouts: list[dict[str, Any]] = [
        {},
        {"chunks": True},
        {"chunks": True, "compression": "gzip"},
        {"fillvalue": 1},
        {"chunks": chunks},
    ]
    file.create_dataset(path, shape, dtype, **rng.choice(layouts))


def _claimed(file: h5py.File, path: str, old: np.ndarray, rng: Random) -> None:
    shape = tuple(rng.choice([*old.shape, *COUNTS]) for _ in range(rng.choice((1, 2, 2, 3))))
    _claim(file, path, shape, old.dtype, rng)


def _group(file: h5py.File, path: str, old: np.ndarray, rng: Random) -> None:
    file[path] = rng.choice([lambda: np.dtype("f4"), lambda: file, lambda: file.create_group("g", track_order=True)])()


def _retyped(file: h5py.File, path: str, old: np.ndarray, rng: Random) -> None:
    """Another type, with the values where they convert."""
    if rng.random() < 0.3:
        h5d.create(file.id, path.encode(), rng.choice(LOW_TYPES), h5s.create_simple(old.shape), _timeless())
        return
    dataset = file.create_dataset(path, old.shape, rng.choice(DTYPES))
    if rng.random() < 0.5:
        dataset[...] = old


def _timeless() -> h5py.h5p.PropDCID:
    """Without the time of day, which would make each file another one."""
    layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    layout.set_obj_track_times(False)
    return layout


def _reshaped(file: h5py.File, path: str, old: np.ndarray, rng: Random) -> None:
    rows, inner = len(old), old.shape[1:]
    shapes: list[tuple[int, ...]] = [(), (0,), (*old.shape, 1), (1, *old.shape), (old.size,), (1,) * 32, (rows, 0)]
    shapes += [(0, *inner), (rows - 1, *inner), (rows + 1, *inner), (rows, 1, 2), (rows, 7)]
    file[path] = h5py.Empty(old.dtype) if rng.random() < 0.1 else np.resize(old, rng.choice(shapes))


def _chunk(file: h5py.File, path: str, old: np.ndarray, rng: Random) -> None:
    """A stored chunk whose bytes are not what its size says."""
    sizes = tuple(max(1, rng.choice((n, n, 1, 2 * n, 2**20))) for n in old.shape)
    shape = tuple(max(a, b) for a, b in zip(old.shape, sizes)) if rng.random() < 0.5 else old.shape
    kinds: list[dict[str, Any]] = [{}, {"compression": "gzip"}, {"compression": "lzf"}, {"fletcher32": True}]
    packed = rng.choice([*kinds, {"scaleoffset": 4}])
    new = file.create_dataset(path, shape, old.dtype, chunks=sizes, maxshape=(None,) * len(shape), **packed)
    content = [
        b"",
        b"\0",
        old.tobytes(),
        rng.randbytes(50),
        bytes(5000),
        zlib.compress(b""),
        zlib.compress(bytes(10**6)),
    ]
    new.id.write_direct_chunk((0,) * len(shape), rng.choice(content), rng.choice((0, 0, 1, 0xFFFF)))


def _poisoned(file: h5py.File, path: str, old: np.ndarray, rng: Random) -> None:
    """Values at the ends of what their type holds."""
    flat = old.reshape(-1)
    for _ in range(1 << rng.randrange(6)):
        flat[rng.randrange(flat.size)] = rng.choice(VALUES)
    file[path] = old if rng.random() < 0.7 else np.full_like(old, rng.choice(VALUES))


def _linked(file: h5py.File, path: str, old: np.ndarray, rng: Random) -> None:
    """A link, or a loop of links, in place of a dataset or of its group."""
    top, inside = path.split("/")[0], rng.choice(["missing", f"/{path}", "/", "observations", "../..", "x/" * 5000])
    if top in file and rng.random() < 0.5:
        del file[top]
        path = top
    file[path] = h5py.ExternalLink(rng.choice(OUTSIDE), inside) if rng.random() < 0.5 else h5py.SoftLink(inside)


def _elsewhere(file: h5py.File, path: str, old: np.ndarray, rng: Random) -> None:
    """A virtual dataset, or one whose bytes lie in another file."""
    outside = rng.choice(OUTSIDE)
    if rng.random() < 0.5:
        place = [(outside, rng.choice((0, 2**40)), h5py.h5f.UNLIMITED)]
        file.create_dataset(path, old.shape, old.dtype, external=place)
    else:
        layout, space = _timeless(), h5s.create_simple(old.shape)
        layout.set_virtual(space, outside.encode(), rng.choice([path, "rewards"]).encode(), space)
        h5d.create(file.id, path.encode(), h5t.py_create(old.dtype, logical=True), space, layout)


# What comes in the place of a dataset that was taken away.
REPLACE: dict[str, Callable[[h5py.File, str, np.ndarray, Random], None]] = {
    "nothing": lambda file, path, old, rng: None, "group": _group, "retyped": _retyped, "reshaped": _reshaped,
    "claimed": _claimed, "chunk": _chunk, "poisoned": _poisoned, "linked": _linked, "elsewhere": _elsewhere,
}  # fmt: skip
