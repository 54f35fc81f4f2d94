"""Verifying a dataset: `python -m shards.verify FOLDER [--full]`.

fast: manifest, tables, sizes, and every row of the index: in its place, inside its shard, of its layout's size
full: every sha256 too, and every byte of every tar outside the arrays: a shard must be exactly what the writer makes of
      the index's rows; tokens must be ids, episodes' returns the sums of their rewards

The index says what a tar should hold, and the tar is compared with that. Nothing is extracted, trusted or unpickled, so
anything else in it (a path, a link, a device, a pickle, a size beyond the end, an array of objects) is refused.

Exit status 0 only if everything holds.
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import pyarrow as pa
import tyro
from rich.console import Console
from rich.progress import track

from schemas.dataset import INDEX_NAME, MEMBERS, DatasetError
from schemas.layout import members_of
from schemas.terminal import command
from schemas.vocabulary import VocabularyMismatch
from shards.reader import Dataset
from shards.writer import BLOCK, npy_header, sample_key, tar_header

NAMED = ("episode", "start", "timesteps", "episode_timesteps", "episode_return", "terminated", "truncated")
META_LIMIT = 2**20


@dataclass(frozen=True)
class Options:
    """Check that a dataset is complete and undamaged."""

    folders: tyro.conf.Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="FOLDER [FOLDER ...]")]]
    """Dataset folders or URLs, each with a dataset.json."""
    full: Annotated[bool, tyro.conf.arg(aliases=["-f"])] = False
    """Also hash every file, and compare every tar with the index."""


def verify(folder: Path | str, full: bool) -> Dataset:
    """The opened dataset, or DatasetError."""
    dataset = Dataset(folder, "full" if full else "size")
    for name, table in (("index", dataset.index), ("shards", dataset.shards)):
        try:
            table.validate(full=True)
        except pa.ArrowException as error:
            raise DatasetError(f"{dataset.place}: {name}.arrow: {str(error).splitlines()[0]}; rebuild it") from None
    _check_rows(dataset)
    if full:
        numbers = range(dataset.shards.num_rows)
        console = Console(stderr=True)
        words = f"members of {dataset.place.name}"
        for number in track(numbers, words, transient=True, console=console, disable=not console.is_terminal):
            _check_shard(dataset, number)
    return dataset


def _check_rows(dataset: Dataset) -> None:
    """Checks the index against itself, the shards' table and the manifest."""
    column, place = dataset.column, dataset.place
    shards, tasks = dataset.shards.num_rows, dataset.manifest.tasks

    def refuse(wrong: np.ndarray, what: str) -> None:
        if wrong.any():
            raise DatasetError(f"{place.path(INDEX_NAME)}: row {int(np.argmax(wrong))} {what}; rebuild the dataset")

    numbers, timesteps, task = column("shard"), column("timesteps").astype(np.int64), column("task")
    refuse((numbers < 0) | (numbers >= shards), f"names a shard, of {shards}, that is not there")
    refuse(timesteps <= 0, "has no timestep")
    refuse((task < 0) | (task >= len(tasks)), f"names a task, of {len(tasks)}, that is not there")
    sizes = dataset.shards.column("bytes").to_numpy()
    rows = np.arange(len(task))
    for n, about in enumerate(tasks):
        first, stop = about.first_row, about.first_row + about.rows
        own = (rows >= first) & (rows < stop)
        refuse((task == n) != own, f"is not where the manifest has the rows of task '{about.spec.name}'")
        expected = members_of(about.spec)
        for member in MEMBERS:
            offset, length = column(f"{member}_offset"), column(f"{member}_bytes")
            if member not in expected:
                refuse(own & ((offset != -1) | (length != 0)), f"has '{member}', which its task has not")
                continue
            dtype, shape = expected[member]
            width = math.prod(shape) * np.dtype(dtype).itemsize
            refuse(own & (offset < 0), f"lacks '{member}'")
            refuse(own & (length != width * timesteps), f"has not as many bytes of '{member}' as its timesteps")
            refuse(own & (offset > sizes[numbers] - length), f"points beyond its shard's end ({member})")
        for held_out in (False, True):
            a, b = dataset.span(n, held_out)
            stops, episodes = column("split_stop")[a:b], column("split_episode")[a:b]
            wrong = np.zeros(len(task), bool)
            wrong[a:b] = stops != np.cumsum(timesteps[a:b])
            wrong[a:b] |= (column("held_out")[a:b] != held_out) | ~np.isin(np.diff(episodes, prepend=-1), (0, 1))
            refuse(wrong, "is out of order")
            held = (int(stops[-1]), int(episodes[-1]) + 1) if b > a else (0, 0)
            if held != about.split(held_out):
                raise DatasetError(f"{place}: the manifest's counts of task '{about.spec.name}' are not the index's; "
                                   "rebuild the dataset")  # fmt: skip
    counts = np.bincount(numbers, minlength=shards), np.bincount(numbers, timesteps, shards)
    for name, found in zip(("samples", "timesteps"), counts):
        if (wrong := dataset.shards.column(name).to_numpy() != found).any():
            shard = dataset.shard(int(np.argmax(wrong)))
            raise DatasetError(f"{place}: the counts of {shard.name} are not the index's; rebuild the dataset")


