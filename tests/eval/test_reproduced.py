"""Policies of others score in our simulators what they are known to score: environment, preprocessing and score.

    GATO_SHARED_DATA=FOLDER python -m pytest -m slow -s tests/eval/test_reproduced.py     prints the table

FOLDER holds policies/ and atari_scores.json. The figures below are its description's, mostly means of 3 episodes; ours
are of more, with other seeds.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

import simulators
from etl.sources import _catalogue
from eval.environments import play
from eval.scores import normalised
from schemas.episode import EnvironmentSpec, TaskSpec
from simulators.experts import perceptron
from simulators.experts.a3c import A3C
from simulators.policy import NoisyPolicy

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("GATO_SHARED_DATA" not in os.environ, reason="GATO_SHARED_DATA names no folder of policies"),
]
SHARED = Path(os.environ.get("GATO_SHARED_DATA", "."))
EPISODES = 20  # some fall early in one episode of six
TOUCHLESS = {"use_contact_forces": False}
# policy -> environment, arguments, mean return as described
BODIES = {
    "hopper-tqc": ("Hopper-v4", {}, 3317),
    "hopper-sac": ("Hopper-v4", {}, 1097),
    "hopper-ppo": ("Hopper-v4", {}, 2437),
    "hopper-trpo": ("Hopper-v4", {}, 3625),
    "hopper-a2c": ("Hopper-v4", {}, 800),
    "hopper-ars": ("Hopper-v4", {}, 1411),
    "halfcheetah-tqc": ("HalfCheetah-v4", {}, 12083),
    "halfcheetah-sac": ("HalfCheetah-v4", {}, 9463),
    "halfcheetah-ppo": ("HalfCheetah-v4", {}, 5863),
    "halfcheetah-trpo": ("HalfCheetah-v4", {}, 1833),
    "halfcheetah-a2c": ("HalfCheetah-v4", {}, 2899),
    "halfcheetah-ars": ("HalfCheetah-v4", {}, 4796),
    "walker2d-tqc": ("Walker2d-v4", {}, 3899),
    "walker2d-sac": ("Walker2d-v4", {}, 3843),
    "walker2d-trpo": ("Walker2d-v4", {}, 5355),
    "walker2d-a2c": ("Walker2d-v4", {}, 629),
    "walker2d-ars": ("Walker2d-v4", {}, 943),
    "walker2d_cs285": ("Walker2d-v4", {}, 5423),
    "halfcheetah_cs285": ("HalfCheetah-v4", {}, 4200),  # described as 36 normalised
    "ant_trpo": ("Ant-v4", TOUCHLESS, 5209),
    "door_dapg": ("AdroitHandDoor-v1", {}, 3027),
    "pen_dapg": ("AdroitHandPen-v1", {}, 5486),  # under gymnasium-robotics' limit of 200 steps
}
# game -> lowest and highest return described, of the policy as it was trained: without sticky actions
GAMES = {"Pong": (16, 19), "Breakout": (60, 324), "SpaceInvaders": (220, 545)}
# game -> mean unclipped return of the logs that were recorded from the policy with sticky actions, and their episodes
STICKY = {"Pong": (11, 5), "Breakout": (78, 10)}
# the folder's table differs from arXiv 1511.06581 in these: a digit or a sign was lost, or rounded
OTHERWISE = {"asteroids", "battlezone", "doubledunk", "fishingderby", "phoenix", "skiing", "tennis", "videopinball"}


class Batch:
    """A perceptron in a batch of simulators; zeros behind an observation that is shorter than its input."""

    def __init__(self, policy: perceptron.Perceptron):
        self.policy = policy

    def reset(self, batch):
        pass

    def act(self, observations, previous_reward, active, rng):
        vectors = np.concatenate([observations[key].reshape(len(active), -1) for key in sorted(observations)], 1)
        vectors = np.pad(vectors, ((0, 0), (0, self.policy.mean.size - vectors.shape[1])))
        return np.stack([self.policy.act({"observation": vector}, rng) for vector in vectors])


@pytest.mark.parametrize("name", BODIES)
def test_bodies(name):
    environment, kwargs, described = BODIES[name]
    spec = simulators.environment_spec(environment, **kwargs)
    env = simulators.make(spec)
    task = TaskSpec(name, "d4rl", simulators.observation_fields(env), simulators.action_spec(env), spec)
    (path,) = (SHARED / "policies").glob(f"{name}.*")
    seeds = list(range(1000, 1000 + EPISODES))
    played = play(NoisyPolicy(Batch(perceptron.load(path)), task.action, 0.0), task, seeds)
    returns = np.array([one.episode_return for one in played])
    reference = simulators.reference(spec)
    spread = returns.std(ddof=1)
    score = f"{normalised(returns.mean(), reference):6.1f}" if reference else "-"
    print(f"\n{name:20} {environment:20} {returns.mean():8.0f} ± {spread:5.0f} ({score}) described {described}")
    assert not any(one.error for one in played)
    # a mean of 3 against a mean of ours: three standard errors of the difference, and what rounding leaves
    assert abs(returns.mean() - described) < 3 * spread * np.sqrt(1 / 3 + 1 / EPISODES) + 0.01 * described


@pytest.fixture
def one_thread():
    """Threads of OpenMP wait for each other on a busy machine, a hundred times as long as they work here."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def play_game(game: str, episodes: int, **kwargs) -> np.ndarray:
    returns = []
    for seed in range(1000, 1000 + episodes):
        env = simulators.make(EnvironmentSpec("atari", f"ALE/{game}-v5", kwargs))
        policy, rng = A3C(SHARED / "policies" / f"{game.lower()}-a3c.safetensors", env), np.random.default_rng(seed)
        observation, _ = env.reset(seed=seed)
        total, ended = 0.0, False
        while not ended:
            observation, reward, terminated, truncated, _ = env.step(policy.act(observation, rng))
            total, ended = total + float(reward), terminated or truncated
        returns.append(total)
    score = normalised(float(np.mean(returns)), _catalogue.game(game).score)
    print(f"\n{game:14} {kwargs} {np.mean(returns):7.1f} ± {np.std(returns, ddof=1):4.1f} ({score:.1f}) of {returns}")
    return np.array(returns)


@pytest.mark.parametrize("game", GAMES)
def test_games_as_the_policies_were_trained(game, one_thread):
    lowest, highest = GAMES[game]
    returns = play_game(game, 5, repeat_action_probability=0.0)
    assert lowest - returns.std(ddof=1) <= returns.mean() <= highest + returns.std(ddof=1)


@pytest.mark.parametrize("game", STICKY)
def test_games_by_the_protocol_of_our_results(game, one_thread):
    """Sticky actions, four frames an action, no-op starts, whole games."""
    described, episodes = STICKY[game]
    returns = play_game(game, 10)
    error = 2 * returns.std(ddof=1) * np.sqrt(1 / len(returns) + 1 / episodes)
    assert abs(returns.mean() - described) < error < described  # so that the check can fail


def test_human_reference_returns():
    table = json.loads((SHARED / "atari_scores.json").read_text())
    ours = {name: game.score for name, game in _catalogue.games().items() if game.score}
    assert set(ours) == set(table)
    assert {name for name, s in ours.items() if (s.low, s.high) != (table[name]["random"], table[name]["human"])} == (
        OTHERWISE
    )
