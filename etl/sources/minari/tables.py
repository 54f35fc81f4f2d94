"""Minari's episodes in Arrow and Parquet files, as the groups of its HDF5 file look to the reader.

data/EPISODE/part-0.{arrow,parquet}   observations (struct, as the space is), actions, rewards, terminations,
                                      truncations: T + 1 rows, all but observations padded by the last one
data/EPISODE/metadata.json            id, total_steps
    -> Tables (names of episodes) -> Episode: arrays by path and space

Box, MultiDiscrete and MultiBinary are fixed-size lists, pictures may be JPEG bytes, tuples are structs of '0', '1'.

Invariant: a file is one episode, its columns read one by one or all at once; an array is whole and of its space's shape
and kind, or an EpisodeError says why not.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet
from gymnasium import spaces

from etl.sources._recognition import json_of
from schemas.episode import EpisodeError
from simulators.spaces import is_picture, is_real, shape_of

AGAIN = "download or record the dataset again"
FORMATS = ("arrow", "parquet")
SUFFIXES = tuple(f".{form}" for form in FORMATS)
METADATA = "metadata.json"
TEXT_BYTES = 4096
EPISODE_BYTES = 2**32
COLUMNS = ("observations", "actions", "rewards", "terminations", "truncations")
DAMAGE = (OSError, pa.ArrowException, ValueError, KeyError, IndexError, TypeError, MemoryError)


class Tables:
    """The episodes below a dataset's folder 'data': iterates over their names, as an HDF5 file does."""

    def __init__(self, folder: Path, form: str):
        self.folder, self.suffix = folder, f".{form}"

    def __enter__(self) -> Tables:
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def __iter__(self) -> Iterator[str]:
        for path in self.folder.iterdir():
            if path.name.isascii() and path.name.isdigit() and path.is_dir() and self._files(int(path.name)):
                yield f"episode_{int(path.name)}"

    def file(self, number: int) -> Path:
        """The file of an episode. EpisodeError where there is none."""
        files = self._files(number)
        if not files:
            raise EpisodeError("missing file", f"no {self.suffix} file in data/{number}; {AGAIN}")
        if len(files) > 1:
            raise EpisodeError("wrong length", f"{len(files)} files in data/{number}, expected one; {AGAIN}")
        return files[0]

    def _files(self, number: int) -> list[Path]:
        try:
            with os.scandir(self.folder / str(number)) as entries:
                names = sorted(e.name for e in entries if e.name.endswith(self.suffix) and e.is_file())
        except OSError:
            return []
        return [self.folder / str(number) / name for name in names if not name.startswith(".")]

    def episode(self, number: int) -> Episode:
        """One of them."""
        return Episode(self.file(number))