def _check_shard(dataset: Dataset, number: int) -> None:
    """A shard is exactly the tar that the writer makes of the index's rows."""
    data = dataset.mapped(number)
    rows = np.flatnonzero(dataset.column("shard") == number)
    at = 0
    for row in rows[np.argsort(dataset.column("tokens_offset")[rows])].tolist():
        at = _check_sample(dataset, number, data, at, row)
    if len(data) - at != 2 * BLOCK or data[at:].any():
        raise DatasetError(_says(dataset, number, at, "the tar's end is missing, or something comes before it"))


def _check_sample(dataset: Dataset, number: int, data: np.ndarray, at: int, row: int) -> int:
    """Check one sample's members from byte `at` on; returns the byte after them."""
    column, task = dataset.column, dataset.manifest.tasks[dataset.column("task")[row]].spec
    T = int(column("timesteps")[row])
    key = sample_key(task.name, int(column("episode")[row]), int(column("start")[row]))
    for member, (dtype, shape) in members_of(task).items():
        header, length = npy_header(dtype, (T, *shape)), int(column(f"{member}_bytes")[row])
        name = f"{key}.{member}.npy"
        head = tar_header(name, len(header) + length) + header
        if bytes(data[at : at + len(head)]) != head or column(f"{member}_offset")[row] != at + len(head):
            raise DatasetError(_says(dataset, number, at, f"not the member '{name}' that the index names"))
        at = _padded(dataset, number, data, at + len(head) + length)
    size = data[at + 124 : at + 135].tobytes()
    length = int(size, 8) if set(size) <= set(b"01234567") else META_LIMIT
    name = f"{key}.meta.json"
    said = bytes(data[at + BLOCK : at + BLOCK + length]) if length < META_LIMIT else b""
    if bytes(data[at : at + BLOCK]) != tar_header(name, length) or not _agrees(dataset, row, task.name, said):
        raise DatasetError(_says(dataset, number, at, f"not the member '{name}' that the index names"))
    if int(dataset.tokens(row).max()) >= dataset.manifest.vocabulary.size:
        ids = dataset.manifest.vocabulary.size
        raise DatasetError(_says(dataset, number, at, f"sample '{key}' holds a token outside the {ids} ids"))
    if task.action and column("episode_timesteps")[row] == T:
        total, listed = float(dataset.reward(row).astype(np.float64).sum()), float(column("episode_return")[row])
        if not math.isclose(total, listed, rel_tol=1e-6, abs_tol=1e-6):
            raise DatasetError(
                _says(dataset, number, at, f"rewards of '{key}' sum to {total}, the index says {listed}")
            )
    return _padded(dataset, number, data, at + BLOCK + length)


def _agrees(dataset: Dataset, row: int, task: str, said: bytes) -> bool:
    """True if a sample's meta.json says what the index says."""
    try:
        meta = json.loads(said)
    except ValueError:
        return False
    named = {name: dataset.column(name)[row].item() for name in NAMED}
    return isinstance(meta, dict) and {name: meta.get(name) for name in (*NAMED, "task")} == named | {"task": task}


def _padded(dataset: Dataset, number: int, data: np.ndarray, at: int) -> int:
    """The first byte of the next block, after zeros."""
    following = -(-at // BLOCK) * BLOCK
    if data[at:following].any():
        raise DatasetError(_says(dataset, number, at, "something is between two members"))
    return following


def _says(dataset: Dataset, number: int, at: int, what: str) -> str:
    path = dataset.place.path(dataset.shard(number).name)
    return f"{path}: byte {at}: {what}; refused, rebuild the dataset"


@command
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
