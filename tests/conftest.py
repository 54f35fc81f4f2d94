"""Logs recorded from the real simulators and datasets built from them, once a session; which tests start processes.

`make check` leaves out the tests marked `process`. A test that starts Python or a command of its environment without
the mark is an error; other programs, and the process in which the code tries an HDF5 file, do not count.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

# Threads that spin while they wait lose most of a core where several processes compute. Read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

from etl.sources._hdf5 import trial
from tests import warm
from tests.commands import run

if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(workers)))

# A shell starts what runs in its background with SIGINT ignored, and nohup with SIGHUP, which all processes started
# here would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

started: list[str] = []


def _listen(event: str, arguments: tuple) -> None:
    if event == "subprocess.Popen":
        words = [os.fsdecode(word) for word in arguments[1]]
        # of the environment, but not the code's own child
        if Path(words[0]).parent == Path(sys.executable).parent and "etl.sources._hdf5" not in words:
            started.append(" ".join(words)[:200])


sys.addaudithook(_listen)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    started.clear()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item):
    if started and not item.get_closest_marker("process"):
        pytest.fail(f"mark it with pytest.mark.process: it started {started[0]}", pytrace=False)


@pytest.fixture(scope="session", autouse=True)
def warm_hdf5_child():
    """The process in which the code tries HDF5 files starts warm; tests of it alone start it cold."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trial, "subprocess", SimpleNamespace(run=_run_warm))
        yield


def _run_warm(command, **options):
    options.pop("capture_output")
    return warm.run(command, text=False, **options)


@pytest.fixture(scope="session")
def logs(tmp_path_factory) -> Path:
    """d4rl/hopper-random-v4.hdf5 and dqn_replay/Pong/1: some 1,500 and 300 timesteps."""
    folder = tmp_path_factory.mktemp("logs")
    hopper, pong = folder / "d4rl", folder / "dqn_replay"
    run("etl.record", "--environment", "Hopper-v4", "--policy", "random", "--steps", "1500", "--output", hopper)
    run("etl.record", "--environment", "ALE/Pong-v5", "--policy", "expert", "--steps", "300", "--output", pong)
    return folder


@pytest.fixture(scope="session")
def hopper(logs, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shards") / "hopper"
    run("etl.build", "--source", "d4rl", "--input", logs / "d4rl", "--output", folder, "--shard-megabytes", "0.05")
    return folder


@pytest.fixture(scope="session")
def pong(logs, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shards") / "pong"
    arguments = ("--source", "atari", "--input", logs / "dqn_replay", "--output", folder)
    run("etl.build", *arguments, "--piece-timesteps", "100")
    return folder
