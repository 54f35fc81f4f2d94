"""Progress of a comparison on the terminal.

(job number, line) -> a bar of parts, and a line per running one -> stderr

Invariant: a reader of stderr that goes away ends no comparison.
"""

from __future__ import annotations

import sys

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from eval.jobs import Job
from eval.runner import JobResult
from schemas.terminal import LossyStream


def lossy_console() -> Console:
    """A console on stderr, whose reader may go away."""
    return Console(file=LossyStream(sys.stderr))  # type: ignore[arg-type]


class Display:
    """A bar of parts, and a line for what each running one is doing."""

    def __init__(self, jobs: list[Job], console: Console):
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self.progress, self.names = Progress(*columns, console=console, transient=True), [job.name for job in jobs]
        self.bar = self.progress.add_task("parts", total=len(jobs))
        self.running: dict[int, str] = {}

    def message(self, number: int, text: str) -> None:
        """Show what a job is doing now."""
        self.running[number] = text
        lines = "; ".join(f"{self.names[number]}: {text}" for number, text in sorted(self.running.items()))
        self.progress.update(self.bar, description=escape(lines) or "parts")

    def finished(self, number: int, result: JobResult) -> None:
        """Print a job's result, and count it."""
        self.running.pop(number, None)
        failed = "[red]failed[/]: " if result.error else ""
        line = f"{escape(self.names[number])}: {failed}{escape(result.summary)}"
        self.progress.console.print(line, highlight=False, soft_wrap=True)
        self.progress.advance(self.bar)
