"""`python -m benchmarks.gpu --shards FOLDER ...`: all figures that need an accelerator, part by part, and their tables.

    plan: parts, the most wanted first -> a process each (benchmarks/gpu_parts.py) -> OUTPUT/figures.jsonl -> README.md

FOLDERS are finished datasets: one of control tasks, whose batches are timed for training, and one of Atari; both are
played. A part that was measured on this hardware with the same data is kept, one that fails leaves its error, and one
that time cuts is begun anew, so the same command goes on where the last one's `--minutes` ended. Exit status 1: some
failed. Without an accelerator the parts run on the CPU (`--sizes tiny`), which tests them and measures nothing of
interest. GPT-2 needs `pip install transformers`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_parts import GPU, PARTS
from benchmarks.gpu_tables import FIGURES, Line, written
from eval.provenance import host
from schemas.dataset import DatasetError
from schemas.files import atomic_write
from shards.reader import Dataset
from trainer.lifecycle import exclusive_run, signal_on_parent_death

ROOT = Path(__file__).resolve().parent.parent
SIZES = ("1.18b", "364m", "79m")
TABLES = "README.md"

Part = tuple[str, str, str, list[str], dict[str, Any]]
"""Name, what of PARTS, size, shards, further arguments."""


def plan(sizes: list[str], control: list[str], atari: list[str]) -> list[Part]:
    """All parts, the most wanted first."""
    shards = control + atari
    parts: list[Part] = [("ceilings", "ceilings", sizes[0], control, {})]
    for size in sizes:
        parts.append((f"train {size} ZeRO 1", "train", size, control, {"stage": "1", "compiled": GPU}))
        parts.append((f"bare loop {size}", "bare", size, control, {}))
        parts.append((f"GPT-2 {size} ZeRO 1", "gpt2", size, control, {}))
    parts.append((f"control {sizes[0]}", "control", sizes[0], shards, {}))
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
    parts += [(f"control {size}", "control", size, shards, {}) for size in sizes[1:]]
    return parts


def measured(part: Part, seconds: float) -> Line:
    """Of a process of its own, whose device memory is free again behind it; what went wrong as `error`; nothing where
    the time was too short."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--one", json.dumps(part)]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {}
    marked = [line for line in done.stdout.splitlines() if line.startswith("figures {")]
    if done.returncode or not marked:
        return {"error": (done.stdout + done.stderr)[-3000:]}
    return json.loads(marked[-1].removeprefix("figures "))


def run(parts: list[Part], output: Path, minutes: float) -> int:
    """The exit status."""
    path, deadline = output / FIGURES, time.monotonic() + 60 * minutes
    who, data = host(torch.get_num_threads()), {folder: fingerprint(folder) for part in parts for folder in part[3]}
    lines, status = known(path), 0
    for part in parts:
        left = deadline - time.monotonic()
        here = who | {"data": [data[folder] for folder in part[3]]}
        if part[0] in done(lines, here) or left < 20:
            continue
        begun = time.monotonic()
        found = measured(part, left)
        if not found:
            continue
        line = {"part": part[0], "seconds": round(time.monotonic() - begun, 1)} | found | here
        status = max(status, int("error" in line))
        lines = [*(one for one in lines if (one["part"], one["hardware"]) != (part[0], who["hardware"])), line]
        with atomic_write(path) as file:
            file.write("".join(json.dumps(one) + "\n" for one in lines).encode())
        print(json.dumps({key: value for key, value in line.items() if key not in here}), flush=True)
        with atomic_write(output / TABLES) as tables:
            tables.write(written([one for one in lines if one["hardware"] == who["hardware"]]).encode())
    missing = [p[0] for p in parts if p[0] not in done(lines, who | {"data": [data[folder] for folder in p[3]]})]
    end = f"{len(missing)} part(s) left or failed: {', '.join(missing)}" if missing else "all parts measured"
    print(end, flush=True)
    return status


def known(path: Path) -> list[Line]:
    """The last line of each part on each hardware, in the order in which they were first measured. What a full disk or
    a power cut left of a line is passed over."""
    found: dict[tuple[str, str], Line] = {}
    for text in path.read_text().splitlines() if path.is_file() else []:
        try:
            line = json.loads(text)
            found[line["part"], line["hardware"]] = line
        except (ValueError, KeyError, TypeError):
            print(f"{path}: passing over a damaged line: {text[:60]}", file=sys.stderr)
    return list(found.values())


def done(lines: list[Line], here: Line) -> set[str]:
    """Names of the parts that were measured on this hardware with these data."""
    same = [line for line in lines if all(line.get(key) == here[key] for key in ("hardware", "data"))]
    return {line["part"] for line in same if "error" not in line}


def fingerprint(folder: str) -> str:
    return Dataset(folder).manifest.fingerprint[:12]


def sorted_out(folders: list[str]) -> tuple[list[str], list[str]]:
    """The folder of control tasks and that of Atari, one each. DatasetError for a folder that is no dataset."""
    whole = [str(Path(folder).resolve()) for folder in folders]
    seen = [any(layout.patches for layout in Dataset(folder).layouts) for folder in whole]
    return tuple([folder for folder, pictures in zip(whole, seen) if pictures == kind][:1] for kind in (False, True))  # type: ignore[return-value]


def main() -> int:
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
        signal_on_parent_death(signal.SIGKILL)  # a part whose command was killed would measure beside the next one's
        _, what, size, shards, arguments = options.one
        print("figures " + json.dumps(PARTS[what](size, shards, **arguments)), flush=True)
        return 0
    if options.minutes <= 0:
        parser.error("--minutes: must be more than 0")
    try:
        control, atari = sorted_out(options.shards)
    except (DatasetError, OSError) as error:
        parser.error(f"--shards: {error}")
    if options.shards and not control:
        parser.error("--shards: none of these folders holds control tasks, whose batches are timed")
    parts = [part for part in plan(options.sizes, control, atari) if options.only in part[0]]
    if not parts:
        parser.error(f"--only {options.only}: no part's name holds this; --list names them")
    if options.list:
        print("\n".join(part[0] for part in parts))
        return 0
    if not options.shards:
        parser.error("--shards: name a finished dataset folder of control tasks, and one of Atari")
    if not atari:
        print("no folder of Atari is named: its parts are left out", flush=True)
    if importlib.util.find_spec("transformers") is None:
        print("GPT-2's parts will fail: pip install transformers", flush=True)
    with exclusive_run(options.output, 5.0):
        return run(parts, options.output, options.minutes)


if __name__ == "__main__":
    sys.exit(main())
