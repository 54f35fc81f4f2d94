"""MuJoCo bodies of gymnasium: Hopper, HalfCheetah, Walker2d, Ant, ... in all their versions.

    gymnasium.make -> {"observation": float32 (D,)}; pictures are our own drawing, which needs no OpenGL

The table beside this file holds the ids with their time limits, `references.json` D4RL's returns of random and expert
play by body (arXiv 2004.07219), whatever the version.

Invariant: the tables are plain data, checked against gymnasium and D4RL by tests.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

from schemas.episode import EnvironmentSpec, ScoreReference
from simulators import pictures, spaces
from simulators.experts import SHIPPED, classic, perceptron
from simulators.experts.classic import Rule
from simulators.suite import SimulatorError, Suite

HERE = Path(__file__).resolve().parent


class MuJoCo(Suite):
    name = "mujoco"
    module = "mujoco"
    extra = "mujoco"
    distributions = ("gymnasium", "mujoco")
    experts = {
        "Hopper-": lambda env: perceptron.load(SHIPPED / "hopper.safetensors"),
        "InvertedDoublePendulum-": lambda env: Rule(classic.inverted_double_pendulum),
        "InvertedPendulum-": lambda env: Rule(classic.inverted_pendulum),
        "Reacher-": lambda env: Rule(classic.reacher),
    }

    def owns(self, id: str) -> bool:
        return environments().get(id, {}).get("suite") == self.name

    def time_limit(self, id: str) -> int | None:
        return environments().get(id, {}).get("max_episode_steps")

    def action_range(self, id: str) -> tuple[float, float] | None:
        low, high = environments().get(id, {}).get("actions", (-1.0, 1.0))
        return (low, high) if id in environments() else None

    def reference(self, id: str) -> ScoreReference | None:
        return body_reference(id) or super().reference(id)

    def build(self, environment: EnvironmentSpec, render: bool) -> gymnasium.Env:
        self.require(environment.id)
        with _without_deprecation():
            return super().build(environment, render)

    def picture(self, env: gymnasium.Env) -> np.ndarray:
        """Our own drawing of the body's geoms; where MUJOCO_GL names a backend and the simulator was made with
        `render`, MuJoCo's renderer. SimulatorError where that backend does not work."""
        raw: Any = env.unwrapped
        if os.environ.get("MUJOCO_GL") and raw.render_mode == "rgb_array":
            try:
                return np.asarray(raw.render())
            except Exception as error:
                backend = os.environ["MUJOCO_GL"]
                raise SimulatorError(
                    f"{spaces.id_of(env)}: MUJOCO_GL={backend} cannot render here ({type(error).__name__}); "
                    "unset MUJOCO_GL to get the drawing that needs no OpenGL"
                ) from error
        body = body_of(env)
        if body is None:
            raise SimulatorError(f"{spaces.id_of(env)}: no MuJoCo body in it, so there is no picture of it")
        return pictures.draw(body.model, body.data, view="above" if "Maze" in spaces.id_of(env) else "side")

    def state(self, env: gymnasium.Env) -> dict[str, np.ndarray]:
        """Positions and velocities, under D4RL's names."""
        data = getattr(env.unwrapped, "data", None)
        return {} if data is None else {"infos/qpos": data.qpos.copy(), "infos/qvel": data.qvel.copy()}


SUITE = MuJoCo()


@contextmanager
def _without_deprecation() -> Iterator[None]:
    """MuJoCo 4 warns at each build of gymnasium's HalfCheetah that its file has an old attribute, which no user can
    change: that one warning is dropped, all others are shown."""
    import mujoco

    earlier = mujoco.get_mju_user_warning()

    def show(message: str) -> None:
        if "'settotalmass' is deprecated" in message:
            return
        if earlier is None:
            print(f"WARNING: {message}\n", file=sys.stderr)
            return
        try:
            earlier(message)
        except ctypes.ArgumentError:  # dm_control's is a function of C's
            earlier(message.encode())

    mujoco.set_mju_user_warning(show)
    try:
        yield
    finally:
        mujoco.set_mju_user_warning(earlier)


def body_of(env: gymnasium.Env) -> Any:
    """Owner of `model` and `data`: the environment, or its part that has them (mazes keep the body in a simulator
    of its own); None if neither does."""
    raw = env.unwrapped
    return raw if hasattr(raw, "model") else next((part for part in vars(raw).values() if hasattr(part, "model")), None)


@cache
def environments() -> dict[str, dict[str, Any]]:
    """Ids of gymnasium and gymnasium-robotics with suite and time limit."""
    return json.loads((HERE / "environments.json").read_text("utf-8"))


@cache
def _references() -> dict[str, list[float]]:
    return json.loads((HERE / "references.json").read_text("utf-8"))


def body_reference(id: str) -> ScoreReference | None:
    """D4RL's reference returns of an environment's body: of 'Hopper-v4', Hopper's."""
    pair = _references().get(id.rsplit("-v", 1)[0])
    return ScoreReference("d4rl", *pair) if pair else None
