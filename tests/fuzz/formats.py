"""What the other formats mean: gzipped .npy, JSON, JSON lines, Parquet, TFRecord.

Invariant: below the damaged layer every layer is sound (a broken .npy header comes in a gzip with a right checksum),
so that damage reaches the code that it is meant for.
"""

from __future__ import annotations

import gzip
import io
import json
import os
from copy import deepcopy
from random import Random
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from tests.fuzz import columns
from tests.fuzz.hdf5 import COUNTS, hdf5
from tests.fuzz.mutate import NUMBERS, Structure, Tree, damage

PICKLE_LOADED = 86  # exit status of a process that loads a pickle or evaluates a header
DESCRS: list[Any] = ["|O", "<f2", "<f8", ">i4", "<M8[s]", "|S0", "<U4", "|V0", "|b1", "<c8", "|S2147483647", "odd", 7]
DESCRS += ["|u1", "<f4", [], None, [("a", "<i4"), ("b", "|O")], [("a", "<f4", (3,))], ("<f4", (3,)), [("a", "|u1")]]
HEADERS = ["(" * 3000, "__import__('os')._exit(86)", "{'shape': 9" + "9" * 5000 + "}", "", "\xff", "{" * 99]
VALUES: list[Any] = [None, True, 0, -1, 1.5, 1e308, float("nan"), float("inf"), 10**300, "", "x" * 10_000, "\ud800"]
VALUES += [[], {}, [0], {"type": "Box"}, "episode_0", "a/b", "../..", "\0", "Hopper-v4", [[[]]], *NUMBERS]
COLUMNS: list[pa.Array] = [
    pa.array(["a", None, "c" * 5000]),
    pa.array([b"\xff", b"", None], pa.binary()),
    pa.array([1]),
]
COLUMNS += [pa.array(["a", "b"]).dictionary_encode(), pa.array(["a", ""], pa.large_string()), pa.nulls(3)]
COLUMNS += [pa.array([["a"], []]), pa.array([{"text": "a"}]), pa.array([], pa.string()), pa.array(["é\0\ud7ff"])]
COLUMNS += [
    pa.array(["a"], pa.string_view()),
    pa.array([b"\xff\xfe", b"ok"], pa.binary()).cast(pa.string(), safe=False),
]


class Payload:
    """A pickle whose loading shows."""

    def __reduce__(self):
        return os._exit, (PICKLE_LOADED,)


def npy(tree: Tree, name: str, rng: Random) -> str:
    """One mutation of a gzipped .npy, or the same number of rows claimed by all of a checkpoint."""
    how = rng.choice(
        ["bytes", "bytes", "header", "header", "text", "rows", "rows", "values", "payload", "pickle", "gzip"]
    )
    folder, rows = name.rpartition("$")[0], rng.choice([*COUNTS, 2**26, 2**26 + 1])
    for each in [n for n in tree if n.startswith(folder)] if how == "rows" and folder else [name]:
        packed = bytes(tree[each])  # type: ignore[arg-type]
        raw = gzip.decompress(packed)
        file = io.BytesIO(raw)
        np.lib.format.read_magic(file)
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        header: dict[Any, Any] = {"descr": dtype.str, "fortran_order": fortran, "shape": shape}
        payload, text = raw[file.tell() :], None
        if how == "bytes":
            tree[each] = _gzip(damage(raw, rng)[0])
            continue
        if how == "gzip":
            tree[each] = _members(raw, packed, rng)
            continue
        if how == "header":
            _odd_header(header, rng)
        elif how == "rows":
            header["shape"] = (rows, *shape[1:])
        elif how == "values":
            array = np.frombuffer(payload, dtype).copy()
            for _ in range(1 << rng.randrange(6)):
                array[rng.randrange(array.size)] = rng.choice([0, 1, 2, 5, 127, np.nan if dtype.kind == "f" else 9])
            payload = array.tobytes()
        elif how == "payload":
            payload = rng.choice([payload[: rng.randrange(len(payload))], payload * 2, payload + b"\0", b""])
        elif how == "pickle":
            file = io.BytesIO()
            np.save(file, np.full(shape, Payload(), object), allow_pickle=True)
            tree[each] = _gzip(file.getvalue())
            continue
        elif how == "text":
            text = rng.choice([*HEADERS, *(damage(repr(header).encode(), rng)[0].decode("latin1") for _ in range(9))])
        tree[each] = _gzip(_magic(repr(header) if text is None else text, rng) + payload)
    return f"npy {how}"


