"""Proportional controllers for gymnasium-robotics' Fetch arms: reach, push, pick and place.

    observation (10,) or (25,), goals (3,) -> where the gripper should be -> move towards it, open or close

A full action moves the gripper by some 3 cm; an action is the way times `GAIN`, shortened to what is allowed.

Invariant: an action is a function of the observation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

GAIN = 20.0
OPEN, CLOSED = 1.0, -1.0
HOVER = 0.06  # metres over a thing on the table
BEHIND = 0.07  # metres from a block's centre to where a push begins
CLEAR = 0.055  # and to where the gripper gets past it
REACH = 0.04  # and to the gripper while it pushes
GENTLY = 0.4  # of the gain while it pushes, for a block that is hit slides on


class Controller:
    """`target`: gripper (3,), object (3,), goal (3,), gap between fingers -> gripper's next place (3,), fingers."""

    algorithm = "scripted"

    def __init__(self, target: Callable[[np.ndarray, np.ndarray, np.ndarray, float], tuple[np.ndarray, float]]):
        self.target = target

    def reset(self) -> None:
        """Nothing is kept between timesteps."""

    def act(self, observation: Mapping[str, np.ndarray], rng: np.random.Generator) -> np.ndarray:
        """{"achieved_goal": (3,), "desired_goal": (3,), "observation": (10,) or (25,)} -> action (4,) in [-1, 1]."""
        state = np.asarray(observation["observation"], np.float64)
        thing, goal = (np.asarray(observation[key], np.float64) for key in ("achieved_goal", "desired_goal"))
        gap = float(state[9:11].sum()) if len(state) > 10 else 0.0
        place, fingers = self.target(state[:3], thing, goal, gap)
        move = GAIN * (place - state[:3])
        return np.array([*(move / max(1.0, np.abs(move).max())), fingers], np.float32)


def reach(gripper: np.ndarray, thing: np.ndarray, goal: np.ndarray, gap: float) -> tuple[np.ndarray, float]:
    """Straight to the goal."""
    return goal, CLOSED


def pick_and_place(gripper: np.ndarray, thing: np.ndarray, goal: np.ndarray, gap: float) -> tuple[np.ndarray, float]:
    """Over the block, down, close, to the goal."""
    away = thing - gripper
    if np.linalg.norm(away) < 0.02:  # between the fingers
        return (goal, CLOSED) if gap < 0.06 else (thing, CLOSED)
    if np.linalg.norm(away[:2]) > 0.01:
        return thing + (0, 0, HOVER), OPEN
    return thing, OPEN


def push(gripper: np.ndarray, thing: np.ndarray, goal: np.ndarray, gap: float) -> tuple[np.ndarray, float]:
    """To the block's far side, around it or over it, then through it to the goal; again where it slips aside."""
    way = (goal - thing)[:2]
    distance = float(np.linalg.norm(way))
    if distance < 0.02:
        return gripper, CLOSED
    ahead = way / distance
    offset = (gripper - thing)[:2]
    along = float(offset @ ahead)
    aside = float(np.linalg.norm(offset - along * ahead))
    if along < 0 and aside < 0.02 and gripper[2] < thing[2] + 0.02:
        return gripper + GENTLY * (np.append(goal[:2] - REACH * ahead, thing[2]) - gripper), CLOSED
    start = np.append(thing[:2] - BEHIND * ahead, thing[2])
    if np.linalg.norm((gripper - start)[:2]) < 0.015 or passes(offset, (start - thing)[:2]) > CLEAR:
        return start, CLOSED
    over = thing[2] + HOVER
    return np.append(start[:2] if gripper[2] > over - 0.015 else gripper[:2], over), CLOSED


def passes(start: np.ndarray, end: np.ndarray) -> float:
    """How far from the origin the way from `start` to `end` passes, both (2,)."""
    way = end - start
    part = np.clip(-(start @ way) / max(float(way @ way), 1e-9), 0.0, 1.0)
    return float(np.linalg.norm(start + part * way))
