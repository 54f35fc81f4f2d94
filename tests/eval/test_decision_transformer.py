"""Decision Transformer: causality, padding, windows, determinism, export, and that it learns what returns mean."""

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from etl.tokenizers.image import resize
from eval.baselines import decision_transformer as dt
from eval.baselines import optimise
from schemas.episode import ActionSpec, EnvironmentSpec, FieldSpec, TaskSpec
from shards.views import Trajectory

VECTORS = (FieldSpec("observation", "continuous", (3,)),)
CONTROL = TaskSpec("line-v0", "d4rl", VECTORS, ActionSpec.continuous(-2.0, 2.0, 2))
FRAMES = (FieldSpec("frame", "image", (84, 84, 1), resized=(64, 80)),)
GAME = TaskSpec("Pong", "atari", FRAMES, ActionSpec.discrete(3), EnvironmentSpec("atari", "ALE/Pong-v5"))
SMALL = dict(context=4, layers=2, heads=2, width=16, steps=3, batch=4, warmup=1, dropout=0.1)


Episode = partial(Trajectory, terminated=True, complete=True)


def control_episode(rng, T, reward=1.0):
    observation = rng.normal(3.0, 5.0, (T, 3)).astype(np.float32)
    return Episode(observation, (), rng.uniform(-2, 2, (T, 2)).astype(np.float32), np.full(T, reward, np.float32))


def game_episode(rng, T):
    frames = rng.integers(0, 256, (T, 64, 80, 1), np.uint8)
    return Episode(None, (frames,), rng.integers(0, 3, T), rng.choice([-1, 0, 1], T).astype(np.float32))


def trained(task, out, seed=0, **config):
    rng = np.random.default_rng(0)
    make = control_episode if task is CONTROL else game_episode
    episodes = [make(rng, T) for T in (9, 3, 14)]
    return dt.train(episodes, task, dt.Config(**SMALL | config), seed, out)


def observations(task, rng, batch):
    if task is CONTROL:
        return {"observation": rng.normal(size=(batch, 3)).astype(np.float32)}
    return {"frame": rng.integers(0, 256, (batch, 84, 84, 1), np.uint8)}


def inputs(model, task, B, K):
    g = torch.Generator().manual_seed(1)
    if task is CONTROL:
        states, actions = torch.randn(B, K, 3, generator=g), torch.randn(B, K, 2, generator=g)
    else:
        states = torch.randint(0, 256, (B, K, 4, 64, 80), generator=g, dtype=torch.uint8)
        actions = torch.randint(0, 3, (B, K), generator=g)
    return torch.randn(B, K, generator=g), states, actions, torch.arange(K).expand(B, K).clone()


@pytest.mark.parametrize("task", [CONTROL, GAME], ids=["control", "game"])
def test_a_prediction_sees_its_return_and_state_but_no_later_ones_nor_its_action(task):
    torch.manual_seed(0)
    model = dt.DecisionTransformer(dt.Config(**SMALL), task, 20).eval()
    for p in model.parameters():
        p.data += 0.3 * torch.randn_like(p)

    def predict(to_go, states, actions, times):
        with torch.no_grad():
            return model(to_go, model.embed(states), actions, times)

    original = inputs(model, task, 2, 4)
    base, t = predict(*original), 2
    for which, first_changed in ((0, t), (1, t), (2, t + 1)):
        changed = [column.clone() for column in original]
        changed[which][:, t] = changed[which][:, t] + (7 if changed[which].is_floating_point() else 1)
        if which == 2 and task is GAME:
            changed[which] %= 3
        difference = (predict(*changed) - base).abs().amax(dim=(0, 2))
        assert (difference[:first_changed] == 0).all()
        assert (difference[first_changed:] > 1e-6).all()


