"""What is played is what the shards name; one fault stays where it happened."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import gymnasium
import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest
from rich.console import Console

import simulators
from etl.sources import _catalogue
from eval.compare import compare as comparison
from eval.environments import play
from eval.options import Options
from eval.scores import scored
from schemas.episode import EnvironmentSpec, TaskSpec
from schemas.vocabulary import PAPER
from shards.reader import Dataset
from simulators.experts import policies
from simulators.policy import RandomPolicy
from simulators.suites import gym as oldgym
from simulators.uninterrupted import uninterrupted
from tests import warm
from tests.conftest import run
from trainer.model import Gato, ModelConfig
from trainer.model.export import ExportInfo, TrainingInfo, save_export

BREAKOUT = EnvironmentSpec("atari", "ALE/Breakout-v5")


class Faulty(gymnasium.Wrapper):
    """Hopper that fails where its seed is odd."""

    def __init__(self, fault, render_mode=None):
        super().__init__(gymnasium.make("Hopper-v4"))
        self.fault, self.failing, self.steps = fault, False, 0

    def reset(self, *, seed=None, options=None):
        self.failing, self.steps = bool((seed or 0) % 2), 0
        observation, info = self.env.reset(seed=seed)
        if self.failing and self.fault == "throws at reset":
            raise OSError("no more licences")
        return observation * (np.nan if self.failing and self.fault == "nan at reset" else 1.0), info

    def step(self, action):
        observation, reward, *ends = self.env.step(action)
        self.steps += 1
        if self.failing and self.steps == 3:
            if self.fault == "throws":
                raise RuntimeError("the body left the world")
            observation = observation * (np.nan if self.fault == "nan" else 1.0)
            reward = np.inf if self.fault == "reward" else reward
        return observation, reward, *ends


FAULTS = {
    "throws": "RuntimeError: the body left the world",
    "throws at reset": "OSError at reset: no more licences",
    "nan": "observation 'observation' that is not finite",
    "nan at reset": "observation 'observation' that is not finite",
    "reward": "a reward of inf",
}
for name in FAULTS:
    gymnasium.register(f"{name.title().replace(' ', '')}Hopper-v0", entry_point=Faulty, kwargs={"fault": name})


class Blind(gymnasium.Wrapper):
    """Draws nothing, and knows no render_mode."""

    def __init__(self):
        super().__init__(gymnasium.make("CartPole-v1"))


gymnasium.register("Blind-v0", entry_point=Blind)
gymnasium.register("UnbuiltHopper-v0", entry_point=lambda: Faulty())


def hopper_task(folder, environment="Hopper-v4", suite="mujoco"):
    return replace(Dataset(folder).manifest.tasks[0].spec, environment=EnvironmentSpec(suite, environment))


def compare(folders, output, **options):
    settings = {"models": ("random", "behaviour"), "episodes": 4, "film_seconds": 0.0} | options
    settings |= {"datasets": tuple(map(str, folders)), "output": output, "processes": 1}
    comparison(Options(**settings), Console(quiet=True))
    return pq.read_table(output / "rows.parquet").to_pylist()


def test_pointmaze_is_recorded_built_and_played(tmp_path):
    run("etl.record", "-e", "PointMaze_UMaze-v3", "--steps", "300", "-o", tmp_path / "logs")
    run("etl.build", "--source", "minari", "--input", tmp_path / "logs", "--output", tmp_path / "shards")
    rows = compare([tmp_path / "shards"], tmp_path / "out", episodes=2)
    assert {row["environment"] for row in rows if row["model"] == "random"} == {"PointMaze_UMaze-v3"}
    assert [(row["timesteps"], row["ending"]) for row in rows if row["model"] == "random"] == [(300, "truncated")] * 2
    (task,) = (one.spec for one in Dataset(tmp_path / "shards").manifest.tasks)
    env = simulators.make(task.environment, seed=0)
    assert task.environment.kwargs["maze_map"] == env.unwrapped.maze.maze_map
    # the scripted expert in what the shards name earns what it earned in the log
    policy, rng = policies.load("expert", env).player, np.random.default_rng(0)
    observation, _ = env.reset(seed=0)
    total = 0.0
    for _ in range(300):
        observation, reward, *_ = env.step(policy.act(observation, rng))
        total += reward
    assert total == next(row["return"] for row in rows if row["model"] == "behaviour") > 0


def test_atari_is_played_by_the_standard_protocol(pong):
    task = Dataset(pong).manifest.tasks[0].spec
    settings = simulators.settings(task.environment)
    assert settings == {
        "ends_on_life_loss": False,
        "frameskip": 4,
        "full_action_space": False,
        "max_episode_steps": 27_000,
        "max_num_frames_per_episode": 0,
        "noop_max": 30,
        "repeat_action_probability": 0.25,
        "rewards": "unclipped",
    }
    assert task.max_episode_steps == settings["max_episode_steps"] == 108_000 / settings["frameskip"]
    # and the emulator says so itself
    env = simulators.make(BREAKOUT, seed=1)
    ale = env.unwrapped.ale
    assert ale.getFloat("repeat_action_probability") == pytest.approx(0.25) and ale.getInt("frame_skip") == 1
    assert ale.getInt("max_num_frames_per_episode") == 0 and env.get_wrapper_attr("_max_episode_steps") == 27_000
    before, frame, rewards, lives = ale.lives(), ale.getEpisodeFrameNumber(), set(), []
    rng, actions = np.random.default_rng(0), 0
    terminated = False
    while not terminated:
        _, reward, terminated, truncated, _ = env.step(rng.integers(4))
        actions += 1
        rewards.add(reward)
        lives.append(ale.lives())
        assert not truncated
    assert before == 5 and set(lives) == {5, 4, 3, 2, 1, 0}  # an episode is a whole game
    assert frame + 4 * actions - 4 < ale.getEpisodeFrameNumber() <= frame + 4 * actions
    invaders = simulators.make(EnvironmentSpec("atari", "ALE/SpaceInvaders-v5"), seed=1)
    assert max(float(invaders.step(1)[1]) for _ in range(200)) >= 5


def test_d4rls_time_limits_are_played():
    """Scores are of returns under D4RL's limit: its pen drops after 100 steps, gymnasium-robotics' after 200."""
    for name, dataset in _catalogue.d4rl_datasets().items():
        if dataset.environment is not None:
            assert simulators.settings(dataset.environment)["max_episode_steps"] == dataset.max_episode_steps, name
    pen = _catalogue.d4rl_datasets()["pen-human-v1"].environment
    env = simulators.make(pen, seed=0)
    steps = next(n for n in range(1, 300) if any(env.step(env.action_space.sample())[2:4]))
    assert steps <= 100 and env.get_wrapper_attr("_max_episode_steps") == 100


def test_babyai_is_scored_by_success(tmp_path):
    run("etl.record", "-e", "BabyAI-GoToRedBallNoDists-v0", "--steps", "60", "-o", tmp_path / "logs")
    run("etl.build", "--source", "babyai", "--input", tmp_path / "logs", "--output", tmp_path / "shards")
    rows = compare([tmp_path / "shards"], tmp_path / "out", episodes=6)
    random = [row for row in rows if row["model"] == "random"]
    assert {row["score_kind"] for row in rows} == {"success"}
    assert all(row["score"] == (100.0 if row["return"] > 0 else 0.0) for row in rows)
    assert all((row["ending"] == "terminated") == (row["score"] == 100.0) for row in random)
    assert 0 < np.mean([row["score"] for row in random]) < 100
    assert all(row["score"] == 100.0 for row in rows if row["model"] == "behaviour" and row["ending"] == "terminated")
    table = (tmp_path / "out/table.md").read_text()
    assert "success rate in % (100: all solved)" in table and "(100.0)" in table
    assert scored(0.4, Dataset(tmp_path / "shards").manifest.tasks[0].spec) == (100.0, "success")


class Old:
    """A gymnasium environment as gym up to 0.25 had it: seed(), observation alone, four values."""

    def __init__(self, new):
        self.new, self.observation_space, self.action_space = new, new.observation_space, new.action_space

    def seed(self, seed):
        self.next_seed = seed

    def reset(self):
        return self.new.reset(seed=self.next_seed)[0]

    def step(self, action):
        observation, reward, terminated, truncated, info = self.new.step(action)
        over = {"TimeLimit.truncated": not terminated} if truncated else {}
        return observation, reward, terminated or truncated, info | over

    def close(self):
        self.new.close()


@pytest.mark.parametrize("id, limit", [("Hopper-v4", 500), ("HalfCheetah-v4", 40)])
def test_the_old_step_is_the_new_step(id, limit):
    new = gymnasium.make(id, max_episode_steps=limit)
    old = oldgym.OldGym(Old(gymnasium.make(id, max_episode_steps=limit)), five=False)
    assert old.observation_space == new.observation_space and old.action_space == new.action_space
    new.action_space.seed(0)
    np.testing.assert_array_equal(new.reset(seed=3)[0], old.reset(seed=3)[0])
    ended = False
    while not ended:
        action = new.action_space.sample()
        (o, *ours), (t, *theirs) = old.step(action), new.step(action)
        np.testing.assert_array_equal(o, t)
        assert ours[:3] == theirs[:3]
        ended = ours[1] or ours[2]
    assert ours[1:3] == ([True, False] if id == "Hopper-v4" else [False, True])


@pytest.mark.parametrize("id", ["Pendulum-v1", "CartPole-v1", "Hopper-v4"])
def test_the_real_old_gym_plays(id, hopper):
    """By hand: gym 0.23 to 0.26 on the path, and for Hopper-v4 gym 0.25 or 0.26 with mujoco up to 2.3.2."""
    pytest.importorskip("gym")
    try:
        env = simulators.make(simulators.environment_spec(f"gym/{id}"))
    except simulators.SimulatorError as error:
        pytest.skip(f"this gym cannot build it: {error}")
    action = simulators.action_spec(env)
    size = simulators.observation_fields(env)[0].shape
    task = replace(hopper_task(hopper, f"gym/{id}", "gym"), action=action)
    task = replace(task, observation=(replace(task.observation[0], shape=size),))
    first, again, other = (play(RandomPolicy(task.action), task, [seed]) for seed in (1, 1, 2))
    assert first[0].error == "" and first[0].ending in ("terminated", "truncated")
    assert (first[0].episode_return, first[0].timesteps) == (again[0].episode_return, again[0].timesteps)
    assert first[0].episode_return != other[0].episode_return or id == "CartPole-v1"
    assert simulators.versions()["gym"]


def test_a_d4rl_log_is_built_for_the_old_gym(logs, tmp_path):
    arguments = ("--source", "d4rl", "--input", logs / "d4rl", "--environment", "gym/Hopper-v2")
    run("etl.build", *arguments, "--output", tmp_path)
    spec = Dataset(tmp_path).manifest.tasks[0].spec
    assert spec.environment == EnvironmentSpec("gym", "gym/Hopper-v2") and spec.score.high == 3234.3


def test_an_episode_that_only_a_goal_ends_is_given_up():
    """CliffWalking has no limit: who walks against its wall walks on."""
    environment = simulators.environment_spec("CliffWalking-v1")
    env = simulators.make(environment)
    task = TaskSpec("walls", "classic", simulators.observation_fields(env), simulators.action_spec(env), environment,
                    max_episode_steps=13)  # fmt: skip
    up = RandomPolicy(task.action)
    up.act = lambda observations, reward, active, rng: np.zeros(len(active), np.int64)
    ended = [(one.ending, one.timesteps, one.episode_return) for one in play(up, task, [0, 1])]
    assert ended == [("step limit", 1300, -1300.0)] * 2
    assert [one.timesteps for one in play(up, task, [0], step_limit=4)] == [4]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_ends_its_own_episode(fault, hopper):
    seeds = [1000, 1001, 1002, 1003]
    task = hopper_task(hopper)
    faulty = replace(task, environment=EnvironmentSpec("mujoco", f"{fault.title().replace(' ', '')}Hopper-v0"))
    played, sound = (play(RandomPolicy(task.action), one, seeds, step_limit=30) for one in (faulty, task))
    for one, other in zip(played, sound):
        if one.seed % 2:
            assert one.ending == "error" and FAULTS[fault] in one.error
            assert one.timesteps == (0 if "reset" in fault else 2) and np.isfinite(one.episode_return)
        else:
            assert (one.episode_return, one.timesteps, one.ending) == (
                other.episode_return,
                other.timesteps,
                other.ending,
            )


def test_ctrl_c_waits_for_a_native_import():
    """Raised inside ale-py's own set-up it would abort the process."""
    code = "import os, signal; os.kill(os.getpid(), signal.SIGINT); done = True"
    with pytest.raises(KeyboardInterrupt), uninterrupted():
        scope = {}
        exec(code, scope)
        assert scope["done"]


