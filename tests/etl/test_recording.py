"""Many logs by one command: what is recorded, what is kept, and that bytes do not depend on workers."""

from __future__ import annotations

import json
import shutil

import pytest

from tests.commands import run


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


@pytest.mark.parametrize(
    "options, words",
    [
        (["--suite", "clasic"], "unknown suite 'clasic'"),
        (["--suite", "gymnasium"], "no expert is shipped"),
        (["--suite", "classic", "-e", "CartPole-v1"], "give one of them"),
        (["--suite", "classic", "--episodes", "0"], "--episodes must be at least 1"),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path, options, words):
    done = run("etl.record", *options, "-o", tmp_path / "logs", check=False)
    assert done.returncode == 1 and words in done.stderr
    assert not (tmp_path / "logs").exists()
