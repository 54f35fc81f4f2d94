"""Recording: the layouts, determinism, and that a log replays in the simulator."""

from __future__ import annotations

import gzip
from itertools import islice
from pathlib import Path

import h5py
import minari
import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import save_file

import simulators
from etl import record
from eval.options import Options as Compared
from simulators.experts import PolicyError, policies
from simulators.rollout import Step, reset_seed

QUIET = Console(quiet=True)


def recorded(folder: Path, **options) -> Path:
    asked = record.Options(output=folder, **options)
    record.check(asked)
    return record.record(asked, QUIET).path


def load_d4rl(path: Path) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    with h5py.File(path) as file:
        for key in ("observations", "actions", "rewards", "terminals", "timeouts", "next_observations"):
            found[key] = file[key][()]
        found |= {f"infos/{key}": values[()] for key, values in file.get("infos", {}).items()}
        assert set(file) <= {key.split("/")[0] for key in found} | {"metadata"}
    return found


def algorithm_of(path: Path) -> bytes:
    with h5py.File(path) as file:
        return file["metadata/algorithm"][()]


def log_bytes(path: Path) -> dict[str, bytes]:
    files = [path] if path.is_file() else [one for one in path.rglob("*") if one.is_file()]
    return {one.name: one.read_bytes() for one in files}


def load_replay(folder: Path) -> dict[str, np.ndarray]:
    found = {}
    for path in sorted(folder.iterdir()):
        with gzip.open(path) as file:
            found[path.name] = np.lib.format.read_array(file, allow_pickle=False)
    return found


@pytest.fixture(scope="module")
def hopper(tmp_path_factory) -> Path:
    return recorded(tmp_path_factory.mktemp("logs"), environment="Hopper-v4", policy="random", steps=300, noise=0.1)


@pytest.fixture(scope="module")
def pong(tmp_path_factory) -> Path:
    return recorded(tmp_path_factory.mktemp("logs"), environment="ALE/Pong-v5", steps=200, noise=0.1)


def test_d4rl_keys_dtypes_and_name(hopper):
    assert hopper.name == "hopper-random-v4.hdf5"
    log = load_d4rl(hopper)
    rows = len(log["rewards"])
    assert 300 <= rows <= 330
    expected = {
        "observations": (np.float32, (rows, 11)),
        "next_observations": (np.float32, (rows, 11)),
        "actions": (np.float32, (rows, 3)),
        "rewards": (np.float32, (rows,)),
        "terminals": (np.bool_, (rows,)),
        "timeouts": (np.bool_, (rows,)),
        "infos/qpos": (np.float64, (rows, 6)),
        "infos/qvel": (np.float64, (rows, 6)),
    }
    assert {key: (value.dtype, value.shape) for key, value in log.items()} == expected
    assert algorithm_of(hopper) == b"random"
    with h5py.File(hopper) as file:
        assert file.attrs["env_id"] == "Hopper-v4"


def test_a_timestep_is_followed_by_the_next_unless_the_episode_ended(hopper):
    log = load_d4rl(hopper)
    ended = log["terminals"] | log["timeouts"]
    assert ended.any() and not (log["terminals"] & log["timeouts"]).any()
    goes_on = ~ended[:-1]
    np.testing.assert_array_equal(log["next_observations"][:-1][goes_on], log["observations"][1:][goes_on])
    assert (log["next_observations"][:-1][~goes_on] != log["observations"][1:][~goes_on]).any(axis=1).all()


def test_logged_actions_replayed_from_logged_states_give_the_logged_outcome(hopper):
    log = load_d4rl(hopper)
    env = simulators.make(simulators.environment_spec("Hopper-v4"), seed=0)
    for row in range(0, len(log["rewards"]), 7):
        env.reset()
        env.unwrapped.set_state(log["infos/qpos"][row], log["infos/qvel"][row])
        observation, reward, terminated, *_ = env.step(log["actions"][row])
        np.testing.assert_allclose(observation["observation"], log["next_observations"][row], atol=1e-4)
        assert reward == pytest.approx(log["rewards"][row], abs=1e-4)
        assert terminated == log["terminals"][row]


