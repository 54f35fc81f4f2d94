"""Many logs by one command: what is recorded, what is kept, and that bytes do not depend on workers."""

from __future__ import annotations

import io
import json
import shutil
import signal
import subprocess
import sys
import time

import pytest
from rich.console import Console

from etl import recording
from etl.record import Options
from schemas.files import exclusive_name
from simulators import scores
from simulators.registry import all_suites
from simulators.suite import Suite
from tests.commands import run

OWN_SUITE = """
import gymnasium
from simulators import registry
from simulators.suites.classic import Classic, Rule, classic

gymnasium.register("OwnPole-v0", "gymnasium.envs.classic_control:CartPoleEnv", max_episode_steps=30)

class Own(Classic):
    name, module = "own", "own_suite"
    experts = {"OwnPole-": lambda env: Rule(classic.cart_pole)}

registry.register(Own())
"""


def table(folder):
    return json.loads((folder / "recorded.json").read_text())


@pytest.fixture(scope="module")
def classic(tmp_path_factory):
    folder = tmp_path_factory.mktemp("suite")
    run("etl.record", "--suite", "classic", "--episodes", "2", "-o", folder)
    return folder


def test_every_task_with_an_expert_has_a_log_in_its_own_format(classic):
    rows = table(classic)
    assert len(rows) == 9 and {row["suite"] for row in rows.values()} == {"classic"}
    assert all(row["episodes"] == 2 and (classic / row["path"]).exists() for row in rows.values())
    assert rows["Pendulum-v1"]["path"] == "d4rl/pendulum-expert-v1.hdf5" and rows["Pendulum-v1"]["timesteps"] == 400
    assert rows["CartPole-v1"]["path"] == "minari/cartpole/expert-v1" and rows["CartPole-v1"]["mean_return"] == 500


def test_the_same_command_records_what_is_missing_to_the_same_bytes(classic, tmp_path):
    before = table(classic)
    shutil.copytree(classic, tmp_path / "logs")
    shutil.rmtree(tmp_path / "logs" / before["Taxi-v4"]["path"])
    kept = (tmp_path / "logs" / before["Pendulum-v1"]["path"]).stat().st_mtime_ns
    done = run("etl.record", "--suite", "classic", "--episodes", "2", "--workers", "2", "-o", tmp_path / "logs")
    assert "1 logs to record, 8 are there" in done.stderr
    assert (tmp_path / "logs" / before["Pendulum-v1"]["path"]).stat().st_mtime_ns == kept
    assert {id: row["sha256"] for id, row in table(tmp_path / "logs").items()} == {
        id: row["sha256"] for id, row in before.items()
    }


def test_other_options_are_not_mixed_in(classic):
    done = run("etl.record", "--suite", "classic", "--episodes", "3", "-o", classic, check=False)
    assert done.returncode == 1 and "was recorded with" in done.stderr and "--overwrite" in done.stderr


@pytest.mark.parametrize("option", [("--level", "medium"), ("--run", "2")])
def test_another_level_or_run_is_not_taken_for_what_is_there(classic, option):
    done = run("etl.record", "--suite", "classic", "--episodes", "2", *option, "-o", classic, check=False)
    assert done.returncode == 1 and "was recorded with" in done.stderr


def test_an_interrupt_between_a_log_and_its_row_loses_neither(classic, tmp_path):
    logs = tmp_path / "logs"
    shutil.copytree(classic, logs)
    before = table(logs)
    rowless = {id: row for id, row in before.items() if id not in ("Pendulum-v1", "CartPole-v1")}
    (logs / "recorded.json").write_text(json.dumps(rowless))
    run("etl.record", "--suite", "classic", "--episodes", "2", "-o", logs)
    seconds = {"seconds": 0}
    assert {id: row | seconds for id, row in table(logs).items()} == {id: row | seconds for id, row in before.items()}
    assert not list(logs.glob(".recording*"))


def test_a_log_of_somebody_else_is_kept_and_named(classic, tmp_path):
    logs = tmp_path / "[a] folder whose name is so long that a line with it is longer than a terminal is wide"
    shutil.copytree(classic, logs)
    rows = table(logs)
    own = logs / rows.pop("Pendulum-v1")["path"]
    own.write_bytes(b"somebody's")
    (logs / "recorded.json").write_text(json.dumps(rows))
    done = run("etl.record", "--suite", "classic", "--episodes", "2", "-o", logs, check=False)
    assert done.returncode == 1 and f"failed Pendulum-v1: {own}: already there; give" in done.stderr
    assert own.read_bytes() == b"somebody's" and len(table(logs)) == 8


