"""MiniGrid's own problems and their planner: it solves them, with noise too, and its logs build as BabyAI's do."""

from __future__ import annotations

import numpy as np
import pytest

import simulators
from shards.reader import Dataset
from simulators.experts import PolicyError, policies
from simulators.policy import NoisyPolicy
from simulators.rollout import rollout
from tests.conftest import run


def episodes(id: str, seeds, noise: float = 0.0):
    """Steps of each episode that the expert plays."""
    env = simulators.make(simulators.environment_spec(id))
    expert = policies.load("expert", env, noise)
    policy = NoisyPolicy(expert, simulators.action_spec(env), noise)
    return [list(rollout(policy, [env], [seed], np.random.default_rng(seed))) for seed in seeds]


@pytest.mark.parametrize(
    "name",
    [
        "BlockedUnlockPickup-v0",
        "Dynamic-Obstacles-6x6-v0",
        "Fetch-8x8-N3-v0",
        "GoToDoor-5x5-v0",
        "GoToObject-6x6-N2-v0",
        "KeyCorridorS3R3-v0",
        "LavaCrossingS9N3-v0",
        "MemoryS13Random-v0",
        "ObstructedMaze-1Dlhb-v0",
        "ObstructedMaze-1Q-v1",
        "PutNear-8x8-N3-v0",
        "RedBlueDoors-6x6-v0",
        "Unlock-v0",
    ],
)
def test_the_planner_solves(name):
    for steps in episodes(f"MiniGrid-{name}", range(4)):
        assert steps[-1].reward > 0 and steps[-1].error is None


def test_a_way_without_obstacles_is_a_shortest_one():
    (steps,) = episodes("MiniGrid-Empty-8x8-v0", [0])
    assert len(steps) == 5 + 1 + 5


def test_the_planner_plays_with_noise():
    played = episodes("MiniGrid-KeyCorridorS3R2-v0", range(6), noise=0.2)
    assert all(steps[-1].reward > 0 for steps in played)
    assert len({len(steps) for steps in played}) > 1


def test_the_planner_looks_at_what_it_is_to_remember():
    """From some starts the thing in the first room is out of sight; no episode ends before it was in sight."""
    env = simulators.make(simulators.environment_spec("MiniGrid-MemoryS17Random-v0"))
    level, expert = env.unwrapped, policies.load("expert", env)
    sights = []
    for seed in range(6):
        seen: list[bool] = []

        def look(row, env, seen=seen):
            seen.append(level.agent_sees(1, level.height // 2 - 1))

        *_, last = rollout(expert, [env], [seed], np.random.default_rng(0), before=look)
        assert last.reward > 0 and any(seen)
        sights.append(seen[0])
    assert not all(sights)


def test_what_asks_for_nothing_has_no_expert():
    env = simulators.make(simulators.environment_spec("MiniGrid-Playground-v0"))
    with pytest.raises(PolicyError, match="no expert of MiniGrid-Playground-v0"):
        policies.load("expert", env)


def test_logs_are_recognised_and_built(tmp_path):
    run("etl.record", "-e", "MiniGrid-DoorKey-5x5-v0", "--episodes", "3", "-o", tmp_path / "logs")
    run("etl.build", "--input", tmp_path / "logs", "--output", tmp_path / "shards")
    (task,) = Dataset(tmp_path / "shards").manifest.tasks
    assert (task.spec.environment.suite, task.episodes) == ("gridworlds", 3)
    assert {spec.key for spec in task.spec.observation} == {"mission", "image", "direction"}