def test_no_picture_is_no_error(hopper):
    spec = EnvironmentSpec("gymnasium", "Blind-v0")
    env = simulators.make(spec)
    task = replace(
        hopper_task(hopper),
        observation=simulators.observation_fields(env),
        action=simulators.action_spec(env),
        environment=spec,
    )
    (one,) = play(RandomPolicy(task.action), task, [0], film=10)
    assert one.ending == "terminated" and one.frames == []


def test_one_faulty_task_leaves_the_others(logs, tmp_path):
    """Six logs of one recording, five of which name an environment that cannot be played, or not to the end."""
    (log,) = (logs / "d4rl").iterdir()
    wrong = {
        "spaces": ("Walker2d-v4", "logged with observations .*11.* but Walker2d-v4 has .*17.*rebuild the dataset"),
        "unknown": ("NoSuchBody-v1", "unknown environment 'NoSuchBody-v1'; use a gymnasium id"),
        "package": ("gym/NoSuchBody-v1", "gym"),
        "unbuilt": ("UnbuiltHopper-v0", "UnbuiltHopper-v0: TypeError.*fault"),
        "throws": ("ThrowsHopper-v0", "RuntimeError: the body left the world"),
        "sound": ("Hopper-v4", ""),
    }
    for name, (environment, _) in wrong.items():
        (tmp_path / name).mkdir()
        copy = shutil.copy(log, tmp_path / name / f"{name}.hdf5")
        with h5py.File(copy, "r+") as file:
            file.attrs["env_id"] = environment
    for folder, chosen in (("all", tmp_path), ("one", tmp_path / "sound")):
        run("etl.build", "--source", "d4rl", "--input", chosen, "--output", tmp_path / folder)
    rows, alone = (compare([tmp_path / name], tmp_path / f"{name}-out") for name in ("all", "one"))
    keep = ("model", "return", "score", "timesteps", "ending", "episode_seed")
    by_task = {name: [row for row in rows if row["dataset"] == name] for name in wrong}
    assert [[row[key] for key in keep] for row in by_task["sound"]] == [[row[key] for key in keep] for row in alone]
    for name, (environment, message) in wrong.items():
        behaviour = [row for row in by_task[name] if row["model"] == "behaviour"]
        assert len(behaviour) > 10 and all(row["ending"] != "error" for row in behaviour)
        failed = [row for row in by_task[name] if row["ending"] == "error"]
        assert len(failed) == {"sound": 0, "throws": 2}.get(name, 4)  # of four episodes
        for row in failed:
            assert row["environment"] == environment
            assert re.search(message, row["error"])
    protocol = json.loads(by_task["sound"][0]["protocol"])
    assert protocol["environment"] == {"max_episode_steps": 1000}
    versions = json.loads(by_task["sound"][0]["versions"])
    assert {"gymnasium", "mujoco", "gymnasium-robotics", "torch", "numpy"} <= set(versions)
    table = (tmp_path / "all-out/table.md").read_text()
    assert "Random failed, and no episode was finished: task 'spaces': logged with observations" in table
    assert "2 of 4 episodes ended in an error and were left out: RuntimeError: the body left the world" in table
    assert "the body left the world" in (tmp_path / "all-out/report.html").read_text()


