"""One digest on every Beam runner that can be started here: real processes, loopback ports.

small D4RL files -> in-memory build (the reference) -> the same build on other runners -> equal digests

Every process stands in a group of its own, which is killed when its test ends, children and all. What these tests
leave out, Flink, Spark and Dataflow, talks to its workers through the Fn API as the portable job service does.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import tyro

from etl.build import Options, beam_flags
from tests import warm
from tests.etl.test_build import d4rl_file, digests

SHARD_MEGABYTES = "0.04"
GUIDE = Path(__file__).parents[2] / "docs" / "runners.md"
JOB_SERVICE = "apache_beam.runners.portability.local_job_service_main"
WORKER_POOL = "apache_beam.runners.worker.worker_pool_main"
DASK = "--runner=apache_beam.runners.dask.dask_runner.DaskRunner"

Digests = tuple[list[str], str, str]


@contextmanager
def process(log: Path, *arguments: str | int | Path, cwd: Path | None = None) -> Iterator[subprocess.Popen]:
    """python -m ARGUMENTS in a process group that is killed at the end of the block; its output goes to `log`."""
    scripts = str(Path(sys.executable).parent)  # Beam's worker pool starts its workers as plain `python`
    environment = os.environ | {"PATH": os.pathsep.join([scripts, os.environ.get("PATH", "")])}
    with log.open("wb") as file:
        # what a builder starts it starts itself; services of Beam and Dask are others' programs
        started = (warm.Popen if arguments[0] == "etl.build" else subprocess.Popen)(
            [sys.executable, "-m", *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=environment,
            cwd=cwd,
        )
    try:
        yield started
    finally:
        with suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)
        started.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until_open(port: int, log: Path, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with suppress(OSError), socket.create_connection(("localhost", port), timeout=1):
            return
        time.sleep(0.05)
    raise AssertionError(f"nothing listens on port {port} after {seconds} s:\n{log.read_text()[-3000:]}")


def build(inputs: Path, output: Path, *flags: str) -> Digests:
    log = output.with_suffix(".log")
    arguments = ("--source", "d4rl", "--input", inputs, "--output", output, "--shard-megabytes", SHARD_MEGABYTES)
    with process(log, "etl.build", *arguments, *flags) as builder:
        status = builder.wait(timeout=300)
    assert status == 0, log.read_text()[-5000:]
    return digests(output)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    d4rl_file(folder / "a-medium-v4.hdf5", episodes=16)
    d4rl_file(folder / "b-expert-v4.hdf5", episodes=48)
    return folder


@pytest.fixture(scope="module")
def in_memory(inputs, tmp_path_factory) -> Digests:
    result = build(inputs, tmp_path_factory.mktemp("in-memory") / "d")
    assert len(result[0]) >= 8
    return result


@pytest.mark.parametrize(
    "workers", [2, pytest.param(1, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)]
)
@pytest.mark.process
def test_worker_processes_of_this_machine_write_the_same_bytes(inputs, in_memory, tmp_path, workers):
    flags = ("--direct_running_mode=multi_processing", f"--direct_num_workers={workers}")
    assert build(inputs, tmp_path / "d", *flags) == in_memory


@pytest.fixture(scope="module")
def portable(tmp_path_factory) -> Iterator[tuple[str, ...]]:
    """Beam flags of a job service and a worker pool that stand in another folder than the builder."""
    folder = tmp_path_factory.mktemp("services")
    job_port, pool_port = free_port(), free_port()
    job, pool = folder / "job.log", folder / "pool.log"
    with (
        process(job, JOB_SERVICE, "--port", job_port, "--staging_dir", folder / "staging", cwd=folder),
        process(pool, WORKER_POOL, "--service_port", pool_port, cwd=folder),
    ):
        wait_until_open(job_port, job)
        wait_until_open(pool_port, pool)
        yield (
            "--runner=PortableRunner",
            f"--job_endpoint=localhost:{job_port}",
            "--environment_type=EXTERNAL",
            f"--environment_config=localhost:{pool_port}",
        )
    assert "Starting worker with command" in pool.read_text()


@pytest.mark.process
def test_external_workers_of_a_portable_job_service_write_the_same_bytes(inputs, in_memory, tmp_path, portable):
    assert build(inputs, tmp_path / "d", *portable) == in_memory


@pytest.mark.process
def test_external_workers_find_what_the_builder_names_relative_to_its_folder(
    inputs, in_memory, tmp_path, portable, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert build(Path(os.path.relpath(inputs)), Path("d"), *portable) == in_memory


@pytest.mark.process
def test_the_workers_of_a_dask_scheduler_share_the_shards_and_write_the_same_bytes(inputs, in_memory, tmp_path):
    distributed = pytest.importorskip("distributed")
    port, log = free_port(), tmp_path / "scheduler.log"
    address = f"tcp://127.0.0.1:{port}"
    loopback = ("--host", "127.0.0.1", "--no-dashboard")
    workers = ("worker", address, "--nworkers", 2, "--nthreads", 1, *loopback)
    with (
        process(log, "dask", "scheduler", "--port", port, *loopback),
        process(tmp_path / "workers.log", "dask", *workers),
    ):
        wait_until_open(port, log)
        with distributed.Client(address, timeout="120s") as client:
            client.wait_for_workers(2, timeout=120)
            assert build(inputs, tmp_path / "d", DASK, f"--dask_client_address={address}") == in_memory
            done = client.run(lambda dask_worker: dask_worker.state.executed_count)
    assert len(done) == 2 and all(count > 0 for count in done.values()), done


@pytest.mark.slow
@pytest.mark.process
def test_a_local_dask_cluster_writes_the_same_bytes(inputs, in_memory, tmp_path):
    pytest.importorskip("distributed")
    assert build(inputs, tmp_path / "d", DASK) == in_memory


def guide_commands() -> list[str]:
    blocks = re.findall(r"^```[a-z]*\n(.*?)^```", GUIDE.read_text(), re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if "-m etl.build" in line]


@pytest.mark.parametrize("command", guide_commands())
def test_every_flag_of_the_guide_exists(command):
    words = shlex.split(command.partition("-m etl.build")[2], comments=True)
    options, rest = tyro.cli(Options, args=words, return_unknown_args=True)
    beam_flags(rest, options.workers)
