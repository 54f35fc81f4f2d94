"""`python -m benchmarks.gpu --shards CONTROL ATARI --minutes 9`: figures that need an accelerator, and their tables.

plan: parts, the most wanted first -> a process each (gpu_checks, gpu_parts, gpu_control) -> OUTPUT/figures.jsonl
-> README.md, written again after each part

A part starts only where its seconds fit what is left, and is ended when it takes much longer; what it had measured by
then is kept. The next part's process imports meanwhile what it needs, and waits. A part that was measured on this
hardware with the same data is not repeated, so the same command continues where the last one ended. Exit status 1:
some failed. `--rehearse` runs every part at `tiny` on whatever is there, which tests it and measures nothing of
interest. `--results` plays what it trains instead, see benchmarks/gpu_results.py.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.gpu_tables import FIGURES, Line, written
from schemas.dataset import DatasetError
from schemas.files import atomic_write
from shards.reader import Dataset

ROOT = Path(__file__).resolve().parent.parent
TABLES = "README.md"
READY, LINE = "ready", "figures "
LONGER, SLACK = 1.5, 10.0  # how much longer than planned a part may take: so many times, and seconds


@dataclass(frozen=True)
class Part:
    """One measurement: `what` of `WORK`, at a size, on shards; `seconds` that it should take on one H100, its start
    included; further arguments."""

    name: str
    what: str
    size: str
    shards: list[str]
    seconds: float
    arguments: dict[str, Any] = field(default_factory=dict)


def plan(control: list[str], atari: list[str]) -> list[Part]:
    """All parts, the most wanted first. The first thirteen fit 9 minutes, the first six 4 minutes."""
    big, middle, small = "1.18b", "364m", "79m"
    both = control + atari
    first = {"stage": "1", "compiled": True}

    def train(size: str, seconds: float, name: str = "ZeRO 1", shards: list[str] = control, **arguments: Any) -> Part:
        return Part(f"train {size} {name}", "train", size, shards, seconds, first | arguments)

    return [
        Part("checks", "checks", "tiny", both, 25),
        train(big, 70, kernels=True),
        Part(f"control {big}", "control", big, both, 35, {"seconds": 27}),
        train(small, 40, kernels=True),
        Part(f"GPT-2 {big} ZeRO 1", "gpt2", big, control, 35),
        Part(f"GPT-2 {small} ZeRO 1", "gpt2", small, control, 18),
        Part(f"bare loop {big}", "bare", big, control, 62),
        train(middle, 53),
        *([train(big, 35, "ZeRO 1, Atari", atari, kernels=True)] if atari else []),
        train(big, 30, "ZeRO 2", stage="2"),
        train(big, 40, "ZeRO 3", stage="3", compiled=False),
        Part(f"control {small}", "control", small, both, 30, {"seconds": 20}),
        Part(f"bare loop {small}", "bare", small, control, 40),
        train(big, 50, "ZeRO 1, micro-batch 16", micro=16),
        Part(f"GPT-2 {middle} ZeRO 1", "gpt2", middle, control, 25),
        Part(f"bare loop {middle}", "bare", middle, control, 50),
        *([Part(f"patches {small}", "patches", small, atari, 40)] if atari else []),
        *([train(small, 35, "ZeRO 1, Atari", atari)] if atari else []),
        train(big, 40, "ZeRO 1, plain", compiled=False),
        train(small, 40, "ZeRO 0", stage="0"),
        train(big, 60, "ZeRO 3, offload", stage="3_offload", compiled=False, checkpointed=True, micro=1),
    ]


def rehearsal(parts: list[Part]) -> list[Part]:
    """The same parts at `tiny`."""
    smaller = [part.arguments | ({"micro": 1} if "micro" in part.arguments else {}) for part in parts]
    return [replace(part, size="tiny", arguments=arguments) for part, arguments in zip(parts, smaller)]


class Worker:
    """The process of a part: it imports, says that it is ready, and begins on request."""

    def __init__(self, part: Part):
        self.part, self.output = part, tempfile.TemporaryFile("w+")  # noqa: SIM115
        command = [sys.executable, "-m", "benchmarks.gpu", "--one", json.dumps(asdict(part))]
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=self.output, stderr=subprocess.STDOUT, text=True
        )

    def figures(self, seconds: float, attention: str = "") -> Line:
        """What it measures within so many seconds; `error` if it failed, `cut` if it was ended and had something.
        `attention`: for GATO_ATTENTION, see trainer/model/segments.py."""
        cut = False
        try:
            self.process.communicate(attention + "\n", timeout=seconds)
        except subprocess.TimeoutExpired:
            cut = True
            self.end()
        self.output.seek(0)
        text = self.output.read()
        marked = [line for line in text.splitlines() if line.startswith(LINE + "{")]
        found: Line = json.loads(marked[-1].removeprefix(LINE)) if marked else {}
        if cut:
            return found | {"cut": True} if found else {"error": f"nothing after {seconds:.0f} s: {text[-1500:]}"}
        if self.process.returncode:
            return found | {"error": text[-3000:]}
        return found or {"error": f"no figures: {text[-1500:]}"}

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


def run(parts: list[Part], output: Path, minutes: float, rehearsed: bool) -> int:
    """The exit status."""
    from eval.provenance import host

    path, deadline = output / FIGURES, time.monotonic() + 60 * minutes
    who = host(len(os.sched_getaffinity(0))) | ({"rehearsal": True} if rehearsed else {})
    data = {folder: fingerprint(folder) for part in parts for folder in part.shards}
    lines, status = known(path), 0
    waiting = [part for part in parts if part.name not in done(lines, who | {"data": data_of(part, data)})]
    skipped: list[str] = []
    ready: Worker | None = None
    while waiting:
        left = deadline - time.monotonic()
        part = waiting.pop(0)
        if left < part.seconds:
            skipped.append(part.name)
            continue
        worker = ready if ready and ready.part == part else Worker(part)
        if ready and ready is not worker:
            ready.end()
        after = next((p for p in waiting if left - part.seconds >= p.seconds), None)
        ready = Worker(after) if after else None
        begun = time.monotonic()
        limit = left if rehearsed else min(left, LONGER * part.seconds + SLACK)
        found = worker.figures(limit, attention_of(lines, who["hardware"]))
        line = {"part": part.name, "seconds": round(time.monotonic() - begun, 1)} | found | who
        line["data"] = data_of(part, data)
        status = max(status, int("error" in line))
        lines = [*(one for one in lines if measured_as(one) != measured_as(line)), line]
        with atomic_write(path) as file:
            file.write("".join(json.dumps(one) + "\n" for one in lines).encode())
        with atomic_write(output / TABLES) as tables:
            tables.write(written([one for one in lines if measured_as(one)[1:] == measured_as(line)[1:]]).encode())
        print(json.dumps({key: value for key, value in line.items() if key not in who}), flush=True)
    if ready:
        ready.end()
    print(f"no time for: {', '.join(skipped)}" if skipped else "all parts were begun", flush=True)
    return status


def attention_of(lines: list[Line], hardware: str) -> str:
    """The kernels that the checks chose on this hardware, by size of the heads, as GATO_ATTENTION takes them;
    FlashAttention 2 where they did not come to it: a kernel that fails takes the process with it."""
    found = [line for line in lines if line["hardware"] == hardware and line["part"] == "checks"]
    chosen = {name.split()[-1]: value["chosen"] for name, value in (found or [{}])[-1].items() if "heads of" in name}
    return ",".join(["=flash", *(f"{size}={name}" for size, name in chosen.items())])


def data_of(part: Part, data: dict[str, str]) -> list[str]:
    return [data[folder] for folder in part.shards]


def measured_as(line: Line) -> tuple[str, str, bool]:
    """Part, hardware, and whether it was a rehearsal."""
    return line["part"], line["hardware"], "rehearsal" in line


def known(path: Path) -> list[Line]:
    """The last line of each part on each hardware, measured or rehearsed, in the order in which they were first
    measured. What a full disk or a power cut left of a line is passed over."""
    found: dict[tuple[str, str, bool], Line] = {}
    for text in path.read_text().splitlines() if path.is_file() else []:
        try:
            line = json.loads(text)
            found[measured_as(line)] = line
        except (ValueError, KeyError, TypeError):
            print(f"{path}: passing over a damaged line: {text[:60]}", file=sys.stderr)
    return list(found.values())


def done(lines: list[Line], here: Line) -> set[str]:
    """Names of the parts that were measured completely on this hardware with these data, in earnest or rehearsed."""
    keys = ("hardware", "data", "rehearsal")
    same = [line for line in lines if all(line.get(key) == here.get(key) for key in keys)]
    return {line["part"] for line in same if "error" not in line and "cut" not in line}


def fingerprint(folder: str) -> str:
    return Dataset(folder).manifest.fingerprint[:12]


def sorted_out(folders: list[str]) -> tuple[list[str], list[str]]:
    """The folder of control tasks and that of Atari, one each. DatasetError for a folder that is no dataset."""
    whole = [str(Path(folder).resolve()) for folder in folders]
    seen = [any(layout.patches for layout in Dataset(folder).layouts) for folder in whole]
    return tuple([folder for folder, pictures in zip(whole, seen) if pictures == kind][:1] for kind in (False, True))  # type: ignore[return-value]


def one(text: str) -> int:
    """The process of a part."""
    from benchmarks.gpu_checks import checks
    from benchmarks.gpu_control import control
    from benchmarks.gpu_parts import bare, gpt2, patches, train
    from benchmarks.gpu_timing import keep
    from trainer.lifecycle import signal_on_parent_death

    signal_on_parent_death(signal.SIGKILL)  # a part whose command was killed would measure beside the next one's
    part = Part(**json.loads(text))
    work = {"checks": checks, "train": train, "bare": bare, "gpt2": gpt2, "patches": patches, "control": control}
    if part.what == "gpt2":
        import transformers.models.gpt2.modeling_gpt2  # noqa: F401
    print(READY, flush=True)
    line = sys.stdin.readline()
    if not line:
        return 1
    os.environ["GATO_ATTENTION"] = line.strip()
    found = work[part.what](part.size, part.shards, **part.arguments)
    keep(found | {"processor_seconds": round(time.process_time(), 1)})
    return 0


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shards", nargs="+", default=[], help="finished dataset folders, a control one, an Atari one")
    parser.add_argument("--output", type=Path, default=Path("docs/results/gpu"))
    parser.add_argument("--minutes", type=float, default=9.0, help="for this call")
    parser.add_argument("--only", default="", help="parts whose names hold this")
    parser.add_argument("--rehearse", action="store_true", help="every part at `tiny`")
    parser.add_argument("--list", action="store_true", help="name the parts and their seconds, and measure none")
    parser.add_argument(
        "--results", action="store_true", help="record, build, train, play; see benchmarks/gpu_results.py"
    )
    parser.add_argument("--policies", type=Path, help="with --results: a folder of the policies that record")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        return one(options.one)
    if options.minutes <= 0:
        parser.error("--minutes: must be more than 0")
    try:
        control, atari = sorted_out(options.shards)
    except (DatasetError, OSError) as error:
        parser.error(f"--shards: {error}")
    if options.results:
        from benchmarks.gpu_results import results

        if options.policies is None:
            parser.error("--results: name the folder of the policies that record by --policies")
        return results(options.policies, atari, options.output, options.minutes, options.rehearse)
    if options.shards and not control:
        parser.error("--shards: none of these folders holds control tasks, whose batches are timed")
    parts = [part for part in plan(control, atari) if options.only in part.name]
    if not parts:
        parser.error(f"--only {options.only}: no part's name holds this; --list names them")
    if options.list:
        print("\n".join(f"{part.seconds:4.0f} s  {part.name}" for part in parts))
        return 0
    if not options.shards:
        parser.error("--shards: name a finished dataset folder of control tasks, and one of Atari")
    if not atari:
        print("no folder of Atari is named: its parts are left out", flush=True)
    from trainer.lifecycle import exclusive_run

    with exclusive_run(options.output, 5.0):
        return run(rehearsal(parts) if options.rehearse else parts, options.output, options.minutes, options.rehearse)


if __name__ == "__main__":
    sys.exit(main())
