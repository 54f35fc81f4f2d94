"""What a run of many tasks reports: short lines, one value per domain."""

from __future__ import annotations

from dataclasses import replace

import pytest

from schemas.metrics import NAMED_TASKS
from schemas.task import EnvironmentSpec
from shards.loader import Loader
from shards.stream import Stream, StreamConfig
from tests.shards.made import Task, make
from trainer.heldout import mean_losses
from trainer.inputs import open_streams
from trainer.metrics import tasks_in_words, words
from trainer.recipes import RECIPES

CONFIG = StreamConfig(sequence_length=16)


def spec(name, suite=""):
    return replace(Task(name, (5,)).spec, environment=EnvironmentSpec(suite, "Id-v0") if suite else None)


def test_held_out_losses_are_averaged_by_domain():
    losses = {"held_out/a/loss": 1.0, "held_out/b/loss": 3.0, "held_out/c/loss": 5.0, "held_out/c/accuracy": 9.0}
    found = mean_losses(losses, [spec("a", "arms"), spec("b", "arms"), spec("c")])
    assert found == {"domains/arms/loss": 2.0, "domains/made/loss": 5.0, "held_out/loss": 3.0}
    assert mean_losses(losses, [spec("a", "arms"), spec("b", "arms")]) == {"held_out/loss": 2.0}


def test_the_line_of_an_evaluated_step_has_one_value_per_domain():
    metrics = {"train/loss": 1.0, "train/tokens_per_second": 1.0, "data/wait_share": 0.0}
    by_domain = {"domains/arms/loss": 2.0, "domains/made/loss": 5.0}
    tasks = {f"held_out/task-{n}/loss": 1.0 for n in range(200)}
    assert "held-out 3.0000 (arms 2.00, made 5.00)  " in words(metrics | by_domain | tasks, 3.0)
    assert "held-out 3.0000  " in words(metrics, 3.0)


@pytest.mark.parametrize("sequences", [0, 2])
def test_without_sequences_to_evaluate_there_is_no_evaluation(tmp_path, sequences):
    folder = make(tmp_path / "control", [Task("body", (40, 30), held_out=(1,))])
    config = RECIPES["tiny-tokens"]
    config = replace(config, data=replace(config.data, folders=(str(folder),), stream=CONFIG))
    _, held_out = open_streams(replace(config, run=replace(config.run, evaluate_sequences=sequences)))
    assert (held_out is not None) == (sequences > 0)


@pytest.mark.parametrize("count", [NAMED_TASKS, NAMED_TASKS + 1])
def test_many_tasks_are_counted_and_few_are_named(tmp_path, count):
    folder = make(tmp_path / "control", [Task(f"body-{n:02}", (40,)) for n in range(count)])
    stream = Stream([folder], CONFIG, 0)
    loader = Loader(stream, 0, 4, 4, threads=0)
    next(loader)
    metrics = {name: value for name, value in loader.metrics().items() if name.startswith(("data/seq", "data/epochs"))}
    if count <= NAMED_TASKS:
        assert tasks_in_words(stream) == f"tasks: {', '.join(stream.tasks)}" and len(metrics) == 2 * count
    else:
        assert tasks_in_words(stream) == f"{count} tasks: made {count}"
        assert metrics == {"data/sequences/made": 4, "data/epochs/made": 4 / sum(t.windows for t in stream.timelines)}
