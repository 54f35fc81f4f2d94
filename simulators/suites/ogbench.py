"""OGBench (arXiv 2410.20092): an arm with cubes, a scene or a puzzle, and mazes, each with five single tasks.

    'cube-double-singletask-task2-v0' -> gymnasium.make -> Reproducible -> {"observation": float32 (D,)}

Experts play the tasks of the arm (cube, scene, puzzle) and the point mazes; ants, humanoids and the visual variants are
there to be played. The goal belongs to the task and is not observed. Every timestep costs a point per thing that is not
where it should be, and an episode ends one timestep after all of them are.

Invariant: an episode is a function of its seed and the actions, though ogbench draws from numpy's global generator.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import gymnasium
import numpy as np

from schemas.episode import EnvironmentSpec
from simulators import pictures
from simulators.experts import manipulation
from simulators.suites.mujoco import MuJoCo

TIME_LIMITS = {
    "cube-single": 200,
    "cube-double": 500,
    "cube-triple": 1000,
    "cube-quadruple": 1000,
    "cube-octuple": 1500,
    "scene": 750,
    "puzzle-3x3": 500,
    "puzzle-4x4": 500,
    "puzzle-4x5": 1000,
    "puzzle-4x6": 1000,
    "pointmaze": 1000,
    "antmaze": 1000,
    "humanoidmaze": 2000,
    "humanoidmaze-giant": 4000,
    "antsoccer": 1000,
}
OF_OURS = re.compile(
    r"(visual-)?(cube-(single|double|triple|quadruple|octuple)|scene|puzzle-(3x3|4x[456])"
    r"|(pointmaze|antmaze|humanoidmaze)-(medium|large|giant|teleport)|antsoccer-(arena|medium))"
    r"(-singletask(-task[1-5])?)?-v\d+"
)
ONE_TASK = re.compile(r"-task[1-5]-v\d+$")


class OGBench(MuJoCo):
    name = "ogbench"
    module = "ogbench"
    extra = "ogbench"
    distributions = ("ogbench", "mujoco")
    experts = {
        "cube-": partial(manipulation.Arm, plan=manipulation.stack_cubes),
        "pointmaze-": manipulation.Maze,
        "puzzle-": partial(manipulation.Arm, plan=manipulation.lights_out),
        "scene-": partial(manipulation.Arm, plan=manipulation.arrange_scene),
    }

    def owns(self, id: str) -> bool:
        return OF_OURS.fullmatch(id) is not None

    def tasks(self) -> tuple[str, ...]:
        """The single tasks; an id without a task's number is one of them again."""
        return tuple(id for id in super().tasks() if ONE_TASK.search(id))

    def time_limit(self, id: str) -> int | None:
        if not self.owns(id):
            return None
        return TIME_LIMITS[max((kind for kind in TIME_LIMITS if kind in id), key=len)]

    def action_range(self, id: str) -> tuple[float, float] | None:
        return (-1.0, 1.0) if self.owns(id) else None

    def build(self, environment: EnvironmentSpec, render: bool) -> gymnasium.Env:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*DISPLAY.*")  # dm_control's renderer's, which is not used
            return Reproducible(super().build(environment, render=False))  # they know no render mode

    def picture(self, env: gymnasium.Env) -> np.ndarray:
        raw: Any = env.unwrapped
        return pictures.draw(raw.model, raw.data, view="above")


SUITE = OGBench()


class Reproducible(gymnasium.Wrapper):
    """Seeds all that an environment of ogbench draws from: its own generator, numpy's, and its space of actions."""

    def __init__(self, env: gymnasium.Env):
        super().__init__(env)
        raw: Any = env.unwrapped
        if isinstance(getattr(type(raw), "action_space", None), property):  # a new one whenever it is asked for
            kind, one = type(raw), gymnasium.spaces.Box(-1.0, 1.0, (5,), np.float32)
            raw.__class__ = type(kind.__name__, (kind,), {"action_space": property(lambda raw: one)})
        self.drawn = np.random.RandomState().get_state()

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        if seed is not None:
            self.drawn = np.random.RandomState(np.random.MT19937(seed)).get_state()
            self.action_space.seed(seed)
        with self._own_numbers():
            return self.env.reset(seed=seed, options=options)

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        with self._own_numbers():
            return self.env.step(action)

    @contextmanager
    def _own_numbers(self) -> Iterator[None]:
        """numpy's global generator is this environment's own inside the block."""
        others = np.random.get_state()
        np.random.set_state(self.drawn)
        try:
            yield
        finally:
            self.drawn = np.random.get_state()
            np.random.set_state(others)
