"""`python -m eval.compare`: DT, TT and Gato on the same datasets, simulators and seeds.

    datasets x models x seeds -> one part of result rows each (eval/jobs.py) -> rows.parquet -> table.md, report.html

Parts are made by several processes, in any order, and put together in theirs. One that is already there with the same
weights, data and protocol is kept, so a killed comparison goes on where it was.

Invariant: every figure is an aggregate of rows in rows.parquet, and every row names its seed, weights, data, versions
and protocol; the number of processes changes none.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from eval import report, scores
from eval.charts import Curves, read_metrics
from eval.jobs import BASELINES, Job, Parts, Told
from eval.options import Options
from schemas.dataset import DatasetError
from schemas.result import RESULT_SCHEMA
from schemas.vocabulary import VocabularyMismatch
from trainer.checkpoint import CheckpointError

Made = tuple[list[dict[str, Any]], str]
# what ends one job; the others go on
FAULTS = (RuntimeError, ArithmeticError, ValueError, OSError)

_parts: Parts
_told: Any


def _begin(options: Options, told: Any) -> None:
    """A worker process opens what all its parts share, and ends when its parent does."""
    global _parts, _told
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    _parts, _told = Parts(options), told


def _one(number: int) -> Made:
    return made(_parts, _parts.jobs[number], partial(_tell, _told, number))


def _tell(told: Any, number: int, text: str) -> None:
    told.put((number, text))


def made(parts: Parts, job: Job, tell: Told) -> Made:
    """The rows of a job and what happened; where it cannot run, a row that says why."""
    try:
        return parts.rows(job, tell)
    except FAULTS as error:
        return [parts.failure(job, str(error))], f"[red]failed[/]: {error}"


def all_made(parts: Parts, jobs: list[Job], processes: int, tell: Any) -> Iterator[tuple[int, Made]]:
    """The rows of every job with its number, as they are ready. `tell` has put((number, text))."""
    if processes == 1:
        for number, job in enumerate(jobs):
            yield number, made(parts, job, partial(_tell, tell, number))
        return
    context = multiprocessing.get_context("spawn")
    told = context.SimpleQueue()

    def pass_on() -> None:
        while (message := told.get()) is not None:
            tell.put(message)

    listener = threading.Thread(target=pass_on, daemon=True)
    listener.start()
    pool = ProcessPoolExecutor(processes, context, _begin, (parts.options, told))
    try:
        # a terminal's Ctrl-C reaches children too, which inherit that they leave it to this process
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        futures = {pool.submit(_one, number): number for number in range(len(jobs))}
        signal.signal(signal.SIGINT, handler)
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BrokenProcessPool:
        remedy = "the same command keeps what was played; give fewer --processes if memory is short"
        raise ChildProcessError(f"a process of the comparison was killed; {remedy}") from None
    finally:
        for child in multiprocessing.active_children():
            child.terminate()  # idle ones, or where something went wrong
        pool.shutdown(cancel_futures=True)
        told.put(None)


class Display:
    """A bar of parts, and a line for what each running one is at."""

    def __init__(self, jobs: list[Job], console: Console):
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self.progress, self.names = Progress(*columns, console=console, transient=True), [job.name for job in jobs]
        self.bar = self.progress.add_task("parts", total=len(jobs))
        self.at: dict[int, str] = {}

    def put(self, message: tuple[int, str]) -> None:
        """Number of a part and what it is at."""
        self.at[message[0]] = message[1]
        running = "; ".join(f"{self.names[number]}: {text}" for number, text in sorted(self.at.items()))
        self.progress.update(self.bar, description=running or "parts")

    def done(self, number: int, what: str) -> None:
        """A part is made."""
        self.at.pop(number, None)
        self.progress.console.print(f"{self.names[number]}: {what}", highlight=False, soft_wrap=True)
        self.progress.advance(self.bar)


def compare(options: Options, console: Console) -> Path:
    """All jobs, then rows, table and report, whose path is returned."""
    parts = Parts(options)
    jobs = parts.jobs
    for remark in parts.remarks:
        console.print(remark, highlight=False, soft_wrap=True)
    processes = options.processes or (1 if torch.cuda.is_available() else len(os.sched_getaffinity(0)))
    found: dict[int, list[dict[str, Any]]] = {}
    display = Display(jobs, console)
    with display.progress:
        for number, (rows, what) in all_made(parts, jobs, min(processes, len(jobs)), display):
            found[number] = rows
            display.done(number, what)
    rows = [row for _, part in sorted(found.items()) for row in part]
    report.save_rows(options.output / "rows.parquet", rows)
    table = pa.Table.from_pylist(rows, schema=RESULT_SCHEMA)
    tasks = {spec.name: spec for spec, _, _ in parts.tasks}
    console.print(report.console(scores.aggregate(table), tasks))
    pictures = {(job.spec.name, job.model): parts.picture(job) for job in jobs if parts.picture(job).is_file()}
    manifests = [dataset.manifest for dataset in parts.datasets]
    title = "DT, TT and Gato compared"
    return report.write_report(options.output, table, manifests, curves(parts, jobs), pictures, title)


def curves(parts: Parts, jobs: list[Job]) -> dict[str, Curves]:
    """Learning curves by title: each Gato's run, and the baselines' losses, a line a task, the mean of its seeds."""
    found: dict[str, Curves] = {}
    for export in parts.exports.values():
        if (path := export.parent / "metrics.jsonl").is_file():
            found[f"Gato: {export.parent.name}"] = read_metrics(path)
    losses: dict[tuple[str, str], list[np.ndarray]] = {}
    for job in jobs:
        trained = parts.folder(job) / "config.json" if job.model in BASELINES else None
        if trained and trained.is_file():
            seed = np.array(json.loads(trained.read_text())["extra"]["losses"])
            losses.setdefault((f"training loss of {job.model.upper()}", job.spec.name), []).append(seed)
    for (quantity, task), seeds in losses.items():
        line: list[tuple[float, float]] = [(int(step), float(loss)) for step, loss in np.mean(seeds, axis=0)]
        found.setdefault("Baselines", {}).setdefault(quantity, {})[task] = line
    return found


def main() -> int:
    """The command; its exit status."""
    options = tyro.cli(Options, prog="python -m eval.compare")
    try:
        path = compare(options, Console(stderr=True))
    except (DatasetError, CheckpointError, VocabularyMismatch, scores.ResultError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: the same command again keeps what was played", file=sys.stderr)
        return 130
    print((path.parent / "table.md").read_text())
    print(f"report: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
