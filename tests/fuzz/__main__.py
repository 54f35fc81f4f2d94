"""`python -m tests.fuzz --source d4rl --minutes 10`: damaged logs against a log reader.

seed, case number -> damaged folder -> a forked process reads it -> findings, one a kind of failure and line of code

Each finding keeps its folder (input/), how it was damaged (case.json) and what came of it (finding.json) under
--output; `--replay` reads such a folder again. Linux only: memory is measured by /proc.

Invariant: case N of a seed is the same whatever ran before it; a process that dies or hangs costs only its own case.
"""

from __future__ import annotations

import faulthandler
import json
import os
import re
import resource
import shutil
import signal
import sys
import time
import warnings
from collections import Counter
from dataclasses import asdict, dataclass, fields
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Annotated

import tyro

from etl import sources
from tests.fuzz import formats, seeds
from tests.fuzz.mutate import Tree, mutate, write
from tests.fuzz.oracle import Finding, attempt, place

HANG = 40  # seconds; a source may take half of them to give a file up
ADDRESSES = 2**32  # bytes of address space above the start: huge allocations fail the same way on every machine
LIFE = 5000  # cases a process


@dataclass(frozen=True)
class Options:
    """Fuzz the readers of etl/sources. Run it several times with other seeds to use more processors."""

    source: Annotated[str, tyro.conf.arg(aliases=["-s"])] = "all"
    minutes: float = 10.0
    """For each source."""
    cases: int = sys.maxsize
    """For each source; it ends at whichever comes first."""
    seed: int = 0
    first: int = 0
    """Case number to start with."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("fuzz-findings")
    replay: Path | None = None
    """A finding's folder, to read its input again in this process."""


