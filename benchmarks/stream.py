"""`python -m benchmarks.stream`: finished training batches, beside other projects' loaders on samples made beforehand.

logs (GATO_SHARED_DATA/{d4rl,dqn_replay}, else recorded here) -> shards -> our stream: windows, separators, roles,
positions, segments, loss mask, prompts; its first sequences, tokens and patches alone, as .npy -> each peer's own
format -> benchmarks/loaders.py in an environment of its own, which also reads the .npy with np.memmap in order.

Batches are 32 sequences of 1024 tokens; the page cache is warm; each loader runs in fresh processes, on one core, and
once more with two threads or worker processes on two. Figures are the best of two turns, rates of the best pass.

Invariant: all read the same sequences of the same episodes in this run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from shards.loader import Loader
from shards.stream import Stream, StreamConfig, find_datasets

SHARED = "GATO_SHARED_DATA"
BATCH, LENGTH = 32, 1024
SAMPLES = {"control": 8192, "atari": 2048}
SOURCES = {"control": ("d4rl", "d4rl"), "atari": ("atari", "dqn_replay")}
RECORD = {"control": ("Hopper-v4", "100000"), "atari": ("ALE/Breakout-v5", "20000")}
TURNS = 2
LOADERS = Path(__file__).with_name("loaders.py")
REQUIREMENTS = Path(__file__).with_name("loaders.txt")


def peers_python(folder: Path, requirements: Path = REQUIREMENTS) -> Path:
    """The interpreter of the peers' environment, made on the first call (2 GB)."""
    python, ready = folder / "bin" / "python", folder / ".ready"
    if not ready.exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "-r", requirements], check=True)
        ready.touch()
    return python


def build(kind: str, folder: Path) -> Path:
    """Shards of one kind of logs."""
    source, name = SOURCES[kind]
    given = Path(os.environ[SHARED]) / name if SHARED in os.environ else None
    logs = given or folder / "logs" / name
    command = [sys.executable, "-m"]
    if given is None:
        environment, steps = RECORD[kind]
        subprocess.run(
            [*command, "etl.record", "-e", environment, "--policy", "random", "--steps", steps, "-o", logs], check=True
        )
    output = folder / "shards" / kind
    subprocess.run([*command, "etl.build", "--source", source, "-i", logs, "-o", output], check=True)
    return output


def assemble(shards: Path, count: int, folder: Path) -> None:
    """The first `count` sequences as tokens.npy (N, L) and patches.npy (N, M, 16, 16, C)."""
    stream = Stream([shards], StreamConfig(), 0)
    folder.mkdir(parents=True)
    first = stream.sequence(0)
    patches, channels = len(first.patches), first.patches.shape[3]
    tokens = np.lib.format.open_memmap(folder / "tokens.npy", "w+", np.int32, (count, LENGTH))
    pixels = None
    if patches:
        shape = (count, patches, 16, 16, channels)
        pixels = np.lib.format.open_memmap(folder / "patches.npy", "w+", np.uint8, shape)
    for first in range(0, count, BATCH):
        batch = stream.batch(first, BATCH)
        tokens[first : first + BATCH] = batch.tokens
        if pixels is not None:
            pixels[first : first + BATCH] = batch.patches.reshape(BATCH, *pixels.shape[1:])


