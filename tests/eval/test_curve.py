"""A run's returns against training: which episodes a line counts, and when it is played again."""

import json
import shutil

import pytest

from eval.environments import Played
from schemas.dataset import DatasetError
from tests.conftest import run
from tests.eval.test_compare import exports  # noqa: F401
from trainer.model.export import ExportInfo

NAME = "returns/hopper-random-v4"


@pytest.fixture
def curve(exports, hopper, tmp_path, monkeypatch):  # noqa: F811
    """Plays the first export: (what the command did, its lines)."""
    folder = shutil.copytree(exports[0].parent, tmp_path / "run")

    def command(*episodes, data=hopper):
        monkeypatch.setattr("eval.curve.play", lambda *arguments: list(episodes))
        done, path = run("eval.curve", folder, "--datasets", data, check=False), folder / "returns.jsonl"
        return done, [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    return command


GOOD = [Played(1000, 4.0, 9, "terminated"), Played(1001, 6.0, 9, "step limit")]
FAILED = Played(1002, 90.0, 9, "error", "simulator diverged")


def test_failed_episodes_are_left_out_and_played_again(curve):
    done, lines = curve(*GOOD, FAILED)
    assert done.returncode == 1 and "failed episodes, left out: 1; hopper-random-v4: simulator" in done.stderr
    assert lines[0][f"{NAME}/return"] == 5.0 and lines[0]["failed"] == 1
    done, lines = curve(FAILED)
    assert done.returncode == 1 and "no episode was finished" in done.stdout and f"{NAME}/return" not in lines[0]
    done, lines = curve(*GOOD)
    assert done.returncode == 0 and len(lines) == 1 and "failed" not in lines[0]
    assert curve(*GOOD)[0].stdout == "" and lines[0][f"{NAME}/share_of_behaviour"] > 0


def test_a_line_of_other_data_or_versions_is_replaced(curve, logs, tmp_path, monkeypatch):
    run("etl.build", "--source", "d4rl", "--input", logs / "d4rl", "--output", tmp_path / "hopper")
    assert curve(*GOOD, data=tmp_path / "hopper")[0].stdout.startswith("step 0: ")
    assert curve(*GOOD, data=tmp_path / "hopper")[0].stdout == ""
    done, lines = curve(*GOOD)
    assert done.stdout.startswith("step 0: ") and len(lines) == 1
    monkeypatch.setattr("simulators.versions", lambda: {"gymnasium": "0"})
    done, lines = curve(*GOOD)
    assert done.stdout.startswith("step 0: ") and len(lines) == 1


def test_there_is_no_share_of_clipped_returns(curve, monkeypatch):
    monkeypatch.setattr("eval.jobs.clips_rewards", lambda environment, source: True)
    assert f"{NAME}/share_of_behaviour" not in curve(*GOOD)[1][0]


def test_data_whose_texts_mean_something_else_are_refused(curve, monkeypatch):
    def refuse(info, manifest, task, data, export):
        raise DatasetError(f"{task.name} of another text model")

    monkeypatch.setattr(ExportInfo, "require_data", refuse)
    done, lines = curve(*GOOD)
    assert done.returncode == 1 and "error: hopper-random-v4 of another text model" in done.stderr and not lines
