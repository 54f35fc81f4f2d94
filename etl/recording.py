"""Many logs by one command: every task of a suite whose expert is shipped, in parallel, each in its own format.

    --suite NAME or all -> ids with an expert -> one process per log -> OUTPUT/{d4rl,minari,babyai,dqn_replay}/...
                        -> OUTPUT/recorded.json: per log its episodes, timesteps, returns, seconds, digest

The same command again records what is missing. A log that fails, or a suite that is not installed, is named, and the
others go on.

Invariant: a log's bytes are a function of its id and the options, whatever else is recorded and by how many workers.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import active_children, get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress

import simulators
from etl.building.formats import TABLE, Row, recorded
from etl.record import DEFAULT_STEPS, AlreadyThere, Options, Recorded, record
from schemas.files import disk_fault, exclusive_name, sha256_of, write_rows
from simulators import plugins, scores
from simulators.registry import all_suites

DEFAULT_FOLDER = Path("data/logs")


def record_suites(options: Options, console: Console) -> int:
    """Record the logs of the asked suites that are missing, and return how many failed. SimulatorError for a suite that
    does not exist, ValueError where a log was recorded with other options or another process records there."""
    output = (options.output or DEFAULT_FOLDER).absolute()
    todo = _tasks(options.suite or "all", console)
    with exclusive_name(output / TABLE, "give another --output"):
        return _record_missing(options, todo, output, console)


def _record_missing(options: Options, todo: list[str], output: Path, console: Console) -> int:
    rows = recorded(output, "give another --output")
    asked = _asked(options)
    for id in todo:
        if id in rows and rows[id].asked != asked and not options.overwrite:
            raise ValueError(f"{output / TABLE}: {id} was recorded with {rows[id].asked}; give another --output, the "
                             "same options, or --overwrite")  # fmt: skip
    present = [id for id in todo if id in rows and (output / rows[id].path).exists() and not options.overwrite]
    missing = [id for id in todo if id not in present]
    console.print(_announcement(options, len(present), missing), highlight=False)
    failed = 0
    with _processes(options.workers) as pool, Progress(console=console) as progress:
        bar = progress.add_task("logs", total=len(missing))
        jobs = {pool.submit(_one, replace(options, environment=id, suite=None), output): id for id in missing}
        for job in as_completed(jobs):
            progress.advance(bar)
            id = jobs[job]
            try:
                rows[id] = job.result()
            except (simulators.SimulatorError, ValueError, OSError) as error:
                failed += 1
                problem = escape(f"{id}: {disk_fault(error, output) or error}")
                console.print(f"[red]failed[/] {problem}", highlight=False, soft_wrap=True)
                continue
            write_rows(output / TABLE, rows)
            row = rows[id]
            line = f"{id}: {row.episodes} episodes, {row.timesteps} timesteps"
            if row.mean_return is not None:
                line += f", return {row.mean_return:.1f} ± {row.std_return:.1f}"
            console.print(line, highlight=False)
    done = [rows[id] for id in todo if id in rows]
    size = sum(row.bytes for row in done) / 1e6
    console.print(f"{output}: {len(done)} logs, {sum(row.timesteps for row in done):,} timesteps, {size:,.0f} MB; "
                  f"{failed} failed", highlight=False)  # fmt: skip
    return failed


@contextmanager
def _processes(count: int) -> Iterator[ProcessPoolExecutor]:
    """A pool whose processes end with an interrupt, and not after all that waits for them."""
    with ProcessPoolExecutor(count, get_context("spawn")) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in active_children():
                process.terminate()
            raise


def _tasks(name: str, console: Console) -> list[str]:
    """Ids of the suite, or of all that are installed; those that are not are named."""
    suites = all_suites().values() if name == "all" else [simulators.suite_named(name)]
    found: list[str] = []
    for suite in suites:
        try:
            found += suite.tasks()
        except simulators.SimulatorError as error:
            if name != "all":
                raise
            console.print(f"[yellow]left out[/] {escape(str(error))}", highlight=False, soft_wrap=True)
    if not found:
        having = ", ".join(suite.name for suite in all_suites().values() if suite.experts)
        raise simulators.SimulatorError(f"--suite {name}: no expert is shipped for it; there are experts of {having}")
    return found


def _announcement(options: Options, present: int, missing: list[str]) -> str:
    """How many logs there will be and how long they take, at the measured seconds of an expert's episode."""
    line = f"{len(missing)} logs to record" + (f", {present} are there" if present else "")
    measured = [scores.table()[id] for id in missing if id in scores.table()]
    if not measured:
        return line
    seconds = sum(_episodes(options, score.timesteps) * score.seconds for score in measured)
    of = "" if len(measured) == len(missing) else f" for {len(measured)} of them (the others were not measured)"
    minutes = max(1, round(seconds / 60 / options.workers))
    return f"{line}; about {minutes} minutes{of} with {options.workers} processes at this project's measured rates"


def _episodes(options: Options, timesteps: float) -> float:
    """Episodes of a log whose episodes have so many timesteps."""
    steps = options.steps or (0 if options.episodes else DEFAULT_STEPS)
    return max(options.episodes or 0, steps / max(timesteps, 1.0))


def _asked(options: Options) -> dict[str, object]:
    names = ("policy", "episodes", "steps", "noise", "temperature", "seed")
    asked = {name: getattr(options, name) for name in names}
    asked |= {name: given for name in ("level", "run") if (given := getattr(options, name)) != getattr(Options, name)}
    if options.episodes is None:
        asked["steps"] = options.steps or DEFAULT_STEPS
    elif options.steps is None:
        asked.pop("steps")
    return asked


def _one(options: Options, output: Path) -> Row:
    """Record one log, in a process of its own."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    plugins.load(options.imports)
    begun = time.process_time()
    options = replace(options, output=None)
    try:
        done = record(options, Console(quiet=True), parent=output)
    except AlreadyThere as taken:
        done = _proven(options, output, taken)
    size, digest = _measure(done.path)
    return Row(
        path=str(done.path.relative_to(output)),
        suite=simulators.suite_of_id(options.environment or "").name,
        episodes=len(done.returns),
        timesteps=done.timesteps,
        mean_return=round(float(np.mean(done.returns)), 4) if done.returns else None,
        std_return=round(float(np.std(done.returns)), 4) if done.returns else None,
        seconds=round(time.process_time() - begun, 2),
        bytes=size,
        sha256=digest,
        asked=_asked(options),
    )


def _proven(options: Options, output: Path, taken: AlreadyThere) -> Recorded:
    """A log that has no row, since an interrupt came between the two: recorded again to the same bytes, it is ours."""
    with TemporaryDirectory(prefix=".recording-", dir=output) as scratch:
        done = record(options, Console(quiet=True), parent=Path(scratch))
        path = output / done.path.relative_to(scratch)
        if _measure(done.path) != _measure(path):
            raise taken
    return replace(done, path=path)


def _measure(path: Path) -> tuple[int, str]:
    """Bytes and digest of a log: of its file, or of all files of its folder."""
    if path.is_file():
        return path.stat().st_size, sha256_of(path)
    files = sorted(p for p in path.rglob("*") if p.is_file())
    total = hashlib.sha256()
    for file in files:
        total.update(f"{file.relative_to(path).as_posix()}\0{sha256_of(file)}\n".encode())
    return sum(file.stat().st_size for file in files), total.hexdigest()