def test_a_log_without_a_whole_episode_has_no_return(tmp_path):
    run("etl.record", "--suite", "box2d", "--steps", "20", "-o", tmp_path)
    assert {row["episodes"]: row["mean_return"] for row in table(tmp_path).values()} == {0: None}


@pytest.mark.parametrize(
    "options, words",
    [
        (["--suite", "clasic"], "unknown suite 'clasic'"),
        (["--suite", "gymnasium"], "no expert is shipped"),
        (["--suite", "classic", "-e", "CartPole-v1"], "give one of them"),
        (["--suite", "classic", "--episodes", "0"], "--episodes 0: must be from 1"),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path, options, words):
    done = run("etl.record", *options, "-o", tmp_path / "logs", check=False)
    assert done.returncode == 1 and words in done.stderr
    assert not (tmp_path / "logs").exists()


def test_two_recordings_of_suites_into_one_folder_are_refused(classic):
    with exclusive_name(classic / "recorded.json", ""):
        done = run("etl.record", "--suite", "classic", "--episodes", "2", "-o", classic, check=False)
    assert done.returncode == 1 and "recorded.json: another process is writing it" in done.stderr


@pytest.mark.process
def test_a_suite_of_a_module_is_recorded_by_its_import(tmp_path):
    """The error for an unknown suite names --import as its remedy."""
    (tmp_path / "own_suite.py").write_text(OWN_SUITE)
    options = ("--suite", "own", "--import", "own_suite", "--episodes", "1", "-o", tmp_path / "logs")
    run("etl.record", *options, cwd=tmp_path, cold=True)
    assert list(table(tmp_path / "logs")) == ["OwnPole-v0"]


def test_episodes_and_steps_together_are_both_reached_in_whole_episodes(tmp_path):
    run("etl.record", "--suite", "classic", "--episodes", "2", "--steps", "300", "-o", tmp_path)
    rows = table(tmp_path)
    assert all(row["episodes"] >= 2 and row["timesteps"] >= 300 for row in rows.values())
    assert rows["CartPole-v1"]["episodes"] == 2 and rows["Pendulum-v1"]["episodes"] == 2
    taxi = rows["Taxi-v4"]
    assert taxi["episodes"] > 2 and taxi["asked"] == {"policy": "expert", "episodes": 2, "steps": 300, "noise": 0.0,
                                                      "temperature": 1.0, "seed": 0}  # fmt: skip


def test_it_says_before_the_start_how_long_it_takes():
    measured = sum(score.seconds for id, score in scores.table().items())
    words = recording._announcement(Options(episodes=60, workers=2), 0, list(scores.table()))
    assert words.startswith(f"{len(scores.table())} logs to record; about {round(measured / 2)} minutes with 2")
    words = recording._announcement(Options(episodes=60), 3, ["CartPole-v1", "Own-v0"])
    assert "2 logs to record, 3 are there; about 1 minutes for 1 of them (the others were not measured)" in words
    assert recording._announcement(Options(), 0, ["Own-v0"]) == "1 logs to record"


def test_a_log_of_steps_is_estimated_by_its_timesteps():
    score = scores.table()["Pendulum-v1"]  # whose episodes have 200
    assert recording._episodes(Options(steps=2000), score.timesteps) == 10
    assert recording._episodes(Options(steps=2000, episodes=50), score.timesteps) == 50
    assert recording._episodes(Options(episodes=5), score.timesteps) == 5
    assert recording._episodes(Options(), score.timesteps) == 100


def test_what_is_not_installed_is_left_out_by_name(monkeypatch):
    class Missing(Suite):
        name, module, install = "missing", "no_such_simulator", "pip install no-such-simulator"
        experts = {"Missing-": lambda env: None}

    monkeypatch.setattr(recording, "all_suites", lambda: {"missing": Missing(), "classic": all_suites()["classic"]})
    said = Console(record=True, file=io.StringIO(), width=200)
    assert len(recording._tasks("all", said)) == 9
    assert "left out suite 'missing' needs the package no_such_simulator" in said.export_text()


@pytest.mark.process
def test_an_interrupt_ends_the_running_logs_and_keeps_those_that_are_whole(tmp_path):
    command = [sys.executable, "-m", "etl.record", "--suite", "classic", "--episodes", "1000000", "-o", str(tmp_path)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stderr is not None
    while "logs to record" not in process.stderr.readline():
        assert process.poll() is None
    time.sleep(3)  # a log is being written
    process.terminate()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM and "keeps the logs that are whole" in said
