"""The few-shot figure: which rows it reads, what it refuses, what it shows."""

from __future__ import annotations

import json

import pytest

from eval.figures.fewshot import chart, points, table
from eval.rows import save_rows
from schemas.result import ResultError, from_table
from tests.commands import run
from tests.eval.test_scores import row
from tests.eval.test_scores import table as as_table

ARM, LEVEL = ("arm", "Meta-World/reach-v3"), ("level", "BabyAI-GoTo-v0")


def played(folder, task, scores, model="gato", zero_shot=False):
    name, id = task
    protocol = json.dumps({"zero_shot": zero_shot})
    rows = [
        row(model, score, dataset=name, environment=id, episode=n, score=score, protocol=protocol)
        for n, score in enumerate(scores)
    ]
    save_rows(folder / "rows.parquet", from_table(as_table(rows)))


@pytest.fixture
def folder(tmp_path):
    played(tmp_path / "trained" / "0", ARM, (10.0, 30.0), zero_shot=True)
    played(tmp_path / "trained" / "10" / "arm", ARM, (50.0,))
    played(tmp_path / "trained" / "10" / "level", LEVEL, (100.0, 0.0))
    played(tmp_path / "scratch" / "10" / "arm", ARM, (40.0,))
    played(tmp_path / "trained" / "0" / "random", ARM, (1.0,), model="random")
    return tmp_path


def test_a_point_is_the_mean_of_a_tasks_episodes_at_its_number_of_demonstrations(folder):
    found = {(one.task, one.start, one.demonstrations): one.score for one in points(folder)}
    assert found == {
        ("arm", "trained", 0): 20.0, ("arm", "trained", 10): 50.0, ("arm", "scratch", 10): 40.0,
        ("arm", "random", 0): 1.0, ("level", "trained", 10): 50.0,
    }  # fmt: skip


def test_the_table_has_every_task_and_each_domains_mean(folder):
    body = table(points(folder))
    assert body.header == ("Domain", "Task", "random", "scratch, 10", "trained, 0", "trained, 10")
    assert body.rows == [
        ("metaworld", "arm", "1.0", "40.0", "20.0", "50.0"),
        ("metaworld", "mean of its tasks", "1.0", "40.0", "20.0", "50.0"),
        ("minigrid", "level", "—", "—", "—", "50.0"),
        ("minigrid", "mean of its tasks", "—", "—", "—", "50.0"),
    ]


@pytest.mark.process
def test_the_command_writes_table_and_picture_and_twice_the_same(folder):
    done = run("eval.figures.fewshot", folder)
    first = (folder / "few-shot.svg").read_bytes()
    assert (folder / "few-shot.md").read_text() in done.stdout and b"<svg" in first
    assert chart(points(folder)).encode() == first


def test_a_model_that_was_trained_on_the_task_is_no_point_at_zero(folder):
    played(folder / "trained" / "0", ARM, (10.0,), zero_shot=False)
    with pytest.raises(ResultError, match="trained on 'arm'; train it with --data.stream.excluded-tasks arm"):
        points(folder)


def test_what_is_not_there_is_named(folder, tmp_path):
    played(tmp_path / "trained" / "ten", ARM, (10.0,))
    with pytest.raises(ResultError, match="'ten' must be the number of demonstrations"):
        points(tmp_path)
    with pytest.raises(ResultError, match="no START/N/rows.parquet"):
        points(tmp_path / "empty")
