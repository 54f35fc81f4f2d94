"""What a comparison shows while it runs, on streams whose reader may go away.

    (job number, line) -> a bar of parts, and a line per running one -> stderr

Invariant: a closed stdout or stderr ends no comparison; what would be shown is dropped.
"""

from __future__ import annotations

import os
import sys
from typing import Any, TextIO

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from eval.jobs import Job
from eval.runner import JobResult


class LossyStream:
    """A text stream that drops what nobody can read any more."""

    def __init__(self, stream: TextIO | None):
        self.stream = stream

    def write(self, text: str) -> int:
        try:
            if self.stream is not None:
                self.stream.write(text)
        except (OSError, ValueError):
            self._drop()
        return len(text)

    def flush(self) -> None:
        try:
            if self.stream is not None:
                self.stream.flush()
        except (OSError, ValueError):
            self._drop()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def _drop(self) -> None:
        """Point the file descriptor at nothing: Python flushes it again when it ends, and would fail then."""
        try:
            assert self.stream is not None
            descriptor, nothing = self.stream.fileno(), os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, descriptor)
            os.close(nothing)
        except (OSError, ValueError):
            self.stream = None


def open_closed_streams() -> None:
    """Point stdin, stdout and stderr at nothing where they are closed: else the next file that is opened takes their
    place, and libraries write into it."""
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            nothing = os.open(os.devnull, os.O_RDWR)
            if nothing != descriptor:
                os.dup2(nothing, descriptor)
                os.close(nothing)
            os.set_inheritable(descriptor, True)
            setattr(sys, name, open(descriptor, "r" if name == "stdin" else "w"))  # noqa: SIM115


def lossy_console() -> Console:
    """A console on stderr."""
    return Console(file=LossyStream(sys.stderr))  # type: ignore[arg-type]


def say(text: str, stream: TextIO | None) -> None:
    """Print a line, if anybody can read it."""
    print(text, file=LossyStream(stream), flush=True)


class Display:
    """A bar of parts, and a line for what each running one is doing."""

    def __init__(self, jobs: list[Job], console: Console):
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self.progress, self.names = Progress(*columns, console=console, transient=True), [job.name for job in jobs]
        self.bar = self.progress.add_task("parts", total=len(jobs))
        self.running: dict[int, str] = {}

    def message(self, number: int, text: str) -> None:
        """A job is doing this now."""
        self.running[number] = text
        lines = "; ".join(f"{self.names[number]}: {text}" for number, text in sorted(self.running.items()))
        self.progress.update(self.bar, description=escape(lines) or "parts")

    def finished(self, number: int, result: JobResult) -> None:
        """A job has its result."""
        self.running.pop(number, None)
        failed = "[red]failed[/]: " if result.error else ""
        line = f"{escape(self.names[number])}: {failed}{escape(result.summary)}"
        self.progress.console.print(line, highlight=False, soft_wrap=True)
        self.progress.advance(self.bar)
