"""Ctrl-C at random moments: a comparison ends within seconds, leaves no process and resumes."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time

import psutil
import pytest

SECONDS_TO_END = 30.0


def interrupted_at(seconds, hopper, pong, output):
    """(exit status, stderr, processes that were left) of a comparison that gets a terminal's Ctrl-C."""
    command = [sys.executable, "-m", "eval.compare", "--models", "random", "behaviour", "--datasets", hopper, pong]
    command += ["--output", output, "--film-seconds", "0", "--episodes", "200"]
    command += ["--processes", "2"]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               start_new_session=True)  # fmt: skip
    try:
        time.sleep(seconds)
        family = [*psutil.Process(process.pid).children(recursive=True)] if process.poll() is None else []
        with contextlib.suppress(ProcessLookupError):  # it may have ended by itself
            os.killpg(process.pid, signal.SIGINT)
        stderr = process.communicate(timeout=SECONDS_TO_END)[1]
        return process.returncode, stderr, psutil.wait_procs(family, timeout=5)[1]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def check(moments, hopper, pong, tmp_path):
    for number, seconds in enumerate(moments):
        status, stderr, left = interrupted_at(seconds, hopper, pong, tmp_path / f"{number}")
        # an interrupt amid Python's own start ends by the signal, one behind the end comes too late
        assert status in (130, -signal.SIGINT, 0), (seconds, status, stderr)
        if status == 130:
            assert "interrupted: the same command again" in stderr and "Traceback" not in stderr, (seconds, stderr)
        assert not left, (seconds, left)


@pytest.mark.process
def test_three_interrupts(hopper, pong, tmp_path):
    check([2.0, 5.0, 8.0], hopper, pong, tmp_path)


@pytest.mark.process
@pytest.mark.slow
def test_twenty_interrupts(hopper, pong, tmp_path):
    generator = random.Random(0)
    check([generator.uniform(1.0, 25.0) for _ in range(20)], hopper, pong, tmp_path)
