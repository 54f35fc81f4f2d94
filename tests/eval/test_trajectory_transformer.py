"""Trajectory Transformer: bins, masks, targets, the cached search against the plain one, determinism, export."""

import json
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from eval.baselines import trajectory_transformer as tt
from eval.baselines.trajectory_transformer.planning import Rows, draw
from schemas.episode import ActionSpec, EnvironmentSpec, FieldSpec, TaskSpec

VECTORS = (FieldSpec("observation", "continuous", (3,)),)
TASK = TaskSpec("line-v0", "d4rl", VECTORS, ActionSpec.continuous(-1.0, 1.0, 2))
SMALL = tt.Config(
    layers=2, heads=2, width=16, bins=12, transitions=4, context=3, horizon=3, beams=3, steps=3, batch=4, warmup=1
)


@dataclass(frozen=True)
class Episode:
    observation: np.ndarray | None
    action: np.ndarray
    reward: np.ndarray
    terminated: bool = True
    complete: bool = True
    frames: np.ndarray | None = None


def episode(rng, T, **kwargs):
    reward = rng.normal(size=T).astype(np.float32)
    return Episode(
        rng.normal(size=(T, 3)).astype(np.float32), rng.uniform(-1, 1, (T, 2)).astype(np.float32), reward, **kwargs
    )


def episodes():
    rng = np.random.default_rng(0)
    return [episode(rng, T) for T in (40, 2, 60)]


def train(out, config=SMALL, seed=0):
    return tt.train(episodes(), TASK, config, seed, out)


def rough(policy):
    """Weights far from uniform predictions, so that a wrong hidden state changes a choice."""
    torch.manual_seed(5)
    for p in policy.model.parameters():
        p.data += 0.5 * torch.randn_like(p)
    return policy


@pytest.mark.parametrize("kind", ["quantile", "uniform"])
def test_bins_hold_equal_shares_or_equal_widths_and_centres_lie_in_them(kind):
    rows = np.random.default_rng(0).normal(size=(6000, 4)) ** 3
    d = tt.Discretiser.fit(rows, replace(SMALL, discretisation=kind))
    bins = d.encode(rows)
    assert bins.min() == 0 and bins.max() == 11
    if kind == "quantile":
        assert all(abs(np.bincount(bins[:, n], minlength=12) - 500).max() <= 2 for n in range(4))
    else:
        assert np.allclose(np.diff(d.edges, axis=1), (rows.max(axis=0) - rows.min(axis=0))[:, None] / 12)
    assert np.array_equal(d.encode(d.centres.T), np.arange(12)[:, None].repeat(4, axis=1))
    assert np.array_equal(d.encode(rows[:, 2:3], 2), bins[:, 2:3])
    assert d.encode(np.array([[-1e9, 1e9, -1e9, 1e9]])).tolist() == [[0, 11, 0, 11]]


def test_quantiles_are_the_original_code_s():
    """Every ceil(n / N)-th value in order, then the greatest."""
    d = tt.Discretiser.fit(np.random.default_rng(0).permutation(25)[:, None], SMALL)
    assert d.edges.tolist() == [[0, 3, 6, 9, 12, 15, 18, 21, 24, 24, 24, 24, 24]]


def test_rows_hold_the_discounted_value_behind_each_reward_and_the_penalty():
    e = Episode(np.zeros((3, 3)), np.zeros((3, 2)), np.array([1.0, 2.0, 4.0]))
    config = replace(SMALL, discount=0.5, termination_penalty=-100.0)
    assert tt.transition_rows(e, config)[:, -2:].tolist() == [[1, 2 - 50], [2, -100], [-100, 0]]
    kept = replace(config, termination_penalty=None)
    assert tt.transition_rows(e, kept)[:, -2:].tolist() == [[1, 4], [2, 4], [4, 0]]
    assert tt.transition_rows(replace_end(e), config)[:, -2:].tolist() == [[1, 4], [2, 4], [4, 0]]


def replace_end(e):
    return Episode(e.observation, e.action, e.reward, terminated=False)


def test_windows_predict_the_end_only_where_the_episode_terminated():
    rng = np.random.default_rng(0)
    data = [episode(rng, 5), episode(rng, 6, terminated=False)]
    rows = [tt.transition_rows(e, SMALL) for e in data]
    d = tt.Discretiser.fit(np.concatenate(rows), SMALL)
    windows = tt.Windows(rows, data, d, replace(SMALL, batch=400))
    tokens, known = (c.numpy().reshape(400, 4, 7) for c in windows.batch(rng))
    assert len(windows.starts) == 4 + 5
    first, second = d.encode(rows[0]), d.encode(rows[1])
    ends = 0
    for window, mask in zip(tokens, known):
        where = [
            (e, s) for e, part in enumerate((first, second)) for s in range(len(part)) if (part[s] == window[0]).all()
        ]
        (e, s) = where[0]
        part = (first, second)[e]
        inside = min(4, len(part) - s)
        assert np.array_equal(window[:inside], part[s : s + inside]) and (window[inside:] == 12).all()
        assert mask[:inside].all() and (mask[inside:] == (e == 0)).all()
        ends += inside < 4
    assert 0 < ends < 400


