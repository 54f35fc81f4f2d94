"""`python -m benchmarks.gpu --results --policies FOLDER --shards ATARI`: from simulators to a table in eight minutes.

policies -> six bodies recorded, a process each -> shards, without Beam -> one Gato of 79m's shape, without a launcher
-> played by several processes -> OUTPUT: table.md, report.html with curves, rows.parquet, metrics.jsonl, results.json

Games are too slow to record there, so their dataset is carried and is trained on and played too. Each stage has a share
of the minutes; training that does not reach its last step in its share is asked to save and export, and is played as
it is. results.json is written again after each stage.

Invariant: a stage that fails ends the run, and what the earlier ones made is kept.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.gpu_tables import FIGURES
from benchmarks.trainer import free_port
from etl import sources
from etl.building import filters
from etl.building.gather import gather
from etl.building.plan import BuildConfig, ShardPlan, make_plan
from etl.building.shard import write_shard
from schemas.files import atomic_write
from shards.folder import Folder

ROOT = Path(__file__).resolve().parent.parent
PLAY_SECONDS = 110.0
START_SECONDS = 45.0  # until a training has imported, compiled and evaluated for the first time
RATE = 500_000.0  # tokens/s that are assumed where no figure of 79m was measured here
BATCH, LENGTH = 64, 1024
PLAYED = ("table.md", "report.html", "rows.parquet")


@dataclass(frozen=True)
class Body:
    """What is recorded: an environment, the file of a policy, its noise, the log's level."""

    environment: str
    policy: str
    noise: float
    level: str


BODIES = (
    Body("Hopper-v4", "hopper-ars.safetensors", 0.05, "medium"),
    Body("Hopper-v4", "hopper-trpo.safetensors", 0.05, "expert"),
    Body("HalfCheetah-v4", "halfcheetah-ars.safetensors", 0.1, "medium"),
    Body("HalfCheetah-v4", "halfcheetah-tqc.safetensors", 0.05, "expert"),
    Body("Walker2d-v4", "walker2d-sac.safetensors", 0.05, "medium"),
    Body("Walker2d-v4", "walker2d-trpo.safetensors", 0.05, "expert"),
)


def results(policies: Path, atari: list[str], output: Path, minutes: float, rehearsed: bool) -> int:
    """All stages; the exit status."""
    deadline, place = time.monotonic() + 60 * minutes, output / "work"
    output.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(place, ignore_errors=True)
    said: dict[str, Any] = {"rehearsal": rehearsed, "seconds": {}}

    def stage(name: str, work: Any) -> Any:
        begun = time.monotonic()
        print(f"{name} ...", flush=True)
        try:
            return work()
        finally:
            said["seconds"][name] = round(time.monotonic() - begun, 1)
            print(f"{name}: {said['seconds'][name]} s", flush=True)
            with atomic_write(output / "results.json") as file:
                file.write(json.dumps(said, indent=1).encode())

    try:
        steps = 2_000 if rehearsed else 200_000
        stage("record", lambda: record(policies, place / "logs", steps, deadline))
        shards = stage("build", lambda: build("d4rl", place / "logs", place / "shards" / "bodies"))
        folders = [str(shards), *atari]
        left = deadline - time.monotonic() - PLAY_SECONDS
        taken = training(folders, place / "run", left, tokens_per_second(output), rehearsed)
        said["training"] = taken
        stage("train", lambda: run(taken, left, asked=True))
        copy(place / "run", ("metrics.jsonl",), output)
        command = playing(folders, place / "run", place / "table", rehearsed)
        stage("play", lambda: run(command, deadline - time.monotonic()))
        copy(place / "table", PLAYED, output)
    except (subprocess.SubprocessError, OSError, ValueError) as error:
        said["error"] = str(error)[-3000:]
        print(f"error: {said['error']}", file=sys.stderr)
    with atomic_write(output / "results.json") as file:
        file.write(json.dumps(said, indent=1).encode())
    shutil.rmtree(place, ignore_errors=True)
    return int("error" in said)


