"""Datasets from Python: build one from logs, and iterate over the batches that training would see.

    logs -> build -> Dataset (a folder and its manifest) -> Stream -> batches of token sequences

Invariant: `build` writes what python -m etl.build writes, and batch n of a Stream is what training at that seed sees.
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np

from schemas.dataset import Manifest
from schemas.ranges import typed
from schemas.vocabulary import Vocabulary
from shards.batch import Batch
from shards.loader import Loader
from shards.stream import Stream as SequenceStream
from shards.stream import StreamConfig


@dataclass(frozen=True)
class Dataset:
    """A finished dataset: its folder or URL, and what its dataset.json says. Accepted wherever a folder is."""

    folder: str
    manifest: Manifest

    def __fspath__(self) -> str:
        return self.folder

    def __repr__(self) -> str:
        timesteps = sum(task.timesteps for task in self.manifest.tasks)
        return f"Dataset({self.folder!r}, tasks={self.tasks}, timesteps={timesteps:,})"

    @property
    def tasks(self) -> list[str]:
        """Names of its tasks."""
        return [task.spec.name for task in self.manifest.tasks]


Folders = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


def folder_list(folders: Folders) -> list[str]:
    """Dataset folders or URLs as strings."""
    if isinstance(folders, str | os.PathLike):
        return [os.fspath(folders)]
    return [os.fspath(folder) for folder in folders]


def build(
    input: str | os.PathLike[str] | None,
    output: str | os.PathLike[str],
    source: str | None = None,
    *,
    beam_arguments: Sequence[str] = (),
    progress: bool = False,
    **options: Any,
) -> Dataset:
    """Tokenize logs into a dataset of shards, in this process: python -m etl.build as a function.

    Args:
        input: a file or folder of logs, or its fsspec URL; None downloads `dataset=NAME`.
        output: dataset folder or URL to write. One that already holds this dataset is kept.
        source: log format: minari, d4rl, lerobot, ... or a plug-in's; by default what the input looks like.
        beam_arguments: Beam's own flags, such as ['--runner=FlinkRunner'].
        progress: show a progress bar on stderr.
        options: the command's other options, with underscores: held_out_share=0.1, expert_share=0.8, overwrite=True,
            imports=['my_module'] for a plug-in.

    Raises:
        TypeError: an option that does not exist.
        ValueError: SourceError, DatasetError or an option's value; the message names file and remedy.
        OSError: the output cannot be written.

    Warns:
        UserWarning: something may be read wrongly, values were clipped, or texts cut; the lines that the command
            prints.
    """
    level = logging.getLogger().level
    from etl import build as command  # sets the level of the root logger, for Beam's warnings at import

    logging.getLogger().setLevel(level)
    from rich.console import Console

    from etl import sources
    from etl.building import filters, oddities, summary
    from etl.building.plan import BuildConfig
    from shards.folder import Folder
    from simulators import plugins

    if isinstance(options.get("imports"), str):
        options["imports"] = (options["imports"],)
    plugins.load(options.get("imports", ()))
    console = Console(stderr=True, quiet=not progress)
    cache = Path(options.get("cache", command.Options.cache))
    place = os.fspath(input) if input else None
    asked = command.Options(source, place, dataset=options.get("dataset"), cache=cache)
    chosen = command.with_source(asked, console)
    name, evidence = str(chosen.source), chosen.evidence
    places: dict[str, Any] = {"source": name, "input": chosen.input, "output": os.fspath(output), "evidence": evidence}
    scan_options = sources.load(name).options
    # the dataclasses that the command's options are fields of
    homes: dict[type, dict[str, Any]] = {
        command.Options: {},
        BuildConfig: {},
        filters.Filter: {},
        scan_options: {},
    }
    for option, value in options.items():
        own = [home for home in homes if option in {field.name for field in dataclasses.fields(home)}]
        if not own or option in (*places, "config", "scan", "filter", "list"):
            known = [field.name for home in homes for field in dataclasses.fields(home)]
            near = " or ".join(difflib.get_close_matches(option, known, n=3))
            remedy = f"perhaps {near}" if near else "see python -m etl.build --help"
            raise TypeError(f"build has no option '{option}' for source {name}; {remedy}")
        homes[own[0]][option] = value
    config = typed(BuildConfig, homes[BuildConfig] | {"filter": typed(filters.Filter, homes[filters.Filter])})
    scan = typed(scan_options, homes[scan_options])
    chosen = typed(command.Options, places | homes[command.Options] | {"config": config, "scan": scan})
    beam = [beam_arguments] if isinstance(beam_arguments, str) else list(beam_arguments)
    flags = command.beam_flags(beam, chosen.workers)
    manifest = command.build(chosen, flags, console)
    odd = oddities.load(Folder(str(chosen.output)))
    doubts = [(task, line) for task, own in odd.items() for line in own.warnings]
    for task, loss in doubts + summary.losses(manifest):
        warnings.warn(f"{task}: {loss}", stacklevel=2)
    return Dataset(str(chosen.output), manifest)


class Stream:
    """Batches of token sequences, in the order in which training with this seed sees them; endless.

    `for batch in stream` starts at `next_sequence`, which is all of its state: Stream(..., start=next_sequence)
    continues where another one stopped.

    Args:
        folders: datasets: folders, URLs or what `build` returned.
        sequence_length: tokens per sequence, L.
        batch_size: sequences per batch, B, on each rank.
        seed, start: which sequences, and the first of them.
        held_out: held-out episodes instead of training ones.
        rank, world: this process and the number of processes; each sees its share of every global batch.
        threads: threads that assemble batches ahead; 0: none.
        options: fields of `shards.stream.StreamConfig`: tasks=("NAME",), weights={"NAME": 2.0}, prompt_probability=0.0.

    Raises:
        TypeError: an option that does not exist, or a number that is no integer.
        ValueError: a dataset that cannot be read, or a value that makes no sense.
    """

    def __init__(
        self,
        folders: Folders,
        sequence_length: int = 1024,
        batch_size: int = 16,
        seed: int = 0,
        start: int = 0,
        *,
        held_out: bool = False,
        rank: int = 0,
        world: int = 1,
        threads: int = 1,
        **options: Any,
    ):
        numbers = {
            "batch_size": batch_size,
            "seed": seed,
            "start": start,
            "rank": rank,
            "world": world,
            "threads": threads,
        }
        for name, value in numbers.items():
            if isinstance(value, bool) or not isinstance(value, Integral):
                raise TypeError(f"Stream({name}={value!r}): give an integer")
        if not isinstance(held_out, bool):
            raise TypeError(f"Stream(held_out={held_out!r}): give True or False")
        known = sorted({field.name for field in dataclasses.fields(StreamConfig)} - {"sequence_length"})
        if strange := sorted(set(options) - set(known)):
            raise TypeError(f"Stream has no option '{strange[0]}'; options: {', '.join(known)}")
        config = typed(StreamConfig, options | {"sequence_length": sequence_length})
        self.sequences = SequenceStream(folder_list(folders), config, seed, held_out)
        """Sequence i by number: `stream.sequences.batch(first, count)`."""
        self.next_sequence = start
        self.batch_size, self.rank, self.world, self.threads = batch_size, rank, world, threads

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks, in the order of a batch's `tasks`."""
        return list(self.sequences.tasks)

    @property
    def vocabulary(self) -> Vocabulary:
        """The ranges of token ids."""
        return self.sequences.vocabulary

    def __iter__(self) -> Iterator[Batch]:
        total = self.batch_size * self.world
        loader = Loader(self.sequences, self.next_sequence, total, self.batch_size, self.rank, self.world, self.threads)
        try:
            for (batch,) in loader:
                self.next_sequence += total
                yield _copied(batch)
        finally:
            loader.close()


def _copied(batch: Batch) -> Batch:
    """A batch with arrays of its own; the loader's are reused."""
    result = copy(batch)
    for field in dataclasses.fields(batch):
        if isinstance(value := getattr(batch, field.name), np.ndarray):
            setattr(result, field.name, value.copy())
    return result
