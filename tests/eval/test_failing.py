"""Messages and exit statuses when nothing can be played, OpenGL is missing or nobody reads its output."""

import os
import shutil
import subprocess
import sys

import h5py
import pytest

import simulators
from eval import provenance
from eval.environments import Played
from eval.rows import load_rows
from tests.conftest import run

QUICK = ("--episodes", "1", "--step-limit", "20", "--film-seconds", "0", "--processes", "1")


@pytest.fixture(scope="module")
def built(logs, tmp_path_factory):
    """One recording of Hopper as three datasets, by what their log names as its environment."""
    root = tmp_path_factory.mktemp("named")
    for name, environment in (("right", "Hopper-v4"), ("wrong", "Walker2d-v4"), ("none", None)):
        (root / name).mkdir()
        copy = shutil.copy(next((logs / "d4rl").iterdir()), root / name / f"{name}.hdf5")
        with h5py.File(copy, "r+") as file:
            del file.attrs["env_id"]
            if environment:
                file.attrs["env_id"] = environment
        run("etl.build", "--source", "d4rl", "--input", root / name, "--output", root / f"{name}-shards")
    return {name: root / f"{name}-shards" for name in ("right", "wrong", "none")}


def play(dataset, output, *models, **kwargs):
    command = ("eval.compare", "--datasets", dataset, "--output", output, "--models", *models, *QUICK)
    return run(*command, check=False, **kwargs)


def test_every_part_failed(built, tmp_path):
    done = play(built["wrong"], tmp_path, "random", "behaviour")
    assert done.returncode == 1 and "| wrong | Walker2d-v4 |" in done.stdout
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: nothing could be played") and "rebuild the dataset with --environment" in last
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr
    assert {row["ending"] for row in load_rows(tmp_path / "rows.parquet").to_pylist()} >= {"error"}


def test_one_part_played_is_enough(built, tmp_path):
    command = ("eval.compare", "--datasets", built["wrong"], built["right"], "--output", tmp_path, "--models", "random")
    assert run(*command, *QUICK).returncode == 0


def test_nothing_to_play_names_the_remedy(built, tmp_path):
    done = play(built["none"], tmp_path, "random", "dt")
    assert done.returncode == 1 and len(done.stderr.strip().splitlines()) == 1
    assert done.stderr.startswith("error: nothing to play: none: its log names no environment")
    assert "--environment" in done.stderr and not tmp_path.joinpath("rows.parquet").exists()
    shown = play(built["none"], tmp_path, "random", "behaviour")
    assert shown.returncode == 0 and "| none | — |" in shown.stdout and "--environment" in shown.stderr


@pytest.mark.process
def test_no_opengl_is_needed_to_play(built, tmp_path):
    done = play(built["right"], tmp_path, "random", env=os.environ | {"MUJOCO_GL": "osmesa"})
    assert done.returncode == 0, done.stderr
    code = """
import simulators
from schemas.episode import EnvironmentSpec
env = simulators.make(EnvironmentSpec("mujoco", "Hopper-v4"), render=True)
env.reset(seed=0)
try:
    print(simulators.frame(env).shape)
except simulators.SimulatorError as error:
    assert "MUJOCO_GL=osmesa cannot render here" in str(error), error
    print("refused")
"""
    drawn = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"MUJOCO_GL": "osmesa"}, capture_output=True, text=True
    )
    assert drawn.stdout.strip() in ("refused", "(480, 480, 3)"), drawn.stderr


@pytest.mark.process
def test_closed_streams_end_no_comparison(built, tmp_path):
    """The reader of both streams is gone before anything is written; then they are closed from the start."""
    command = [sys.executable, "-m", "eval.compare", "--datasets", str(built["right"]), str(built["wrong"])]
    command += ["--models", "random", "behaviour", *QUICK[:-1], "2", "--output"]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([*command, str(tmp_path / "gone")], stdout=write, stderr=write, timeout=300)
    os.close(write)
    assert done.returncode == 0
    command[command.index("2")] = "1"
    shell = f"exec {' '.join([*command, str(tmp_path / 'closed')])} >&- 2>&-"
    assert subprocess.run(["bash", "-c", shell], timeout=300).returncode == 0
    gone, closed = (load_rows(tmp_path / name / "rows.parquet").column("return") for name in ("gone", "closed"))
    assert repr(gone.to_pylist()) == repr(closed.to_pylist()) and len(gone) > 2


