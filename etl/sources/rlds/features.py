"""The steps of an RLDS dataset by its features.json, and an example's lists as arrays of it.

features.json -> Leaf: key ('observation/image'), kind, dtype, shape of one step
tf.train.Example's lists + Leaf -> a Column: numbers (T, *shape), texts (T,), pictures (T, H, W, C) decoded on demand

Nested lists (KEY/ragged_flat_values, KEY/ragged_row_lengths_0) are read where all rows are of one length.

Invariant: a column has the leaf's shape, or EpisodeError says what is wrong; nothing is decoded before it is asked for.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from etl.sources import _pictures
from etl.sources._tfrecord import AGAIN, Values
from schemas.episode import EpisodeError

STEPS = "steps/"
DEEPEST = 32
EPISODE_BYTES = 2**32
FLAT, LENGTHS = "/ragged_flat_values", "/ragged_row_lengths_0"
INTEGERS = ("bool", "uint8", "int8", "uint16", "int16", "int32", "uint32", "int64", "uint64")


@dataclass(frozen=True)
class Leaf:
    """One array of a step. `key`: its path below 'steps'; a side of `shape` is -1 where features.json leaves it open.
    `encoding`: how a tensor's bytes are packed, '' where it is a list of numbers."""

    key: str
    kind: Literal["number", "text", "picture"]
    dtype: str
    shape: tuple[int, ...]
    encoding: str = ""


def leaves_of(features: Any) -> list[Leaf]:
    """The arrays of one step, by key. EpisodeError where a features.json describes no steps."""
    try:
        steps = features["featuresDict"]["features"]["steps"]
        step = steps["sequence"]["feature"] if "sequence" in steps else steps["dataset"]["feature"]
        return sorted(_leaves(step, ""), key=lambda leaf: leaf.key.split("/"))
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        why = f"no '{error.args[0]}'" if isinstance(error, KeyError) else str(error)[:120]
        raise EpisodeError("corrupt metadata", f"features.json describes no RLDS steps ({why}); {AGAIN}") from error


def _leaves(about: dict[str, Any], key: str, rows: tuple[int, ...] = ()) -> Iterator[Leaf]:
    """`rows`: sides of the sequences around it."""
    if key.count("/") > DEEPEST or len(rows) > DEEPEST:
        raise ValueError("nested too deeply")
    if "featuresDict" in about:
        for name, feature in about["featuresDict"]["features"].items():
            yield from _leaves(feature, f"{key}/{name}".strip("/"), rows)
    elif "sequence" in about:
        length = int(about["sequence"].get("length") or -1)
        yield from _leaves(about["sequence"]["feature"], key, (*rows, length if length > 0 else -1))
    elif "image" in about:
        image = about["image"]
        yield Leaf(key, "picture", str(image.get("dtype") or "uint8"), (*rows, *_shape(image)))
    elif "text" in about:
        yield Leaf(key, "text", "string", rows)
    elif "classLabel" in about:
        yield Leaf(key, "number", "int64", rows)
    elif "tensor" in about:
        tensor = about["tensor"]
        dtype, shape, encoding = str(tensor.get("dtype", "float32")), _shape(tensor), str(tensor.get("encoding") or "")
        kind: Literal["number", "text"] = "text" if dtype in ("string", "object") else "number"
        yield Leaf(key, kind, dtype, (*rows, *shape), "" if encoding.lower() == "none" else encoding.lower())
    # audio, video, bounding boxes and the like are no part of an observation that is read


def _shape(about: dict[str, Any]) -> tuple[int, ...]:
    sides = (about.get("shape") or {}).get("dimensions") or ()
    shape = tuple(int(side) for side in sides)
    if len(shape) > 8 or any(side < -1 for side in shape):
        raise ValueError(f"a tensor of shape {shape}")
    return shape


