"""Simulators as recorder and agent see them; the policies that play them."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import simulators
from schemas.episode import ActionSpec, EnvironmentSpec
from simulators import scores
from simulators.experts import SHIPPED, PolicyError, perceptron, policies
from simulators.experts.train import play
from simulators.policy import NoisyPolicy, random_actions
from simulators.suites import atari, robotics

PONG = EnvironmentSpec("atari", "ALE/Pong-v5")


def trajectory(spec, seed, steps=30):
    env = simulators.make(spec)
    observation, _ = env.reset(seed=seed)
    rng, seen = np.random.default_rng(seed), [observation]
    action = simulators.action_spec(env)
    for _ in range(steps):
        seen.append(env.step(random_actions(action, rng, 1)[0])[0])
    env.close()
    return seen


@pytest.mark.parametrize("spec", [PONG, simulators.environment_spec("Hopper-v4")], ids=lambda spec: spec.id)
def test_same_seed_same_observations(spec):
    first, again, other = trajectory(spec, 3), trajectory(spec, 3), trajectory(spec, 4)
    for a, b in zip(first, again):
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])
    assert any((a[key] != b[key]).any() for a, b in zip(first, other) for key in a)


def test_atari_frame_is_the_box_filtered_maximum_of_the_last_two_screens():
    steady = EnvironmentSpec("atari", "ALE/Pong-v5", {"repeat_action_probability": 0.0, "noop_max": 0})
    env, emulator = simulators.make(steady), simulators.make(steady).unwrapped
    env.reset(seed=0)
    emulator.reset(seed=0)
    for action in [0] * 10 + [2, 3] * 10:
        observation, *_ = env.step(action)
        screens = [emulator.step(action)[0] for _ in range(4)]
    # a box filter by hand: the mean of the whole pixels whose centres lie under an output pixel
    pooled = np.maximum(screens[2], screens[3]).astype(np.float64)
    rows, columns = (
        [slice(int(n * size / 84 + 0.5), int((n + 1) * size / 84 + 0.5)) for n in range(84)] for size in (210, 160)
    )
    expected = np.array([[pooled[row, column].mean() for column in columns] for row in rows])
    assert observation["frame"].shape == (84, 84, 1) and observation["frame"].dtype == np.uint8
    assert np.abs(observation["frame"][..., 0] - expected).max() <= 1.0


def test_atari_time_limit_and_noops_come_from_the_kwargs():
    env = simulators.make(EnvironmentSpec("atari", "ALE/Pong-v5", {"max_episode_steps": 5, "noop_max": 0}))
    env.reset(seed=0)
    assert env.unwrapped.ale.getEpisodeFrameNumber() == 0
    ends = [env.step(0)[2:4] for _ in range(5)]
    assert ends == [(False, False)] * 4 + [(False, True)]
    starts = set()
    env = simulators.make(PONG)
    for seed in range(8):
        env.reset(seed=seed)
        starts.add(env.unwrapped.ale.getEpisodeFrameNumber())
    assert len(starts) > 2 and max(starts) <= atari.NOOP_MAX


@pytest.mark.parametrize("form", ["none", "Python's", "C's"])
def test_only_the_one_deprecation_of_mujoco_is_hidden(form, capfd, monkeypatch):
    import gymnasium
    import mujoco

    def build(*args, **kwargs):
        for text in ("compiler attribute 'settotalmass' is deprecated and will be removed", "bad state at DOF 0"):
            mujoco.get_mju_user_warning()(text)
        return made(*args, **kwargs)

    @ctypes.CFUNCTYPE(None, ctypes.c_char_p)  # as dm_control's
    def shown_by_c(text):
        print(f"WARNING: {text.decode()}")

    made, usual = gymnasium.make, mujoco.get_mju_user_warning()
    monkeypatch.setattr(gymnasium, "make", build)
    mujoco.set_mju_user_warning(
        {"none": None, "Python's": lambda text: print(f"WARNING: {text}"), "C's": shown_by_c}[form]
    )
    before = mujoco.get_mju_user_warning()
    try:
        simulators.make(simulators.environment_spec("HalfCheetah-v4")).close()
        assert mujoco.get_mju_user_warning() is before
    finally:
        mujoco.set_mju_user_warning(usual)
    shown = "".join(capfd.readouterr())
    assert "WARNING: bad state at DOF 0" in shown and "settotalmass" not in shown


def test_specs_of_each_suite():
    hopper, pong = simulators.make(simulators.environment_spec("Hopper-v5")), simulators.make(PONG)
    maze = simulators.make(simulators.environment_spec("PointMaze_UMaze-v3"))
    assert simulators.action_spec(hopper) == ActionSpec.continuous(-1.0, 1.0, 3)
    assert simulators.action_spec(pong) == ActionSpec.discrete(6)
    assert [(f.key, f.kind, f.shape, f.resized) for f in simulators.observation_fields(pong)] == [
        ("frame", "image", (84, 84, 1), (64, 80))
    ]
    observation, _ = maze.reset(seed=0)
    assert list(observation) == [f.key for f in simulators.observation_fields(maze)]
    assert list(observation) == ["achieved_goal", "desired_goal", "observation"]
    assert all(value.dtype == np.float32 for value in observation.values())


@pytest.mark.parametrize("environment", ["Hopper-v4", "PointMaze_UMaze-v3", "ALE/Pong-v5"])
def test_a_picture_on_any_machine_that_changes_with_the_state(environment, monkeypatch):
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    env = simulators.make(simulators.environment_spec(environment), seed=0, render=True)
    before = simulators.frame(env)
    assert before.dtype == np.uint8 and before.ndim == 3 and before.shape[2] == 3
    for _ in range(30):
        env.step(env.action_space.sample())
    after = env.render()
    assert after.shape == before.shape and (after != before).any()


@pytest.mark.parametrize("wrong", ["Hopper-v99", "Pong-v99", "NoSuchBody-v1", "ALE/NoSuchGame-v5"])
def test_unknown_ids_are_named(wrong):
    with pytest.raises(simulators.SimulatorError, match=f"unknown environment '{wrong}'"):
        simulators.environment_spec(wrong)


def test_a_missing_package_and_wrong_arguments_are_named(monkeypatch):
    monkeypatch.setattr(robotics.Robotics, "module", "a_package_that_is_not_there")
    remedy = r"a_package_that_is_not_there.*pip install 'gato-open\[robotics\]'"
    with pytest.raises(simulators.SimulatorError, match=remedy):
        simulators.make(EnvironmentSpec("robotics", "PointMaze_UMaze-v3"))
    with pytest.raises(simulators.SimulatorError, match="Hopper-v4.*no_such_argument"):
        simulators.make(EnvironmentSpec("mujoco", "Hopper-v4", {"no_such_argument": 1}))


def mlp(inputs=11, hidden=8, outputs=3):
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(inputs, hidden), torch.nn.ReLU(), torch.nn.Linear(hidden, outputs), torch.nn.Tanh()
    )


def test_safetensors_and_npz_agree_with_torch(tmp_path):
    network, rng = mlp(), np.random.default_rng(0)
    mean, variance = rng.normal(size=11), rng.uniform(0.001, 2.0, 11)
    tensors = {"observation.mean": mean, "observation.variance": variance}
    arrays = {"mean": mean, "std": np.sqrt(variance), "clip": 10.0, "hidden": "relu", "out": "tanh"}
    for n, layer in enumerate((network[0], network[2])):
        weight, bias = layer.weight.detach().numpy(), layer.bias.detach().numpy()
        tensors |= {f"layers.{n}.weight": weight, f"layers.{n}.bias": bias}
        arrays |= {f"W{n}": weight, f"b{n}": bias}
    header = {"hidden_activation": "relu", "output_activation": "tanh", "observation_clip": "10"}
    perceptron.save_safetensors(tmp_path / "policy.safetensors", tensors, header)
    np.savez(tmp_path / "policy.npz", **arrays)
    loaded = [perceptron.load(tmp_path / name) for name in ("policy.safetensors", "policy.npz")]
    for _ in range(20):
        observation = rng.normal(0, 5, 11).astype(np.float32)
        normal = np.clip((observation - mean) / np.sqrt(variance), -10, 10)
        expected = network(torch.tensor(normal, dtype=torch.float32)).detach().numpy()
        for policy in loaded:
            action = policy.act({"observation": observation}, rng)
            assert action.dtype == np.float32
            np.testing.assert_allclose(action, expected, atol=1e-5)


@pytest.mark.parametrize("wanted, played", [(1.5, 1.5), (-9.0, -2.0)])
def test_a_perceptron_acts_and_is_scored_in_the_whole_range_of_its_actions(tmp_path, monkeypatch, wanted, played):
    path = tmp_path / "pendulum.npz"
    np.savez(path, W0=np.zeros((1, 3)), b0=np.array([wanted]))
    env = simulators.make(simulators.environment_spec("Pendulum-v1"))
    batch = {"observation": np.zeros((1, 3), np.float32)}, np.zeros(1), np.ones(1, bool), np.random.default_rng(0)
    policy = NoisyPolicy(policies.load(str(path), env), simulators.action_spec(env), 0.0)
    assert policy.act(*batch) == played and policy.clipped_share == (wanted != played)
    monkeypatch.setitem(env.get_wrapper_attr("suite").experts, "Pendulum-", lambda env: perceptron.load(path))
    monkeypatch.setattr(scores, "_play", lambda env, policy, seed: (float(policy.act(*batch)[0, 0]), 1))
    assert scores.measure("Pendulum-v1", 2, 0).expert == played


def test_noise_is_added_to_what_is_within_the_range():
    far, spec = SimpleNamespace(act=lambda *batch: np.full((1, 2), 9.0, np.float32)), ActionSpec.continuous(-1, 1, 2)
    rng, again = np.random.default_rng(0), np.random.default_rng(0)
    found = [NoisyPolicy(far, spec, 0.1).act({}, np.zeros(1), np.ones(1, bool), rng) for _ in range(20)]
    np.testing.assert_array_equal(
        np.stack(found), np.minimum(1 + again.normal(0, 0.1, (20, 1, 2)), 1).astype(np.float32)
    )


def test_layers_that_do_not_fit_are_refused(tmp_path):
    path = tmp_path / "broken.npz"
    np.savez(path, W0=np.zeros((8, 11)), b0=np.zeros(8), W1=np.zeros((3, 9)), b1=np.zeros(3))
    with pytest.raises(PolicyError, match=r"broken.npz: layer 1 has weight \(3, 9\)"):
        perceptron.load(path)
    np.savez(path, other=np.zeros(3))
    with pytest.raises(PolicyError, match="broken.npz: no field 'W0'.*other"):
        perceptron.load(path)
    path.write_bytes(b"not an archive")
    with pytest.raises(PolicyError, match="broken.npz: not a readable"):
        perceptron.load(path)


def test_the_shipped_hopper_stands_and_says_where_it_is_from():
    policy = perceptron.load(SHIPPED / "hopper.safetensors")
    assert policy.metadata["algorithm"] == "ppo" and policy.metadata["licence"] == "MIT"
    assert float(policy.metadata["return_mean"]) > 3000
    assert play(policy, "Hopper-v4", seed=0, episodes=1)[0] > 2500


def score(environment, name, steps, seed=0):
    env = simulators.make(simulators.environment_spec(environment))
    policy = policies.load(name, env)
    rng = np.random.default_rng(seed)
    observation, _ = env.reset(seed=seed)
    total = 0.0
    for _ in range(steps):
        batch = {key: value[None] for key, value in observation.items()}
        action = policy.act(batch, np.zeros(1), np.ones(1, bool), rng)[0]
        observation, reward, terminated, truncated, _ = env.step(action)
        total += float(reward)
        if terminated or truncated:
            break
    return total


@pytest.mark.parametrize(
    "environment, steps, margin",
    [("ALE/Pong-v5", 600, 5), ("ALE/Breakout-v5", 400, 8), ("ALE/Freeway-v5", 400, 3), ("PointMaze_UMaze-v3", 300, 50)],
)
def test_scripted_experts_beat_random_by_far(environment, steps, margin):
    assert score(environment, "expert", steps) >= score(environment, "random", steps) + margin
