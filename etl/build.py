"""`python -m etl.build --source d4rl`: logs to a dataset of shards.

resolve files -> scan -> plan -> Beam pipeline (progress by finished shards) -> gather -> summary

Exit status 0 when a dataset was made or already stood there; 1, with one line that
names file and remedy, when nothing useful could be made.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import threading
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import tyro
from apache_beam.options.pipeline_options import PipelineOptions
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from etl import pipeline, sources
from schemas.dataset import DatasetError, Manifest, load_manifest
from schemas.vocabulary import by_name


@dataclass(frozen=True)
class Options:
    """Tokenize offline-RL logs into a dataset of WebDataset shards, through Apache Beam.

    Beam's own flags pass through: --runner, --direct_num_workers, --flink_master and so on.
    """

    source: str = "d4rl"
    """Log format: d4rl (HDF5 files) or atari (DQN-Replay folders)."""
    input: Annotated[Path | None, tyro.conf.arg(aliases=["-i"])] = None
    """A file, or a folder of logs. Without it, --dataset is downloaded to the cache."""
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """Dataset folder to write; data/shards/SOURCE where not given."""
    dataset: str | None = None
    """Dataset to download: a D4RL id such as hopper-medium-v2, or an Atari GAME/RUN such as Pong/1."""
    cache: Path = Path(os.environ.get("GATO_CACHE", "~/.cache/gato"))
    """Where downloads are kept."""
    environment: str | None = None
    """gymnasium id, for logs that name none."""
    max_episode_steps: int | None = None
    """Time limit, for logs without timeouts."""
    workers: int = 1
    """Processes on this machine (Beam's multi_processing mode when above 1)."""
    max_rejected_share: float = 0.1
    """The build fails when more than this share of the episodes had to be rejected."""
    overwrite: bool = False
    """Replace a different dataset that stands in the output folder."""
    config: tyro.conf.OmitArgPrefixes[pipeline.BuildConfig] = field(default_factory=pipeline.BuildConfig)


def build(options: Options, beam_arguments: list[str], console: Console) -> Manifest:
    """Make the dataset. DatasetError or SourceError name what is wrong."""
    by_name(options.config.vocabulary)
    source = sources.load(options.source)
    output = options.output or Path("data/shards") / options.source
    if options.input is not None and not options.input.exists():
        raise sources.SourceError(f"{options.input}: no such file or folder; give --input an existing one")
    files = source.resolve(options.input, options.dataset, options.cache.expanduser())
    scans = source.scan(files, sources.ScanOptions(options.environment, options.max_episode_steps))
    plan = pipeline.make_plan(options.source, scans, options.config)
    for rejection in (r for scan in scans for r in scan.rejected if r.position < 0):
        console.print(f"[yellow]rejected[/] {rejection.file}: {rejection.reason}: {rejection.detail}", highlight=False)
    if (output / "dataset.json").exists():
        standing = load_manifest(output)
        if standing.config == asdict(options.config) | {"inputs": pipeline.inputs_of(plan)}:
            damaged = pipeline.damaged_file(output, standing)
            if damaged is None:
                console.print(f"{output}: already built from these files with these options")
                return standing
            console.print(f"{output / damaged}: missing or damaged; building the dataset again")
        elif not options.overwrite:
            raise DatasetError(f"{output}: holds another dataset; give another --output, or --overwrite to replace it")
        pipeline.remove_dataset(output)
    if not plan:
        lines = [r for scan in scans for r in scan.rejected]
        why = f"{lines[0].file}: {lines[0].reason}: {lines[0].detail}" if lines else "it holds no episode"
        raise DatasetError(f"nothing usable in the input: {why}")
    output.mkdir(parents=True, exist_ok=True)
    with _progress(plan, output, console):
        pipeline.run(plan, output, beam_arguments)
    return pipeline.gather(output.name, plan, scans, output, options.config, options.max_rejected_share)


class _progress:
    """A bar that counts finished shards, whatever runner makes them."""

    def __init__(self, plan: list, output: Path, console: Console):
        columns = (TextColumn("shards"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, console=console)
        self.task = self.bar.add_task("shards", total=len(plan))
        self.output, self.stop = output, threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self.stop.wait(0.2):
            self.bar.update(self.task, completed=pipeline.finished_shards(self.output))

    def __enter__(self) -> None:
        self.bar.start()
        self.thread.start()

    def __exit__(self, *exception: object) -> None:
        self.stop.set()
        self.thread.join()
        self.bar.update(self.task, completed=pipeline.finished_shards(self.output))
        self.bar.stop()


def summarise(manifest: Manifest, console: Console) -> None:
    """Print what the dataset holds, a line a task."""
    table = Table("task", "episodes", "cut", "held out", "rejected", "timesteps", "tokens", "return (whole episodes)")
    for task in manifest.tasks:
        returns = "-" if task.return_mean is None else f"{task.return_mean:.2f} ± {task.return_std:.2f}"
        counts = (task.episodes, task.cut_episodes, task.held_out_episodes, task.rejected_episodes)
        table.add_row(task.spec.name, *map(str, counts), f"{task.timesteps:,}", f"{task.tokens:,}", returns)
        if task.out_of_range_actions or task.clipped_observations:
            console.print(
                f"[yellow]{task.spec.name}[/]: {task.out_of_range_actions} action values outside the declared range "
                f"and {task.clipped_observations} observation values beyond the mu-law's range were clipped"
            )
    console.print(table)
    size = sum(shard.bytes for shard in manifest.shards)
    cut = sum(task.cut_episodes for task in manifest.tasks)
    console.print(
        f"{len(manifest.shards)} shards, {size / 2**20:.1f} MiB; {manifest.rejected.rows} lines in rejected.jsonl"
    )
    if cut:
        console.print(f"{cut} episodes were cut by the end of their log: kept for training, left out of the returns")


def beam_flags(arguments: list[str], workers: int) -> list[str]:
    """Beam's arguments with our defaults; ValueError for a flag that neither we nor Beam know."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, conflict_handler="resolve")
    for options in {PipelineOptions, *PipelineOptions.__subclasses__()}:
        options._add_argparse_args(parser)  # type: ignore[attr-defined]  # Beam has no public list of its flags
    unknown = parser.parse_known_args(arguments)[1]
    if unknown:
        raise ValueError(f"unknown option {unknown[0]}; see python -m etl.build --help, or Beam's own pipeline options")
    if not any(flag.split("=")[0] == "--runner" for flag in arguments):
        # Named outright: DirectRunner would first try to download another runner.
        arguments = [*arguments, "--runner=apache_beam.runners.portability.fn_api_runner.FnApiRunner"]
    if workers > 1:
        arguments = [*arguments, "--direct_running_mode=multi_processing", f"--direct_num_workers={workers}"]
    return arguments


def main() -> int:
    console = Console(stderr=True, width=None if sys.stderr.isatty() else 140)
    logging.getLogger().setLevel(logging.ERROR)
    logging.getLogger("apache_beam").setLevel(logging.ERROR)
    options, rest = tyro.cli(Options, prog="python -m etl.build", return_unknown_args=True)
    try:
        manifest = build(options, beam_flags(rest, options.workers), console)
    except (sources.SourceError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: no dataset yet; the same command again keeps the finished shards", file=sys.stderr)
        return 130
    summarise(manifest, console)
    return 0


if __name__ == "__main__":
    sys.exit(main())