@pytest.mark.parametrize("task", [CONTROL, GAME], ids=["control", "game"])
def test_windows_hold_the_episode_and_mark_its_end(task):
    rng = np.random.default_rng(0)
    episode = control_episode(rng, 6) if task is CONTROL else game_episode(rng, 6)
    scaling = dt.Scaling(np.array([1.0, 2.0, 3.0]), np.array([2.0, 2.0, 4.0]), task.action)
    windows = dt.Windows([episode], dt.Config(context=4, return_scale=2.0), scaling)
    to_go, states, actions, times, valid = windows.window(0, 3)
    assert valid.tolist() == [True, True, True, False] and times.tolist() == [3, 4, 5, 6]
    assert np.allclose(to_go[:3], [episode.reward[t:].sum() / 2 for t in (3, 4, 5)])
    if task is CONTROL:
        assert np.allclose(states[:3] * [2, 2, 4] + [1, 2, 3], episode.observation[3:], atol=1e-5)
        assert np.allclose(actions[:3] * 2, episode.action[3:], atol=1e-6)
        assert np.allclose(scaling.undo_action(actions)[:3], episode.action[3:], atol=1e-6)
    else:
        assert np.array_equal(states[1], episode.frames[1:5, ..., 0])
        assert np.array_equal(windows.window(0, 0)[1][1], episode.frames[[0, 0, 0, 1], ..., 0])
        assert actions[:3].tolist() == episode.action[3:].tolist()


def test_episodes_are_drawn_by_length_and_timesteps_uniformly():
    rng = np.random.default_rng(0)
    episodes = [control_episode(rng, T) for T in (10, 30)]
    scaling = dt.Scaling(np.zeros(3), np.ones(3), CONTROL.action)
    windows = dt.Windows(episodes, dt.Config(context=1, batch=8000), scaling)
    to_go = windows.batch(rng)[0].numpy()[:, 0] * 1000
    counts = np.bincount(to_go.round().astype(int), minlength=31)[1:]
    # returns-to-go 1..10 lie in both episodes, 11..30 in the longer one alone: 200 draws a timestep
    assert abs(counts[:10].mean() - 400) < 30 and abs(counts[10:].mean() - 200) < 15


@pytest.mark.parametrize("task", [CONTROL, GAME], ids=["control", "game"])
def test_play_equals_the_training_forward_over_the_last_window(task, tmp_path):
    policy = dt.load(trained(task, tmp_path))
    rng, seen, chosen = np.random.default_rng(3), [], []
    policy.reset(2)
    rewards = np.concatenate([np.zeros((1, 2)), rng.normal(size=(6, 2))])
    for reward in rewards:
        seen.append(observations(task, rng, 2))
        chosen.append(policy.act(seen[-1], reward, np.ones(2, bool), rng))
    if task is CONTROL:
        frames, values = None, np.stack([o["observation"] for o in seen])
    else:
        frames, values = np.stack([resize(o["frame"], (64, 80)) for o in seen]), None
    gained = np.clip(rewards, -1, 1) if task is GAME else rewards
    T, first = len(seen), len(seen) - 4
    to_go = (policy.target - gained.cumsum(axis=0)) / policy.config.return_scale
    for b in range(2):
        if task is CONTROL:
            states, actions = policy.scaling.state(values[:, b]), policy.scaling.action(np.stack(chosen)[:, b])
        else:
            states, actions = dt.stack_frames(frames[:, b], np.arange(T)), np.stack(chosen)[:, b]
        columns = [to_go[:, b].astype(np.float32), states, actions, np.arange(T)]
        to_go_b, states_b, actions_b, times_b = (torch.from_numpy(c[first:][None]) for c in columns)
        with torch.no_grad():
            out = policy.model(to_go_b, policy.model.embed(states_b), actions_b, times_b)[0, -1].numpy()
        if task is CONTROL:
            assert np.allclose(policy.scaling.undo_action(out), chosen[-1][b], atol=1e-5)
        else:
            last = policy.history[-1]
            assert last[2][b].item() == chosen[-1][b]
            again = policy.model(*(torch.stack(c, dim=1) for c in zip(*policy.history)))[b, -1].detach().numpy()
            assert np.allclose(again, out, atol=1e-5)