def test_a_prediction_sees_only_earlier_tokens_and_no_earlier_value():
    torch.manual_seed(0)
    model = tt.TrajectoryTransformer(SMALL, 3, 2).eval()
    for p in model.parameters():
        p.data += 0.3 * torch.randn_like(p)
    tokens = torch.randint(0, 12, (2, 21))
    with torch.no_grad():
        base = model(tokens)
        for place in (8, 13):  # an observation, and a value
            changed = tokens.clone()
            changed[:, place] = (changed[:, place] + 1) % 12
            difference = (model(changed) - base).abs().amax(dim=(0, 2))
            assert (difference[:place] == 0).all() and difference[place] > 1e-6
            assert (difference[place + 1 :] > 1e-6).all() if place == 8 else (difference[place + 1 :] == 0).all()


def test_every_dimension_has_embeddings_and_a_head_of_its_own_and_the_end_is_one():
    model = tt.TrajectoryTransformer(SMALL, 3, 2)
    places = torch.arange(14)
    same = model.embed(torch.full((1, 14), 4), places) - model.places[places]
    assert len(torch.unique(same[0], dim=0)) == 7 and torch.allclose(same[0, :7], same[0, 7:], atol=1e-6)
    ended = model.embed(torch.full((1, 14), 12), places) - model.places[places]
    assert torch.allclose(ended[0], model.tokens.weight[-1].expand(14, -1), atol=1e-6)


@pytest.mark.parametrize("context", [2, 3, 4])
def test_the_cached_search_equals_the_plain_one(context, tmp_path):
    folder = train(tmp_path, replace(SMALL, context=context, cdf_act=0.5, k_obs=2))
    cached, plain = rough(tt.load(folder)), rough(tt.load(folder, cached=False))
    rng = np.random.default_rng(0)
    seen = [{"observation": rng.normal(size=(3, 3)).astype(np.float32)} for _ in range(6)]
    actions = []
    for policy in (cached, plain):
        policy.reset(3)
        random = np.random.default_rng(9)
        actions.append([policy.act(o, np.ones(3), np.ones(3, bool), random) for o in seen])
    assert np.array_equal(actions[0], actions[1])
    assert len(np.unique(np.concatenate(actions[0]), axis=0)) > 2


