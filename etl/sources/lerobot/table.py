"""Rows of LeRobot's Parquet files as arrays, a band of rows at a time.

data/**/*.parquet -> runs: where each episode lies, by episode_index -> Table.rows(start, stop) -> one array per column

Invariant: memory holds the rows asked for and a band; whatever a column holds, the result has the feature's shape, or
EpisodeError says what is wrong.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet

from etl.sources import _pictures
from etl.sources.lerobot.metadata import AGAIN, DAMAGE, Feature, damage
from schemas.episode import EpisodeError

CORRUPT = "corrupt Parquet"
BAND = 256  # rows
SCAN_BAND = 2**16  # rows of a few narrow columns
EPISODE_BYTES = 2**32  # of one column, unpacked


class Run(NamedTuple):
    """Rows [start, stop) of a file that are one episode's; its raw return, None without rewards; the task_index of its
    first row."""

    episode: int
    start: int
    stop: int
    total: float | None
    task: int | None


def runs(path: Path, reward: str | None) -> list[Run]:
    """The episodes of a file in order. EpisodeError where it cannot be read."""
    with damage(path, CORRUPT):
        file = pa.parquet.ParquetFile(path)
        names = file.schema_arrow.names
        if "episode_index" not in names:
            raise EpisodeError("missing key", f"no column 'episode_index' in {path.name}; {AGAIN}")
        wanted = [name for name in ("episode_index", reward, "task_index") if name in names]
        columns: dict[str, list[np.ndarray]] = {str(name): [] for name in wanted}
        for batch in file.iter_batches(SCAN_BAND, columns=wanted):
            for name, parts in columns.items():
                parts.append(_flat(batch[name]))
        arrays = {name: np.concatenate(parts) if parts else np.empty(0) for name, parts in columns.items()}
    episodes = arrays["episode_index"]
    if not len(episodes):
        raise EpisodeError("empty", f"no row in {path.name}; {AGAIN}")
    if episodes.dtype.kind not in "iu":
        raise EpisodeError("wrong dtype", f"'episode_index' is {episodes.dtype} in {path.name}; {AGAIN}")
    starts = [0, *(np.flatnonzero(np.diff(episodes)) + 1).tolist()]
    found = []
    for start, stop in zip(starts, [*starts[1:], len(episodes)]):
        total = float(arrays[reward][start:stop].sum(dtype=np.float64)) if reward in arrays else math.nan
        task = int(arrays["task_index"][start]) if "task_index" in arrays else None
        found.append(Run(int(episodes[start]), start, stop, total if math.isfinite(total) else None, task))
    return found


def span(paths: list[Path], features: list[Feature]) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest finite value of each element of some columns one after the other, (N,) float64 each, read from
    all files. EpisodeError where they hold none."""
    lows, highs = [], []
    for path in paths:
        try:
            with damage(path, CORRUPT):
                file = pa.parquet.ParquetFile(path)
                for batch in file.iter_batches(SCAN_BAND, columns=[feature.name for feature in features]):
                    values = np.concatenate(
                        [_numbers(batch[f.name], f).reshape(len(batch), -1) for f in features], axis=1
                    ).astype(np.float64)
                    values = values[np.isfinite(values).all(axis=1)]
                    if len(values):
                        lows.append(values.min(axis=0))
                        highs.append(values.max(axis=0))
        except EpisodeError:
            continue  # its episodes are rejected when they are read
    if not lows:
        raise EpisodeError("empty", f"no action can be read; {AGAIN}")
    return np.min(lows, axis=0), np.max(highs, axis=0)


class Table:
    """One open file. Rows asked for in ascending order are read once."""

    def __init__(self, path: Path, columns: list[str]):
        self.path = path
        with damage(path, CORRUPT):
            self.file = pa.parquet.ParquetFile(path)
            missing = [name for name in columns if name not in self.file.schema_arrow.names]
            if missing:
                raise EpisodeError("missing key", f"no column '{missing[0]}' in {path.name}; {AGAIN}")
            if twice := [name for name in columns if self.file.schema_arrow.names.count(name) > 1]:
                raise EpisodeError(CORRUPT, f"two columns '{twice[0]}' in {path.name}; {AGAIN}")
            groups = range(self.file.num_row_groups)
            self.ends = np.cumsum([self.file.metadata.row_group(group).num_rows for group in groups])
        self.columns = columns
        self.bands: Iterator[pa.RecordBatch] = iter(())
        self.band: pa.RecordBatch | None = None
        self.first = self.stop = 0  # rows of the band

    def rows(self, start: int, stop: int) -> pa.Table:
        """Rows [start, stop) of all columns."""
        with damage(self.path, CORRUPT):
            if stop > (int(self.ends[-1]) if len(self.ends) else 0):
                raise EpisodeError("wrong length", f"{self.path.name} has fewer than {stop} rows; {AGAIN}")
            if self.band is None or start < self.first:
                group = int(np.searchsorted(self.ends, start, side="right"))
                self.first = self.stop = int(self.ends[group - 1]) if group else 0
                groups = list(range(group, len(self.ends)))
                self.bands = self.file.iter_batches(BAND, row_groups=groups, columns=self.columns)
                self.band = None
            parts = []
            while True:
                if self.band is not None and start < self.stop:
                    low, high = max(start, self.first), min(stop, self.stop)
                    parts.append(self.band.slice(low - self.first, high - low))
                    if high == stop:
                        return pa.Table.from_batches(parts)
                self.band = next(self.bands)
                self.first, self.stop = self.stop, self.stop + len(self.band)