def work(results: Connection, name: str, trees: list[Tree], seed: int, cases: range, folder: Path) -> None:
    """The life of a process: it says each case's number before it, and the outcome behind it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.simplefilter("ignore")
    said = os.open(folder / "stderr", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    os.dup2(said, 1), os.dup2(said, 2)
    for case in cases:
        os.ftruncate(2, 0)
        results.send((case, None))
        _limit()
        rng = Random(f"{name} {seed} {case}")
        tree, damage = mutate(trees, formats.MUTATORS, rng)
        environment, limit = rng.choice([None, None, "Hopper-v4", "None-v0"]), rng.choice([None, None, 1, 5, 10**12])
        given = {"environment": environment, "max_episode_steps": limit}
        given |= {"frames": rng.choice(["80x64", "padded"]), "text_tokens": rng.choice([16, 16, 1])}
        kind = sources.load(name).options
        options = kind(**{field.name: given[field.name] for field in fields(kind) if field.name in given})
        here = folder / str(case)
        write(tree, here / "input")
        about = {"source": name, "seed": seed, "case": case, "damage": damage, "options": asdict(options)}
        (here / "case.json").write_text(json.dumps(about, indent=1))
        _limit()
        outcome = attempt(sources.load(name), here / "input", options)
        faulthandler.cancel_dump_traceback_later()
        if isinstance(outcome, str):
            shutil.rmtree(here)
        results.send((case, outcome))


def _limit() -> None:
    """From here on this process has HANG seconds and ADDRESSES, and says where it was when it dies."""
    faulthandler.enable(2)
    faulthandler.dump_traceback_later(HANG, exit=True, file=2)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ADDRESSES, resource.RLIM_INFINITY))


def fuzz(name: str, options: Options, folder: Path) -> int:
    """Number of different findings; each is said when it is met first, all at the end."""
    trees, outcomes, findings = seeds.trees(name), Counter[str](), Counter[Finding]()
    for number, tree in enumerate(trees):
        write(tree, folder / f"seed{number}")
        if (came := attempt(sources.load(name), folder / f"seed{number}", sources.load(name).options())) != "fine":
            raise SystemExit(f"{name}: undamaged seed {number} is not read: {came}")
    began, case = time.monotonic(), options.first

    def left() -> float:
        return max(0.0, began + 60 * options.minutes - time.monotonic())

    def met(outcome: str | Finding) -> None:
        outcomes[outcome if isinstance(outcome, str) else outcome.kind] += 1
        if isinstance(outcome, str) or outcome.kind == "mutator":
            return
        one = Finding(outcome.kind, outcome.error, outcome.where, "")
        findings[one] += 1
        slug = re.sub(r"[^\w.]+", "-", f"{name}-{one.kind}-{one.error}-{one.where}")[:150]
        if findings[one] == 1:
            print(f"{options.output / slug}: {one.kind} {one.error} at {one.where} (case {case})", flush=True)
            shutil.rmtree(options.output / slug, ignore_errors=True)
            shutil.copytree(folder / str(case), options.output / slug, symlinks=True, copy_function=_copy)
            (options.output / slug / "finding.json").write_text(json.dumps(asdict(outcome), indent=1))
        shutil.rmtree(folder / str(case))

    last, context = options.first + min(options.cases, sys.maxsize - options.first), get_context("fork")
    while case < last and left():
        results, theirs = context.Pipe(duplex=False)
        cases = range(case, min(last, case + LIFE))
        process = context.Process(target=work, args=(theirs, name, trees, options.seed, cases, folder), daemon=True)
        process.start()
        theirs.close()
        outcome: str | Finding | None = None
        while results.poll(left()):
            try:
                case, outcome = results.recv()
            except EOFError:
                break
            if outcome is not None:
                met(outcome)
        else:
            process.kill()
        process.join()
        if outcome is None and left():
            met(_death(process.exitcode or 0, folder, case))
        case += 1
    count, seconds = sum(outcomes.values()), time.monotonic() - began
    print(f"{name}: {count} cases, {60 * count / seconds:.0f} a minute; {outcomes.total()} outcomes: {dict(outcomes)}")
    for one, number in findings.most_common():
        print(f"{number:8} x {one.kind} {one.error} at {one.where}", flush=True)
    return len(findings)


def _death(status: int, folder: Path, case: int) -> Finding:
    """What killed the process, from its exit status and what faulthandler wrote."""
    said = (folder / "stderr").read_text(errors="replace")
    frames = re.findall(r'File "(.+?)", line (\d+) in (\S+)', said)
    own = [f"{place(file)}:{line} {function}" for file, line, function in frames if place(file)]
    kind = "hang" if "Timeout (" in said else "crash"
    if not (folder / str(case) / "case.json").exists():
        kind = "mutator"
    error = "" if "Timeout (" in said else signal.Signals(-status).name if status < 0 else f"exit {status}"
    return Finding(kind, error, own[0] if own else "", said[-6000:])


def replay(folder: Path) -> int:
    about = json.loads((folder / "case.json").read_text())
    _limit()
    with TemporaryDirectory() as name:  # what reads may not write, and a case may have left its mark
        shutil.copytree(folder / "input", f"{name}/input", symlinks=True, copy_function=_copy)
        source = sources.load(about["source"])
        outcome = attempt(source, Path(name, "input"), source.options(**about["options"]))
    print(outcome if isinstance(outcome, str) else f"{outcome.kind} {outcome.error} {outcome.where}\n{outcome.detail}")
    return int(not isinstance(outcome, str))


def _copy(source: str, target: str) -> None:
    os.mkfifo(target) if Path(source).is_fifo() else shutil.copy(source, target)


def main() -> int:
    options = tyro.cli(Options, prog="python -m tests.fuzz")
    if options.replay is not None:
        return replay(options.replay)
    found = 0
    for name in (
        [name for name in sources.names() if name in seeds.SEEDS]
        if options.source == "all"
        else [sources.load(options.source).name]
    ):
        if name not in seeds.SEEDS:
            print(f"{name}: skipped, tests/fuzz/seeds.py has no seed for it")
            continue
        with TemporaryDirectory(prefix="fuzz-") as folder:
            found += fuzz(name, options, Path(folder))
    return int(found > 0)


if __name__ == "__main__":
    sys.exit(main())
