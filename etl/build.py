"""`python -m etl.build --input LOGS`: logs to a dataset of shards.

recognise source -> resolve files -> scan -> filter -> plan -> Beam pipeline (progress by shards) -> gather -> summary

Exit status 0 if a dataset was made or was already there; 1, with one line that names
file and remedy, if none could be made.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
import threading

logging.getLogger().setLevel(logging.ERROR)  # first of all: Beam warns while it is imported
from dataclasses import field, make_dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import tyro
from apache_beam.options.pipeline_options import PipelineOptions, StandardOptions
from rich.console import Console

from etl import sources
from etl.building import formats, pipeline, summary
from etl.building.dataset import Options, build, with_source
from etl.sources import SourceError
from schemas import terminal
from schemas.files import disk_fault, home_expanded
from simulators import plugins

__all__ = ["Options", "beam_flags", "build", "parsed", "with_source"]
DASK = "apache_beam.runners.dask.dask_runner.DaskRunner"
IN_MEMORY = "--runner=apache_beam.runners.portability.fn_api_runner.FnApiRunner"


def parsed(arguments: list[str], console: Console | None = None) -> tuple[Options, list[str]]:
    """The options of a command line, those of its source among them, and what is left for Beam. ValueError for an
    option of another source; SourceError where no source is given and none fits the input."""
    plugins.load_early(arguments)
    early, _ = early_parser().parse_known_args(arguments)
    given = {name: value for name, value in vars(early).items() if value is not None}
    if "cache" in given:
        given["cache"] = Path(given["cache"])
    chosen = with_source(Options(**given), console or Console(stderr=True))
    assert chosen.source is not None
    source = sources.load(chosen.source)
    kind: Any = tyro.conf.OmitArgPrefixes[source.options]  # type: ignore[misc,name-defined]
    flat: Any = make_dataclass(
        "Options", [("scan", kind, field(default_factory=source.options))], bases=(Options,), frozen=True
    )
    flat.__doc__ = Options.__doc__
    options, rest = tyro.cli(flat, prog="python -m etl.build", args=arguments, return_unknown_args=True)
    for name in (argument.split("=")[0].removeprefix("--").replace("-", "_") for argument in rest):
        owners = sources.owners(name)
        if owners:
            whose = f"--{name.replace('_', '-')} is an option of source {' and '.join(owners)}"
            raise ValueError(f"{whose}; source {source.name} does not know it: leave it out")
    return replace(options, source=chosen.source, evidence=chosen.evidence), rest


def early_parser() -> argparse.ArgumentParser:
    """Of the options that decide which source's options there are."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flags in (("--source",), ("--input", "-i"), ("--output", "-o"), ("--dataset",), ("--cache",)):
        early.add_argument(*flags)
    return early


def beam_flags(arguments: list[str], workers: int) -> list[str]:
    """Beam's arguments with our defaults; ValueError for a flag that neither we nor Beam know."""
    arguments = _dask_flags(arguments)
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, conflict_handler="resolve")
    for options in {PipelineOptions, *PipelineOptions.__subclasses__()}:
        options._add_argparse_args(parser)  # type: ignore[attr-defined]  # Beam has no public list of its flags
    unknown = parser.parse_known_args(arguments)[1]
    if unknown:
        raise ValueError(f"unknown option {unknown[0]}; see python -m etl.build --help, or Beam's own pipeline options")
    if not any(flag.split("=")[0] == "--runner" for flag in arguments):
        # Named outright: DirectRunner would first try to download another runner.
        arguments = [*arguments, IN_MEMORY]
    if workers > 1:
        arguments = [*arguments, "--direct_running_mode=multi_processing", f"--direct_num_workers={workers}"]
    return arguments


def _dask_flags(arguments: list[str]) -> list[str]:
    """With Dask's runner: its flags made known, its full name, and one shard a task (Beam's default of 128 would
    give a whole plan to one worker). ValueError where Dask is not installed."""
    if not (PipelineOptions(arguments).view_as(StandardOptions).runner or "").endswith("DaskRunner"):
        return arguments
    try:
        importlib.import_module("apache_beam.runners.dask.dask_runner")
    except ImportError as error:
        raise ValueError(f"--runner DaskRunner: {error}; pip install 'gato-open[dask]'") from error
    if not any(flag.startswith(("--dask_npartitions", "--dask_partition_size")) for flag in arguments):
        arguments = [*arguments, "--dask_partition_size=1"]
    return [*arguments, f"--runner={DASK}"]  # the last one counts


@terminal.command
def main() -> int:
    # A copy of stderr: while Beam's worker processes run, stderr itself goes to a log file.
    copy: Any = terminal.LossyStream(os.fdopen(os.dup(2), "w"))
    console = Console(file=copy, width=None if sys.stderr.isatty() else 140)
    logging.getLogger("apache_beam").setLevel(logging.CRITICAL)  # what fails is raised too
    arguments = sys.argv[1:]
    try:
        given, _ = early_parser().parse_known_args(arguments)
        each = formats.formats_of(given.source, given.input)
        if not each:
            return run(arguments, console)
        places = [["--input", str(folder), "--output", formats.output_of(folder, given.output)] for folder in each]
        return max(run([*arguments, *place], console) for place in places)  # the last one of an option counts
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as interrupt:
        threading.excepthook = lambda about: None  # what the runner's threads say while they end
        print("interrupted: no dataset yet; the same command again keeps the finished shards", file=sys.stderr)
        return terminal.status_of(interrupt)


def run(arguments: list[str], console: Console) -> int:
    """One build by a command line; its exit status."""
    options = Options()
    try:
        options, rest = parsed(arguments, console)
        flags = beam_flags(rest, options.workers)
        if options.list:
            wide = Console(width=None if sys.stdout.isatty() else 300)  # names and addresses are copied from it
            summary.datasets(sources.load(str(options.source)), home_expanded(options.cache), wide)
            return 0
        manifest = build(options, flags, console)
    except (SourceError, ValueError, OSError) as error:
        place = options.output or f"data/shards/{options.source}"
        print(f"error: {disk_fault(error, place) or error}", file=sys.stderr)
        return 1
    summary.show(manifest, console)
    return 0


def command() -> NoReturn:
    """The console script gato-build: `main`, and an end that waits for nothing. A runner whose worker was lost leaves
    threads that never end."""
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    pipeline.end_children()
    os._exit(status)


if __name__ == "__main__":
    command()
