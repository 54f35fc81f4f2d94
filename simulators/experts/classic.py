"""Experts of gymnasium's small problems: feedback rules, value iteration, and the heuristic of LunarLander.

    observation {"observation": ...} -> a rule of one or two lines -> action

Invariant: a player is a deterministic function of its environment's observations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import gymnasium
import numpy as np


class Rule:
    """A function observation (D,) -> action."""

    algorithm = "scripted"

    def __init__(self, rule: Callable[[np.ndarray], Any]):
        self.rule = rule

    def reset(self) -> None:
        """Nothing is kept between timesteps."""

    def act(self, observation: Mapping[str, np.ndarray], rng: np.random.Generator) -> np.ndarray:
        """{"observation": (D,)} -> action, as the environment takes it."""
        return np.asarray(self.rule(np.asarray(observation["observation"], np.float64)))


def cart_pole(state: np.ndarray) -> int:
    """(position, speed, angle, its rate) -> 0 left, 1 right: linear feedback."""
    return int(state @ (0.1, 0.3, 3.0, 1.0) > 0)


def mountain_car(state: np.ndarray) -> int:
    """(position, speed) -> 0 or 2: always push along, which adds energy."""
    return 2 if state[1] > 0 else 0


def mountain_car_continuous(state: np.ndarray) -> list[float]:
    """(position, speed) -> force [-1, 1]: as `mountain_car`."""
    return [float(np.float32(1.0 if state[1] > 0 else -1.0))]


def acrobot(state: np.ndarray) -> int:
    """(cos, sin of both angles, rates) -> 0, 1, 2: torque against the first joint's rate, which adds energy."""
    return 0 if state[4] > 0 else 2


def pendulum(state: np.ndarray) -> list[float]:
    """(cos, sin of the angle from upright, rate) -> torque [-2, 2]: energy is added until it can be caught."""
    angle, rate = np.arctan2(state[1], state[0]), state[2]
    if state[0] > 0.85:
        torque = -12.0 * angle - 3.0 * rate
    else:
        energy = rate**2 / 6 + 5.0 * (state[0] - 1)  # of a rod of mass 1, length 1, g 10; 0 at rest upright
        torque = -2.0 * np.sign(rate) * np.sign(energy) if abs(rate) > 1e-3 else 2.0
    return [float(np.clip(torque, -2.0, 2.0))]


def inverted_pendulum(state: np.ndarray) -> list[float]:
    """(position, angle, speed, its rate) -> force [-3, 3]: linear-quadratic regulator of MuJoCo's cart and pole."""
    return [float(np.clip(state[:4] @ (1.73, 12.259, 2.014, 1.819), -3.0, 3.0))]


def inverted_double_pendulum(state: np.ndarray) -> list[float]:
    """(position, sines, cosines of both angles, speed, their rates, ...) -> force [-1, 1]: as `inverted_pendulum`."""
    angles = np.arctan2(state[1:3], state[3:5])
    return [float(np.clip(-np.r_[state[0], angles, state[5:8]] @ (0.08, 1.357, 5.362, 0.185, 0.75, 0.768), -1.0, 1.0))]


def reacher(state: np.ndarray) -> np.ndarray:
    """(cosines, sines of both joints, target (2,), joints' rates, ...) -> torques [-1, 1]: towards the joint angles,
    of the two that put the fingertip on the target, that are nearer."""
    upper, lower = 0.1, 0.11  # lengths of the arm
    joints, (x, y) = np.arctan2(state[2:4], state[0:2]), state[4:6]
    bend = np.arccos(np.clip((x * x + y * y - upper**2 - lower**2) / (2 * upper * lower), -1.0, 1.0))
    ways = []
    for second in (bend, -bend):
        first = np.arctan2(y, x) - np.arctan2(lower * np.sin(second), upper + lower * np.cos(second))
        ways.append(np.array([(first - joints[0] + np.pi) % (2 * np.pi) - np.pi, second - joints[1]]))
    nearer = min(ways, key=lambda way: float(np.abs(way).sum()))
    return np.clip(0.3 * nearer - 0.05 * state[6:8], -1.0, 1.0)


def lunar_lander(env: gymnasium.Env) -> Rule:
    """The heuristic in gymnasium, for main and side engines, discrete or continuous."""
    from gymnasium.envs.box2d.lunar_lander import heuristic

    lander: Any = env.unwrapped

    def rule(state: np.ndarray) -> Any:
        action = heuristic(lander, state)
        return np.clip(action, -1.0, 1.0).astype(np.float32) if lander.continuous else action

    return Rule(rule)


def value_iteration(env: gymnasium.Env, discount: float = 0.999, tolerance: float = 1e-9) -> Rule:
    """The best policy of a finite problem whose `P` lists {state: {action: [(probability, next, reward, end)]}}."""
    problem: Any = env.unwrapped
    table = problem.P
    states, actions = len(table), len(table[0])
    outcomes = [(s, a, *found) for s in table for a in table[s] for found in table[s][a]]
    here, action, chance, following, reward, end = (np.array(column) for column in zip(*outcomes))
    quality, change = np.zeros((states, actions)), np.inf
    while change > tolerance:
        value = quality.max(axis=1)
        quality = np.zeros((states, actions))
        np.add.at(quality, (here, action), chance * (reward + discount * value[following] * ~end))
        change = np.abs(quality.max(axis=1) - value).max()
    best = quality.argmax(axis=1)
    return Rule(lambda state: int(best[int(state.reshape(()))]))
