"""The output of a build: progress while it runs, a table of the dataset, the names of known datasets.

Invariant: progress is read from the finished shards alone, so it is right on every runner.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from rich import progress
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from etl.building.oddities import TaskOddities
from etl.building.plan import ShardPlan
from etl.sources import Source
from schemas.dataset import Manifest, TaskSummary


class _Rate(progress.ProgressColumn):
    """Timesteps per second since the start, of what this run has written."""

    def render(self, task: progress.Task) -> str:
        done = task.completed - task.fields["kept"]
        return f"{done / task.elapsed:,.0f} timesteps/s" if task.elapsed and done else "- timesteps/s"


class Progress:
    """A bar over planned timesteps, moved by finished shards; `message` prints a line above it."""

    def __init__(
        self, plan: list[ShardPlan], finished: Callable[[], list[int]], console: Console, interval: float = 0.25
    ):
        self.interval = interval  # seconds between looks; looking into an object store takes a request
        self.sizes = {shard.number: shard.timesteps for shard in plan}
        self.finished, self.console, self.stop = finished, console, threading.Event()
        columns = (
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.TaskProgressColumn(),
            _Rate(),
            progress.TimeElapsedColumn(),
            progress.TextColumn("left"),
            progress.TimeRemainingColumn(elapsed_when_finished=False, compact=True),
        )
        self.bar = progress.Progress(*columns, console=console, speed_estimate_period=3600)
        self.task = self.bar.add_task("shards", total=sum(self.sizes.values()), kept=0)
        self._look()
        self.bar.update(self.task, kept=self.bar.tasks[0].completed)
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def message(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False)

    def _look(self) -> None:
        done = [number for number in self.finished() if number in self.sizes]
        description = f"shards {len(done)}/{len(self.sizes)}"
        self.bar.update(self.task, completed=sum(self.sizes[n] for n in done), description=description)

    def _watch(self) -> None:
        while not self.stop.wait(self.interval):
            self._look()

    def __enter__(self) -> Progress:
        self.bar.start()
        self.thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop.set()
        self.thread.join()
        self._look()
        self.bar.stop()


def show(manifest: Manifest, console: Console) -> None:
    """Print what the dataset holds, one line per task."""
    columns = ("episodes", "cut", "held out", "filtered", "rejected", "timesteps", "tokens", "MiB")
    table = Table("task", *columns, "return: mean ± std (min, 25 %, median, 75 %, max)")
    for task in manifest.tasks:
        counts = (task.episodes, task.cut_episodes, task.held_out_episodes, task.filtered_episodes)
        sizes = (task.rejected_episodes, task.timesteps, task.tokens)
        numbers = [f"{n:,}" for n in (*counts, *sizes)]
        table.add_row(task.spec.name, *numbers, f"{task.bytes / 2**20:.1f}", _returns(task))
    console.print(table)
    for name, loss in losses(manifest):
        console.print(f"[yellow]{name}[/]: {loss}", highlight=False)
    size = sum(task.bytes for task in manifest.tasks)
    console.print(
        f"{manifest.shards.rows} shards, {size / 2**20:.1f} MiB; {manifest.rejected.rows} lines in rejected.jsonl"
    )
    if cut := sum(task.cut_episodes for task in manifest.tasks):
        console.print(f"{cut} episodes were cut by the end of their log: kept for training, left out of the returns")


def show_oddities(found: dict[str, TaskOddities], console: Console) -> None:
    """Print what looks odd in the values of each task, one line each."""
    for name, odd in found.items():
        for line in odd.found:
            console.print(f"[yellow]odd[/] {escape(name)}: {escape(line)}", highlight=False, soft_wrap=True)


def losses(manifest: Manifest) -> list[tuple[str, str]]:
    """What tokens do not keep of the logs: (task, line) each."""
    return [
        (task.spec.name, f"{count:,} {what}")
        for task in manifest.tasks
        for what, count in (
            ("observation values beyond the mu-law's range were clipped", task.clipped_observations),
            ("action values outside the declared range were clipped", task.out_of_range_actions),
            ("texts were cut at their length; give more --text-tokens", task.cut_texts),
        )
        if count
    ]


def _returns(task: TaskSummary) -> str:
    if task.returns is None:
        return "-"
    return f"{task.return_mean:.2f} ± {task.return_std:.2f} ({', '.join(f'{q:.1f}' for q in task.returns)})"


def datasets(source: Source, cache: Path, console: Console) -> None:
    """Print the datasets that a source knows by name."""
    known = source.known(cache)
    table = Table("dataset", "environment", "cached", "address")
    for one in known:
        table.add_row(one.id, one.environment, str(one.cached or ""), one.where)
    console.print(table)
    console.print(f"{len(known)} datasets, {sum(one.cached is not None for one in known)} in {cache}")
