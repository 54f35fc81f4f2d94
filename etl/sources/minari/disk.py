"""Minari's format on disk: what metadata.json says, and arrays of one episode from main_data.hdf5.

    metadata.json -> spaces (by Minari's own JSON reader) -> leaves: one array each, with key, path and space
    episode_N/observations/PATH + space -> (T, *space.shape), strings (T,), or decoded JPEGs

Nothing is unpickled, imported or read from another file: links out of the HDF5 file are not followed.

Invariant: whatever the bytes are, the result is an array that fits its space's shape and kind, or an EpisodeError;
shapes are checked against the bytes on disk and a fixed bound before anything is read.
"""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from gymnasium import spaces
from minari.serialization import deserialize_space
from PIL import Image

from etl.sources import _hdf5, _recognition
from etl.sources.minari.tables import FORMATS, SUFFIXES, Episode, Tables
from schemas.episode import EpisodeError
from simulators import spaces as rules
from simulators.spaces import Leaf, SpaceError, is_picture, shape_of
from simulators.spaces import is_real as is_float

METADATA, DATA = "metadata.json", "main_data.hdf5"
TIMESTEP_VALUES = 65_536
IMAGE_VALUES = 2**24
EPISODE_BYTES = 2**32  # of one array, unpacked
METADATA_BYTES = 2**26
TEXT_BYTES = 4096  # of one timestep
AGAIN = "download or record the dataset again"
# What h5py, Pillow, json and numpy raise for bytes that make no sense.
DAMAGE: tuple[type[Exception], ...] = (*_hdf5.DAMAGE, AssertionError, SyntaxError, Image.DecompressionBombError)
_ID = re.compile(r"(?:[\w-]+/)*[\w-]+")


def is_id(name: str) -> bool:
    """True if it looks like (NAMESPACE/)NAME-vN and cannot lead out of a folder."""
    return _ID.fullmatch(name) is not None


def marks(input: Path) -> list[tuple[str, dict[str, Any]]]:
    """Evidence that Minari wrote a file or folder: (evidence, description) of a few metadata.json with spaces, else
    the data file that has no other name."""
    if input.is_file():
        if input.name not in (METADATA, DATA):
            return []
        input = input.parent
    files = _recognition.files_below(input)
    found: list[tuple[str, dict[str, Any]]] = []
    for path in [path for path in files if path.name == METADATA][: _recognition.FEW]:
        about = _recognition.json_of(path)
        if isinstance(about, dict) and {"observation_space", "action_space"} <= set(about):
            form = str(about.get("data_format", "hdf5"))[:20]
            found.append((f"{_recognition.below(input, path)} with spaces, data_format {form}", about))
    if not found:
        found += [(_recognition.below(input, path), {}) for path in files if path.name == DATA][:1]
    return found


def dataset_id(path: Path) -> str:
    """The id in the metadata beside a main_data.hdf5, else the name of the dataset's folder."""
    try:
        name = metadata(path).get("dataset_id")
    except EpisodeError:
        name = None
    path = path.parent if path.suffix in SUFFIXES else path
    folder = path.parents[1] if path.parent.name == "data" else path.parent
    return name if isinstance(name, str) and is_id(name) else re.sub(r"[^\w-]", "-", folder.name)


def metadata(path: Path) -> dict[str, Any]:
    """The metadata.json beside a main_data.hdf5."""
    path = (path.parent if path.suffix in SUFFIXES else path).with_name(METADATA)
    try:
        if path.exists() and not path.is_file():
            raise EpisodeError("missing file", f"{path.name} is no file; {AGAIN}")
        size = path.stat().st_size
        about = json.loads(path.read_bytes()) if size <= METADATA_BYTES else None
    except OSError as error:
        raise EpisodeError("missing file", f"{path.name} cannot be opened ({error.strerror}); {AGAIN}") from error
    except (ValueError, RecursionError) as error:
        raise EpisodeError("corrupt metadata", f"{path.name} is not JSON ({brief(error)}); {AGAIN}") from error
    if not isinstance(about, dict):
        raise EpisodeError("corrupt metadata", f"{path.name} of {size} bytes holds no description; {AGAIN}")
    form = str(about.get("data_format", "hdf5"))[:20]
    if form not in ("hdf5", *FORMATS):
        remedy = f"write the dataset again as hdf5, {' or '.join(FORMATS)}"
        raise EpisodeError("unknown format", f"data_format is '{form}'; {remedy}")
    return about


