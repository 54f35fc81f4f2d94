"""The agent's cache against the model's plain forward, and batches against episodes played alone, to the bit."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from eval.agents import AgentConfig, TokenAgent, demonstration, prompted, tokens
from eval.environments import play
from schemas.layout import PATCH, SEPARATOR
from shards.batch import Batch
from shards.reader import Dataset
from simulators.policy import EpisodeRng
from tests.shards.made import Task, make
from trainer.model import Gato, ModelConfig
from trainer.model.export import ExportInfo, TrainingInfo
from trainer.model.transformer import rope_cos_sin, rotate

SMALL = ModelConfig(blocks=2, heads=2, width=32, feed_forward=64, head_size=16, patch_channels=16)


class Recorder(TokenAgent):
    """Keeps the logits of every action token and the observed columns of every timestep."""

    def reset(self, batch):
        self.logits, self.observed = [], []
        super().reset(batch)

    def _choose(self, logits, points):
        self.logits.append(logits.numpy().copy())
        return super()._choose(logits, points)

    def _ids(self, tokens):
        self.observed.append(tokens)
        return super()._ids(tokens)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def setup(folder, small=SMALL, kind=Recorder, device="cpu", **config):
    dataset = Dataset(folder)
    task = dataset.manifest.tasks[0].spec
    vocabulary = dataset.manifest.vocabulary
    info = ExportInfo("gato.model", 1, small, vocabulary, vocabulary.fingerprint, 120, 0, (task,), {}, TrainingInfo())
    model = Gato(small, vocabulary).initialise(1).eval()
    # far from uniform, and ruled by the context and not by the last token, so that a wrong hidden state changes choices
    model.tokens.weight.data.mul_(20)
    for weight in (weight for weight in model.blocks.parameters() if weight.ndim == 2):
        weight.data.mul_(30)
    options, model = AgentConfig(**config), model.to(device)
    return kind(model, info, task, options, demonstration(dataset, 0, options, info)), dataset


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


def plain_logits(agent, seen, actions):
    """(timesteps, A, B, ids) by the model's plain forward over a window that is put together here, token by token."""
    layout, tokenizer, prompt = agent.layout, agent.tokenizer, []
    if agent.prompt is not None:
        length = agent.window // 2
        shown = slice(length) if agent.config.prompt == "start" else slice(-length, None)
        patches = agent.prompt.patches
        prompt = list(zip(agent.prompt.tokens[shown], [None] * length if patches is None else patches[shown]))
    found = np.zeros((len(seen), layout.action, len(actions[0]), len(agent.head)))
    for row in range(len(actions[0])):
        timesteps = list(prompt)
        for t, observation in enumerate(seen):
            encoded = tokenizer.encode_observation({key: value[[row]] for key, value in observation.items()})
            stored = np.concatenate([encoded.tokens, tokenizer.encode_action(actions[t][[row]])[0]], axis=1)
            timesteps.append((stored[0], None if encoded.patches is None else encoded.patches[0]))
            columns, pixels = [], []
            for stored, patches in timesteps[-agent.window :]:
                left, shown = list(stored), list(patches if patches is not None else [])
                for place, role in enumerate(layout.roles):
                    token = (
                        agent.model.vocabulary.separator if role == SEPARATOR else 0 if role == PATCH else left.pop(0)
                    )
                    if role == PATCH:
                        pixels.append((len(columns), shown.pop(0), layout.patch_centres[place - layout.text]))
                    columns.append((token, role, place))
            batch = Batch.empty(np.zeros(1, np.int64), len(columns), len(pixels), max(1, layout.channels))
            batch.tokens[0], batch.roles[0], batch.positions[0] = np.array(columns).T
            batch.segments[:] = 0
            for n, (place, patch, centre) in enumerate(pixels):
                batch.patch_index[n], batch.patches[n], batch.patch_positions[n] = place, patch, centre
            with torch.no_grad():
                hidden = agent.model(batch.to("cpu"))[0, len(columns) - layout.action - 1 : -1]
                found[t, :, row] = agent.model.logits(hidden)[:, agent.ids[0].start :][:, : len(agent.head)]
    return found