def _odd_header(header: dict[Any, Any], rng: Random) -> None:
    shape = header["shape"]
    rows = shape[:1]
    odd: list[Any] = [
        (),
        (0,),
        (-1,),
        (*shape, 1),
        (*rows, 0),
        (*rows, 2**40),
        (*rows, 84, 84),
        (*rows, 1024, 1024),
        None,
    ]
    odd += [(*rows, 16, 16, 3), (1.0,), ("1",), (True,), [1], (2**64,), (10**30,), (1,) * 65, (2**32, 2**32, 16)]
    odd += [(*rows, 84, 84, 1), *((number, *shape[1:]) for number in NUMBERS)]
    key = rng.choice([*header, "shape", None])
    values = {"shape": odd, "descr": DESCRS, "fortran_order": [True, 1, None, "yes"]}
    header[key] = rng.choice(values.get(key, [0]))
    if rng.random() < 0.1:
        del header[key]


def _magic(text: str, rng: Random) -> bytes:
    version = rng.choice([1, 1, 1, 1, 2, 3, 0, 9])
    line = text.encode("utf-8" if version == 3 else "latin1", "replace") + b"\n"
    size, width = len(line) if rng.random() < 0.95 else rng.choice(NUMBERS), 2 if version <= 1 else 4
    return b"\x93NUMPY" + bytes([version, 0]) + (size % 256**width).to_bytes(width, "little") + line


def _members(raw: bytes, packed: bytes, rng: Random) -> bytes:
    cut = rng.randrange(len(raw))
    kinds = [_gzip(raw[:cut]) + _gzip(raw[cut:]), packed + packed, packed + bytes(rng.choice((1, 700, 70_000))), raw]
    kinds += [packed + rng.randbytes(30), packed[:-1], packed[:-8] + bytes(8), _gzip(b"") * 500 + packed, _gzip(packed)]
    kinds += [packed[:3] + b"\x1f" + packed[4:], packed + _gzip(b""), _gzip(b""), packed[:10], packed + b"\x1f\x8b"]
    return rng.choice(kinds)


def _gzip(raw: bytes) -> bytes:
    return gzip.compress(raw, 1, mtime=0)


def json_text(tree: Tree, name: str, rng: Random) -> str:
    """Values of a JSON document, or of one line of many, changed, deleted or moved; JSON in its strings too."""
    content = bytes(tree[name]).decode()  # type: ignore[arg-type]
    lines = content.splitlines() if name.endswith("l") else [content]
    at = rng.randrange(len(lines))
    value = json.loads(lines[at])
    for _ in range(1 << rng.randrange(3)):
        value = _twist(value, rng)
    lines[at] = json.dumps(value, ensure_ascii=rng.random() < 0.8)
    tree[name] = rng.choice(["\n", "\n", "\r\n", "\r"]).join(lines).encode("utf-8", "surrogatepass")
    return "json"


def _twist(value: Any, rng: Random) -> Any:
    if isinstance(value, str) and value[:1] in ("{", "[") and rng.random() < 0.9:
        return json.dumps(_twist(json.loads(value), rng))
    if not isinstance(value, dict | list) or not value or rng.random() < 0.1:
        return deepcopy(rng.choice(VALUES))
    key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
    how = rng.random()
    if how < 0.8:
        value[key] = _twist(value[key], rng)
    elif how < 0.9:
        del value[key]
    elif isinstance(value, dict):
        value[rng.choice(["", "x/y", "a\nb", *value])] = value[key]
    else:
        value += value[: rng.choice((1, 300))]
    return value


def parquet(tree: Tree, name: str, rng: Random) -> str:
    """Another table in its place, or one column of it."""
    if rng.random() < 0.6:
        return columns.column(tree, name, rng)
    column = rng.choice(COLUMNS)
    names = rng.choice([["text"], ["text"], ["other"], ["text", "text"], ["other", "text"], ["text.x"]])
    table = pa.Table.from_arrays([pa.concat_arrays([column] * rng.choice((1, 2, 100)))] * len(names), names)
    kind = {"compression": rng.choice(["none", "snappy", "gzip", "zstd"]), "use_dictionary": rng.random() < 0.5}
    kind |= {"data_page_version": rng.choice(["1.0", "2.0"]), "row_group_size": rng.choice((1, 2, 1000))}
    file = io.BytesIO()
    pyarrow.parquet.write_table(table, file, **kind)
    tree[name] = file.getvalue()
    return f"parquet {column.type}"


MUTATORS: dict[str, Structure] = {".hdf5": hdf5, ".h5": hdf5, ".gz": npy, ".json": json_text, ".jsonl": json_text}
MUTATORS |= {".parquet": parquet, "-of-": columns.records}