def place(folder: Path) -> Path:
    """The file for a dataset: its main_data.hdf5; where it has none, its metadata.json, episodes beside it."""
    path = folder / DATA
    try:
        tables = not path.exists() and metadata(path).get("data_format") in FORMATS
    except EpisodeError:
        tables = False
    return folder / METADATA if tables else path


def dataset_of(file: str) -> Path:
    """The `place` of the dataset that a ref's file is of."""
    path = Path(file)
    return path.parents[1] / METADATA if path.suffix in SUFFIXES else path


def opened(path: Path) -> h5py.File | Tables:
    """The episodes of a dataset, by its `place`. EpisodeError says what is wrong."""
    if path.name == METADATA:
        return Tables(path.parent, str(metadata(path).get("data_format")))
    return _hdf5.opened(path)


def space_of(about: dict[str, Any], key: str) -> spaces.Space:
    """'observation_space' or 'action_space' of the metadata."""
    if not isinstance(about.get(key), str):
        raise EpisodeError("corrupt metadata", f"no '{key}' in {METADATA}; write the dataset again with Minari 0.5")
    with damage("corrupt metadata"):
        return _deserialized(about[key])


@lru_cache(maxsize=4)
def _deserialized(text: str) -> spaces.Space:
    """The bounds of large pictures are millions of numbers in JSON: a second each time."""
    return deserialize_space(text)


def observation_leaves(about: dict[str, Any]) -> list[Leaf]:
    """The arrays of the observation space, in the order of their paths."""
    space = space_of(about, "observation_space")
    with damage("corrupt metadata"):
        leaves = rules.leaves(space)
        for leaf in leaves:
            size, most = math.prod(shape_of(leaf.space)), IMAGE_VALUES if is_picture(leaf.space) else TIMESTEP_VALUES
            if not 0 < size <= most:
                raise EpisodeError("unsupported space", f"'{leaf.key}' has {size} values; 1 to {most} can be read")
    return leaves


def where(leaf: Leaf) -> tuple[str, ...]:
    """Path of a leaf's array below `observations`."""
    return tuple(f"_index_{step}" if isinstance(step, int) else step for step in leaf.path)


def integers(key: str, space: spaces.Space, stored: np.ndarray) -> np.ndarray:
    """Integers (T, ...) int64. EpisodeError where one lies outside the space."""
    low, count = rules.bounds(space)
    values = stored.astype(np.int64)
    outside = (values - low < 0) | (values - low >= count)
    if outside.any():
        raise EpisodeError("out of range", f"'{key}' leaves its space at timestep {np.argwhere(outside)[0][0]}")
    return values


@contextmanager
def damage(reason: str = "corrupt HDF5") -> Iterator[None]:
    """Turns what a library raises for damaged bytes into an EpisodeError of that reason."""
    try:
        yield
    except EpisodeError:
        raise
    except SpaceError as error:
        raise EpisodeError(error.reason, str(error)) from None
    except DAMAGE as error:
        raise EpisodeError(reason, f"{brief(error)}; {AGAIN}") from error