@pytest.mark.parametrize("data", ["hopper", "pong"])
@pytest.mark.parametrize("prompt", ["none", "start", "end"])
@pytest.mark.parametrize("rotary", ["none", "token"])
@pytest.mark.parametrize("window", ["rolling", "exact"])
def test_logits_are_those_of_the_plain_forward(data, prompt, rotary, window, request):
    """In exact mode at all times, in rolling mode until something is dropped."""
    folder, small = request.getfixturevalue(data), replace(SMALL, rotary=rotary, action_position="own")
    agent, dataset = setup(folder, small, decoding="greedy", prompt=prompt, window=window)
    room = agent.window - (0 if prompt == "none" else agent.window // 2)
    count = room if window == "rolling" else agent.window + 3
    seen, actions = list(observations(dataset, count, 2)), acts(agent, dataset, count, 2)
    logits = np.stack(agent.logits).reshape(count, agent.layout.action, 2, -1)
    assert np.allclose(logits, plain_logits(agent, seen, actions), atol=2e-3)
    assert len(np.unique(actions)) > 1


@pytest.mark.parametrize("data", ["hopper", "pong"])
@pytest.mark.parametrize("window", ["rolling", "exact"])
def test_a_batch_acts_as_each_environment_alone(data, window, request):
    agent, dataset = setup(request.getfixturevalue(data), decoding="greedy", window=window)
    together = acts(agent, dataset, 2 * agent.window + 1, 5)
    logits = agent.logits
    for n in (0, 3):
        assert np.array_equal(together[:, n : n + 1], acts(agent, dataset, 2 * agent.window + 1, 5, slice(n, n + 1)))
        assert all(np.array_equal(many[n], one[0]) for many, one in zip(logits, agent.logits))


class Witness:
    """A policy that another one plays for, with what was asked and done."""

    def __init__(self, policy):
        self.policy, self.active, self.actions = policy, [], []

    def reset(self, batch):
        self.policy.reset(batch)

    def act(self, observations, reward, active, rng):
        self.active.append(active.copy())
        self.actions.append(self.policy.act(observations, reward, active, rng))
        return self.actions[-1]


@pytest.mark.parametrize("decoding", ["greedy", "sample", "mean"])
def test_episodes_that_end_at_different_times_are_those_played_alone(hopper, decoding):
    agent, dataset = setup(hopper, decoding=decoding)
    task, seeds = dataset.manifest.tasks[0].spec, [3, 4, 5, 6, 7, 8]
    together = Witness(agent)
    episodes = play(together, task, seeds, step_limit=60, policy_seed=11)
    rows = [len(logits) for logits in agent.logits[:: agent.layout.action]]
    assert rows == [int(active.sum()) for active in together.active] and rows[0] == 6 and rows[-1] < 3
    for n in (0, 2, 5):
        alone = Witness(agent)
        (one,) = play(alone, task, seeds[n : n + 1], step_limit=60, policy_seed=11)
        assert (one.episode_return, one.timesteps) == (episodes[n].episode_return, episodes[n].timesteps)
        assert np.array_equal(np.stack(alone.actions)[:, 0], np.stack(together.actions)[: one.timesteps, n])
    if decoding == "sample":
        again = Witness(agent)
        play(again, task, seeds, step_limit=60, policy_seed=12)
        assert not np.array_equal(again.actions[0], together.actions[0])


def test_a_timestep_is_one_graph_of_fixed_shapes(hopper):
    """No break in it and no new one when the window wraps: what a compiler or a CUDA graph asks for."""
    agent, dataset = setup(hopper, kind=TokenAgent, decoding="greedy")
    plain, graphs = acts(agent, dataset, 3 * agent.window, 2), []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    agent.timestep = torch.compile(agent.timestep, backend=count, fullgraph=True, dynamic=False)
    agent.reset(2)
    assert np.array_equal(plain[: agent.window], acts(agent, dataset, agent.window, 2))
    at_first = len(graphs)
    assert np.array_equal(plain, acts(agent, dataset, 3 * agent.window, 2)) and len(graphs) == at_first == 1


@pytest.mark.parametrize("data", ["hopper", "pong"])
def test_a_replayed_agent_plays_as_the_plain_one(data, request):
    """On a CPU without the capture; batches of two sizes, and a cache that was used before."""
    folder = request.getfixturevalue(data)
    plain, dataset = setup(folder, decoding="sample", kind=TokenAgent)
    agent, _ = setup(folder, decoding="sample", kind=TokenAgent, launch="graph")
    for size in (3, 2, 2):
        count = 2 * agent.window + 1
        assert np.array_equal(acts(agent, dataset, count, size), acts(plain, dataset, count, size))
        assert agent.replay is not None and agent.cache is agent.replay.cache


def test_a_replayed_agent_keeps_its_rows_when_episodes_end(hopper):
    plain, dataset = setup(hopper, decoding="sample", kind=TokenAgent)
    agent, _ = setup(hopper, decoding="sample", kind=TokenAgent, launch="graph")
    task, seeds = dataset.manifest.tasks[0].spec, [3, 4, 5, 6, 7, 8]
    mine, theirs = (play(one, task, seeds, step_limit=60, policy_seed=11) for one in (agent, plain))
    assert [one.episode_return for one in mine] == [one.episode_return for one in theirs] and len(
        {one.timesteps for one in mine}
    ) > 1
    assert len(agent.running) == len(seeds) > len(plain.running)
    with pytest.raises(ValueError, match="use plain"):
        AgentConfig(launch="graph", window="exact").check()


@pytest.mark.process
def test_a_compiled_timestep_chooses_what_the_plain_one_does(hopper):
    found = []
    for launch in ("plain", "compiled"):
        agent, dataset = setup(hopper, decoding="greedy", kind=TokenAgent, launch=launch)
        found.append(acts(agent, dataset, 2 * agent.window, 2))
    assert np.array_equal(*found)


def test_nothing_in_a_timestep_waits_for_a_tensors_value(hopper):
    """What a capture would refuse; fake tensors have no values to give."""
    agent, dataset = setup(hopper, decoding="mean", kind=TokenAgent)
    acts(agent, dataset, 3, 2)
    K, A = agent.layout.length, agent.layout.action
    with torch.inference_mode(), FakeTensorMode(allow_non_fake_inputs=True):
        numbers = torch.arange(3 * K - 1, 4 * K - 1)
        tokens = agent.timestep(torch.zeros(2, K - A + 1, SMALL.width), numbers, torch.zeros(2, A, dtype=torch.float64))
        assert tokens.shape == (2, A)


@pytest.mark.parametrize("data", ["hopper", "pong"])
def test_slots_beyond_the_window_are_never_attended_to(data, request, monkeypatch):
    """A GPU's cache has them; here it is made on the CPU."""
    plain, dataset = setup(request.getfixturevalue(data), decoding="greedy", kind=TokenAgent)
    monkeypatch.setitem(tokens.ALIGNMENT, "cpu", 64)
    agent, _ = setup(request.getfixturevalue(data), decoding="greedy", kind=TokenAgent)
    count = 3 * agent.window
    assert np.array_equal(acts(agent, dataset, count, 3), acts(plain, dataset, count, 3))
    held = agent.cache.blocks[0][0]
    assert held.shape[2] % 64 == 0 and held.shape[2] > agent.slots and not held[:, :, agent.slots :].any()


def test_rotary_angles_are_right_far_into_an_episode():
    q, k = torch.randn(2, 1, 64, generator=torch.Generator().manual_seed(0))
    products = [
        rotate(q, rope_cos_sin(torch.tensor([n + 7]), 64, torch.float32))
        @ rotate(k, rope_cos_sin(torch.tensor([n]), 64, torch.float32)).T
        for n in (0, 700_000)
    ]
    assert torch.allclose(*products, atol=1e-4)


def test_the_mean_of_two_bins_is_the_one_between_them(hopper):
    agent, _ = setup(hopper, kind=TokenAgent, decoding="mean")
    first = torch.arange(0, 1024, 7)
    distance = torch.arange(len(first)) % ((1024 - first) // 2)
    logits = torch.full((len(first), 1024), -torch.inf)
    for bins in (first, first + 2 * distance):
        logits[torch.arange(len(first)), bins] = 0.0
    assert torch.equal(agent._choose(logits, torch.zeros(len(first), 1)), first + distance)


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
        assert np.array_equal(agent.observed[-1][0], tokens[t, :11])


def test_a_prompt_is_the_end_or_the_start_of_the_best_episode(hopper):
    for prompt, shown in (("start", slice(0, 4)), ("end", slice(-4, None))):
        agent, dataset = setup(hopper, prompt=prompt)
        agent.reset(2)
        rows = dataset.rows(0, held_out=False)
        best = int(rows[np.argmax(dataset.column("episode_return")[rows])])
        assert agent.time == 4 and np.array_equal(agent.observed[0], dataset.tokens(best)[shown])
        assert np.array_equal(agent.last[1], dataset.tokens(best)[shown][-1, -3:])


def test_a_prompt_goes_beyond_the_pieces_that_an_episode_is_stored_in(tmp_path):
    """The best episode's last piece has 3 timesteps; an episode shorter than the window is shown whole."""
    dataset = Dataset(make(tmp_path, [Task("made", (30, 43, 20), held_out=(0,), patches=(1, 2))], piece=10))
    info = ExportInfo("gato.model", 1, SMALL, dataset.manifest.vocabulary, "", 0, 0, (), {}, TrainingInfo())
    rows = [row for row in dataset.rows(0, held_out=False) if dataset.column("episode")[row] == 1]
    whole = [np.concatenate([member(row) for row in rows]) for member in (dataset.tokens, dataset.patches)]
    assert len(whole[0]) == 43
    for window in (2, 3, 4, 20, 24, 43, 99):
        info = replace(info, sequence_length=window * dataset.layouts[0].length + 1)
        for kind, shown in (("start", slice(window)), ("end", slice(-window, None))):
            found = demonstration(dataset, 0, AgentConfig(prompt=kind), info)
            for ours, theirs in zip((found.tokens, found.patches), whole):
                np.testing.assert_array_equal(ours, theirs[shown])


def test_each_row_draws_its_own_numbers():
    three, one = EpisodeRng.seeded(5, [1, 2, 3]), EpisodeRng.seeded(5, [3])
    first = three.random((6, 2))
    assert np.array_equal(first[4:], one.random((2, 2))) and len(np.unique(first)) == 12
    assert np.array_equal(three.of(np.array([False, False, True])).random((1, 4)), one.random((1, 4)))


def test_a_context_too_short_is_refused(pong):
    agent, dataset = setup(pong)
    info = replace(ExportInfo("gato.model", 1, SMALL, agent.model.vocabulary, "", 30, 0, (), {}, TrainingInfo()))
    with pytest.raises(ValueError, match="two timesteps"):
        TokenAgent(agent.model, info, dataset.manifest.tasks[0].spec, AgentConfig())


def test_auto_prompts_where_tasks_share_an_environment(hopper):
    agent, dataset = setup(hopper)
    task = dataset.manifest.tasks[0].spec
    for others, wanted in (((), "none"), ((replace(task, name="hopper-expert-v4"),), "end")):
        info = ExportInfo(
            "gato.model", 1, SMALL, agent.model.vocabulary, "", 120, 0, (task, *others), {}, TrainingInfo()
        )
        assert prompted(AgentConfig(), info, task).prompt == wanted
        assert prompted(AgentConfig(prompt="start"), info, task).prompt == "start"