@pytest.mark.parametrize("task", [CONTROL, GAME], ids=["control", "game"])
def test_actions_have_the_type_and_range_of_the_task_and_rows_do_not_mix(task, tmp_path):
    policy, rng = dt.load(trained(task, tmp_path)), np.random.default_rng(0)
    seen = [observations(task, rng, 3) for _ in range(6)]

    def play(rows):
        policy.reset(len(rows))
        uniform = type("Fixed", (), {"random": lambda self, shape: np.full(shape, 0.4)})()
        active = np.ones(len(rows), bool)
        return np.stack(
            [policy.act({k: v[rows] for k, v in o.items()}, np.ones(len(rows)), active, uniform) for o in seen]
        )

    together = play([0, 1, 2])
    if task is CONTROL:
        assert together.dtype == np.float32 and together.shape == (6, 3, 2) and np.abs(together).max() <= 2
    else:
        assert together.dtype == np.int64 and together.shape == (6, 3) and set(np.unique(together)) <= {0, 1, 2}
    for n in range(3):
        assert np.allclose(together[:, n], play([n])[:, 0], atol=1e-5)


@pytest.mark.parametrize("task", [CONTROL, GAME], ids=["control", "game"])
def test_training_is_a_function_of_its_seed(task, tmp_path):
    state = torch.random.get_rng_state()
    bodies = [
        json.loads((trained(task, tmp_path / str(n), seed) / "config.json").read_text())
        for n, seed in enumerate((1, 1, 2))
    ]
    hashes = [body["weights_sha256"] for body in bodies]
    assert hashes[0] == hashes[1] != hashes[2]
    assert bodies[0]["extra"]["losses"] == bodies[1]["extra"]["losses"]
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("task", [CONTROL, GAME], ids=["control", "game"])
def test_an_interrupted_training_leaves_no_baseline_and_starts_again(task, tmp_path):
    def interrupt(figures):
        raise KeyboardInterrupt

    make, rng = control_episode if task is CONTROL else game_episode, np.random.default_rng(0)
    episodes = [make(rng, T) for T in (9, 3, 14)]
    with pytest.raises(KeyboardInterrupt):
        dt.train(episodes, task, dt.Config(**SMALL), 0, tmp_path / "again", interrupt)
    # what a kill between the two files leaves, of another seed
    (tmp_path / "again").mkdir(exist_ok=True)
    other = trained(task, tmp_path / "other", seed=1) / "weights.safetensors"
    other.rename(tmp_path / "again" / "weights.safetensors")
    with pytest.raises(ValueError, match="no config.json"):
        dt.load(tmp_path / "again")
    again, whole = trained(task, tmp_path / "again"), trained(task, tmp_path / "whole")
    for name in ("weights.safetensors", "config.json"):
        assert (again / name).read_bytes() == (whole / name).read_bytes()
    assert sorted(path.name for path in again.iterdir()) == ["config.json", "weights.safetensors"]
    dt.load(again)


@pytest.mark.parametrize("task", [CONTROL, GAME], ids=["control", "game"])
def test_weight_decay_spares_what_the_original_spares(task):
    config = dt.Config(**SMALL | {"weight_decay": 0.1}, decay_all=task is CONTROL)
    model = dt.DecisionTransformer(config, task, 20)
    for p in model.parameters():
        p.data.fill_(1.0)
    optimise(model, config, lambda: sum(0.0 * p.sum() for p in model.parameters()), None)
    kept = {name for name, p in model.named_parameters() if (p == 1.0).all()}
    if task is CONTROL:
        assert not kept
    else:
        matrices = {name for name, p in model.named_parameters() if p.ndim > 1}
        assert kept & matrices == {"place", "timestep.weight", "action.weight"}
        assert "head.bias" not in model.state_dict()


