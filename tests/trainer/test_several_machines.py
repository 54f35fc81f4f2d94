"""Ranks on machines of their own: each is a process with its own folder, as rank files and data may lie there."""

import os
import shutil
import socket
import subprocess
import sys
from contextlib import contextmanager

import pytest

from tests import warm
from tests.trainer.launch import ROOT, SMALL, family, latest_step, train
from trainer.checkpoint import CheckpointError, latest
from trainer.distributed.ranks import complete_environment

pytestmark = pytest.mark.process

MAIN = ROOT / "trainer" / "main.py"
STARTERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "OMPI_", "PMI_", "SLURM_")


def line(data, *extra, steps=4, main=MAIN):
    """A rank's command line, for whatever starts it."""
    run = ["--steps", str(steps), "--run.log-every", "1", "--run.save-every", "2", "--data.folders", str(data)]
    return [sys.executable, str(main), "--recipe", "tiny-tokens", *SMALL.split(), *run, *map(str, extra)]


def clean_environment(**more):
    kept = {name: value for name, value in os.environ.items() if not name.startswith(STARTERS)}
    return kept | more


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextmanager
def two_ranks(folders, *commands, cold=(False, False)):
    """Two processes of one run, each in its folder; they are gone after the block."""
    port, started = str(free_port()), []
    try:
        for rank, (folder, words) in enumerate(zip(folders, commands)):
            folder.mkdir(parents=True, exist_ok=True)
            place = {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
            paths = {"PYTHONPATH": str(ROOT)} if words[1] == str(MAIN) else {}
            popen = subprocess.Popen if cold[rank] else warm.Popen
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            environment = clean_environment(**place, **paths, MASTER_PORT=port)
            started.append(popen(words, cwd=folder, env=environment, **pipes))
        yield started
    finally:
        for process in started:
            if process.poll() is None:
                process.kill()
            process.wait(60)


def refused(folders, *commands, **options):
    """The line for the user of two ranks that both end before their first step."""
    with two_ranks(folders, *commands, **options) as started:
        told = [process.communicate(timeout=200) for process in started]
        assert [process.returncode for process in started] == [1, 1], told
    assert "Traceback" not in str(told) and "step 1:" not in str(told), told
    (shown,) = [one for one in told[0][1].splitlines() if one.startswith("error: ")]
    return shown


def test_a_run_folder_that_is_not_shared_is_refused(hopper, tmp_path):
    words = line(hopper, "--run.output", "run")
    shown = refused((tmp_path / "a", tmp_path / "b"), words, words)
    assert "--run.output run: rank 1 on" in shown and "does not see the files" in shown and "share" in shown
    assert not list(tmp_path.glob("*/run/.shared-*")) and not list(tmp_path.glob("*/run/checkpoints"))


def test_other_data_under_the_same_path_is_refused(hopper, pong, tmp_path):
    shutil.copytree(hopper, tmp_path / "a" / "data")
    shutil.copytree(pong, tmp_path / "b" / "data")
    words = line("data", "--run.output", tmp_path / "run")
    shown = refused((tmp_path / "a", tmp_path / "b"), words, words)
    assert "rank 1 on" in shown and "dataset data (fingerprint" in shown and "copy the same files" in shown


def test_data_that_one_machine_lacks_is_named(hopper, tmp_path):
    shutil.copytree(hopper, tmp_path / "a" / "data")
    words = line("data", "--run.output", tmp_path / "run")
    shown = refused((tmp_path / "a", tmp_path / "b"), words, words)
    assert "rank 1 on" in shown and "data: no dataset.json" in shown


def test_other_settings_and_other_files_of_settings_are_refused(hopper, tmp_path):
    own = [line(hopper, "--run.output", tmp_path / "run", "--seed", seed) for seed in (0, 1)]
    shown = refused((tmp_path, tmp_path), *own)
    assert "rank 1 on" in shown and "seed 1, there 0" in shown and "start every rank with the same" in shown
    for folder, stage in (("a", 1), ("b", 2)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "own.json").write_text(f'{{"zero_optimization": {{"stage": {stage}}}}}')
    words = line(hopper, "--run.output", tmp_path / "run", "--deepspeed", "own.json")
    shown = refused((tmp_path / "a", tmp_path / "b"), words, words)
    assert "other DeepSpeed file" in shown and "zero_optimization.stage 2, there 1" in shown


def test_another_version_of_the_package_is_refused(hopper, tmp_path):
    for room in ("schemas", "shards", "trainer", "deepspeed_configs"):
        shutil.copytree(ROOT / room, tmp_path / "other" / room, ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "other" / "trainer" / "loss.py").open("a") as file:
        file.write("# changed\n")
    words = [
        line(hopper, "--run.output", tmp_path / "run", main=main)
        for main in (MAIN, tmp_path / "other" / "trainer" / "main.py")
    ]
    shown = refused((tmp_path, tmp_path), *words, cold=(False, True))
    assert "rank 1 on" in shown and "runs gato-open" in shown and "install the same on every machine" in shown


def test_a_lost_rank_is_one_line_with_the_remedy(hopper, tmp_path):
    words = line(hopper, "--run.output", tmp_path / "run", steps=100_000)
    with two_ranks((tmp_path / "a", tmp_path / "b"), words, words) as (first, second):
        for shown in first.stdout:
            if shown.startswith("step 3:"):
                break
        second.kill()
        output, errors = first.communicate(timeout=120)
    assert first.returncode == 1 and "Traceback" not in output + errors, output + errors
    assert "a rank was lost or does not answer; run the same command to resume" in errors
    step = latest_step(tmp_path / "run")
    assert step >= 2
    assert f"resuming at step {step}" in train(tmp_path / "run", [hopper], steps=step + 2).stdout


def test_a_part_on_another_machine_is_asked_for(hopper, tmp_path):
    train(tmp_path / "run", [hopper], processes=2, steps=4)
    moved = []
    for part in (tmp_path / "run" / "checkpoints").glob("step-*/part-00001.safetensors"):
        moved.append((shutil.move(part, tmp_path / f"{part.parent.name}.part"), part))
    assert len(moved) == 2
    with pytest.raises(CheckpointError) as raised:
        latest(tmp_path / "run" / "checkpoints")
    assert "the part of rank 1 is missing" in str(raised.value) and "copy" in str(raised.value)
    assert "start again" not in str(raised.value) and "another --run.output" not in str(raised.value)
    for kept, place in moved:
        shutil.move(kept, place)
    assert latest_step(tmp_path / "run") == 4


@pytest.mark.parametrize(
    "environment",
    [
        {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0"},
        {"PMI_RANK": "0", "PMI_SIZE": "1"},
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_LOCALID": "0", "SLURM_STEP_NODELIST": "127.0.0.1"},
    ],
    ids=["openmpi", "mpich", "srun"],
)
def test_other_starters_need_no_launcher(hopper, tmp_path, environment):
    port = {"MASTER_PORT": str(free_port())}
    words = line(hopper, "--run.output", tmp_path, steps=2)
    done = warm.run(words, cwd=ROOT, timeout=200, env=clean_environment(**environment, **port))
    assert done.returncode == 0 and latest_step(tmp_path) == 2, done.stdout + done.stderr


def test_a_network_interface_that_is_none_is_named(hopper, tmp_path):
    environment = clean_environment(GLOO_SOCKET_IFNAME="none0", PMI_RANK="0", PMI_SIZE="1")
    environment |= {"MASTER_PORT": str(free_port())}
    done = warm.run(line(hopper, "--run.output", tmp_path), cwd=ROOT, timeout=200, env=environment)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "none0; GLOO_SOCKET_IFNAME must name a network interface of this machine" in done.stderr, done.stderr


@pytest.mark.parametrize("starter", ["mpirun", "torchrun"])
def test_the_starters_themselves(hopper, tmp_path, starter):
    if not (found := shutil.which(starter, path=os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"])):
        pytest.skip(f"no {starter}")
    port, words = str(free_port()), line(hopper, "--run.output", tmp_path, steps=2)
    start = [found, "--nproc-per-node", "2", "--master-port", port]
    if starter == "mpirun":
        start = [found, "--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-np", "2", words.pop(0)]
    else:
        words.pop(0)
    environment = clean_environment(MASTER_PORT=port, OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
    done = subprocess.run([*start, *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0 and "2 process(es) on cpu" in done.stdout, done.stdout + done.stderr
    record = latest(tmp_path / "checkpoints")
    assert record and record.world_size == 2 and not any(family(tmp_path).values())


def test_ranks_of_several_machines_find_the_first_one():
    environment = {"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1", "SLURM_TASKS_PER_NODE": "2(x2)"}
    for listed, first in (("gpu[03-05,9],x", "gpu03"), ("a,b", "a"), ("node[1,4]", "node1"), ("n-1", "n-1")):
        own = environment | {"SLURM_STEP_NODELIST": listed}
        complete_environment(own)
        assert (own["MASTER_ADDR"], own["RANK"], own["LOCAL_WORLD_SIZE"]) == (first, "3", "2")
    mpi = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
    with pytest.raises(ValueError, match="mpirun on several machines .* -x MASTER_ADDR=HOST"):
        complete_environment(dict(mpi))
    given = mpi | {"MASTER_ADDR": "a"}
    complete_environment(given)
    assert given["MASTER_ADDR"] == "a" and given["MASTER_PORT"] == "29500"
    with pytest.raises(ValueError, match="environment variable WORLD_SIZE=two: must be a number"):
        complete_environment({"RANK": "0", "WORLD_SIZE": "two"})
    launched = {"RANK": "0", "SLURM_PROCID": "7", "SLURM_NTASKS": "8"}
    complete_environment(launched)
    assert "WORLD_SIZE" not in launched