def test_noise_is_in_the_log_and_in_range(tmp_path):
    path = recorded(tmp_path / "clean", steps=50, seed=1)
    clean = load_d4rl(path)
    noisy = load_d4rl(recorded(tmp_path / "noisy", steps=50, seed=1, noise=0.2))
    assert algorithm_of(path) == b"ppo"
    np.testing.assert_array_equal(clean["observations"][0], noisy["observations"][0])
    assert (clean["actions"][0] != noisy["actions"][0]).any()
    assert np.abs(noisy["actions"]).max() <= 1.0


def test_a_time_limit_is_a_timeout(tmp_path):
    path = recorded(tmp_path, environment="HalfCheetah-v4", policy="random", steps=1001)
    log = load_d4rl(path)
    assert np.flatnonzero(log["timeouts"]).tolist() == [999] and not log["terminals"].any()


def test_several_fields_make_a_minari_dataset(tmp_path):
    path = recorded(tmp_path, environment="PointMaze_UMaze-v3", steps=310, noise=0.1)
    assert path.parts[-2:] == ("pointmaze_umaze", "expert-v3")
    dataset = minari.MinariDataset(path / "data")
    first, cut = dataset.iterate_episodes()  # a tenth more than asked for, in which the last one might have ended
    assert sorted(first.observations) == ["achieved_goal", "desired_goal", "observation"]
    assert (len(first.actions), len(cut.actions), len(first.observations["observation"])) == (
        300,
        41,
        301,
    )  # a tenth more, to end the last one
    assert first.truncations[-1] and not cut.truncations.any() and dataset.spec.env_spec.id == "PointMaze_UMaze-v3"
    assert dataset.storage.metadata["algorithm_name"] == "scripted"
    assert not [p for p in tmp_path.rglob("*.tmp")]


def test_dqn_replay_layout(pong):
    assert pong.parts[-3:] == ("Pong", "1", "replay_logs")
    log = load_replay(pong)
    rows = int(log["add_count_ckpt.0.gz"])
    assert 200 <= rows <= 220
    shapes = {name.removeprefix("$store$_"): (array.dtype, array.shape) for name, array in log.items()}
    assert shapes == {
        "observation_ckpt.0.gz": (np.uint8, (rows, 84, 84)),
        "action_ckpt.0.gz": (np.int32, (rows,)),
        "reward_ckpt.0.gz": (np.float32, (rows,)),
        "terminal_ckpt.0.gz": (np.uint8, (rows,)),
        "add_count_ckpt.0.gz": (np.int64, ()),
        "invalid_range_ckpt.0.gz": (np.int64, (5,)),
    }
    assert set(np.unique(log["$store$_action_ckpt.0.gz"])) <= set(range(6))
    assert len(np.unique(log["$store$_observation_ckpt.0.gz"].reshape(rows, -1), axis=0)) > rows // 2


@pytest.mark.parametrize("environment", ["Hopper-v4", "ALE/Pong-v5"])
def test_same_arguments_same_arrays_and_another_seed_others(tmp_path, environment):
    load = load_replay if environment.startswith("ALE/") else load_d4rl
    options = {"environment": environment, "policy": "random", "steps": 60, "noise": 0.1}
    first, again = (load(recorded(tmp_path / name, **options)) for name in "ab")
    assert {key: value.tobytes() for key, value in first.items()} == {k: v.tobytes() for k, v in again.items()}
    other = load(recorded(tmp_path / "c", **options, seed=1))
    assert any(first[key].tobytes() != other[key].tobytes() for key in first if "action" in key)


def test_a_policy_of_another_body_is_refused(tmp_path):
    path = tmp_path / "cheetah.npz"
    np.savez(path, W0=np.zeros((6, 17), np.float32), b0=np.zeros(6, np.float32))
    with pytest.raises(PolicyError, match=r"cheetah.npz: input \(layer 0\) has size 17, Hopper-v4 needs 11"):
        recorded(tmp_path, policy=str(path))
    np.savez(path, W0=np.zeros((6, 11), np.float32), b0=np.zeros(6, np.float32))
    with pytest.raises(PolicyError, match=r"cheetah.npz: output \(layer 0\) has size 6, Hopper-v4 needs 3"):
        recorded(tmp_path, policy=str(path))