class Episode:
    """The columns of one file, read when they are asked for, or before that by `load`."""

    def __init__(self, path: Path):
        self.path, self.name = path, f"data/{path.parent.name}"
        self.columns: dict[str, pa.Array] = {}

    @cached_property
    def attrs(self) -> dict[str, Any]:
        """Attributes that Minari wrote beside the file."""
        about = json_of(self.path.with_name(METADATA))
        return about if isinstance(about, dict) else {}

    def load(self, keys: tuple[str, ...] = COLUMNS) -> None:
        """Read several columns in one go; one that is missing is an error once it is asked for. EpisodeError where the
        bytes make no sense."""
        try:
            self._load(keys)
        except DAMAGE as error:
            why = " ".join(str(error).split())[:200] or type(error).__name__
            raise EpisodeError(f"corrupt {self.path.suffix[1:]}", f"{self.path.name}: {why}; {AGAIN}") from error

    def column(self, key: str, rows: int | None = None) -> np.ndarray:
        """rewards, terminations or truncations: (T,), of `rows` rows where given, never empty."""
        values = self._column(key)
        kind = values.type
        if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
            raise EpisodeError("wrong dtype", f"'{key}' is {str(kind)[:40]}; {AGAIN}")
        T = len(values) - 1
        if T < 1:
            raise EpisodeError("empty", f"no row in '{key}'")
        if rows is not None and rows != T:
            raise EpisodeError("wrong length", f"'{key}' has {T} rows, expected {rows}; {AGAIN}")
        return _whole(values, key).to_numpy(zero_copy_only=False)[:T]

    def rows_of(self, path: tuple[str, ...], space: spaces.Space, T: int, width: int) -> np.ndarray:
        """The first T rows of an array."""
        name, shape = "/".join(path), shape_of(space)
        values = self._column(path[0])
        for step in path[1:]:
            step = step.removeprefix("_index_")
            if not pa.types.is_struct(values.type) or values.type.get_field_index(step) < 0:
                raise EpisodeError("missing key", f"no '{name}' in {self.name}; {AGAIN}")
            values = pc.struct_field(values, step)
        if len(values) != T + 1:
            raise EpisodeError("wrong length", f"'{name}' has {len(values)} rows, expected {T + 1}; {AGAIN}")
        if T * max(math.prod(shape) * (1 if is_picture(space) else 8), width) > EPISODE_BYTES:
            raise EpisodeError("too large", f"'{name}' has {T} rows of {shape}; record shorter episodes")
        values = _whole(values[:T], name)
        if isinstance(space, spaces.Text):
            return _strings(values, name)
        if is_picture(space) and pa.types.is_binary(values.type):
            from etl.sources.minari.disk import jpeg  # which needs this module

            return np.stack([jpeg(code.as_py(), shape, name) for code in values])
        return _numbers(values, name, space, T)

    def _column(self, key: str) -> pa.Array:
        """A column of the file. EpisodeError where it is not there, or its bytes make no sense."""
        if key not in self.columns:
            self.load((key,))
        if key not in self.columns:
            raise EpisodeError("missing key", f"no '{key}' in {self.name}; {AGAIN}")
        return self.columns[key]

    def _load(self, keys: tuple[str, ...]) -> None:
        if self.path.suffix == ".parquet":
            # without buffering ahead nothing waits for another thread
            with pa.OSFile(str(self.path)) as source, pa.parquet.ParquetFile(source, pre_buffer=False) as file:
                table = file.read([key for key in keys if key in file.schema_arrow.names], use_threads=False)
        else:
            with pa.memory_map(str(self.path)) as source, pa.ipc.open_file(source) as file:
                table = file.read_all().select([key for key in keys if key in file.schema.names])
                table.validate(full=True)
        for key in table.column_names:
            column = table.column(key)
            self.columns[key] = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)


def _whole(values: pa.Array, name: str) -> pa.Array:
    if values.null_count:
        raise EpisodeError("wrong length", f"'{name}' has timesteps without a value; {AGAIN}")
    return values


def _numbers(values: pa.Array, name: str, space: spaces.Space, T: int) -> np.ndarray:
    shape = shape_of(space)
    if pa.types.is_fixed_size_list(values.type) or pa.types.is_list(values.type):
        widths = pc.list_value_length(values)
        width = pc.min(widths).as_py()
        if width != pc.max(widths).as_py() or width != math.prod(shape):
            raise EpisodeError("wrong shape", f"'{name}' has {width} values per row, expected {shape}")
        values = _whole(values.flatten(), name)
    elif math.prod(shape) != 1:
        raise EpisodeError("wrong shape", f"'{name}' has one value a row, expected {shape}")
    kind = values.type
    real = pa.types.is_floating(kind)
    if not (real or pa.types.is_integer(kind) or pa.types.is_boolean(kind)) or real != is_real(space):
        raise EpisodeError("wrong dtype", f"'{name}' is {str(kind)[:40]}, its space {space.dtype}")
    numbers = values.to_numpy(zero_copy_only=False)
    if is_picture(space) and numbers.dtype != np.uint8 and not real:
        raise EpisodeError("wrong dtype", f"'{name}' is {numbers.dtype}, its space {space.dtype}")
    return numbers.reshape(T, *shape)


def _strings(values: pa.Array, name: str) -> np.ndarray:
    if not (pa.types.is_string(values.type) or pa.types.is_large_string(values.type)):
        raise EpisodeError("wrong dtype", f"'{name}' is {str(values.type)[:40]}, expected a string a row")
    if len(values) and pc.max(pc.binary_length(values)).as_py() > TEXT_BYTES:
        raise EpisodeError("too large", f"'{name}' holds a text of more than {TEXT_BYTES} bytes")
    return np.array(values.to_pylist(), np.str_)
