"""Verifying a dataset: `python -m shards.verify FOLDER [--full]`.

fast: manifest, file sizes, and every index row: inside its shard, of its layout's size, in its place
full: every sha256 too, every member of every tar against the index, every token's id

A tar is walked header by header. Nothing is extracted or unpickled, and whatever is no plain file of the kinds that
the writer makes (a link, a device, a path, a pickle, an extended header, a size behind the end) is refused.

Exit status 0 only if everything holds.
"""

from __future__ import annotations

import io
import re
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from rich.progress import track

from schemas.dataset import MEMBERS, DatasetError
from schemas.layout import PATCH_SIZE, TimestepLayout
from schemas.vocabulary import VocabularyMismatch
from shards.reader import Dataset

BLOCK = tarfile.BLOCKSIZE
NAME = re.compile(rf"[^./\\\0]+\.(({'|'.join(MEMBERS)})\.npy|meta\.json)")
DTYPES = {"tokens": "<u2", "patches": "|u1", "reward": "<f4", "observation": "<f4", "action": "<f4"}


@dataclass(frozen=True)
class Options:
    """Check that a dataset is whole."""

    folders: tyro.conf.Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="FOLDER [FOLDER ...]")]]
    """Dataset folders or URLs, each with a dataset.json."""
    full: Annotated[bool, tyro.conf.arg(aliases=["-f"])] = False
    """Also hash every file, and compare every tar member with the index."""


def verify(folder: Path | str, full: bool) -> Dataset:
    """The opened dataset, or DatasetError."""
    dataset = Dataset(folder, "full" if full else "size")
    _check_rows(dataset)
    if full:
        numbers = range(dataset.shards.num_rows)
        for number in track(numbers, f"members of {dataset.place.name}", transient=True):
            _check_shard(dataset, number)
    return dataset


def _check_rows(dataset: Dataset) -> None:
    """What the index says of itself, of the shards' table and of the manifest."""
    column, place = dataset.column, dataset.place
    shards, tasks = dataset.shards.num_rows, dataset.manifest.tasks

    def refuse(wrong: np.ndarray, what: str) -> None:
        if wrong.any():
            raise DatasetError(f"{place.path('index.arrow')}: row {int(np.argmax(wrong))} {what}; rebuild the dataset")

    numbers, timesteps, task = column("shard"), column("timesteps"), column("task")
    refuse((numbers < 0) | (numbers >= shards), f"names a shard, of {shards}, that is not there")
    refuse(timesteps <= 0, "has no timestep")
    sizes = dataset.shards.column("bytes").to_numpy()
    for member in MEMBERS:
        offset, length = column(f"{member}_offset"), column(f"{member}_bytes")
        refuse((offset >= 0) & (offset + length > sizes[numbers]), f"points behind its shard's end ({member})")
    for n, about in enumerate(tasks):
        first, stop = about.first_row, about.first_row + about.rows
        own = np.zeros(len(task), bool)
        own[first:stop] = True
        refuse((task == n) != own, f"is not where the manifest has the rows of task '{about.spec.name}'")
        for member, width in _widths(dataset.layouts[n]).items():
            wrong = own & (column(f"{member}_bytes") != width * timesteps)
            refuse(wrong, f"has not as many bytes of '{member}' as its timesteps")
        for held_out in (False, True):
            a, b = dataset.span(n, held_out)
            stops, episodes = column("split_stop")[a:b], column("split_episode")[a:b]
            wrong = np.zeros(len(task), bool)
            wrong[a:b] = stops != np.cumsum(timesteps[a:b], dtype=np.int64)
            wrong[a:b] |= (column("held_out")[a:b] != held_out) | ~np.isin(np.diff(episodes, prepend=-1), (0, 1))
            refuse(wrong, "is out of order")
            total = about.held_out_timesteps if held_out else about.timesteps - about.held_out_timesteps
            if (int(stops[-1]) if b > a else 0) != total:
                raise DatasetError(f"{place}: the manifest's counts of task '{about.spec.name}' are not the index's; "
                                   "rebuild the dataset")  # fmt: skip
    counts = np.bincount(numbers, minlength=shards), np.bincount(numbers, timesteps, shards)
    for name, found in zip(("samples", "timesteps"), counts):
        if (wrong := dataset.shards.column(name).to_numpy() != found).any():
            shard = dataset.shard(int(np.argmax(wrong)))
            raise DatasetError(f"{place}: the counts of {shard.name} are not the index's; rebuild the dataset")


