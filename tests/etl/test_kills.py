"""SIGKILL at any moment: the same command again gives the same bytes, and a lost worker ends in a message."""

import os
import random
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import psutil
import pytest

from etl.building import heartbeat
from shards.folder import Folder
from tests import warm
from tests.conftest import run
from tests.etl.test_build import d4rl_file, digests

SHARDS = ("--shard-megabytes", "0.3")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    for name in ("a", "b", "c"):
        d4rl_file(folder / f"{name}-medium-v4.hdf5", episodes=600, length=60)
    return folder


@pytest.fixture(scope="module")
def built(inputs, tmp_path_factory):
    output = tmp_path_factory.mktemp("built") / "d"
    started = time.monotonic()
    run("etl.build", "--input", inputs, "--output", output, *SHARDS)
    return output, time.monotonic() - started


def start(inputs, output, *flags):
    command = [sys.executable, "-m", "etl.build", "--input", str(inputs), "--output", str(output), *SHARDS, *flags]
    return warm.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def kill_tree(pid):
    processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.process
def test_killed_at_random_moments(inputs, built, tmp_path, workers):
    """Five kills of the whole build, then one run to the end; ten for both settings."""
    reference, seconds = built
    moments = random.Random(int(workers))
    for _ in range(5):
        process = start(inputs, tmp_path / "d", "--workers", workers)
        time.sleep(moments.uniform(0.3, 1.0) * seconds)
        if process.poll() is None:
            kill_tree(process.pid)
        process.communicate()
        finished = (tmp_path / "d" / "dataset.json").exists()
        # a kill may fall between the manifest, which comes last, and the end of the process
        assert finished or process.returncode != 0
        assert not finished or digests(tmp_path / "d") == digests(reference)
    run("etl.build", "--input", inputs, "--output", tmp_path / "d", *SHARDS, "--workers", workers)
    assert digests(tmp_path / "d") == digests(reference)
    assert not [p.name for p in (tmp_path / "d").iterdir() if p.name.startswith(".")]


def worker_at_work(output, deadline):
    """The process that writes a shard this moment: temporary names hold the process id."""
    while time.monotonic() < deadline:
        for path in output.glob(".shard-*.tmp"):
            return int(path.name.split(".")[-3])
        time.sleep(0.001)
    return None


@pytest.mark.process
def test_a_killed_worker_is_replaced(inputs, built, tmp_path):
    process = start(inputs, tmp_path / "d", "--workers", "2")
    victim = worker_at_work(tmp_path / "d", time.monotonic() + 60)
    assert victim not in (None, process.pid)
    os.kill(victim, signal.SIGKILL)
    _, errors = process.communicate(timeout=150)
    assert process.returncode == 0, errors
    assert digests(tmp_path / "d") == digests(built[0])
    assert not psutil.pid_exists(victim) or psutil.Process(victim).status() == psutil.STATUS_ZOMBIE


@pytest.mark.process
def test_two_builds_of_one_folder_do_not_mix(inputs, built, tmp_path):
    first = start(inputs, tmp_path / "d")
    assert worker_at_work(tmp_path / "d", time.monotonic() + 60) == first.pid
    second = start(inputs, tmp_path / "d")
    _, errors = second.communicate(timeout=60)
    assert (second.returncode == 1 and "another build" in errors) or (second.returncode == 0 and first.poll() == 0)
    first.communicate(timeout=60)
    assert digests(tmp_path / "d") == digests(built[0])


def test_a_silent_worker_is_lost_and_a_slow_one_or_a_stopped_build_is_not(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(heartbeat, "time", SimpleNamespace(monotonic=lambda: now[0]))
    folder, beat = Folder(tmp_path), tmp_path / ".build" / "shard-000001.tar.alive"
    elsewhere, here = heartbeat.Watch(folder, local=False), heartbeat.Watch(folder, local=True)

    def look(watch, seconds, beating=True, finished=0):
        for _ in range(seconds):
            now[0] += 1
            if beating:
                beat.touch()
                os.utime(beat, (0, now[0]))  # by a clock that is far slow
            watch.check(finished)

    look(elsewhere, 100, beating=False)  # nobody was ever heard: the workers are elsewhere
    look(elsewhere, 100)
    look(here, 100)
    now[0] += 3600  # Ctrl-Z, or a laptop asleep: neither side was there
    here.check(0)
    elsewhere.check(0)
    look(here, 5)
    with pytest.raises(heartbeat.WorkerLost, match=r"shard-000001.tar gave no sign of life for 2\d s"):
        look(here, 30, beating=False)
    look(elsewhere, 40, beating=False)  # a cluster gives the shard to another worker
    look(elsewhere, 40, beating=False, finished=1)
    with pytest.raises(heartbeat.WorkerLost, match="no worker gave a sign of life"):
        look(elsewhere, 10, beating=False, finished=1)
