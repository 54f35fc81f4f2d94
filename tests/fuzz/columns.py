"""What tables of numbers mean: one column of a Parquet file, one feature of a TFRecord's examples.

table or record -> a column that is gone, of another type or length, with odd values -> written again, checksums right

Invariant: below the damaged column the file is as its writer made it.
"""

from __future__ import annotations

import gzip
import io
from random import Random
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from etl.sources._tfrecord import example, frame
from tests.etl.tfexample import written
from tests.fuzz.mutate import Tree, damage

INTEGERS = [0, -1, 1, 2, 7, 2**31, 2**40, 2**63 - 1, -(2**63)]
FLOATS = [float("nan"), float("inf"), -float("inf"), 1e38, 1e300, -0.0, 1e-40]
TYPES = [pa.int8(), pa.uint64(), pa.float16(), pa.float64(), pa.string(), pa.bool_(), pa.date32(), pa.null(),
         pa.list_(pa.int64()), pa.list_(pa.float32(), 2), pa.binary(), pa.decimal128(9, 2)]  # fmt: skip


def column(tree: Tree, name: str, rng: Random) -> str:
    """One column of a Parquet file, or all rows of it."""
    table = pa.parquet.read_table(io.BytesIO(bytes(tree[name])))  # type: ignore[arg-type]
    place = rng.randrange(table.num_columns)
    key, values = table.column_names[place], table[place].to_pylist()
    how = rng.choice(["drop", "rename", "twice", "type", "value", "value", "rows", "order"])
    if how == "drop":
        table = table.remove_column(place)
    elif how == "rename":
        table = table.rename_columns([n if n != key else rng.choice(["", key + "s", "x"]) for n in table.column_names])
    elif how == "twice":
        table = table.append_column(key, table[place])
    elif how == "type":
        kind = rng.choice(TYPES)
        table = table.set_column(place, key, rng.choice([pa.nulls(len(table), kind), _cast(table[place], kind)]))
    elif how == "value":
        for _ in range(1 << rng.randrange(4)):
            row = rng.randrange(len(values) or 1)
            values[row] = _odd(values[row], rng)
        table = table.set_column(place, key, pa.array(values))
    elif how == "rows":
        start = rng.randrange(len(table) + 1)
        parts = [table.slice(start), table.slice(0, start), table.slice(0, 0), *[table] * 3]
        table = pa.concat_tables(rng.choices(parts, k=rng.choice((1, 1, 2, 50))))
    else:
        table = table.take(rng.sample(range(len(table)), len(table)))
    file = io.BytesIO()
    pyarrow.parquet.write_table(table, file, row_group_size=rng.choice((1, 5, 1000)))
    tree[name] = file.getvalue()
    return f"column {key[:40]} {how}"


def _cast(values: pa.ChunkedArray, kind: pa.DataType) -> pa.Array | pa.ChunkedArray:
    return values.cast(kind, safe=False) if not pa.types.is_nested(values.type) else pa.nulls(len(values), kind)


def _odd(value: Any, rng: Random) -> Any:
    """Another value of the same type, none, or one of another length."""
    if rng.random() < 0.1:
        return None
    if isinstance(value, list):
        how = rng.randrange(5)
        if how == 0 and len(value):
            return value[:-1]
        if how == 1:
            return value * 2
        return [_odd(one, rng) for one in value]
    if isinstance(value, dict):
        return {key: _odd(one, rng) for key, one in value.items()}
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return rng.choice(INTEGERS)
    if isinstance(value, float):
        return rng.choice(FLOATS)
    if isinstance(value, bytes):
        return damage(value, rng)[0]
    return rng.choice(["", "x" * 5000, "../..", "\0"])


def records(tree: Tree, name: str, rng: Random) -> str:
    """One feature of the examples of a TFRecord file, their bytes, or their number and order."""
    packed = bytes(tree[name])  # type: ignore[arg-type]
    zipped = packed[:2] == b"\x1f\x8b"
    raw, found, at = gzip.decompress(packed) if zipped else packed, [], 0
    while at < len(raw):
        size = int.from_bytes(raw[at : at + 8], "little")
        found.append(raw[at + 12 : at + 12 + size])
        at += size + 16
    row = rng.randrange(len(found))
    how = rng.choice(["bytes", "bytes", "feature", "feature", "feature", "count", "order", "frame"])
    if how == "bytes":
        found[row] = damage(found[row], rng)[0]
    elif how == "feature":
        features: dict[str, Any] = dict(example(found[row]))
        for _ in range(1 << rng.randrange(3)):
            key = rng.choice(sorted(features))
            features[key] = _feature(features[key], rng)
            if rng.random() < 0.15:
                features[rng.choice(["steps/x", key + "/ragged_row_lengths_0", ""])] = features.pop(key)
        found[row] = written(**features)
    elif how == "count":
        found = rng.choice([found * 2, found[:row], [*found, b""], [b""] * 300])
    elif how == "order":
        rng.shuffle(found)
    frames = [frame(data) for data in found]
    if how == "frame":  # lengths and checksums themselves
        frames[row] = damage(frames[row][:12], rng)[0] + frames[row][12:]
    raw = b"".join(frames)
    tree[name] = gzip.compress(raw, 1, mtime=0) if zipped else raw
    return f"records {how}"


def _feature(values: Any, rng: Random) -> Any:
    """A list of another length, type or content."""
    values = list(values)
    how = rng.randrange(6)
    if how == 0:
        return values[: rng.randrange(len(values) + 1)]
    if how == 1:
        return values * rng.choice((2, 3, 100))
    if how == 2:
        return rng.choice([[], [b"\xff"] * len(values), [1.0] * len(values), [2**40] * len(values)])
    for _ in range(1 << rng.randrange(4)):
        if values:
            row = rng.randrange(len(values))
            one = values[row]
            if isinstance(one, bytes):
                values[row] = rng.choice([damage(one, rng)[0], b"", one * 2])
            else:
                values[row] = rng.choice(FLOATS if isinstance(one, np.floating) else INTEGERS)
    return values