def _widths(layout: TimestepLayout) -> dict[str, int]:
    """Bytes a timestep of the members whose size follows from the layout."""
    return {"tokens": 2 * layout.stored, "patches": layout.patches * PATCH_SIZE**2 * layout.channels}


def _check_shard(dataset: Dataset, number: int) -> None:
    """Every member of the tar is one that the index names, at exactly that place, and the other way round."""
    shard = dataset.shard(number)
    path = dataset.place.path(shard.name)
    data = dataset.mapped(number)
    rows = np.flatnonzero(dataset.column("shard") == number)
    expected = {
        int(dataset.column(f"{member}_offset")[row]): (member, row, int(dataset.column(f"{member}_bytes")[row]))
        for row in rows
        for member in MEMBERS
        if dataset.column(f"{member}_offset")[row] >= 0
    }
    vocabulary = dataset.manifest.vocabulary.size
    names: set[str] = set()
    for name, start, size in members(data, path):
        if name in names:
            raise DatasetError(f"{path}: member '{name}' is there twice; refused")
        names.add(name)
        if name.endswith(".meta.json"):
            continue
        kind = name.split(".")[1]
        header, dtype = _npy_header(data[start : start + size], f"{path}: member '{name}'")
        member, row, length = expected.pop(start + header, ("", -1, 0))
        if member != kind or length != size - header or dtype != DTYPES[kind]:
            raise DatasetError(f"{path}: member '{name}' is not what the index has at its place; rebuild the dataset")
        if kind == "tokens" and length and int(dataset.tokens(int(row)).max()) >= vocabulary:
            raise DatasetError(f"{path}: member '{name}' holds a token outside the {vocabulary} ids; rebuild it")
    if expected:
        member, row, _ = next(iter(expected.values()))
        raise DatasetError(f"{path}: index row {row} '{member}' is no member of the tar; rebuild the dataset")


def members(data: np.ndarray, path: str) -> Iterator[tuple[str, int, int]]:
    """(name, first byte, size) of the members of a tar, given as bytes (n,) uint8. DatasetError for anything but the
    plain files that the writer makes, and for a tar without an end."""
    at = 0
    while True:
        head = bytes(data[at : at + BLOCK])
        if head == bytes(BLOCK) and not data[at:].any():
            return
        try:
            info = tarfile.TarInfo.frombuf(head, "utf-8", "strict")
        except (tarfile.HeaderError, UnicodeDecodeError, ValueError) as error:
            raise DatasetError(f"{path}: no tar member at byte {at} ({error}); rebuild the dataset") from None
        if info.type != tarfile.REGTYPE or not NAME.fullmatch(info.name):
            raise DatasetError(f"{path}: member '{info.name}' is not a plain file of a Gato dataset; refused")
        if info.size < 0 or at + BLOCK + info.size > len(data):
            claim = f"claims {info.size} bytes, more than the file has"
            raise DatasetError(f"{path}: member '{info.name}' {claim}; refused")
        yield info.name, at + BLOCK, info.size
        at += BLOCK + -(-info.size // BLOCK) * BLOCK


def _npy_header(data: np.ndarray, what: str) -> tuple[int, str]:
    """Bytes of an .npy header and the dtype that it names; DatasetError where it is none or names objects."""
    stream = io.BytesIO(bytes(data[:4096]))
    try:
        if np.lib.format.read_magic(stream) != (1, 0):
            raise ValueError("not version 1.0")
        _, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    except (ValueError, SyntaxError, TypeError) as error:
        raise DatasetError(f"{what}: no .npy header ({error}); refused") from None
    if fortran or dtype.hasobject:
        raise DatasetError(f"{what}: holds objects, which would be unpickled, or is not in row order; refused")
    return stream.tell(), dtype.str


def main() -> int:
    options = tyro.cli(Options, prog="python -m shards.verify")
    if not options.folders:
        print("error: no folder given; name at least one with a dataset.json", file=sys.stderr)
        return 2
    status = 0
    for folder in options.folders:
        try:
            dataset = verify(folder, options.full)
        except (DatasetError, VocabularyMismatch) as error:
            print(f"error: {error}", file=sys.stderr)
            status = 1
            continue
        manifest = dataset.manifest
        counts = f"{manifest.shards.rows} shards, {dataset.index.num_rows} samples, {len(manifest.tasks)} tasks"
        print(f"{folder}: whole, {counts}")
    return status


if __name__ == "__main__":
    sys.exit(main())
