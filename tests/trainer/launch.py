"""The real command under the real launcher, at a size of seconds; what a run wrote, and which processes are left.

Processes are warm forks (tests/warm.py), except where a test asks for cold ones, as a user's shell starts them.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import psutil

from tests import warm
from trainer.checkpoint import latest

ROOT = Path(__file__).resolve().parent.parent.parent
SMALL = (
    "--model.blocks 1 --model.heads 2 --model.width 32 --model.feed-forward 64 --model.head-size 16 "
    "--model.patch-channels 16 --model.stochastic-depth 0.1 --data.global-batch 8 --data.micro-batch 2 "
    "--data.stream.sequence-length 120 --data.stream.mixture-block 8 --run.evaluate-sequences 2"
)


def launcher(processes: int = 1) -> list[str]:
    """The `deepspeed` command of this environment, on a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = str(Path(sys.executable).with_name("deepspeed"))
    return [command, "--num_gpus", str(processes), "--master_port", str(port)]


def command(output, data, *extra, processes=1, steps=6) -> list[str]:
    """A small training run of datasets `data`."""
    folders = ["--data.folders", *map(str, data)]
    run = ["--run.output", str(output), "--steps", str(steps), "--run.log-every", "1", "--run.save-every", "2"]
    return [*launcher(processes), "trainer/main.py", "--recipe", "tiny-tokens", *SMALL.split(), *folders, *run, *extra]


def train(*arguments, check=True, prepare=None, cold=False, **options) -> subprocess.CompletedProcess:
    """Run `command` to its end. `prepare` is called in the child before it starts, which makes it a cold one."""
    done = finish(command(*arguments, **options), cold=cold or prepare is not None, preexec_fn=prepare)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def finish(command: list[str], cold: bool = False, timeout: float = 300, **options) -> subprocess.CompletedProcess:
    """Run a command in the root of the checkout to its end."""
    run = partial(subprocess.run, capture_output=True, text=True) if cold else warm.run
    return run(command, cwd=ROOT, timeout=timeout, **options)


def losses(output) -> list[float]:
    """The loss of every step."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line["train/loss"] for line in lines if line["step"] > 0]


def metrics_at(output, step) -> dict:
    """All metrics of a step."""
    return next(line for line in map(json.loads, (output / "metrics.jsonl").open()) if line["step"] == step)


def errors(done: subprocess.CompletedProcess) -> list[str]:
    """The lines of stderr for the user."""
    return [line for line in done.stderr.splitlines() if line.startswith("error: ")]


def latest_step(output) -> int:
    """Step of the newest intact checkpoint, 0 if there is none."""
    record = latest(output / "checkpoints") if (output / "checkpoints").is_dir() else None
    return record.step if record else 0


def family(output) -> dict[str, list[psutil.Process]]:
    """The living processes of a run: of the `deepspeed` command, its launcher, and the ranks in order."""
    found: dict[str, list[psutil.Process]] = {"command": [], "launcher": [], "rank": []}
    for process in psutil.process_iter(["cmdline", "status"]):
        line = process.info["cmdline"] or []
        if str(output) not in line or process.info["status"] == psutil.STATUS_ZOMBIE:
            continue
        kind = "launcher" if "deepspeed.launcher.launch" in line else "command"
        found["rank" if any(word.startswith("--local_rank=") for word in line) else kind].append(process)
    found["rank"].sort(key=lambda process: process.pid)
    return found


def nobody_left(output, seconds: float = 60) -> bool:
    """Whether all processes of a run are gone before long."""
    deadline = time.monotonic() + seconds
    while any(family(output).values()):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True