class Given:
    """The lists of one example, as columns."""

    def __init__(self, lists: Mapping[str, Values]):
        self.lists = lists

    def has(self, key: str) -> bool:
        """True if there is such an array, of fixed or of ragged rows."""
        return STEPS + key in self.lists or STEPS + key + FLAT in self.lists

    def numbers(self, leaf: Leaf, steps: int | None = None) -> np.ndarray:
        """(T, *shape) of a leaf of numbers; T as the list has it where `steps` is None."""
        values = self._list(leaf)
        if isinstance(values, list):
            if values and not leaf.encoding:
                raise EpisodeError("wrong dtype", f"'{leaf.key}' holds bytes, expected {leaf.dtype}; {AGAIN}")
            values = self._unpacked(leaf, values)
        shape = self._filled(leaf, len(values), steps)
        if leaf.dtype == "bool":
            values = values != 0
        elif leaf.dtype in INTEGERS and values.dtype.kind == "f":
            raise EpisodeError("wrong dtype", f"'{leaf.key}' holds floats, expected {leaf.dtype}; {AGAIN}")
        elif leaf.dtype.startswith(("float", "bfloat")) and values.dtype.kind != "f":
            raise EpisodeError("wrong dtype", f"'{leaf.key}' holds integers, expected {leaf.dtype}; {AGAIN}")
        return values.reshape(shape)

    def texts(self, leaf: Leaf, steps: int) -> np.ndarray:
        """(T,) strings."""
        values = self._list(leaf)
        if not isinstance(values, list) or len(values) != steps:
            raise EpisodeError("wrong length", f"'{leaf.key}' has {len(values)} rows, expected {steps} texts; {AGAIN}")
        try:
            return np.array([line.decode() for line in values], np.str_)
        except UnicodeDecodeError as error:
            raise EpisodeError("not UTF-8", f"'{leaf.key}' is no text ({error.reason}); {AGAIN}") from None

    def pictures(self, leaf: Leaf, steps: int) -> Pictures:
        """(T, H, W, C) uint8, decoded when rows are asked for."""
        values = self._list(leaf)
        if not isinstance(values, list) or len(values) != steps:
            raise EpisodeError(
                "wrong length", f"'{leaf.key}' has {len(values)} rows, expected {steps} pictures; {AGAIN}"
            )
        shape = leaf.shape
        if -1 in shape:
            shape = _pictures.size_of(values[0], leaf.key)
        return Pictures(leaf.key, values, shape)

    def _list(self, leaf: Leaf) -> Values:
        name = STEPS + leaf.key
        if name in self.lists:
            return self.lists[name]
        if name + FLAT not in self.lists:
            raise EpisodeError("missing key", f"no '{name}' in an example; {AGAIN}")
        lengths = self.lists.get(name + LENGTHS, [])
        if len({int(length) for length in lengths if not isinstance(length, bytes)}) != 1:
            raise EpisodeError("wrong shape", f"'{leaf.key}' has rows of several lengths; leave it out by "
                               "--observation-keys")  # fmt: skip
        return self.lists[name + FLAT]

    def _unpacked(self, leaf: Leaf, values: list[bytes]) -> np.ndarray:
        """Tensors that are stored as bytes, packed by zlib or plain."""
        size = math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
        if size < 0 or size * len(values) > EPISODE_BYTES:
            raise EpisodeError("too large", f"'{leaf.key}' is {leaf.dtype} {leaf.shape} a step; leave it out")
        parts = []
        for data in values:
            try:
                data = zlib.decompressobj().decompress(data, size + 1) if leaf.encoding == "zlib" else data
            except zlib.error as error:
                raise EpisodeError("corrupt Example", f"'{leaf.key}': {error}; {AGAIN}") from None
            if len(data) != size:
                raise EpisodeError(
                    "wrong shape", f"'{leaf.key}' has {len(data)} bytes per step, expected {size}; {AGAIN}"
                )
            parts.append(np.frombuffer(data, leaf.dtype))
        return np.concatenate(parts) if parts else np.empty(0, leaf.dtype)

    def _filled(self, leaf: Leaf, count: int, steps: int | None) -> tuple[int, ...]:
        """(T, *shape) of so many values; a side that features.json leaves open is what remains."""
        known, open_sides = math.prod(side for side in leaf.shape if side >= 0), leaf.shape.count(-1)
        if steps is None and not open_sides:
            steps = count // known if known else 0
        if steps and open_sides == 1 and known and count % (steps * known) == 0:
            return steps, *(count // (steps * known) if side < 0 else side for side in leaf.shape)
        if steps is None or open_sides or count != steps * known:
            detail = f"'{leaf.key}' has {count} values in {steps} steps, features.json says {leaf.shape} each"
            raise EpisodeError("wrong shape", f"{detail}; {AGAIN}")
        return steps, *leaf.shape


class Pictures:
    """Coded pictures as a column (T, H, W, C) uint8."""

    dtype = np.dtype(np.uint8)

    def __init__(self, key: str, codes: list[bytes], shape: tuple[int, ...]):
        if len(shape) != 3:
            raise EpisodeError("wrong shape", f"'{key}' is {shape} a step, and no picture; leave it out")
        self.key, self.codes, self.side = key, codes, (shape[0], shape[1], shape[2])

    @property
    def shape(self) -> tuple[int, ...]:
        return len(self.codes), *self.side

    def __getitem__(self, rows: slice) -> np.ndarray:
        codes = self.codes[rows]
        out = np.empty((len(codes), *self.side), np.uint8)
        for row, code in enumerate(codes):
            out[row] = _pictures.decode(code, self.key, self.side)
        return out
