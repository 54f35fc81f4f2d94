"""Verifying a dataset: `python -m shards.verify FOLDER [--full]`.

fast: manifest, file sizes, and every index row inside its shard
full: every sha256 too, and every member of every tar against the index

Exit status 0 only if everything holds.
"""

from __future__ import annotations

import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from rich.progress import track

from schemas.dataset import MEMBERS, DatasetError
from schemas.vocabulary import VocabularyMismatch
from shards.reader import Dataset


@dataclass(frozen=True)
class Options:
    """Check that a dataset is whole."""

    folders: tyro.conf.Positional[Annotated[tuple[Path, ...], tyro.conf.arg(metavar="FOLDER [FOLDER ...]")]]
    """Dataset folders, each with a dataset.json."""
    full: Annotated[bool, tyro.conf.arg(aliases=["-f"])] = False
    """Also hash every file and compare every tar member with the index."""


def verify(folder: Path, full: bool) -> Dataset:
    """The opened dataset, or DatasetError."""
    dataset = Dataset(folder, "full" if full else "size")
    sizes = np.array([shard.bytes for shard in dataset.manifest.shards] or [0])
    limit = sizes[dataset.column("shard")] if dataset.index.num_rows else np.empty(0)
    for member in MEMBERS:
        ends = dataset.column(f"{member}_offset") + dataset.column(f"{member}_bytes")
        if (ends > limit).any():
            raise DatasetError(
                f"{folder}: index row {int(np.argmax(ends > limit))} points behind its shard's end; rebuild"
            )
    numbers, shards = dataset.column("shard"), dataset.manifest.shards
    samples = np.bincount(numbers, minlength=len(shards))
    timesteps = np.bincount(numbers, dataset.column("timesteps"), len(shards))
    for shard, *counts in zip(shards, samples, timesteps):
        if [shard.samples, shard.timesteps] != counts:
            raise DatasetError(f"{folder}: the manifest's counts of {shard.name} are not the index's; rebuild")
    if full:
        for number, shard in enumerate(track(dataset.manifest.shards, f"members of {folder.name}", transient=True)):
            _compare_members(dataset, number, folder / shard.name)
    return dataset


def _compare_members(dataset: Dataset, number: int, path: Path) -> None:
    """Every array the index names must be a member of the tar at exactly that place."""
    with tarfile.open(path) as tar:
        infos = tar.getmembers()
    bad = next((info.name for info in infos if not info.isreg() or "/" in info.name), None)
    if bad:
        raise DatasetError(f"{path}: member '{bad}' is not a plain file of this folder; refused")
    ends = {info.offset_data + info.size: info for info in infos}
    for row in np.flatnonzero(dataset.column("shard") == number):
        for member in MEMBERS:
            offset, size = (int(dataset.column(f"{member}_{what}")[row]) for what in ("offset", "bytes"))
            if offset < 0:
                continue
            info = ends.get(offset + size)
            if info is None or not info.name.endswith(f".{member}.npy") or offset < info.offset_data:
                raise DatasetError(f"{path}: index row {row} '{member}' is no member of the tar; rebuild the dataset")


def main() -> int:
    options = tyro.cli(Options, prog="python -m shards.verify")
    if not options.folders:
        print("error: no folder given; name at least one with a dataset.json", file=sys.stderr)
        return 2
    status = 0
    for folder in options.folders:
        try:
            dataset = verify(folder, options.full)
        except (DatasetError, VocabularyMismatch, tarfile.TarError) as error:
            print(f"error: {error}", file=sys.stderr)
            status = 1
            continue
        manifest = dataset.manifest
        counts = f"{len(manifest.shards)} shards, {dataset.index.num_rows} samples, {len(manifest.tasks)} tasks"
        print(f"{folder}: whole, {counts}")
    return status


if __name__ == "__main__":
    sys.exit(main())
