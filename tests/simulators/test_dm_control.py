"""The DeepMind Control Suite to be played: spaces, seeds, ends, pictures, and logs of random play."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pytest

import simulators
from shards.reader import Dataset
from simulators.experts import PolicyError, policies
from simulators.rollout import rollout
from tests.conftest import run

pytestmark = pytest.mark.skipif(find_spec("dm_control") is None, reason="pip install 'gato-open[dm-control]'")


def test_fields_and_actions_are_as_rl_unplugged_logs_them():
    """Its logs hold one vector per key: a number is a vector of one, and a matrix is flattened."""
    env = simulators.make(simulators.environment_spec("dm_control/manipulator-bring_ball-v0"))
    assert {field.key: field.shape for field in simulators.observation_fields(env)}["arm_pos"] == (16,)
    env = simulators.make(simulators.environment_spec("dm_control/humanoid-walk-v0"))
    shapes = {field.key: field.shape for field in simulators.observation_fields(env)}
    assert shapes["head_height"] == (1,) and shapes["joint_angles"] == (21,) and len(shapes) == 6
    action = simulators.action_spec(env)
    assert (action.size, set(action.low), set(action.high)) == (21, {-1.0}, {1.0})


def test_an_episode_is_a_function_of_its_seed():
    spec = simulators.environment_spec("dm_control/point_mass-hard-v0")  # its body too is drawn
    one, other = simulators.make(spec), simulators.make(spec)

    def played(env, seed):
        steps = rollout(policies.load("random", env), [env], [seed], np.random.default_rng(0), step_limit=30)
        return np.stack([step.next_observation["position"] for step in steps])

    first, second = played(one, 3), played(one, 4)
    np.testing.assert_array_equal(second, played(other, 4))
    assert not np.array_equal(first, second)
    assert simulators.frame(one).shape == (300, 400, 3)


def test_an_episode_is_cut_after_a_thousand_timesteps():
    spec = simulators.environment_spec("dm_control/cartpole-swingup-v0")
    env = simulators.make(spec)
    steps = list(rollout(policies.load("random", env), [env], [0], np.random.default_rng(0)))
    assert len(steps) == 1000 == simulators.suite_of_id(spec.id).time_limit(spec.id)
    assert steps[-1].truncated and not steps[-1].terminated
    assert simulators.settings(spec)["max_episode_steps"] == 1000
    assert all(0.0 <= step.reward <= 1.0 for step in steps)


def test_it_has_no_expert_and_says_so():
    env = simulators.make(simulators.environment_spec("dm_control/cartpole-swingup-v0"))
    with pytest.raises(PolicyError, match="no expert of dm_control/cartpole-swingup-v0"):
        policies.load("expert", env)
    assert simulators.suite_named("dm_control").tasks() == ()
    assert simulators.suite_of_id("dm_control/lqr-lqr_2_1-v0").time_limit("dm_control/lqr-lqr_2_1-v0") is None


@pytest.mark.process
def test_logs_of_random_play_build(tmp_path):
    id = "dm_control/cartpole-swingup-v0"
    run("etl.record", "-e", id, "--policy", "random", "--episodes", "1", "-o", tmp_path / "logs")
    run("etl.build", "--input", tmp_path / "logs", "--output", tmp_path / "shards")
    (task,) = Dataset(tmp_path / "shards").manifest.tasks
    assert (task.spec.environment.suite, task.spec.environment.id) == ("dm_control", id)
    assert {field.key for field in task.spec.observation} == {"position", "velocity"}