def ours(shards: str, threads: int, samples: int, seconds: float, verify: Any) -> dict[str, Any]:
    """Our own figures, of a fresh process: what benchmarks/loaders.py gives of the others."""
    for path in Path(shards).rglob("*"):
        path.read_bytes() if path.is_file() else None
    begun = time.perf_counter()
    loader = Loader(Stream(find_datasets(shards), StreamConfig(), 0, verify=verify), 0, BATCH, BATCH, threads=threads)
    next(loader)
    first = time.perf_counter() - begun
    rates: list[float] = []
    begun = time.perf_counter()
    while len(rates) < 2 or time.perf_counter() - begun < seconds:
        start = time.perf_counter()
        for _ in range(samples // BATCH):
            next(loader)
        rates.append(samples / (time.perf_counter() - start))
    loader.close()
    name = "ours" if verify == "size" else "ours, hashes checked on opening"
    return {"peer": name, "workers": threads, "samples_per_second": max(rates), "first_batch_seconds": first}


def measure(command: list[object], cores: int) -> list[dict[str, Any]]:
    """The JSON lines of a command that runs on so many cores."""
    allowed = sorted(os.sched_getaffinity(0))[-cores:]
    done = subprocess.run(
        [*map(str, command)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: os.sched_setaffinity(0, allowed),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def better(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """The best of two turns in each figure."""
    if "error" in first or "error" in second:
        return first if "error" in first else second
    rate, delay = "samples_per_second", "first_batch_seconds"
    return first | {rate: max(first[rate], second[rate]), delay: min(first[delay], second[delay])}


def compare(kind: str, shards: Path, python: Path, folder: Path, seconds: float) -> None:
    """One table: a kind of tasks, every loader."""
    samples = SAMPLES[kind]
    assemble(shards, samples, folder / kind)
    rows: dict[int, dict[str, dict]] = {}
    for workers, cores in ((0, 1), (2, 2)):
        own = [sys.executable, "-m", "benchmarks.stream", "--ours", shards, "--samples", samples, "--threads", workers]
        peers = [python, LOADERS, folder / kind, folder / f"{kind}-peers", f"--workers={workers}", f"--batch={BATCH}"]
        found: dict[str, dict[str, Any]] = {}
        for _ in range(TURNS):
            for command in ([*own, "--verify", "size"], peers, [*own, "--verify", "auto"]):
                for row in measure([*command, f"--seconds={seconds}"], cores):
                    found[row["peer"]] = better(found.get(row["peer"], row), row)
        rows[workers] = found
    size = sum(path.stat().st_size for path in (folder / kind).glob("*.npy")) / samples
    table = Table("loader", "M tokens/s, 1 core", "GB/s", "first batch, ms", "M tokens/s, 2 cores", "first batch, ms")
    for name in rows[0]:
        cells = []
        for workers in (0, 2):
            row = rows[workers].get(name, {"error": "not run"})
            if "error" in row:
                cells += [row["error"][:40], *([""] if workers == 0 else []), ""]
                continue
            rate = row["samples_per_second"]
            cells += [f"{rate * LENGTH / 1e6:.2f}"] + ([f"{rate * size / 1e9:.2f}"] if workers == 0 else [])
            cells += [f"{1e3 * row['first_batch_seconds']:.1f}"]
            if row.get("exact") is False:
                name += " (not exact)"
        table.add_row(name, *cells)
    console = Console(width=140)
    console.print(f"{kind}: {samples} sequences of {LENGTH} tokens, {size:,.0f} bytes each", table)
    whole = {name: row for name, row in rows[0].items() if "error" not in row}
    mine, yard = whole["ours"], whole["memmap"]
    others = [row for name, row in whole.items() if not name.startswith("ours") and name != "memmap"]
    best = max(others, key=lambda row: row["samples_per_second"])
    quick = min(others, key=lambda row: row["first_batch_seconds"])
    rate, first = "samples_per_second", "first_batch_seconds"
    console.print(
        f"stream, {kind}, one core: ours / sequential memmap {mine[rate] / yard[rate]:.2f}; ours / best peer "
        f"({best['peer']}) {mine[rate] / best[rate]:.2f}; first batch {1e3 * mine[first]:.1f} ms, quickest peer "
        f"({quick['peer']}) {1e3 * quick[first]:.1f} ms",
        soft_wrap=True,
    )


def run(folder: Path, python: Path, seconds: float = 3.0) -> None:
    for kind in SAMPLES:
        compare(kind, build(kind, folder), python, folder, seconds)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--ours")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--samples", type=int, default=2048)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--verify", default="size")
    parser.add_argument("--peers", type=Path, default=Path(".venv-peers"), help="the peers' virtual environment")
    options = parser.parse_args()
    if options.ours:
        print(json.dumps(ours(options.ours, options.threads, options.samples, options.seconds, options.verify)))
        return
    with tempfile.TemporaryDirectory() as name:
        run(Path(name), peers_python(options.peers), options.seconds)


if __name__ == "__main__":
    main()
