"""SIGKILL at any moment: the same command again gives the same bytes, and a lost worker ends in a message."""

import os
import random
import signal
import subprocess
import sys
import time

import psutil
import pytest

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


def test_a_silent_worker_is_lost_and_a_slow_one_is_not(tmp_path, monkeypatch):
    from etl.building import heartbeat as watch
    from shards.folder import Folder

    monkeypatch.setattr(watch, "PATIENCE_SECONDS", 1.5)
    monkeypatch.setattr(watch, "SILENCE_SECONDS", 1.5)
    folder = Folder(tmp_path)
    seen = watch.Watch(folder, local=False)
    time.sleep(2)
    seen.check(0)  # nobody was ever heard: the workers are elsewhere
    with watch.Heartbeat(folder, "shard-000000.tar"):
        time.sleep(2.5)
        seen.check(0)
    time.sleep(2)
    with pytest.raises(watch.WorkerLost, match="no worker gave a sign of life"):
        seen.check(0)
    ours = watch.Watch(folder, local=True)
    (tmp_path / ".build" / "shard-000001.tar.alive").touch()
    os.utime(tmp_path / ".build" / "shard-000001.tar.alive", (time.time() - 5, time.time() - 5))
    with pytest.raises(watch.WorkerLost, match="shard-000001.tar"):
        ours.check(1)
    seen.check(1)  # a cluster gives the shard to another worker