def record(policies: Path, logs: Path, steps: int, deadline: float) -> None:
    """A log of each body, all at once. CalledProcessError or TimeoutExpired."""
    commands = [
        [
            *(sys.executable, "-m", "etl.record", "-e", body.environment, "--level", body.level, "--noise", body.noise),
            *("--policy", policies / body.policy, "--steps", steps, "--seed", 100, "-o", logs),
        ]
        for body in BODIES
    ]
    one = os.environ | {"OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(list(map(str, command)), cwd=ROOT, env=one, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        for command in commands
    ]
    try:
        for process in running:
            _, errors = process.communicate(timeout=max(1.0, deadline - time.monotonic()))
            if process.returncode:
                raise subprocess.SubprocessError(f"{process.args}: {errors.decode()[-1000:]}")
    finally:
        for process in running:
            process.kill()


def build(source: str, logs: Path, output: Path, shard_megabytes: float = 8.0) -> Path:
    """A dataset of a folder of logs, as `etl.build` makes it, by a pool of processes instead of Beam."""
    found, config = sources.load(source), BuildConfig(shard_megabytes=shard_megabytes)
    files = found.resolve(logs, None, logs)
    scans = [filters.apply(found, scan, config.filter) for scan in found.scan(files, found.options())]
    plan = make_plan(source, scans, config)
    folder = Folder(output)
    with get_context("spawn").Pool(min(len(plan), len(os.sched_getaffinity(0)))) as pool:
        pool.starmap(_write, [(shard.to_bytes(), str(folder)) for shard in plan])
    gather(plan, scans, folder, config)
    return output


def _write(plan: bytes, place: str) -> int:
    return write_shard(ShardPlan.from_bytes(plan), place).number


def tokens_per_second(output: Path) -> float:
    """Of 79m, if this machine measured it."""
    path = output / FIGURES
    for text in path.read_text().splitlines() if path.is_file() else []:
        line = json.loads(text)
        if line.get("part") == "train 79m ZeRO 1" and "rehearsal" not in line and "tokens_per_second" in line:
            return float(line["tokens_per_second"])
    return RATE


def training(folders: list[str], run: Path, seconds: float, rate: float, rehearsed: bool) -> list[str]:
    """The command that trains for about so many seconds. The rate falls to its end in them."""
    steps = 6 if rehearsed else max(100, int(0.9 * (seconds - START_SECONDS) * rate / (BATCH * LENGTH)))
    shape = ["--recipe", "tiny-tokens", "--data.global-batch", "4", "--data.micro-batch", "4"]
    if not rehearsed:
        shape = ["--recipe", "79m-table", "--data.global-batch", str(BATCH), "--data.micro-batch", str(BATCH // 2)]
    every = str(max(1, steps // 5))
    return [
        *(sys.executable, "trainer/main.py", *shape, "--run.output", str(run), "--data.folders", *folders),
        *("--steps", str(steps), "--optimiser.decay-steps", str(steps), "--optimiser.warmup-steps", str(steps // 20)),
        *("--run.evaluate-every", every, "--run.evaluate-sequences", "4", "--run.save-every", str(steps)),
    ]


def playing(folders: list[str], run: Path, output: Path, rehearsed: bool) -> list[str]:
    """The command that plays what was trained, beside the behaviour that was recorded."""
    limit, episodes, processes = ("20", "1", "1") if rehearsed else ("1000", "5", "8")
    return [
        *(sys.executable, "-m", "eval.compare", "--gato", str(run / "export"), "--datasets", *folders),
        *("--models", "random", "behaviour", "gato", "--episodes", episodes, "--step-limit", limit),
        *("--processes", processes, "--film-seconds", "0", "-o", str(output)),
    ]


def run(command: list[str], seconds: float, asked: bool = False) -> None:
    """A command to its end, as the only rank of a group. After `seconds` it is killed, or, if `asked`, asked to end
    well before that. CalledProcessError or TimeoutExpired."""
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    alone |= {"NCCL_SOCKET_IFNAME": "lo", "NCCL_IB_DISABLE": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | alone, stdout=sys.stderr)
    try:
        try:
            status = process.wait(max(1.0, seconds - (15.0 if asked else 0.0)))
        except subprocess.TimeoutExpired:
            if not asked:
                raise
            process.send_signal(signal.SIGTERM)  # it saves and exports
            status = process.wait(30.0)
        if status:
            raise subprocess.CalledProcessError(status, command)
    finally:
        process.kill()


def copy(folder: Path, names: tuple[str, ...], output: Path) -> None:
    for name in names:
        shutil.copy(folder / name, output / name)