def test_what_cannot_be_recorded_is_said_and_leaves_nothing(tmp_path):
    with pytest.raises(PolicyError, match="no expert of Walker2d-v4 is shipped"):
        recorded(tmp_path, environment="Walker2d-v4")
    with pytest.raises(PolicyError, match="nowhere.npz: no such policy file"):
        recorded(tmp_path, policy="nowhere.npz")
    assert not list(tmp_path.iterdir())
    recorded(tmp_path, policy="random", steps=5)
    with pytest.raises(ValueError, match="already there.*--overwrite"):
        recorded(tmp_path, policy="random", steps=5)
    recorded(tmp_path, policy="random", steps=5, overwrite=True)


@pytest.mark.parametrize("environment", ["Hopper-v4", "CartPole-v1", "ALE/Pong-v5"])
def test_a_second_recording_of_one_name_is_refused_while_the_first_runs(tmp_path, monkeypatch, environment):
    options = {"environment": environment, "policy": "random", "steps": 30, "overwrite": True}
    alone = log_bytes(recorded(tmp_path / "alone", **options))
    play, said = record.play, []

    def with_another(*arguments):
        monkeypatch.setattr(record, "play", play)
        with pytest.raises(ValueError, match="another process is writing it; wait for it to end, or give another --o"):
            recorded(tmp_path / "both", **options)
        said.append("refused")
        yield from play(*arguments)

    monkeypatch.setattr(record, "play", with_another)
    path = recorded(tmp_path / "both", **options)
    assert said and log_bytes(path) == alone
    assert not [one for one in (tmp_path / "both").rglob(".*")]
    recorded(tmp_path / "both", **options)  # it is free again


