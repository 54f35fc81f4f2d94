"""`python -m benchmarks.gpu --shards FOLDER ...`: all figures that need an accelerator, part by part, and their tables.

    plan: parts, the most wanted first -> a process each (benchmarks/gpu_parts.py) -> OUTPUT/figures.jsonl -> README.md

FOLDERS are finished datasets: one of control tasks, whose batches are timed for training, and one of Atari behind it;
both are played. A part that figures.jsonl holds is kept and one that fails leaves its error there, so the same command
goes on where the last one's `--minutes` ended. Without an accelerator the parts run on the CPU (`--sizes tiny`), which
tests them and measures nothing of interest.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_parts import GPU, PARTS
from benchmarks.gpu_tables import FIGURES, Line, written
from eval.host import host
from schemas.files import atomic_write

ROOT = Path(__file__).resolve().parent.parent
SIZES = ("1.18b", "364m", "79m")
TABLES = "README.md"

Part = tuple[str, str, str, list[str], dict[str, Any]]
"""Name, what of PARTS, size, shards, further arguments."""


def plan(sizes: list[str], shards: list[str]) -> list[Part]:
    """All parts, the most wanted first."""
    control, atari = shards[:1], shards[1:2]
    parts: list[Part] = [("ceilings", "ceilings", sizes[0], control, {})]
    for size in sizes:
        parts.append((f"train {size} ZeRO 1", "train", size, control, {"stage": "1", "compiled": GPU}))
        parts.append((f"bare loop {size}", "bare", size, control, {}))
        parts.append((f"GPT-2 {size} ZeRO 1", "gpt2", size, control, {}))
    parts.append((f"control {sizes[0]}", "control", sizes[0], shards[:2], {}))
    parts.append((f"kernels {sizes[0]}", "kernels", sizes[0], control, {}))
    small = {"stage": "3_offload", "micro": 1, "checkpointed": True}
    parts.append((f"train {sizes[0]} ZeRO 3, offload", "train", sizes[0], control, small))
    for size in sizes:
        if atari:
            parts.append((f"train {size} ZeRO 1, Atari", "train", size, atari, {"stage": "1", "compiled": GPU}))
            parts.append((f"patches {size}", "patches", size, atari, {}))
    for size in sizes:
        parts.append((f"train {size} ZeRO 1, plain", "train", size, control, {"stage": "1"}))
        for stage in "23":
            one = {"stage": stage, "compiled": GPU and stage != "3"}
            parts.append((f"train {size} ZeRO {stage}", "train", size, control, one))
    parts += [(f"kernels {size}", "kernels", size, control, {}) for size in sizes[1:]]
    for micro in (1, 2, 4, 16, 32):
        one = {"stage": "1", "compiled": GPU, "micro": micro}
        parts.append((f"train {sizes[-1]} ZeRO 1, micro-batch {micro}", "train", sizes[-1], control, one))
    parts += [(f"control {size}", "control", size, shards[:2], {}) for size in sizes[1:]]
    return parts


def measured(part: Part, seconds: float) -> Line:
    """Of a process of its own, whose device memory is free again behind it; what went wrong as `error`."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--one", json.dumps(part)]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {seconds:.0f} s"}
    marked = [line for line in done.stdout.splitlines() if line.startswith("figures {")]
    if done.returncode or not marked:
        return {"error": (done.stdout + done.stderr)[-3000:]}
    return json.loads(marked[-1].removeprefix("figures "))


def run(parts: list[Part], output: Path, minutes: float) -> None:
    output.mkdir(parents=True, exist_ok=True)
    path, deadline = output / FIGURES, time.monotonic() + 60 * minutes
    kept = {line["part"] for line in known(path) if "error" not in line}
    who = host(torch.get_num_threads())
    for part in parts:
        left = deadline - time.monotonic()
        if part[0] in kept or left < 20:
            continue
        begun = time.monotonic()
        found = measured(part, left)
        line = {"part": part[0], "seconds": round(time.monotonic() - begun, 1)} | found | who
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps({key: value for key, value in line.items() if key not in who}), flush=True)
        with atomic_write(output / TABLES) as tables:
            tables.write(written(known(path)).encode())
    missing = [part[0] for part in parts if part[0] not in {line["part"] for line in known(path)}]
    print(f"{len(missing)} part(s) left: {', '.join(missing)}" if missing else "all parts measured", flush=True)


def known(path: Path) -> list[Line]:
    """The last line of each part, in the order in which they were first measured."""
    lines = [json.loads(line) for line in path.open()] if path.is_file() else []
    return list({line["part"]: line for line in lines}.values())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shards", nargs="+", default=[], help="finished dataset folders, a control one, an Atari one")
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=[*SIZES, "tiny"])
    parser.add_argument("--output", type=Path, default=Path("docs/results/gpu"))
    parser.add_argument("--minutes", type=float, default=25.0, help="for this call")
    parser.add_argument("--only", default="", help="parts whose names hold this")
    parser.add_argument("--list", action="store_true", help="name the parts, and measure none")
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        _, what, size, shards, arguments = options.one
        print("figures " + json.dumps(PARTS[what](size, shards, **arguments)), flush=True)
        return
    parts = [part for part in plan(options.sizes, options.shards) if options.only in part[0]]
    if options.list:
        print("\n".join(part[0] for part in parts))
    elif not options.shards:
        parser.error("--shards: name a finished dataset folder of control tasks, and one of Atari")
    else:
        run(parts, options.output, options.minutes)


if __name__ == "__main__":
    main()
