"""`python -m eval.figures.fewshot FOLDER`: scores on unseen tasks against demonstrations, the paper's few-shot figure.

    FOLDER/START/N/**/rows.parquet, each of eval.compare -> Gato's score per task, START and N -> few-shot.{md,svg}

START names what was fine-tuned, such as "trained" (on other tasks) or "scratch"; N is the number of demonstrations.

Invariant: 0 demonstrations are of a model that the task was kept from; equal rows give equal files.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import matplotlib
import numpy as np
import tyro
from matplotlib.figure import Figure

from eval.charts import COLOURS, LINES, STYLE, svg
from eval.report import Comparison, markdown_table
from eval.rows import load_rows
from schemas.files import atomic_write
from schemas.result import EpisodeResult, ResultError, from_table
from schemas.terminal import command
from simulators.registry import suite_of_id

COLUMNS = 5  # panels side by side
RANDOM = "random"


@dataclass(frozen=True)
class Point:
    """The mean score of a task's episodes after `demonstrations`; of random play where `start` is "random"."""

    domain: str
    task: str
    start: str
    demonstrations: int
    score: float
    episodes: int


@dataclass(frozen=True)
class Options:
    """Write few-shot.md and few-shot.svg into the folder of comparisons."""

    folder: Annotated[Path, tyro.conf.Positional]
    """Holds START/N/**/rows.parquet, N the number of demonstrations."""


def points(folder: Path) -> list[Point]:
    """One point per task, start and number of demonstrations, ordered by these.

    Raises:
        ResultError: no rows, a folder that is no number, or a model at 0 demonstrations that knows the task.
    """
    files = sorted(folder.glob("*/*/**/rows.parquet"))
    if not files:
        raise ResultError(f"{folder}: no START/N/rows.parquet in it; play with python -m eval.compare -o {folder}/...")
    episodes: dict[tuple[str, str, str, int], list[float]] = {}
    for path in files:
        start, number = path.relative_to(folder).parts[:2]
        if not number.isdigit():
            raise ResultError(f"{path}: folder '{number}' must be the number of demonstrations; rename it")
        for row in from_table(load_rows(path)):
            if row.failed or row.score != row.score or row.model not in ("gato", RANDOM):
                continue
            if row.model == "gato" and number == "0" and not json.loads(row.protocol).get("zero_shot"):
                raise ResultError(f"{path}: this model was trained on '{row.dataset}'; train it with "
                                  f"--data.stream.excluded-tasks {row.dataset}")  # fmt: skip
            episodes.setdefault(_key(row, start, int(number)), []).append(row.score)
    return [Point(*key, float(np.mean(scores)), len(scores)) for key, scores in sorted(episodes.items())]


def _key(row: EpisodeResult, start: str, number: int) -> tuple[str, str, str, int]:
    domain = suite_of_id(row.environment).name
    return (domain, row.dataset, RANDOM, 0) if row.model == RANDOM else (domain, row.dataset, start, number)


def table(found: Sequence[Point]) -> Comparison:
    """A row per task and one of each domain's mean; a column per start and number of demonstrations."""
    columns = sorted({(one.start, one.demonstrations) for one in found}, key=lambda one: (one[0] != RANDOM, *one))
    scores = {(one.domain, one.task, one.start, one.demonstrations): one.score for one in found}
    rows = []
    for domain in sorted({one.domain for one in found}):
        tasks = sorted({one.task for one in found if one.domain == domain})
        rows += [(domain, task, *(_text(scores.get((domain, task, *column))) for column in columns)) for task in tasks]
        means = ([scores[key] for task in tasks if (key := (domain, task, *column)) in scores] for column in columns)
        rows.append((domain, "mean of its tasks", *(_text(float(np.mean(m)) if m else None) for m in means)))
    names = (start if start == RANDOM else f"{start}, {number}" for start, number in columns)
    caption = (
        "Mean score on tasks that were kept from training, by what was fine-tuned and the number of demonstrations "
        "(0: played from a prompt): 0 is random play and 100 the expert, or the share of solved episodes in %."
    )
    return Comparison(("Domain", "Task", *names), rows, [], caption)


def _text(score: float | None) -> str:
    return "—" if score is None else f"{score:z.1f}"


def chart(found: Sequence[Point]) -> str:
    """One panel per task as an SVG: lines of the starts over 0, 10, 100, ... demonstrations, random play dashed."""
    tasks = sorted({(one.domain, one.task) for one in found})
    starts = sorted({one.start for one in found} - {RANDOM}, key=lambda start: (start != "trained", start))
    numbers = sorted({one.demonstrations for one in found if one.start != RANDOM})
    columns = min(COLUMNS, len(tasks))
    rows = -(-len(tasks) // columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(2.2 * columns, 1.8 * rows + 0.3), layout="constrained")
        for place, (domain, task) in enumerate(tasks, 1):
            axes = figure.add_subplot(rows, columns, place)
            own = [one for one in found if (one.domain, one.task) == (domain, task)]
            for one in own:
                if one.start == RANDOM:
                    axes.axhline(one.score, color=COLOURS["random"], linewidth=0.8, linestyle=(0, (4, 3)))
            for colour, start in zip(LINES, starts):
                line = [(numbers.index(one.demonstrations), one.score) for one in own if one.start == start]
                if line:
                    axes.plot(*zip(*line), color=colour, marker="o", markersize=3, linewidth=1.4, label=start)
            axes.set_title(task, fontsize=6.5, loc="left")
            axes.set_xticks(range(len(numbers)), [str(number) for number in numbers])
            axes.set_xlim(-0.3, len(numbers) - 0.7)
            axes.set_ylim(min(-5.0, *(one.score for one in own)), max(105.0, *(one.score for one in own)))
            axes.grid(axis="y")
            axes.tick_params(length=0, labelsize=7)
        figure.supxlabel("demonstrations", fontsize=8)
        figure.supylabel("score", fontsize=8)
        handles = {label: line for axes in figure.axes for line, label in zip(*axes.get_legend_handles_labels())}
        figure.legend(list(handles.values()), list(handles), loc="outside lower left", ncols=4, frameon=False)
        return svg(figure)


@command
def main() -> int:
    """The command; its exit status."""
    options = tyro.cli(Options, prog="python -m eval.figures.fewshot")
    try:
        found = points(options.folder)
        text, picture = markdown_table(table(found)), chart(found)
        for name, content in (("few-shot.md", text), ("few-shot.svg", picture)):
            with atomic_write(options.folder / name) as file:
                file.write(content.encode())
    except (ResultError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
