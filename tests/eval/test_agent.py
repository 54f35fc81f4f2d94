"""The agent's cache against recomputing the window, and batches against single environments."""

from dataclasses import replace

import numpy as np
import pytest

from eval.agent import AgentConfig, GatoAgent, demonstration
from shards.reader import Dataset
from trainer.checkpoint import ExportInfo
from trainer.model import Gato, ModelConfig

SMALL = ModelConfig(blocks=2, heads=2, width=32, feed_forward=64, head_size=16, patch_channels=16)


def setup(folder, small=SMALL, **config):
    dataset = Dataset(folder)
    task = dataset.manifest.tasks[0].spec
    vocabulary = dataset.manifest.vocabulary
    info = ExportInfo("gato.model", 1, small, vocabulary, vocabulary.fingerprint, 120, 0, (task,), {}, {})
    model = Gato(small, vocabulary).initialise(1).eval()
    model.tokens.weight.data.mul_(20)  # far from uniform, so that a wrong hidden state changes the choice
    options = AgentConfig(**config)
    return GatoAgent(model, info, task, options, demonstration(dataset, 0, options)), dataset


def observations(dataset, count, batch):
    rng = np.random.default_rng(0)
    for _ in range(count):
        if dataset.layouts[0].patches:
            yield {"frame": rng.integers(0, 256, (batch, 84, 84, 1), np.uint8)}
        else:
            yield {"observation": rng.normal(size=(batch, 11)).astype(np.float32)}


def acts(agent, dataset, count, batch, rows=slice(None)):
    size = len(range(batch)[rows])
    agent.reset(size)
    rng, active = np.random.default_rng(0), np.ones(size, bool)
    seen = [{k: v[rows] for k, v in o.items()} for o in observations(dataset, count, batch)]
    return np.stack([agent.act(o, np.zeros(size, np.float32), active, rng) for o in seen])


@pytest.mark.parametrize("data", ["hopper", "pong"])
@pytest.mark.parametrize("prompt", ["none", "start", "end"])
@pytest.mark.parametrize("rotary", ["none", "token"])
def test_the_cache_equals_the_exact_window_until_something_is_dropped(data, prompt, rotary, request):
    folder, small = request.getfixturevalue(data), replace(SMALL, rotary=rotary, action_position="own")
    rolling, dataset = setup(folder, small, decoding="greedy", prompt=prompt)
    exact, _ = setup(folder, small, decoding="greedy", prompt=prompt, window="exact")
    room = rolling.window - int(rolling.window * (0.0 if prompt == "none" else 0.5))
    assert np.array_equal(acts(rolling, dataset, room, 3), acts(exact, dataset, room, 3))


@pytest.mark.parametrize("data", ["hopper", "pong"])
def test_a_batch_acts_as_each_environment_alone(data, request):
    agent, dataset = setup(request.getfixturevalue(data), decoding="greedy")
    together = acts(agent, dataset, 2 * agent.window + 1, 3)
    for n in range(3):
        assert np.array_equal(together[:, n : n + 1], acts(agent, dataset, 2 * agent.window + 1, 3, slice(n, n + 1)))


@pytest.mark.parametrize("decoding", ["sample", "greedy", "mean"])
def test_continuous_actions_lie_in_range(hopper, decoding):
    agent, dataset = setup(hopper, decoding=decoding)
    actions = acts(agent, dataset, 4, 2)
    assert actions.shape == (4, 2, 3) and actions.dtype == np.float32 and np.abs(actions).max() <= 1


def test_discrete_actions_are_among_the_allowed_ones(pong):
    agent, dataset = setup(pong, decoding="sample", temperature=100.0)
    actions = acts(agent, dataset, 30, 4)
    assert set(np.unique(actions)) == set(range(6))
    with pytest.raises(ValueError, match="mean"):
        setup(pong, decoding="mean")


def test_the_agent_sees_the_tokens_of_the_log(hopper):
    """Replaying a logged episode's observations gives the stored observation tokens."""
    agent, dataset = setup(hopper, prompt="none")
    agent.reset(1)
    row = int(dataset.rows(0, False)[0])
    raw, tokens = dataset.observation(row), dataset.tokens(row)
    for t in range(min(5, len(raw))):
        agent.act({"observation": raw[t : t + 1]}, np.zeros(1), np.ones(1, bool), np.random.default_rng(0))
        assert np.array_equal(agent.tokens[0, t % agent.window, :11], tokens[t, :11])


def test_a_prompt_is_the_end_or_the_start_of_the_best_episode(hopper):
    for prompt, shown in (("start", slice(0, 4)), ("end", slice(-4, None))):
        agent, dataset = setup(hopper, prompt=prompt)
        agent.reset(2)
        rows = dataset.rows(0, held_out=False)
        best = int(rows[np.argmax(dataset.column("episode_return")[rows])])
        assert agent.time == 4 and np.array_equal(agent.tokens[1, :4], dataset.tokens(best)[shown])


def test_a_context_too_short_is_refused(pong):
    agent, dataset = setup(pong)
    info = replace(ExportInfo("gato.model", 1, SMALL, agent.model.vocabulary, "", 30, 0, (), {}, {}))
    with pytest.raises(ValueError, match="two timesteps"):
        GatoAgent(agent.model, info, dataset.manifest.tasks[0].spec, AgentConfig())