def test_a_recording_that_was_killed_leaves_nothing_after_the_next(tmp_path):
    options = {"environment": "CartPole-v1", "policy": "random", "steps": 20}
    path = recorded(tmp_path, **options)
    before = log_bytes(path)
    path.rename(tmp_path / ".cartpole-random-v1.tmp")
    (path.parent / f".{path.name}.lock").touch()
    assert log_bytes(recorded(tmp_path, **options)) == before
    assert not list(tmp_path.rglob(".*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise": float("nan")}, "--noise nan: must be from 0"),
        ({"noise": 5.0, "environment": "CartPole-v1"}, "--noise 5.0: must be from 0 to 1"),
        ({"seed": -1}, "--seed -1: must be from 0"),
        ({"steps": 0}, "--steps 0: must be from 1"),
        ({"level": "a/b"}, "--level 'a/b': it is a part of a file name"),
    ],
)
def test_options_that_mean_nothing_are_refused_by_name(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        recorded(tmp_path, policy="random", **options)
    assert not list(tmp_path.iterdir())


def test_actions_beyond_their_space_are_clipped_and_counted(tmp_path, monkeypatch):
    module = tmp_path / "far_experts.py"
    module.write_text("def far(env):\n    return lambda observation: [0.4, 9.0, -9.0]\n")
    options = record.Options(environment="Hopper-v4", policy="far_experts:far", steps=9, output=tmp_path / "logs")
    monkeypatch.syspath_prepend(tmp_path)
    done = record.record(options, QUIET)
    assert done.clipped == pytest.approx(2 / 3)
    assert str(done).endswith("67% of the policy's action values lay beyond the action space and were clipped")
    assert np.abs(load_d4rl(done.path)["actions"]).max() == 1


@pytest.mark.parametrize("environment", ["Hopper-v4", "ALE/Pong-v5"])
def test_an_interrupted_recording_leaves_no_log(tmp_path, monkeypatch, environment):
    play = record.play

    def interrupted(*arguments):
        for n, step in enumerate(play(*arguments)):
            if n == 20:
                raise KeyboardInterrupt
            yield step

    monkeypatch.setattr(record, "play", interrupted)
    with pytest.raises(KeyboardInterrupt):
        recorded(tmp_path, environment=environment, policy="random", steps=100)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def a3c_file(path: Path, actions: int = 6, **changed) -> Path:
    rng = np.random.default_rng(0)
    shapes = {f"conv{n}.weight": (32, 1 if n == 1 else 32, 3, 3) for n in range(1, 5)}
    shapes |= {f"conv{n}.bias": (32,) for n in range(1, 5)}
    shapes |= {"gru.weight_ih": (768, 800), "gru.weight_hh": (768, 256), "gru.bias_ih": (768,), "gru.bias_hh": (768,)}
    shapes |= {"actor_linear.weight": (actions, 256), "actor_linear.bias": (actions,)}
    arrays = {name: rng.normal(0, 0.1, shape).astype(np.float32) for name, shape in (shapes | changed).items() if shape}
    save_file(arrays, path)
    return path


def test_a_recurrent_policy_plays_atari_and_remembers(tmp_path):
    path = a3c_file(tmp_path / "pong.safetensors")
    logs = [recorded(tmp_path / name, environment="ALE/Pong-v5", policy=str(path), steps=60) for name in "ab"]
    first, again = (gzip.decompress((log / "$store$_action_ckpt.0.gz").read_bytes()) for log in logs)
    assert first == again
    env = simulators.make(simulators.environment_spec("ALE/Pong-v5"), seed=0)
    policy, observation = policies.load(str(path), env).player, env.reset(seed=0)[0]
    policy.act(observation, np.random.default_rng(0))
    assert policy.memory.abs().sum() > 0
    policy.reset()
    assert policy.memory.abs().sum() == 0
    cold = [
        recorded(tmp_path / n, environment="ALE/Pong-v5", policy=str(path), steps=60, temperature=1e-3) for n in "cd"
    ]
    cold = [set(gzip.decompress((log / "$store$_action_ckpt.0.gz").read_bytes())[128:]) for log in cold]
    assert cold[0] == cold[1] and len(cold[0]) < len(set(first[128:]))


def test_temperature_is_for_policies_that_sample(tmp_path):
    with pytest.raises(PolicyError, match="has no temperature"):
        recorded(tmp_path, temperature=0.5, steps=5)
    with pytest.raises(ValueError, match="--temperature 0.0: must be from"):
        recorded(tmp_path, temperature=0.0, steps=5)


@pytest.mark.parametrize(
    ("environment", "given", "message"),
    [
        ("ALE/Breakout-v5", {}, "has 6 actions, ALE/Breakout-v5 needs 4"),
        ("Hopper-v4", {}, "plays Atari games, not Hopper-v4"),
        ("ALE/Pong-v5", {"gru.bias_hh": ()}, "no field 'gru.bias_hh'"),
        ("ALE/Pong-v5", {"conv2.bias": (3,)}, r"field 'conv2.bias' has shape \(3,\), must be \(32,\)"),
        ("ALE/Pong-v5", {"actor_linear.bias": ()}, "no field 'actor_linear.bias'"),
    ],
)
def test_a_recurrent_policy_that_does_not_fit_is_refused(tmp_path, environment, given, message):
    path = a3c_file(tmp_path / "policy.safetensors", **given)
    with pytest.raises(PolicyError, match=message):
        recorded(tmp_path, environment=environment, policy=str(path), steps=5)


def test_no_episode_is_reset_as_a_comparison_resets_it(monkeypatch):
    compared = Compared()
    played = range(compared.first_seed, compared.first_seed + 1000)
    assert not {reset_seed(0, n) for n in range(3000)} & set(played)
    assert [reset_seed(0, n) for n in (0, 999, 1000)] == [0, 999, 2000]
    assert reset_seed(2, 1000) == 2_000_006 + 1000
    seeds = []

    def one_step(policy, environments, asked, *_, **__):
        seeds.extend(asked)
        return [Step(0, {}, None)]

    monkeypatch.setattr(record, "rollout", one_step)
    env = simulators.make(simulators.environment_spec("CartPole-v1"))
    steps = record.play(record.Options(environment="CartPole-v1"), env, policies.load("random", env))
    assert len(list(islice(steps, 1003))) == 1003
    assert seeds == [*range(1000), 2000, 2001, 2002]
