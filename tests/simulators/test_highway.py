"""highway-env: seeds decide episodes, the drivers get through, and their logs build."""

from __future__ import annotations

from importlib.util import find_spec

import gymnasium
import numpy as np
import pytest

import simulators
from shards.reader import Dataset
from simulators.experts import policies
from simulators.rollout import rollout
from tests.conftest import run

pytestmark = pytest.mark.skipif(find_spec("highway_env") is None, reason="pip install 'gato-open[highway]'")


def episode(env, policy: str, seed: int):
    """Steps of one episode."""
    return list(rollout(policies.load(policy, env), [env], [seed], np.random.default_rng(seed)))


def test_ids_are_those_that_are_registered():
    suite = simulators.suite_named("highway")
    suite.register()
    own = [id for id, row in gymnasium.registry.items() if str(row.entry_point).startswith("highway_env.")]
    assert len(own) > 25 and {simulators.suite_of_id(id).name for id in own} == {"highway"}
    assert {"exit-v1", "intersection-v2"} < set(suite.tasks()) and "exit-v0" not in suite.tasks()


def test_an_episode_is_a_function_of_its_seed(monkeypatch):
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")  # as machines without a screen have it, and other suites set it
    spec = simulators.environment_spec("intersection-v2")
    one, other = simulators.make(spec), simulators.make(spec, render=True)
    first = [episode(one, "expert", seed) for seed in (3, 4)]
    again = episode(other, "expert", 4)
    assert [step.reward for step in first[1]] == [step.reward for step in again]
    for step, same in zip(first[1], again):
        np.testing.assert_array_equal(step.observation["observation"], same.observation["observation"])
    assert not np.array_equal(first[0][0].observation["observation"], again[0].observation["observation"])
    assert again[0].observation["observation"].shape == (15, 7)
    picture = simulators.frame(other)
    assert picture.ndim == 3 and len(np.unique(picture)) > 2


def test_the_driver_crosses_where_random_play_crashes():
    env = simulators.make(simulators.environment_spec("intersection-v2"))
    played = {policy: [episode(env, policy, seed) for seed in (0, 1, 2)] for policy in ("expert", "random")}
    returns = {policy: np.mean([sum(step.reward for step in steps) for steps in played[policy]]) for policy in played}
    assert returns["expert"] > returns["random"] + 2
    assert min(steps[-1].reward for steps in played["expert"]) >= 0, "no crash"


@pytest.mark.process
def test_logs_are_recorded_and_built(tmp_path):
    id = "two-way-v0"
    for name in ("one", "two"):
        run("etl.record", "-e", id, "--episodes", "2", "--seed", "5", "-o", tmp_path / name)
    one, two = ({path.relative_to(tmp_path / name): path.read_bytes() for path in (tmp_path / name).rglob("*.*")
                 if path.is_file()} for name in ("one", "two"))  # fmt: skip
    assert one == two and one
    run("etl.build", "--input", tmp_path / "one", "--output", tmp_path / "shards")
    (task,) = Dataset(tmp_path / "shards").manifest.tasks
    assert (task.spec.environment.suite, task.spec.environment.id, task.episodes) == ("highway", id, 2)
    assert [(field.key, field.shape) for field in task.spec.observation] == [("observation", (3, 3, 5))]
