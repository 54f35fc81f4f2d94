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
from schemas.metrics import NAMED_TASKS

FEW = 5
COUNTS = ("episodes", "cut", "held out", "filtered", "rejected", "timesteps", "tokens")


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
    """Print what the dataset holds, one line per task; of many tasks, one per domain without the returns."""
    if len(manifest.tasks) > NAMED_TASKS:
        _show_domains(manifest, console)
        return
    table = Table("task", *COUNTS, "MiB", "return: mean ± std (min, 25 %, median, 75 %, max)")
    for task in manifest.tasks:
        numbers = [f"{n:,}" for n in _counts(task)]
        table.add_row(task.spec.name, *numbers, f"{task.bytes / 2**20:.1f}", _returns(task))
    console.print(table)
    _show_rest(manifest, console)


def _show_domains(manifest: Manifest, console: Console) -> None:
    table = Table("domain", "tasks", *COUNTS, "MiB")
    for domain in sorted({task.spec.domain for task in manifest.tasks}):
        tasks = [task for task in manifest.tasks if task.spec.domain == domain]
        sums = map(sum, zip(*map(_counts, tasks)))
        size = sum(task.bytes for task in tasks) / 2**20
        table.add_row(domain, str(len(tasks)), *(f"{n:,}" for n in sums), f"{size:.1f}")
    console.print(table)
    _show_rest(manifest, console)


def _counts(task: TaskSummary) -> tuple[int, ...]:
    counts = (task.episodes, task.cut_episodes, task.held_out_episodes, task.filtered_episodes)
    return *counts, task.rejected_episodes, task.timesteps, task.tokens


def _show_rest(manifest: Manifest, console: Console) -> None:
    found = losses(manifest)
    shown = found if len(manifest.tasks) <= NAMED_TASKS else found[:FEW]
    if len(shown) < len(found):
        console.print(f"{len(found)} losses of tokens, the first {FEW} of them:")
    for name, loss in shown:
        console.print(f"[yellow]{name}[/]: {loss}", highlight=False)
    size = sum(task.bytes for task in manifest.tasks)
    console.print(
        f"{manifest.shards.rows} shards, {size / 2**20:.1f} MiB; {manifest.rejected.rows} lines in rejected.jsonl"
    )
    if cut := sum(task.cut_episodes for task in manifest.tasks):
        console.print(f"{cut} episodes were cut by the end of their log: kept for training, left out of the returns")


def show_oddities(found: dict[str, TaskOddities], console: Console) -> None:
    """Print what looks odd in the values of each task, one line each; of many tasks, the first few lines."""
    lines = [(name, line) for name, odd in found.items() for line in odd.found]
    shown = lines if len(found) <= NAMED_TASKS else lines[:FEW]
    for name, line in shown:
        console.print(f"[yellow]odd[/] {escape(name)}: {escape(line)}", highlight=False, soft_wrap=True)
    if len(shown) < len(lines):
        rest = f"{len(lines) - len(shown)} lines more on {len({name for name, _ in lines})} tasks"
        console.print(f"[yellow]odd[/] {rest}: python -m etl.inspect shows them", highlight=False)


def losses(manifest: Manifest) -> list[tuple[str, str]]:
    """Losses of tokenization against the logs: (task, line) each."""
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