def test_target_is_the_best_whole_episode_unless_given(tmp_path):
    rng = np.random.default_rng(0)
    cut = control_episode(rng, 50)
    episodes = [control_episode(rng, 5), control_episode(rng, 8), Episode(**{**vars(cut), "complete": False})]
    assert dt.load(dt.train(episodes, CONTROL, dt.Config(**SMALL), 0, tmp_path)).target == 8
    config = dt.Config(**SMALL, target_return=77.0)
    assert dt.load(dt.train(episodes, CONTROL, config, 0, tmp_path)).target == 77


def test_conditioning_on_a_return_picks_the_behaviour_that_earned_it(tmp_path):
    rng = np.random.default_rng(0)
    episodes = []
    for n in range(40):
        good, noise = n % 2 == 0, rng.normal(size=(10, 3)).astype(np.float32)
        action = np.full((10, 2), 1.5 if good else -1.5, np.float32)
        episodes.append(Episode(noise, (), action, np.full(10, float(good), np.float32)))
    means = []
    for target in (10.0, 0.0):
        sizes = dict(context=3, layers=1, width=32, dropout=0.0, return_scale=10.0, clip=1.0)
        config = dt.Config(**sizes, steps=150, batch=32, lr=3e-3, warmup=10, target_return=target)
        policy = dt.load(dt.train(episodes, CONTROL, config, 0, tmp_path))
        policy.reset(4)
        means.append(policy.act(observations(CONTROL, rng, 4), np.zeros(4), np.ones(4, bool), rng).mean())
    assert means[0] > 1.2 and means[1] < -1.2


def test_a_damaged_or_unfinished_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no config.json"):
        dt.load(tmp_path)
    trained(CONTROL, tmp_path)
    text = (tmp_path / "config.json").read_text()
    for wrong, message in (
        (text.replace('"gato.baseline.dt"', '"gato.baseline.tt"'), "format gato.baseline.tt"),
        (text.replace('"context"', '"contexts"'), "contexts"),
        (text[:50], "not JSON"),
        ("{}", "'format' is missing"),
    ):
        (tmp_path / "config.json").write_text(wrong)
        with pytest.raises(ValueError, match=message):
            dt.load(tmp_path)
    (tmp_path / "config.json").write_text(text)
    weights = bytearray((tmp_path / "weights.safetensors").read_bytes())
    weights[-1] ^= 1
    (tmp_path / "weights.safetensors").write_bytes(weights)
    with pytest.raises(ValueError, match="changed since"):
        dt.load(tmp_path)


def test_what_it_cannot_play_is_refused(tmp_path):
    several = TaskSpec("several", "d4rl", VECTORS, ActionSpec.discrete(3, size=2))
    with pytest.raises(ValueError, match="one discrete action"):
        dt.train([control_episode(np.random.default_rng(0), 5)], several, dt.Config(**SMALL), 0, tmp_path)
    with pytest.raises(ValueError, match="no training episodes"):
        dt.train([], CONTROL, dt.Config(**SMALL), 0, tmp_path)
    two = replace(GAME, observation=(*FRAMES, FieldSpec("wrist", "image", (30, 50, 1))))
    with pytest.raises(ValueError, match="differ in size .'frame' 64 x 80, 'wrist' 32 x 64.; leave 'dt' out"):
        dt.train([game_episode(np.random.default_rng(0), 5)], two, dt.Config(**SMALL), 0, tmp_path)
    mixed = replace(CONTROL, observation=(*VECTORS, FieldSpec("mode", "discrete", (), (3,))))
    with pytest.raises(ValueError, match="not text or discrete values"):
        dt.train([control_episode(np.random.default_rng(0), 5)], mixed, dt.Config(**SMALL), 0, tmp_path)


