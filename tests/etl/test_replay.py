"""A policy in training, recorded: rows that the simulator gives again, whole episodes, and an early end."""

import h5py
import numpy as np
import pytest

import simulators
from tests.conftest import run


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    folder = tmp_path_factory.mktemp("replay")
    run("etl.replay", "--timesteps", "4096", "--output", folder, "--policy", folder / "best.safetensors")
    return folder / "hopper-medium-replay-v4.hdf5"


def test_rows_are_the_simulators_own_and_episodes_are_whole(log):
    env = simulators.make(simulators.environment_spec("Hopper-v4"), seed=0)
    with h5py.File(log) as file:
        rows = {key: file[key][:] for key in ("observations", "actions", "rewards", "terminals", "timeouts")}
        rows |= {key: file[key][:] for key in ("next_observations", "infos/qpos", "infos/qvel")}
    assert 3000 < len(rows["rewards"]) <= 4096 and (rows["terminals"] | rows["timeouts"])[-1]
    assert np.abs(rows["actions"]).max() == 1.0  # explored to the bounds, not beyond them
    for row in (0, 500, len(rows["rewards"]) - 1):
        env.reset(seed=0)
        env.unwrapped.set_state(rows["infos/qpos"][row], rows["infos/qvel"][row])
        seen, reward, terminated, _, _ = env.step(rows["actions"][row])
        np.testing.assert_allclose(seen["observation"], rows["next_observations"][row], atol=1e-6)
        assert reward == pytest.approx(rows["rewards"][row], abs=1e-5) and terminated == rows["terminals"][row]
    inside = ~(rows["terminals"] | rows["timeouts"])[:-1]
    np.testing.assert_array_equal(rows["observations"][1:][inside], rows["next_observations"][:-1][inside])


def test_a_part_of_the_episodes_and_an_early_end(log, tmp_path):
    done = run("etl.replay", "--timesteps", "4096", "--every", "5", "--until", "1", "--output", tmp_path)
    assert "2,048 steps: return" in done.stderr and "4,096 steps" not in done.stderr
    with h5py.File(tmp_path / log.name) as few, h5py.File(log) as all_:
        ends = np.flatnonzero(all_["terminals"][:] | all_["timeouts"][:])
        fifth = slice(int(ends[3]) + 1, int(ends[4]) + 1)
        shown = few["observations"][: fifth.stop - fifth.start]
        np.testing.assert_array_equal(shown, all_["observations"][fifth])


def test_what_cannot_be_recorded_so_is_refused_before_it_begins(log, tmp_path):
    for options, words in (
        (("--environment", "CartPole-v1"), "its actions are discrete; experts are trained for continuous ones"),
        (("--timesteps", "100"), "--timesteps 100: must be from 2048"),
        (("--every", "0"), "--every 0: must be from 1"),
    ):
        done = run("etl.replay", "--output", tmp_path, *options, check=False)
        assert done.returncode == 1 and words in done.stderr and not list(tmp_path.iterdir())
    done = run("etl.replay", "--timesteps", "4096", "--output", log.parent, check=False)
    assert done.returncode == 1 and "already there" in done.stderr


def test_the_policy_that_was_kept_is_recorded_by_its_file(log, tmp_path):
    policy = log.parent / "best.safetensors"
    run("etl.record", "--policy", policy, "--steps", "50", "--output", tmp_path)
    assert (tmp_path / "hopper-best-v4.hdf5").is_file()