def brief(error: BaseException) -> str:
    """One line, of the innermost reason."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())[:200] or type(error).__name__


def episode_group(file: h5py.File | Tables, number: int) -> h5py.Group | Episode:
    if isinstance(file, Tables):
        return file.episode(number)
    name = f"episode_{number}"
    group = file[name] if _hdf5.holds(file, name) else None
    if not isinstance(group, h5py.Group):
        raise EpisodeError("missing group", f"no group '{name}'; {AGAIN}")
    return group


def column(group: h5py.Group | Episode, key: str, rows: int | None = None) -> np.ndarray:
    """rewards, terminations or truncations: (T,), of `rows` rows where given, never empty."""
    if isinstance(group, Episode):
        return group.column(key, rows)
    node = _node(group, (key,))
    if node.dtype.kind not in "fiub":
        raise EpisodeError("wrong dtype", f"'{key}' is {node.dtype}; {AGAIN}")
    if node.shape[1:] not in ((), (1,)):
        raise EpisodeError("wrong shape", f"'{key}' is {node.shape}, expected (T,)")
    if node.shape[0] == 0:
        raise EpisodeError("empty", f"no row in '{key}'")
    if rows is not None and node.shape[0] != rows:
        raise EpisodeError("wrong length", f"'{key}' has {node.shape[0]} rows, expected {rows}; {AGAIN}")
    if 8 * node.shape[0] > EPISODE_BYTES:
        raise EpisodeError("too large", f"'{key}' has {node.shape[0]} rows; record shorter episodes")
    return _hdf5.Rows(node)[:].reshape(-1)


def rows_of(
    group: h5py.Group | Episode, path: tuple[str, ...], space: spaces.Space, T: int, rows: int, width: int
) -> np.ndarray:
    """The first T of a dataset's `rows` rows. `width`: values of a timestep in the field that it becomes."""
    if isinstance(group, Episode):
        return group.rows_of(path, space, T, width)
    node, name, shape, picture = _node(group, path), "/".join(path), shape_of(space), is_picture(space)
    if node.shape[0] != rows:
        raise EpisodeError("wrong length", f"'{name}' has {node.shape[0]} rows, expected {rows}; {AGAIN}")
    coded = picture and not is_float(space)
    if T * max(math.prod(shape) * (1 if coded else 8), width) > EPISODE_BYTES:
        raise EpisodeError("too large", f"'{name}' has {T} rows of {shape}; record shorter episodes")
    if isinstance(space, spaces.Text):
        return _strings(node, name, T)
    if coded and node.ndim == 1 and h5py.check_vlen_dtype(node.dtype) == np.uint8:
        return np.stack([jpeg(code.tobytes(), shape, name) for code in _hdf5.values(node, T)])
    if coded and node.ndim == 2 and shape != node.shape[1:] and node.dtype == np.uint8:
        return np.stack([jpeg(code.tobytes(), shape, name) for code in _hdf5.Rows(node)[:T]])
    if node.dtype.kind not in ("f" if is_float(space) else "iub") or (coded and node.dtype != np.uint8):
        raise EpisodeError("wrong dtype", f"'{name}' is {node.dtype}, its space {space.dtype}")
    if node.shape[1:] != shape and math.prod(shape) * math.prod(node.shape[1:]) != 1:
        raise EpisodeError("wrong shape", f"'{name}' is {node.shape}, expected {(rows, *shape)}")
    return _hdf5.Rows(node)[:T].reshape(T, *shape)


def _node(group: h5py.Group, path: tuple[str, ...]) -> _hdf5.Dataset:
    """The dataset at that path, in this very file, with all the bytes that its shape says."""
    node = _hdf5.dataset(group, *path)
    if node is None:
        raise EpisodeError("missing key", f"no '{'/'.join(path)}' in {group.name}; {AGAIN}")
    return node


def _strings(node: _hdf5.Dataset, name: str, T: int) -> np.ndarray:
    kind = h5py.check_string_dtype(node.dtype)
    if kind is None or node.ndim != 1:
        raise EpisodeError("wrong dtype", f"'{name}' is {node.dtype} {node.shape}, expected a string a row")
    lines = []
    for line in _hdf5.values(node, T):
        if len(line) > TEXT_BYTES:
            raise EpisodeError("too large", f"'{name}' holds a text of more than {TEXT_BYTES} bytes")
        lines.append(bytes(line).decode("utf-8"))
    return np.array(lines, np.str_)


def jpeg(code: bytes, shape: tuple[int, ...], name: str) -> np.ndarray:
    with damage("corrupt JPEG"), Image.open(io.BytesIO(code), formats=["JPEG"]) as image:
        stored = (image.height, image.width, len(image.getbands()))
        if stored != (*shape[:2], shape[2] if len(shape) == 3 else 1):
            raise EpisodeError("wrong shape", f"'{name}' holds a picture of {stored}, expected {shape}")
        return np.asarray(image, np.uint8).reshape(shape)
