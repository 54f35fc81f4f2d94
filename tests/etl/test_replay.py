"""A policy in training, recorded: rows that the simulator gives again, whole episodes, and an early end."""

import os
from pathlib import Path

import h5py
import numpy as np
import pytest

import simulators
from tests.conftest import run

ROOT = Path(__file__).resolve().parents[2]


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
        (("--environment", "PointMaze_UMaze-v3"), "only observations of one plain vector are replayed"),
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


BODIES = """
import gymnasium
import numpy as np
from gymnasium.spaces import Box


class Body(gymnasium.Env):
    observation_space = Box(-10, 10, (3,), np.float32)
    action_space = Box(np.float32([0, -3]), np.float32([1, 7]))
    total = 0

    def seen(self):
        return self.np_random.uniform(-1, 1, 3).astype(np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.timestep = 0
        return self.seen(), {}

    def step(self, action):
        assert self.action_space.contains(action), f"beyond the range: {action}"
        self.timestep, Body.total = self.timestep + 1, Body.total + 1
        if self.spec.id == "Stalls-v0" and Body.total == 500:
            raise RuntimeError("motor is hot")
        reward = float("nan") if self.spec.id == "Nan-v0" and Body.total == 500 else 1.0
        return self.seen(), reward, self.timestep >= 30 and self.spec.id != "Endless-v0", False, {}


for name in ("Asymmetric", "Stalls", "Nan", "Endless"):
    gymnasium.register(f"{name}-v0", Body)
"""


@pytest.fixture(scope="module")
def bodies(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bodies")
    (folder / "replay_bodies.py").write_text(BODIES)
    return {"PYTHONPATH": f"{folder}:{ROOT}"}


@pytest.mark.process
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Stalls", "Stalls-v0: timestep 2 of an episode: RuntimeError: motor is hot"),
        ("Nan", "FloatingPointError: the simulator returned a reward of nan"),
        ("Endless", "an episode has no end within the 2048 --timesteps"),
    ],
)
def test_a_body_that_fails_ends_it_with_one_line_and_no_log(bodies, tmp_path, name, words):
    command = ("etl.replay", "--environment", f"replay_bodies:{name}-v0", "--timesteps", "2048", "--output", tmp_path)
    done = run(*command, check=False, env=os.environ | bodies)
    errors = [line for line in done.stderr.splitlines() if "return" not in line or line.startswith("error")]
    assert done.returncode == 1 and "Traceback" not in done.stderr and words in errors[-1], done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.process
def test_actions_stay_in_a_range_that_is_not_symmetric(bodies, tmp_path):
    command = ("etl.replay", "--environment", "replay_bodies:Asymmetric-v0", "--timesteps", "2048")
    run(*command, "--output", tmp_path, env=os.environ | bodies)
    with h5py.File(tmp_path / "asymmetric-medium-replay-v0.hdf5") as file:
        actions = file["actions"][:]
    assert actions.min(0).tolist() == [0, -3] and (actions.max(0) <= [1, 7]).all()


def test_a_policy_that_cannot_be_kept_is_refused_before_the_training(log, tmp_path):
    for name, words in (
        ("best.pt", "give a name that ends in .safetensors"),
        ("file/best.safetensors", "file is a file; give a folder"),
        ("there.safetensors", "already there; give another name, or --overwrite"),
    ):
        (tmp_path / "file").touch()
        (tmp_path / "there.safetensors").write_bytes(b"kept")
        done = run("etl.replay", "--output", tmp_path / "out", "--policy", tmp_path / name, check=False)
        assert done.returncode == 1 and words in done.stderr and not (tmp_path / "out").exists()
    assert (tmp_path / "there.safetensors").read_bytes() == b"kept"
    done = run("etl.replay", "--output", tmp_path / "out", "--until", "nan", check=False)
    assert done.returncode == 1 and "--until nan: must be from" in done.stderr
