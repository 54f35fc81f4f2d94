"""Each example does what its docstring says: its commands, with fewer steps."""

from __future__ import annotations

import importlib
import re
import shlex
import sys
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from rich.console import Console

from etl import record, sources
from etl.sources import EpisodeRef, Rejection
from examples import own_loop
from schemas.episode import ActionSpec, RawEpisode
from shards.reader import Dataset
from tests.commands import run
from tests.trainer.launch import SMALL, finish, launcher

ROOT = Path(__file__).resolve().parents[2]
FIELDS = {
    "arm/position": ("continuous", (2,)),
    "arm/velocity": ("continuous", (2,)),
    "camera/above": ("image", (32, 48, 3)),
    "camera/wrist": ("image", (20, 20, 1)),
}


@pytest.fixture(autouse=True)
def in_the_checkout(monkeypatch):
    monkeypatch.chdir(ROOT)


def commands(example: str, folder: Path, **changes: object) -> list[list[str]]:
    """The commands of an example's docstring, below `folder`, with other values of options that they give."""
    text = importlib.import_module(f"examples.{example}").__doc__.replace("\\\n", " ")
    found = [shlex.split(line, comments=True) for line in re.findall(r"^    (\S.*)$", text, re.MULTILINE)]
    for words in found:
        for name, value in changes.items():
            if (flag := f"--{name}") in words:
                words[words.index(flag) + 1] = str(value)
    return [[re.sub("^(?=(data|runs|results)/)", f"{folder}/", word) for word in words] for words in found]


def task_of(folder: Path):
    (task,) = Dataset(folder).manifest.tasks
    return task


def test_the_environment_is_a_valid_one():
    with pytest.warns(UserWarning, match="normalized space"):  # Box(-2, 2) is meant
        check_env(gymnasium.make("examples.own_environment:CameraReach-v0", render_mode="rgb_array").unwrapped)


@pytest.mark.process
def test_own_environment_from_record_to_table(tmp_path):
    shorter = {"steps": 20, "optimiser.decay-steps": 20, "optimiser.warmup-steps": 2, "episodes": 2}
    recording, building, training, comparing = commands("own_environment", tmp_path, **shorter)
    run(*recording[2:], "--steps", "300")
    run(*building[2:])
    task = task_of(tmp_path / "data/reach/shards")
    assert {field.key: (field.kind, field.shape) for field in task.spec.observation} == FIELDS
    assert task.spec.action == ActionSpec.continuous(-2.0, 2.0, 2)
    done = finish([*launcher(), *training[1:], *SMALL.split()])
    assert done.returncode == 0, done.stdout + done.stderr
    table = run(*comparing[2:], "--processes", "1").stdout
    row = next(line for line in table.splitlines() if line.startswith("| camerareach-expert-v0"))
    gato, random, behaviour = (float(cell.split()[0]) for cell in row.split("|")[-4:-1])
    assert behaviour > random and -200 < gato < 0
    assert "data:image" in (tmp_path / "results/reach/report.html").read_text()  # its own render


def test_a_plain_id_counts_with_the_modules_import(tmp_path):
    module = "examples.own_environment"
    options = record.Options("CameraReach-v0", f"{module}:expert", (module,), steps=20, output=tmp_path)
    assert record.record(options, Console(quiet=True)).path == tmp_path / "camerareach/expert-v0"


@pytest.fixture
def own_log_format(monkeypatch):
    """The module, whose source is registered until the test ends."""
    monkeypatch.setattr(sources, "_registered", {})
    module = importlib.import_module("examples.own_log_format")
    sources.register(module.SOURCE)
    return module


@pytest.fixture
def npz(own_log_format, tmp_path) -> Path:
    own_log_format.write_episodes(tmp_path / "data/npz/logs/reach", 6)
    return tmp_path / "data/npz/logs/reach"


def test_own_log_format(npz, tmp_path):
    writing, building = commands("own_log_format", tmp_path)
    assert writing[:3] == ["python", "-m", "examples.own_log_format"] and Path(writing[3]) == npz
    run(*building[2:])
    task = task_of(tmp_path / "data/npz/shards")
    assert (task.spec.name, task.episodes, task.rejected_episodes) == ("reach", 6, 0)
    assert {field.key: (field.kind, field.shape) for field in task.spec.observation} == FIELDS
    assert task.spec.action == ActionSpec.continuous(-2.0, 2.0, 2)
    comparing = ("--models", "random", "behaviour", "--episodes", "2", "--film-seconds", "0", "--processes", "1")
    table = run("eval.compare", "--datasets", tmp_path / "data/npz/shards", *comparing, "-o", tmp_path / "table").stdout
    assert "| reach | examples.own_environment:CameraReach-v0 |" in table and "error" not in table


def test_episodes_come_back_as_they_were_written(npz, own_log_format):
    source = sources.load("npz-episodes")
    (scan,) = source.scan(source.resolve(npz, None, npz), own_log_format.Options(action_limit=2.0))
    episodes = list(sources.read(source, scan.task, scan.episodes))
    assert len(episodes) == 6 and scan.task.max_episode_steps == max(one.timesteps for one in episodes)
    with np.load(npz / "0003.npz") as written:
        np.testing.assert_array_equal(episodes[3].observation["camera/above"], written["camera/above"])
        np.testing.assert_allclose(episodes[3].action, written["action"], rtol=1e-6)
        assert scan.episodes[3].total == pytest.approx(written["reward"].sum())
        assert episodes[3].terminated == bool(written["terminated"]) != episodes[3].truncated


def test_a_damaged_file_is_rejected_and_the_others_are_read(npz, own_log_format):
    whole = (npz / "0002.npz").read_bytes()
    (npz / "0002.npz").write_bytes(whole[: len(whole) // 2])
    source = sources.load("npz-episodes")
    (scan,) = source.scan(source.resolve(npz, None, npz), own_log_format.Options(action_limit=2.0))
    assert [one.position for one in scan.episodes] == [0, 1, 3, 4, 5]
    assert [(one.file, one.reason) for one in scan.rejected] == [("0002.npz", "unreadable")]
    refs = [scan.episodes[0], EpisodeRef(str(npz / "0002.npz"), 2, 0, 9)]  # damaged after it was scanned
    assert [type(one) for one in source.read(scan.task, refs)] == [RawEpisode, Rejection]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--action-limit", "0"), "--action-limit 0.0: give a positive number"),
        (("--separator", ";"), "unknown option --separator"),
    ],
)
def test_its_options_are_checked(arguments, message, npz, tmp_path):
    plug_in = ("--import", "examples.own_log_format", "--source", "npz-episodes")
    done = run("etl.build", *plug_in, "--input", npz, "--output", tmp_path / "shards", *arguments, check=False)
    assert done.returncode == 1 and done.stderr.startswith(f"error: {message}")


@pytest.mark.filterwarnings("ignore:.*out of date")
def test_own_loop(monkeypatch, capsys):
    pytest.importorskip("mujoco")
    monkeypatch.setattr(sys, "argv", ["own_loop", "--episodes", "2", "--steps", "30"])
    own_loop.main()
    lines = [line.split(": return ") for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines] == ["alone, seed 0", "alone, seed 1", "batch, seed 0", "batch, seed 1"]
    alone, batch = np.reshape([float(line[1]) for line in lines], (2, 2))
    np.testing.assert_allclose(alone, batch, atol=0.2)
    assert (alone > 20).all()  # one a timestep for not falling, and some for moving
