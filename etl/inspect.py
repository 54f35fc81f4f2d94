"""`python -m etl.inspect DATASET`: what a dataset holds, and one timestep of it decoded back.

dataset.json -> facts, rejected.jsonl -> terminal; etl.inspection.decoded.TaskView (survey, timestep) -> HTML page | PNG

A page shows the facts of all tasks and decodes up to 12 of them; a picture shows the first. --task names another.

Invariant: the output is the only file written. A page loads nothing, and equal datasets give equal pages.
"""

from __future__ import annotations

import difflib
import json
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from etl.building import oddities
from etl.inspection.decoded import InspectError, TaskView
from etl.inspection.facts import Facts, facts, reasons_of
from etl.inspection.figure import figure
from etl.inspection.page import FIRST_LINES, page
from etl.sources import Rejection
from etl.tokenizers.text import TextTokenizer
from schemas.dataset import REJECTED_NAME
from schemas.files import atomic_write
from schemas.terminal import command
from shards.folder import Folder
from shards.reader import Dataset

SHOWN_TASKS = 12  # on one page, where no task is named


@dataclass(frozen=True)
class Options:
    """Show what a dataset of shards holds, and decode one timestep of it back."""

    dataset: tyro.conf.Positional[str]
    """Dataset folder or URL, with a dataset.json."""
    task: Annotated[str | None, tyro.conf.arg(aliases=["-t"])] = None
    """Task to look into; every task of the dataset where not given."""
    episode: int | None = None
    """Episode of the task, counted from 0; its first one where not given."""
    timestep: int | None = None
    """Timestep of the episode, counted from 0; the middle one where not given."""
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """FILE.html or FILE.png to write; results/inspect-NAME.html where not given."""


def inspect(options: Options, console: Console) -> Path:
    """Print the tables and write the output; returns its path. InspectError, DatasetError or OSError say what is
    wrong."""
    if options.output is not None and options.output.suffix.lower() not in (".html", ".png"):
        raise InspectError(f"--output {options.output}: neither .html nor .png; give it one of these endings")
    dataset = Dataset(options.dataset)
    manifest = dataset.manifest
    output = options.output or Path("results") / f"inspect-{manifest.name}.html"
    model = manifest.text_model
    text = TextTokenizer(dataset.local(model.file), manifest.vocabulary) if model else None
    names = [task.spec.name for task in manifest.tasks]
    odd = oddities.load(Folder(options.dataset))
    views = [TaskView(dataset, number, text, odd.get(names[number])) for number in _chosen(options, names)]
    looked = views[: 1 if output.suffix.lower() == ".png" else SHOWN_TASKS]
    steps = [view.timestep(options.episode, options.timestep) for view in looked]
    lines = dataset.local(manifest.rejected).read_text("utf-8").splitlines()
    rejected = [Rejection(**json.loads(line)) for line in lines]
    words = [facts(view, rejected) for view in views]
    for view, own in zip(views, words):
        console.print(_table(view.task.name, own))
    _print_rejected(rejected, console)
    for view in looked:
        view.survey()
        good, verdict = view.verdict
        console.print(Text(f"{view.task.name}: {verdict}", "green" if good else "bold red"), soft_wrap=True)
    try:
        with atomic_write(output) as file:
            if output.suffix.lower() == ".png":
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", "Glyph")  # texts hold letters that no installed font has
                    figure(views[0], steps[0], words[0], manifest.name).savefig(file, format="png")
            else:
                file.write(
                    page(views, steps, words, rejected).encode("utf-8", "replace")
                )  # names of files may be no Unicode
    except OSError as error:
        raise InspectError(f"{output}: cannot be written ({error.strerror}); give another --output") from None
    if len(looked) < len(views):
        console.print(f"{output} shows {len(looked)} of {len(views)} tasks; give --task for another", soft_wrap=True)
    return output


def _chosen(options: Options, names: list[str]) -> list[int]:
    """Ordinals of the tasks to show."""
    if options.task is None:
        return list(range(len(names)))
    if options.task not in names:
        near = difflib.get_close_matches(options.task, names, n=3, cutoff=0.5) or names[:8]
        raise InspectError(f"{options.dataset}: no task '{options.task}'; give --task {' or '.join(near)}")
    return [names.index(options.task)]


def _table(name: str, words: Facts) -> Table:
    table = Table(title=Text(name, "bold"), title_justify="left", show_header=False)
    for what, value in words:
        table.add_row(Text(what, "cyan"), Text(value))
    return table


def _print_rejected(rejected: Sequence[Rejection], console: Console) -> None:
    if rejected:
        first = f"{REJECTED_NAME}: {reasons_of(rejected)}; first of {len(rejected)}:"
        lines = [f"  {r.file}, {r.position}: {r.reason}: {r.detail}" for r in rejected[:FIRST_LINES]]
        console.print(Text("\n".join([first, *lines])), soft_wrap=True)


@command
def main() -> int:
    options = tyro.cli(Options, prog="python -m etl.inspect")
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 110)
    try:
        output = inspect(options, console)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    console.print(Text(str(output)), soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