def test_pictures_of_one_size_are_joined_as_channels(tmp_path):
    rng = np.random.default_rng(0)
    fields = (FieldSpec("rgbd", "image", (60, 70, 4), resized=(64, 80)), FieldSpec("grey", "image", (64, 80, 1)))
    task = replace(GAME, observation=fields, action=ActionSpec.discrete(3, start=5))
    pictures = tuple(rng.integers(0, 256, (9, 64, 80, channels), np.uint8) for channels in (1, 3, 1))  # by key
    episode = Episode(None, pictures, rng.integers(5, 8, 9), np.ones(9, np.float32))
    assert np.array_equal(episode.frames, np.concatenate(pictures, axis=3))
    policy = dt.load(dt.train([episode], task, dt.Config(**SMALL), 0, tmp_path))
    policy.reset(4)
    seen = {spec.key: rng.integers(0, 256, (4, *spec.shape), np.uint8) for spec in fields}
    assert policy._state(seen).shape == (4, 4 * 5, 64, 80)
    assert (policy._state(seen)[:, -5] == seen["grey"][..., 0]).all()
    actions = policy.act(seen, np.zeros(4), np.ones(4, bool), rng)
    assert actions.shape == (4,) and set(actions.tolist()) <= {5, 6, 7}


@pytest.mark.parametrize("shape, resized", [((24, 40, 3), (32, 48)), ((16, 16, 1), None), ((16, 200, 1), (16, 208))])
def test_pictures_smaller_than_the_convolutions(tmp_path, shape, resized):
    rng = np.random.default_rng(0)
    task = replace(GAME, observation=(FieldSpec("camera", "image", shape, resized=resized),))
    frames = rng.integers(0, 256, (9, *(resized or shape[:2]), shape[2]), np.uint8)
    episode = Episode(None, (frames,), rng.integers(0, 3, 9), np.ones(9, np.float32))
    policy = dt.load(dt.train([episode], task, dt.Config(**SMALL), 0, tmp_path))
    policy.reset(2)
    actions = policy.act({"camera": rng.integers(0, 256, (2, *shape), np.uint8)}, np.zeros(2), np.ones(2, bool), rng)
    assert actions.shape == (2,)


def test_pictures_as_large_as_the_convolutions_stay_as_they_are():
    for size in ((80, 64), (dt.SMALLEST_SIDE, dt.SMALLEST_SIDE)):
        pictures = torch.rand(2, 4, *size)
        assert torch.equal(dt.padded(pictures), pictures)
    one = dt.padded(torch.ones(1, 1, 16, 48))
    assert one.shape == (1, 1, 36, 48) and one.sum() == 16 * 48


def test_each_dimension_has_its_own_bounds(tmp_path):
    rng, space = np.random.default_rng(0), ActionSpec.continuous((-2, 0), (2, 0.5))
    scaling = dt.Scaling(np.zeros(3), np.ones(3), space)
    actions = rng.uniform(space.low, space.high, (50, 2)).astype(np.float32)
    np.testing.assert_allclose(scaling.action(actions), actions * [0.5, 4] - [0, 1], atol=1e-6)
    np.testing.assert_allclose(scaling.undo_action(scaling.action(actions)), actions, atol=1e-6)


def test_published_settings():
    paper = dt.Config.paper(
        TaskSpec("hopper-medium-v2", "d4rl", VECTORS, CONTROL.action, EnvironmentSpec("mujoco", "Hopper-v4"))
    )
    assert (paper.context, paper.layers, paper.heads, paper.width, paper.lr, paper.warmup) == (
        20,
        3,
        1,
        128,
        1e-4,
        10_000,
    )
    assert (paper.target_return, paper.clip, paper.return_scale, paper.steps, paper.batch) == (
        3600,
        0.25,
        1000,
        100_000,
        64,
    )
    game = dt.Config.paper(GAME)
    assert (game.context, game.layers, game.heads, game.width, game.lr, game.target_return) == (30, 6, 8, 128, 6e-4, 20)
    assert dt.Config.quick(CONTROL).target_return is None
    assert (paper.decay_all, game.decay_all) == (True, False)
    for task in (CONTROL, GAME):
        steps = [getattr(dt.Config, budget)(task).steps for budget in ("quick", "cpu", "long", "paper")]
        assert steps == sorted(set(steps))
