"""The tables beside the suites say what the packages and D4RL say."""

from __future__ import annotations

import numpy as np
import pytest

import simulators
from etl.sources import _catalogue
from simulators.suites import mujoco


@pytest.mark.parametrize("id", ["Hopper-v4", "Humanoid-v5", "HumanoidStandup-v5", "InvertedPendulum-v5", "Pusher-v5"])
def test_action_ranges_are_the_simulators(id):
    env = simulators.make(simulators.environment_spec(id))
    spec = simulators.action_spec(env)
    low, high = simulators.suite_of_id(id).action_range(id)
    assert set(spec.low) == {low} and set(spec.high) == {high}
    np.testing.assert_array_equal(env.action_space.low, np.full(spec.size, low, np.float32))


def test_references_are_d4rls():
    bodies = {}
    for dataset in _catalogue.d4rl_datasets().values():
        if dataset.environment and dataset.score:
            bodies[dataset.environment.id.rsplit("-v", 1)[0]] = dataset.score
    assert set(mujoco._references()) == set(bodies)
    assert simulators.reference(simulators.environment("Hopper-v5")) == bodies["Hopper"]
    for body, score in bodies.items():
        assert mujoco.body_reference(f"{body}-v9") == score


def test_every_id_belongs_to_one_suite():
    for id, row in mujoco.environments().items():
        suite = simulators.suite_of_id(id)
        assert (suite.name, suite.time_limit(id)) == (row["suite"], row["max_episode_steps"])
    others = {"ALE/Pong-v5": "atari", "BabyAI-GoToLocal-v0": "minigrid", "gym/Hopper-v2": "gym"}
    others |= {"MiniGrid-Empty-5x5-v0": "gridworlds"}
    others |= {"CartPole-v1": "classic", "LunarLander-v3": "box2d", "Meta-World/reach-v3": "metaworld"}
    others |= {"scene-singletask-task4-v0": "ogbench", "antmaze-medium-play-v0": "gymnasium", "u-turn-v1": "highway"}
    others |= {"dm_control/cheetah-run-v0": "dm_control"}
    others |= {"Blackjack-v1": "gymnasium", "module:Hopper-v4": "gymnasium", "Hopper-v99": "gymnasium"}
    assert {id: simulators.suite_of_id(id).name for id in others} == others