@pytest.mark.process
def test_provenance_without_git_or_a_checkout(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance.commit() == ""
    monkeypatch.undo()
    package = tmp_path / "site-packages" / "eval"
    shutil.copytree(provenance.__file__.rsplit("/", 1)[0], package, ignore=shutil.ignore_patterns("weights"))
    subprocess.run("git init -q . && git -c user.name=a -c user.email=a@b commit -q --allow-empty -m theirs",
                   shell=True, cwd=tmp_path, check=True)  # fmt: skip
    code = "from eval import provenance; print(repr(provenance.commit()), provenance.__file__)"
    paths = os.pathsep.join([str(package.parent), os.getcwd()])
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": paths},
                          capture_output=True, text=True)  # fmt: skip
    assert done.stdout.split() == ["''", str(package / "provenance.py")], done.stderr
    assert simulators.versions()["gymnasium"]


@pytest.mark.process
def test_an_output_that_is_a_file_is_refused_before_anything_is_done(tmp_path):
    file = tmp_path / "taken"
    file.write_text("mine")
    commands = (("eval.compare", "--models", "random"), ("etl.record", "--policy", "random"),
                ("etl.build", "--input", tmp_path))  # fmt: skip
    for command in commands:
        for output in (file, file / "below"):
            done = run(*command, "--output", output, check=False)
            assert done.returncode == 1
            assert done.stderr.strip() == f"error: --output {output}: {file} is a file; give a folder"


def test_a_damaged_part_is_played_again(built, tmp_path):
    play(built["right"], tmp_path, "random")
    (part,) = (tmp_path / "parts").iterdir()
    whole = part.read_bytes()
    for damaged in (b"", whole[:20], whole[:-9]):
        part.write_bytes(damaged)
        assert play(built["right"], tmp_path, "random").returncode == 0
        assert load_rows(part).num_rows == 1


def test_a_part_with_failed_episodes_is_played_again(built, tmp_path, monkeypatch):
    failed = [Played(1000, 3.0, 20, "step limit"), Played(1001, ending="error", error="no display")]
    for episodes, status in ((failed[1:], 1), (failed[1:], 1), (failed, 0)):
        monkeypatch.setattr("eval.runner.play", lambda *arguments, episodes=episodes: episodes)
        done = play(built["right"], tmp_path, "random")
        assert done.returncode == status and "kept from before" not in done.stderr
    monkeypatch.undo()
    assert play(built["right"], tmp_path, "random").returncode == 0
    assert "error" not in load_rows(tmp_path / "rows.parquet").column("ending").to_pylist()
    assert "kept from before" in play(built["right"], tmp_path, "random").stderr


def test_what_is_in_the_way_of_the_results_is_said_before_anything_is_played(built, tmp_path):
    (tmp_path / "out").symlink_to("nowhere")
    done = play(built["right"], tmp_path / "out", "random")
    assert done.returncode == 1 and "is a link to nothing" in done.stderr and "return" not in done.stdout


def test_the_file_of_a_dataset_in_its_folders_place_is_named(built, tmp_path):
    done = play(built["right"] / "dataset.json", tmp_path, "random")
    assert done.returncode == 1 and f"a file; give the folder of a dataset, {built['right']}" in done.stderr


def test_a_curves_damaged_files_are_named_or_played_again(tmp_path):
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "model.json").write_text("{")
    done = run("eval.curve", tmp_path, check=False)
    assert done.returncode == 1 and "model.json: damaged" in done.stderr and "Traceback" not in done.stderr
