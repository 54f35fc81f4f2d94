"""What is played has the space that was logged: choices per dimension, several pictures, keys in one order."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from gymnasium import spaces

from eval.agents import AgentConfig, make_agent
from eval.baselines import decision_transformer as dt
from eval.baselines import trajectory_transformer as tt
from schemas.layout import ACTION
from schemas.task import ActionSpec, FieldSpec, TaskSpec
from schemas.vocabulary import DISJOINT
from shards.stream import Stream, StreamConfig
from shards.views import trajectories
from simulators.policy import EpisodeRng, RandomPolicy
from tests.etl.memory import build, episode_of, values_of
from tests.etl.test_spaces import ROBOT
from trainer.model import Gato, ModelConfig
from trainer.model.export import ExportInfo, TrainingInfo

SMALL = ModelConfig(blocks=2, heads=2, width=32, feed_forward=64, head_size=16, patch_channels=16)
VECTOR = FieldSpec("x", "continuous", (2,))
DIALS = TaskSpec("dials", "memory", (VECTOR,), ActionSpec.discrete((3, 7), start=(0, -2)))
# by level and not by character: "a/b" < "a-b", though "-" < "/"
NESTED = tuple(FieldSpec(key, "continuous", (n + 1,)) for n, key in enumerate(("b", "a-b", "a/b", "a/a", "a0")))


def agent_of(task, length=200, **config):
    vocabulary = DISJOINT
    info = ExportInfo(
        "gato.model", 1, SMALL, vocabulary, vocabulary.fingerprint, length, 0, (task,), {}, TrainingInfo()
    )
    model = Gato(SMALL, vocabulary).initialise(1).eval()
    model.tokens.weight.data.mul_(20)  # far from uniform, also over ids that the space does not have
    return make_agent(model, info, task, AgentConfig(**config))


@pytest.mark.parametrize("decoding", ["sample", "greedy"])
@pytest.mark.parametrize("window", ["rolling", "exact"])
def test_each_dimension_has_its_own_choices(decoding, window):
    allowed, rng = spaces.MultiDiscrete([3, 7], start=[0, -2]), np.random.default_rng(0)
    agent, seen = agent_of(DIALS, decoding=decoding, window=window, temperature=10.0), set()
    agent.reset(8)
    for _ in range(12):
        actions = agent.act({"x": values_of(VECTOR, 8, rng)}, np.zeros(8), np.ones(8, bool), rng)
        assert actions.shape == (8, 2) and all(allowed.contains(action) for action in actions)
        seen |= set(map(tuple, actions.tolist()))
    if decoding == "sample":  # the larger dimension's ids are reached, beyond what the smaller one has
        assert {d for _, d in seen} > {0, 1} and max(d for _, d in seen) > 0
    policy = RandomPolicy(DIALS.action)
    drawn = policy.act({}, np.zeros(2000), np.ones(2000, bool), np.random.default_rng(0))
    assert all(allowed.contains(action) for action in drawn)
    assert len(np.unique(drawn, axis=0)) == 21


def test_the_agent_embeds_pictures_as_training_does(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    episodes = [episode_of(ROBOT, 4, rng)]
    dataset = build(tmp_path / "robot", ROBOT, episodes, monkeypatch)
    agent = agent_of(ROBOT)
    length = 4 * agent.layout.length
    batch = Stream([tmp_path / "robot"], StreamConfig(sequence_length=length), seed=0).evaluation_batch(
        0, np.array([0])
    )
    assert batch.patches.shape == (4 * 36, 16, 16, 3)
    with torch.no_grad():
        trained = agent.model.embed(batch.to("cpu"))[0]
        encoded = agent.tokenizer.encode_observation(episodes[0].observation)
        assert np.array_equal(encoded.patches, dataset.patches(0))
        played = agent._embed(agent._ids(encoded.tokens), encoded.patches)
    observed = (torch.from_numpy(batch.roles[0]) != ACTION).view(4, -1)
    torch.testing.assert_close(played.flatten(0, 1), trained[observed.flatten()])


def test_pictures_of_two_tasks_share_a_batch(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    grey = TaskSpec("grey", "memory", (FieldSpec("eye", "image", (16, 32, 1)),), ActionSpec.discrete(2))
    for task in (ROBOT, grey):
        build(tmp_path / task.name, task, [episode_of(task, 9, rng, n) for n in range(3)], monkeypatch)
    stream = Stream([tmp_path / "robot", tmp_path / "grey"], StreamConfig(sequence_length=100), seed=0)
    batch = stream.batch(0, 8)
    assert set(batch.tasks.tolist()) == {0, 1} and batch.patches.shape[3] == 3
    model = Gato(SMALL, DISJOINT).initialise(0)
    assert torch.isfinite(model(batch.to("cpu"))).all()


def test_nested_keys_are_in_one_order_for_all_models(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    task = TaskSpec("nested", "memory", NESTED, ActionSpec.continuous((-1, 0), (1, 2)))
    episodes = [episode_of(task, 30, rng, n) for n in range(3)]
    dataset = build(tmp_path / "nested", task, episodes, monkeypatch)
    order = ("a/a", "a/b", "a-b", "a0", "b")
    logged = np.concatenate([episodes[0].observation[key] for key in order], axis=1)
    assert [spec.key for spec in agent_of(task).tokenizer.fields] == list(order)
    played = trajectories(dataset, 0)
    assert np.array_equal(played[0].observation, logged), "what the baselines are trained on"
    row = {key: value[:4] for key, value in episodes[0].observation.items()}
    backwards = dict(reversed(row.items()))
    decision = dt.load(dt.train(played, task, dt.Config(context=2, layers=1, width=8, steps=1), 0, tmp_path / "dt"))
    assert np.array_equal(decision._state(backwards), decision.scaling.state(logged[:4]))
    small = replace(tt.Config.quick(task), layers=1, width=8, steps=1, horizon=1, beams=1, expand=1)
    planned = tt.load(tt.train(played, task, small, 0, tmp_path / "tt"))
    assert np.array_equal(planned._values(backwards), logged[:4])
    planned.reset(4)
    actions = planned.act(backwards, np.zeros(4), np.ones(4, bool), EpisodeRng.seeded(0, [0, 1, 2, 3]))
    assert (actions >= [-1, 0]).all() and (actions <= [1, 2]).all()
