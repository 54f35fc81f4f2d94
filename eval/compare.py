"""`python -m eval.compare`: DT, TT and Gato on the same datasets, simulators and seeds.

    datasets x models x seeds -> parts, one file of result rows each -> rows.parquet -> table.md, report.html

Several processes run the parts in any order (eval/workers.py); the rows are joined in the order of the parts. A part
that exists with the same weights, data and protocol and no failed episode is reused, so a killed comparison resumes
where it was.

Invariant: every number is an aggregate of rows in rows.parquet, and every row names its seed, weights, data, versions
and protocol. The number of processes changes none of them.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
import tyro
from rich.console import Console

from eval import domains, report, scores
from eval.charts import Curves, read_metrics
from eval.display import Display, lossy_console
from eval.options import Options
from eval.rows import save_rows
from eval.runner import BASELINES, ComparisonRunner, JobResult
from eval.workers import run_jobs
from schemas.files import disk_fault
from schemas.result import EpisodeResult, to_table
from schemas.terminal import command, status_of

TITLE = "DT, TT and Gato compared"


@dataclass(frozen=True)
class Outcome:
    """A finished comparison: its rows in RESULT_SCHEMA, its table in Markdown, its report, and the reason if nothing
    could be played."""

    rows: pa.Table
    table: str
    report: Path
    error: str = ""


def compare(options: Options, console: Console) -> Outcome:
    """Run all parts, then write rows.parquet, table.md and report.html to `options.output`.

    Raises:
        ValueError: an option, dataset or export cannot be used, or nothing is left to play (DatasetError,
            CheckpointError, VocabularyMismatch and ResultError are its subclasses).
        OSError: a file cannot be written; ChildProcessError: a worker was killed.
        KeyboardInterrupt: Ctrl-C; the same call resumes.
    """
    runner = ComparisonRunner(options)
    options.output.mkdir(parents=True, exist_ok=True)  # before anything is played
    for remark in runner.remarks:
        console.print(remark, highlight=False, soft_wrap=True, markup=False)
    processes = options.processes or (1 if torch.cuda.is_available() else len(os.sched_getaffinity(0)))
    results: dict[int, JobResult] = {}
    display = Display(runner.jobs, console)
    with display.progress, closing(run_jobs(runner, min(processes, len(runner.jobs)), display.message)) as finished:
        for number, result in finished:
            results[number] = result
            display.finished(number, result)
    rows = [row for _, result in sorted(results.items()) for row in result.rows]
    save_rows(options.output / "rows.parquet", rows)
    table = to_table(rows)
    by_domain: list[report.Comparison] = []
    first: dict[tuple[str, str], EpisodeResult] = {}  # those that films show
    for row in rows:
        first.setdefault((row.dataset, row.model), row)
    if runner.many:
        found = domains.by_domain(table)
        by_domain = [domains.domains_table(found), domains.extremes_table(found)]
        console.print(report.rich_table(by_domain[0]))
        film(runner, [first[name, "gato"] for name in domains.filmed(found, "gato")], console)
    else:
        film(runner, [row for row in first.values() if runner.picture(row).is_file() and not row.failed], console)
        console.print(report.console(scores.aggregate(table), {task.spec.name: task.spec for task in runner.tasks}))
    pictures = {key: runner.picture(row) for key, row in first.items() if runner.filmed(row)}
    manifests = [dataset.manifest for dataset in runner.datasets]
    page = report.write_report(options.output, table, manifests, learning_curves(runner), pictures, TITLE, by_domain)
    return Outcome(table, (options.output / "table.md").read_text("utf-8"), page, failure_of(runner, results))


def film(runner: ComparisonRunner, rows: list[EpisodeResult], console: Console) -> None:
    """Films of these rows, the first of their jobs, where there is none or one of other weights, data or protocol."""
    for row in rows:
        job = next(job for job in runner.jobs if (job.spec.name, job.model) == (row.dataset, row.model))
        try:
            runner.film(job, row)
        except Exception as error:  # a simulator may raise anything, and no figure depends on a film
            console.print(f"no film of {row.dataset}: {error}", highlight=False, soft_wrap=True, markup=False)


def failure_of(runner: ComparisonRunner, results: dict[int, JobResult]) -> str:
    """Why a comparison shows nothing: every part that plays failed, or there are no rows. Empty otherwise."""
    played = [results[number] for number, job in enumerate(runner.jobs) if job.model != "behaviour"]
    if played and all(result.error for result in played):
        reasons = dict.fromkeys(result.error for result in played)
        return f"nothing could be played: {'; '.join(reasons)}"
    if not any(result.rows for result in results.values()):
        return "the logs hold no complete episode, and no other model was asked for; give other --models"
    return ""


def learning_curves(runner: ComparisonRunner) -> dict[str, Curves]:
    """Learning curves by title: each Gato's run, and the baselines' losses (per task, the mean over its seeds)."""
    curves: dict[str, Curves] = {}
    for export in runner.exports.values():
        if (path := export.parent / "metrics.jsonl").is_file():
            curves[f"Gato: {export.parent.name}"] = read_metrics(path)
    losses: dict[tuple[str, str], list[np.ndarray]] = {}
    for job in runner.jobs:
        config = runner.baseline_folder(job) / "config.json" if job.model in BASELINES else None
        if config and config.is_file():
            seed = np.array(json.loads(config.read_text("utf-8"))["extra"]["losses"])
            losses.setdefault((f"training loss of {job.model.upper()}", job.spec.name), []).append(seed)
    for (quantity, task), seeds in losses.items():
        line: list[tuple[float, float]] = [(int(step), float(loss)) for step, loss in np.mean(seeds, axis=0)]
        curves.setdefault("Baselines", {}).setdefault(quantity, {})[task] = line
    return curves


@command
def main() -> int:
    """The command; returns its exit status: 1 where nothing could be played."""
    options = tyro.cli(Options, prog="python -m eval.compare")
    try:
        outcome = compare(options, lossy_console())
    except (ValueError, OSError) as error:
        print(f"error: {disk_fault(error, options.output) or error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as interrupt:
        print("interrupted: the same command again keeps what was played", file=sys.stderr)
        return status_of(interrupt)
    print(outcome.table)
    print(f"report: {outcome.report}")
    if outcome.error:
        print(f"error: {outcome.error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