def exported(folder, vocabulary):
    small = ModelConfig(blocks=1, heads=2, width=32, feed_forward=64, head_size=16, patch_channels=16)
    model = Gato(small, vocabulary).initialise(1)
    info = ExportInfo("gato.model", 1, small, vocabulary, vocabulary.fingerprint, 120, 0, (), {}, TrainingInfo())
    save_export(folder, dict(model.state_dict()), info)
    return folder


def test_a_checkpoint_of_another_vocabulary(hopper, logs, tmp_path):
    paper = exported(tmp_path / "export", PAPER)
    command = ("eval.compare", "--gato", paper, "--datasets", hopper, "-o", tmp_path / "out", "--processes", "1")
    done = run(*command, check=False)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and "vocabulary" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and not (tmp_path / "out").exists()
    # beside a dataset that it fits, the other's rows alone are marked
    (tmp_path / "logs").mkdir()
    shutil.copy(next((logs / "d4rl").iterdir()), tmp_path / "logs" / "second.hdf5")
    run("etl.build", "--input", tmp_path / "logs", "--vocabulary", "paper", "--output", tmp_path / "fits")
    rows = compare(
        [hopper, tmp_path / "fits"], tmp_path / "both", models=("random", "gato"), gato=(paper,), step_limit=5
    )
    prints = {Dataset(folder).manifest.fingerprint: folder for folder in (hopper, tmp_path / "fits")}
    gato = [(prints[row["dataset_fingerprint"]], row["ending"]) for row in rows if row["model"] == "gato"]
    assert gato == [(hopper, "error")] * 4 + [(tmp_path / "fits", "step limit")] * 4
    assert [row["ending"] for row in rows if row["model"] == "random"] == ["step limit"] * 8


@pytest.mark.parametrize("processes", ["1", "2"])
@pytest.mark.process
def test_ctrl_c_keeps_what_was_played(processes, hopper, pong, tmp_path):
    output = tmp_path / "out"
    command = [sys.executable, "-m", "eval.compare", "--models", "random", "--datasets", str(hopper), str(pong)]
    command += ["--output", str(output), "--film-seconds", "0", "--step-limit", "150", "--processes", processes]
    process = warm.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    until = time.monotonic() + 200
    while not (found := list(output.glob("parts/*.parquet"))) and time.monotonic() < until:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: its children get it too
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130, said
    assert "interrupted: the same command again" in said and "Traceback" not in said
    assert len(found) == 1 and list(output.rglob("*.parquet")) == found
    before = found[0].read_bytes()
    again = warm.run(command, timeout=300)
    assert again.returncode == 0 and again.stderr.count("kept from before") == 1
    assert found[0].read_bytes() == before
    rows = pq.read_table(output / "rows.parquet").to_pylist()
    assert [row["ending"] for row in rows] == [row["ending"] for row in rows if row["ending"] != "error"]
    assert len(rows) == 20 and {row["environment"] for row in rows} == {"Hopper-v4", "ALE/Pong-v5"}
