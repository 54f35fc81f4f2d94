"""Suites with an expert each: what they register, that seeds decide episodes, that experts play well."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest

import simulators
from eval.scores import scored
from schemas.episode import TaskSpec
from simulators import scores
from simulators.experts import policies
from simulators.policy import EpisodeRng, OnePlayer
from simulators.registry import all_suites
from tests.conftest import run


def played(env, policy, seed: int) -> tuple[np.ndarray, float, bool]:
    """Observations of one episode, its return, and whether the simulator called it a success."""
    observation, _ = env.reset(seed=seed)
    policy.reset(1)
    seen, total, success = [observation["observation"]], 0.0, False
    while True:
        batch = {key: value[None] for key, value in observation.items()}
        action = policy.act(batch, np.zeros(1), np.ones(1, bool), np.random.default_rng(0))[0]
        observation, reward, terminated, truncated, info = env.step(action)
        seen.append(observation["observation"])
        total, success = total + float(reward), success or bool(info.get("success"))
        if terminated or truncated:
            return np.stack(seen), total, success


def test_tasks_are_the_newest_versions_that_an_expert_plays():
    tasks = {suite.name: suite.tasks() for suite in all_suites().values() if find_spec(suite.module)}
    assert len(tasks["metaworld"]) == 50 and "Meta-World/reach-v3" in tasks["metaworld"]
    assert "Taxi-v4" in tasks["classic"] and "Taxi-v3" not in tasks["classic"]
    assert tasks["mujoco"] == ("Hopper-v5", "InvertedDoublePendulum-v5", "InvertedPendulum-v5", "Reacher-v5")
    assert tasks["gymnasium"] == ()
    assert len(tasks["minigrid"]) == 90 and not any("Carrying" in id for id in tasks["minigrid"])
    assert len(tasks["gridworlds"]) == 70 and not any("WFC" in id for id in tasks["gridworlds"])
    assert {"FetchPush-v4", "PointMaze_UMaze-v3"} < set(tasks["robotics"]) and "FetchPush-v1" not in tasks["robotics"]
    assert sum(map(len, tasks.values())) >= 150
    for name, ids in tasks.items():
        assert {simulators.suite_of_id(id).name for id in ids} <= {name}


def test_a_meta_world_episode_is_a_function_of_its_seed():
    spec = simulators.environment_spec("Meta-World/drawer-open-v3")
    one, other = simulators.make(spec), simulators.make(spec)
    first = [played(one, policies.load("expert", one), seed) for seed in (3, 4)]
    again = played(other, policies.load("expert", other), 4)
    np.testing.assert_array_equal(first[1][0], again[0])
    assert first[0][2] and first[1][2] and not np.array_equal(first[0][0], first[1][0])
    assert first[0][0].shape == (201, 39) and first[0][0].dtype == np.float32
    assert simulators.suite_of_id(spec.id).time_limit(spec.id) == 200
    assert simulators.frame(one).ndim == 3


def test_scripted_actions_stay_in_the_range_that_the_simulator_uses():
    env = simulators.make(simulators.environment_spec("Meta-World/handle-pull-side-v3"))
    expert = policies.load("expert", env)
    observation, _ = env.reset(seed=0)
    expert.reset(1)
    batch = {key: value[None] for key, value in observation.items()}
    action = expert.act(batch, np.zeros(1), np.ones(1, bool), np.random.default_rng(0))
    assert action.dtype == np.float32 and np.abs(action).max() == 1.0


@pytest.mark.parametrize(
    "id, least",
    [
        ("CartPole-v1", 500),
        ("MountainCarContinuous-v0", 90),
        ("CliffWalking-v1", -13),
        ("LunarLander-v3", 100),
        ("InvertedPendulum-v5", 1000),
        ("InvertedDoublePendulum-v5", 9300),
        ("Reacher-v5", -8),
        ("FetchReach-v4", -5),
        ("FetchPush-v4", -35),
        ("FetchPickAndPlace-v4", -25),
    ],
)
def test_experts_play_well(id, least):
    env = simulators.make(simulators.environment_spec(id))
    assert played(env, policies.load("expert", env), 0)[1] >= least


def test_scores_are_of_the_tasks_and_normalise_them():
    for id, row in scores.table().items():
        assert row.expert > row.random, id
        suite = simulators.suite_of_id(id)
        assert set(row.versions) == set(suite.distributions)
    reference = simulators.reference(simulators.environment("CartPole-v1"))
    assert (reference.kind, reference.high) == ("expert", 500)
    assert simulators.reference(simulators.environment("Hopper-v5")).kind == "d4rl"


def test_a_player_draws_numbers_of_any_kind_wherever_it_plays():
    class Shuffling:
        algorithm = "shuffling"

        def reset(self) -> None:
            pass

        def act(self, observation, rng):
            return np.array([rng.choice(3, p=[0.5, 0.25, 0.25]), rng.integers(7), rng.normal()])

    batch = {"observation": np.zeros((1, 2))}, np.zeros(1), np.ones(1, bool)
    drawn = [
        OnePlayer(Shuffling()).act(*batch, rng) for rng in (EpisodeRng.seeded(0, [4]), np.random.default_rng((0, 4)))
    ]
    np.testing.assert_array_equal(*drawn)


@pytest.mark.process
def test_scores_of_nothing_are_refused():
    for option, value, words in (
        ("--episodes", "0", "--episodes 0: must be from 1"),
        ("--workers", "0", "--workers 0: must be from 1"),
        ("--suite", "atarii", "atarii"),
    ):
        done = run("simulators.scores", option, value, check=False)
        assert done.returncode == 1 and words in done.stderr and "Traceback" not in done.stderr


DRAWN = """
import simulators
env = simulators.make(simulators.environment_spec("CartPole-v1"), seed=0, render=True)
assert simulators.frame(env).shape == (400, 600, 3)
"""


@pytest.mark.process
def test_pictures_without_a_screen_are_drawn_without_a_complaint():
    names = ("DISPLAY", "WAYLAND_DISPLAY", "XDG_RUNTIME_DIR", "SDL_VIDEODRIVER")
    bare = {name: value for name, value in os.environ.items() if name not in names}
    done = subprocess.run([sys.executable, "-c", DRAWN], env=bare, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_reference_is_of_the_arguments_that_were_measured():
    for id, same, other in (
        ("FetchReach-v4", {"reward_type": "sparse"}, {"reward_type": "dense"}),
        ("PointMaze_UMaze-v3", {"continuing_task": True}, {"continuing_task": False}),
        ("Pendulum-v1", {"g": 10.0, "max_episode_steps": 200}, {"g": 9.81}),
        ("Hopper-v5", {"terminate_when_unhealthy": True}, {"terminate_when_unhealthy": False}),
        ("ALE/Pong-v5", {"obs_type": "rgb", "frameskip": 4}, {"mode": 1}),
    ):
        plain, others = simulators.environment(id), [simulators.environment(id, kwargs) for kwargs in (same, other)]
        found = simulators.reference(plain)
        assert found is not None and [simulators.reference(one) for one in others] == [found, None], id
        task = TaskSpec("t", "d4rl", (), None, others[1])
        assert np.isnan(scored(5.0, task)[0]) and scored(5.0, replace(task, environment=others[0]))[1] == found.kind


def test_a_recorded_environments_arguments_are_those_that_were_measured():
    """Logs in Minari's format note all that gymnasium was given."""
    for id in ("PointMaze_UMaze-v3", "FetchReach-v4"):
        plain = simulators.environment(id)
        with closing(simulators.make(plain)) as env:
            kwargs = json.loads(env.spec.to_json())["kwargs"]
        assert kwargs and simulators.reference(simulators.environment(id, kwargs)) == simulators.reference(plain)
