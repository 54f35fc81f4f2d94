"""Weights by task and by domain, and the stream that mixes by them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from schemas.dataset import DatasetError
from schemas.task import EnvironmentSpec
from shards.mixture import task_weights
from shards.stream import Stream, StreamConfig
from tests.shards.made import Task, make

ARMS = [replace(Task(f"arm-{n}", (5,)).spec, environment=EnvironmentSpec("arms", f"Arm{n}-v0")) for n in range(4)]
MAZE = replace(Task("maze", (5,)).spec, environment=EnvironmentSpec("mazes", "Maze-v0"))
BOOK = Task("book", (5,), action=0, text=4).spec


def test_without_domains_every_task_counts_by_itself():
    assert task_weights([*ARMS, MAZE], {"maze": 3.0}, {}) == [1, 1, 1, 1, 3]


def test_a_domain_has_its_share_whatever_its_number_of_tasks():
    assert task_weights([*ARMS, MAZE, BOOK], {}, {"arms": 2.0}) == [0.5, 0.5, 0.5, 0.5, 1, 1]


def test_tasks_divide_their_domain_by_their_own_weights():
    weights = task_weights([*ARMS, MAZE], {"arm-0": 3.0, "arm-1": 0.0}, {"mazes": 1.0})
    assert np.allclose(weights, [0.6, 0, 0.2, 0.2, 1])


def test_a_domain_of_tasks_without_weight_takes_no_part():
    assert task_weights([*ARMS, MAZE], {"maze": 0.0}, {"arms": 1.0})[-1] == 0


def test_the_stream_mixes_by_domain_and_stays_a_function_of_i(tmp_path):
    folder = make(tmp_path / "control", [Task(f"body-{n}", (40, 30), (1,)) for n in range(3)])
    config = StreamConfig(sequence_length=16, domains={"made": 5.0})
    alone, plain = Stream([folder], config, 0), Stream([folder], replace(config, domains={}), 0)
    assert alone.fingerprint != plain.fingerprint
    assert (alone.batch(0, 8).tokens == plain.batch(0, 8).tokens).all(), "one domain alone changes nothing"
    assert (alone.batch(5, 3).tokens == alone.batch(0, 8).tokens[5:]).all()
    assert Stream([folder], config, 0, held_out=True).tasks == alone.tasks


def test_an_unknown_domain_is_refused_by_name(tmp_path):
    folder = make(tmp_path / "control", [Task("body", (40,))])
    with pytest.raises(DatasetError, match="unknown domain 'metaworld'; domains: made"):
        Stream([folder], StreamConfig(sequence_length=16, domains={"metaworld": 1.0}), 0)