def test_growing_rows_predict_as_the_last_transitions_from_scratch(tmp_path):
    model = rough(tt.load(train(tmp_path))).model
    tokens = torch.randint(0, 13, (4, 40), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        rows = Rows(model, tokens[:, :3].clone(), cached=True)
        order = torch.arange(4)
        for t in range(3, 40):
            begin = 7 * max(0, -(-(t - 20) // 7))
            assert torch.allclose(rows.logits, model(tokens[order, begin:t])[:, -1], atol=1e-4)
            if t in (9, 23):
                order = order[torch.tensor([2, 2, 0, 1])]
                rows.select(torch.tensor([2, 2, 0, 1]))
            rows.append(tokens[order, t])


def test_actions_are_bin_centres_and_rows_do_not_mix(tmp_path):
    policy = rough(tt.load(train(tmp_path, replace(SMALL, k_act=1))))
    rng = np.random.default_rng(0)
    seen = [rng.normal(size=(3, 3)).astype(np.float32) for _ in range(5)]

    def play(active):
        policy.reset(3)
        return np.stack([policy.act({"observation": o}, np.ones(3), active, rng) for o in seen])

    everyone, some = play(np.ones(3, bool)), play(np.array([True, False, True]))
    assert everyone.dtype == np.float32 and everyone.shape == (5, 3, 2)
    assert np.array_equal(everyone[:, [0, 2]], some[:, [0, 2]])
    alone = [play(np.arange(3) == n)[:, n] for n in range(3)]
    assert np.array_equal(everyone, np.stack(alone, axis=1))
    centres = policy.discretiser.centres[3:5].astype(np.float32)
    assert all(np.isin(everyone[..., a], centres[a]).all() for a in range(2))


def test_what_is_played_is_an_action_even_where_the_end_is_likeliest(tmp_path):
    policy = tt.load(train(tmp_path))
    torch.nn.init.zeros_(policy.model.norm.weight)
    torch.nn.init.ones_(policy.model.norm.bias)
    policy.model.head.data[:, SMALL.bins] = 10.0
    assert (policy.plan(torch.zeros(2, 3, dtype=torch.int64), np.random.default_rng(0)) < SMALL.bins).all()


def test_draw_keeps_the_likeliest():
    rng = np.random.default_rng(0)
    logits = torch.tensor([[0.05, 0.5, 0.15, 0.3]]).log().repeat(4000, 1)
    shares = lambda *limits: np.bincount(draw(logits, *limits, rng), minlength=4) / 4000  # noqa: E731
    assert np.allclose(shares(None, None), [0.05, 0.5, 0.15, 0.3], atol=0.03)
    assert np.allclose(shares(2, None), [0, 5 / 8, 0, 3 / 8], atol=0.03)
    assert np.allclose(shares(None, 0.3), [0, 5 / 8, 0, 3 / 8], atol=0.03)
    assert np.allclose(shares(None, 0.6), [0, 1, 0, 0])
    assert np.allclose(shares(1, None), [0, 1, 0, 0])


def test_planning_finds_the_action_that_pays(tmp_path):
    rng = np.random.default_rng(0)
    task = TaskSpec(
        "bandit-v0", "d4rl", (FieldSpec("observation", "continuous", (1,)),), ActionSpec.continuous(-1.0, 1.0, 1)
    )
    data = []
    for _ in range(60):
        x, a = rng.normal(size=(20, 1)).astype(np.float32), rng.uniform(-1, 1, (20, 1)).astype(np.float32)
        data.append(Episode(x, a, a[:, 0], terminated=False))
    sizes = dict(layers=1, heads=2, width=32, bins=10, transitions=2, dropout=0.0, discount=0.5)
    search = dict(context=2, horizon=1, beams=16, cdf_act=None)
    config = tt.Config(**sizes, **search, steps=250, batch=64, lr=5e-3, warmup=10, decay=None)
    policy = tt.load(tt.train(data, task, config, 0, tmp_path))
    policy.reset(8)
    seen = {"observation": rng.normal(size=(8, 1)).astype(np.float32)}
    planned = policy.act(seen, np.zeros(8), np.ones(8, bool), rng)
    assert planned.mean() > 0.6  # behaviour: 0


def test_smoothing_spreads_targets_over_neighbours_and_leaves_the_end_alone():
    soft = tt.soft_targets(replace(SMALL, smoothing=1.0))
    assert torch.allclose(soft.sum(dim=1), torch.ones(13))
    assert soft[5].argmax() == 5 and soft[5, 4] > 0.2 and soft[5, 12] == 0 and soft[12].tolist() == [0] * 12 + [1]
    assert torch.equal(tt.soft_targets(SMALL), torch.eye(13))


def test_training_is_a_function_of_its_seed(tmp_path):
    state = torch.random.get_rng_state()
    bodies = [
        json.loads((train(tmp_path / str(n), seed=seed) / "config.json").read_text())
        for n, seed in enumerate((1, 1, 2))
    ]
    assert bodies[0]["weights_sha256"] == bodies[1]["weights_sha256"] != bodies[2]["weights_sha256"]
    assert bodies[0]["extra"]["losses"] == bodies[1]["extra"]["losses"]
    assert bodies[0]["format"] == "gato.baseline.tt" and bodies[0]["task"]["name"] == "line-v0"
    assert torch.equal(state, torch.random.get_rng_state())


def test_what_it_cannot_play_is_refused(tmp_path):
    image = (FieldSpec("frame", "image", (84, 84, 1), resized=(64, 80)),)
    game = TaskSpec("Pong", "atari", image, ActionSpec.discrete(3))
    with pytest.raises(ValueError, match="task 'Pong': .*not images"):
        tt.train(episodes(), game, SMALL, 0, tmp_path)
    for context in (1, 5):
        with pytest.raises(ValueError, match=f"context {context}: must be from"):
            tt.train(episodes(), TASK, replace(SMALL, context=context), 0, tmp_path)
    with pytest.raises(ValueError, match="no training episodes"):
        tt.train([], TASK, SMALL, 0, tmp_path)
    assert not list(tmp_path.iterdir())


def test_published_settings():
    spec = replace(TASK, environment=EnvironmentSpec("mujoco", "Hopper-v4"))
    paper = tt.Config.paper(spec)
    assert (paper.bins, paper.transitions, paper.layers, paper.heads, paper.width) == (100, 10, 4, 4, 128)
    assert (paper.horizon, paper.beams, paper.expand, paper.k_obs, paper.cdf_act) == (15, 128, 2, 1, 0.6)
    assert (paper.termination_penalty, paper.action_weight, paper.smoothing) == (-100, 5, 0)
    cheetah = tt.Config.paper(replace(TASK, environment=EnvironmentSpec("mujoco", "HalfCheetah-v4")))
    assert (cheetah.horizon, cheetah.beams) == (5, 32)
    assert tt.Config.paper(TASK).termination_penalty is None
    steps = [getattr(tt.Config, budget)(spec).steps for budget in ("quick", "cpu", "long", "paper")]
    assert steps == sorted(set(steps))
