"""OGBench's arm and mazes: seeds decide episodes, the chained oracles solve tasks, and their logs build."""

from __future__ import annotations

from importlib.util import find_spec
from itertools import product

import gymnasium
import numpy as np
import pytest

import simulators
from shards.reader import Dataset
from simulators.experts import policies
from simulators.experts.manipulation import solve_lights_out
from simulators.policy import NoisyPolicy
from simulators.rollout import rollout
from tests.conftest import run

INSTALLED = pytest.mark.skipif(find_spec("ogbench") is None, reason="pip install 'gato-open[ogbench]'")


def episode(env, seed: int, noise: float = 0.0):
    """Steps of one episode that the expert plays."""
    policy = NoisyPolicy(policies.load("expert", env, noise), simulators.action_spec(env), noise)
    return list(rollout(policy, [env], [seed], np.random.default_rng(seed)))


@INSTALLED
def test_tasks_are_the_single_tasks_of_the_arm_and_the_point():
    ids = simulators.suite_named("ogbench").tasks()
    assert len(ids) == 70 and "scene-singletask-task5-v0" in ids and "pointmaze-giant-singletask-task1-v0" in ids
    assert not any(id.startswith("visual-") or "singletask-v0" in id for id in ids)


@INSTALLED
def test_time_limits_and_owner_are_ogbenchs_own():
    simulators.suite_named("ogbench").register()
    own = {id: row for id, row in gymnasium.registry.items() if str(row.entry_point).startswith("ogbench.")}
    own = {id: row for id, row in own.items() if "powderworld" not in id and "online" not in id}
    assert len(own) > 250
    for id, row in own.items():
        suite = simulators.suite_of_id(id)
        assert (suite.name, suite.time_limit(id)) == ("ogbench", row.max_episode_steps), id


def test_no_dataset_of_d4rl_is_taken_for_ogbenchs():
    for id in ("antmaze-medium-play-v0", "antmaze-umaze-v2", "PointMaze_Large-v3", "cube-v0"):
        assert simulators.suite_of_id(id).name != "ogbench"


@INSTALLED
@pytest.mark.parametrize("id", ["cube-single-singletask-task1-v0", "pointmaze-teleport-singletask-task3-v0"])
def test_an_episode_is_a_function_of_its_seed(id):
    spec = simulators.environment_spec(id)
    one, other = simulators.make(spec), simulators.make(spec)
    first = [episode(one, seed, noise=0.3) for seed in (3, 4)]
    np.random.seed(0)  # ogbench draws from it
    again = episode(other, 4, noise=0.3)
    assert [step.reward for step in first[1]] == [step.reward for step in again]
    for step, same in zip(first[1], again):
        np.testing.assert_array_equal(step.observation["observation"], same.observation["observation"])
    assert not np.array_equal(first[0][0].observation["observation"], again[0].observation["observation"])
    assert again[-1].terminated and simulators.frame(one).shape == (300, 400, 3)


@INSTALLED
@pytest.mark.parametrize(
    "id, most",
    [
        ("cube-double-singletask-task4-v0", 250),  # swapped, so that one is put aside
        ("cube-triple-singletask-task5-v0", 300),  # a stack
        ("puzzle-4x4-singletask-task1-v0", 200),
        ("scene-singletask-task4-v0", 200),  # unlock, open, put into, shut, lock
    ],
)
def test_the_oracles_in_a_chain_solve(id, most):
    steps = episode(simulators.make(simulators.environment_spec(id)), 0)
    assert steps[-1].terminated and len(steps) < most
    assert all(np.abs(step.action).max() <= 1.0 for step in steps)


def test_lights_out_is_solved_by_the_fewest_presses():
    rng = np.random.default_rng(0)
    every = np.array(list(product((False, True), repeat=9))).reshape(-1, 3, 3)
    flips = np.stack([flipped(presses) for presses in every])
    for wrong in rng.random((5, 3, 3)) < 0.5:
        found = solve_lights_out(wrong)
        solutions = every[(flips == wrong).all(axis=(1, 2))]
        np.testing.assert_array_equal(flipped(found), wrong)
        assert found.sum() == min(presses.sum() for presses in solutions)
    wide = flipped(rng.random((4, 6)) < 0.5)
    np.testing.assert_array_equal(flipped(solve_lights_out(wide)), wide)
    corner = np.zeros((4, 4), bool)
    corner[0, 0] = True
    assert not solve_lights_out(corner).any(), "no presses flip this one alone"


def flipped(presses: np.ndarray) -> np.ndarray:
    """Buttons that change: each press flips itself and its neighbours."""
    changed = np.zeros_like(presses)
    for row, column in np.argwhere(presses):
        for x, y in ((row, column), (row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)):
            if 0 <= x < presses.shape[0] and 0 <= y < presses.shape[1]:
                changed[x, y] ^= True
    return changed


@INSTALLED
@pytest.mark.process
def test_logs_have_the_same_bytes_again_and_build(tmp_path):
    id = "pointmaze-medium-singletask-task3-v0"
    for name in ("one", "two"):
        run("etl.record", "-e", id, "--episodes", "3", "--seed", "5", "-o", tmp_path / name)
    (one,), (two,) = ([*(tmp_path / name).rglob("*.hdf5")] for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    run("etl.build", "--input", tmp_path / "one", "--output", tmp_path / "shards")
    (task,) = Dataset(tmp_path / "shards").manifest.tasks
    assert (task.spec.environment.suite, task.spec.environment.id, task.episodes) == ("ogbench", id, 3)