def numbers(rows: pa.Table, feature: Feature) -> np.ndarray:
    """(T, *feature.shape) of a column of numbers, in the column's own dtype."""
    if len(rows) * max(1, math.prod(feature.shape)) * 8 > EPISODE_BYTES:
        raise EpisodeError("too large", f"'{feature.name}' has {len(rows)} rows of {feature.shape}")
    return _numbers(rows[feature.name], feature)


def pictures(rows: pa.Table, feature: Feature, root: Path) -> np.ndarray:
    """(T, H, W, C) uint8 of a column of encoded pictures, or of the paths of their files."""
    T = len(rows)
    if T * math.prod(feature.shape) > EPISODE_BYTES:
        raise EpisodeError("too large", f"'{feature.name}' has {T} pictures of {feature.shape}")
    height, width, channels = feature.shape
    picture = height, width, channels
    out = np.empty((T, *picture), np.uint8)
    column = rows[feature.name]
    codes, names = _cells(column, "bytes"), None
    for row, data in enumerate(codes):
        try:
            if not isinstance(data, bytes):
                names = names or _cells(column, "path")
                data = _beside(root, names[row])
            out[row] = _pictures.decode(data, f"{feature.name} at timestep {row}", picture)
        except DAMAGE as error:
            if isinstance(error, EpisodeError):
                raise
            why = " ".join(str(error).split())[:120]
            raise EpisodeError("corrupt picture", f"'{feature.name}' at timestep {row} ({why}); {AGAIN}") from error
    return out


def _cells(column: pa.ChunkedArray, name: str) -> list[object]:
    """One field of a column of structs, or the column itself as bytes; None where there is nothing."""
    if not pa.types.is_struct(column.type):
        return column.to_pylist() if name == "bytes" else [None] * len(column)
    if column.type.get_field_index(name) < 0:
        return [None] * len(column)
    return pc.struct_field(column, name).to_pylist()


def _beside(root: Path, name: object) -> bytes:
    """A picture that lies in a file of the dataset."""
    if not isinstance(name, str):
        raise ValueError("neither bytes nor path")
    path = Path(os.path.normpath(root / name))
    if not path.is_relative_to(root) or not path.resolve().is_relative_to(root.resolve()):
        raise ValueError(f"'{name[:80]}' leads out of the dataset")
    if not path.is_file():
        raise ValueError(f"'{name[:80]}' is no file")
    return path.read_bytes()


def _numbers(column: pa.Array | pa.ChunkedArray, feature: Feature) -> np.ndarray:
    T, values = len(column), _flat(column)
    if values.dtype.kind not in "fiub":
        raise EpisodeError(
            "wrong dtype", f"'{feature.name}' is {values.dtype}, info.json says {feature.dtype}; {AGAIN}"
        )
    if len(values) != T * math.prod(feature.shape):
        detail = f"'{feature.name}' has {len(values)} values in {T} rows, info.json says {feature.shape}; {AGAIN}"
        raise EpisodeError("wrong shape", detail)
    return values.reshape(T, *feature.shape)


def _flat(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """All values of a column of numbers or of nested lists of them."""
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
        if isinstance(column, pa.ChunkedArray):
            column = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    while pa.types.is_nested(column.type) and not column.null_count:
        if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)
                or pa.types.is_fixed_size_list(column.type)):  # fmt: skip
            raise EpisodeError("wrong dtype", f"a column of {str(column.type)[:80]}, no numbers; {AGAIN}")
        if len(column) and not pa.types.is_fixed_size_list(column.type):
            lengths = pc.min_max(pc.list_value_length(column)).as_py()
            if lengths["min"] != lengths["max"]:
                raise EpisodeError("wrong shape", f"rows of {lengths['min']} to {lengths['max']} values; {AGAIN}")
        column = pc.list_flatten(column)
    if column.null_count:
        raise EpisodeError("not finite", f"a column of numbers has {column.null_count} empty cells; {AGAIN}")
    return column.to_numpy(zero_copy_only=False)
