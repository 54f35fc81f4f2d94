"""Environments of the old gym and of d4rl, for those who hold that stack, in gymnasium's terms.

    gym.make(id): seed, reset -> observation, step -> (observation, reward, done, info)
    -> OldGym: reset(seed) -> (observation, info), step -> (observation, reward, terminated, truncated, info)

gym 0.26 has the five values already; 0.21 to 0.25 say with `TimeLimit.truncated` that a time limit ended an episode.

Invariant: observations, rewards and ends are the old environment's own; nothing is imported until `make` is called.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import warnings
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from schemas.episode import EnvironmentSpec, ScoreReference
from simulators import pictures
from simulators.suite import Suite
from simulators.suites.mujoco import body_of, body_reference

PREFIX = "gym/"


class OldGymSuite(Suite):
    """Ids gym/ID. d4rl, where it is installed, registers its ids (gym/hopper-medium-v2) by being imported."""

    name = "gym"
    module = "gym"
    install = "pip install 'gym<0.27', and d4rl for its ids"
    distributions = ("gym", "d4rl", "mujoco-py")

    def owns(self, id: str) -> bool:
        return id.startswith(PREFIX)

    def reference(self, id: str) -> ScoreReference | None:
        return body_reference(id.removeprefix(PREFIX))

    def require(self, id: str) -> None:
        self.register()  # which ids there are shows when one is made

    def build(self, environment: EnvironmentSpec, render: bool) -> gymnasium.Env:
        self.register()
        return make(environment.id.removeprefix(PREFIX), dict(environment.kwargs))

    def settings(self, environment: EnvironmentSpec) -> dict[str, Any]:
        self.register()
        return dict(environment.kwargs)

    def picture(self, env: gymnasium.Env) -> np.ndarray:
        body = body_of(env)
        return super().picture(env) if body is None else pictures.draw(body.model, body.data)


SUITE = OldGymSuite()


def make(id: str, kwargs: dict[str, Any]) -> gymnasium.Env:
    """The environment that gym knows as `id`. Raises what gym raises."""
    gym = importlib.import_module("gym")
    if importlib.util.find_spec("d4rl"):
        try:
            importlib.import_module("d4rl")
        except Exception as error:  # mujoco-py raises a bare Exception without its binaries; gym's own ids still work
            warnings.warn(f"d4rl cannot be imported, so its ids are missing: {error}", stacklevel=2)
    gym.logger.set_level(gym.logger.ERROR)
    # its checker uses names that numpy 2 lacks
    if "disable_env_checker" in inspect.signature(gym.make).parameters:
        kwargs = {"disable_env_checker": True} | kwargs
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return OldGym(gym.make(id, **kwargs), five=_five(gym.__version__))


class OldGym(gymnasium.Env):
    """One old environment. `five`: it takes and gives what gym 0.26 does."""

    def __init__(self, old: Any, five: bool):
        self.old, self.five = old, five
        self.observation_space, self.action_space = space(old.observation_space), space(old.action_space)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        if self.five:
            return self.old.reset(seed=seed)
        if seed is not None:
            self.old.seed(seed)
        return self.old.reset(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        if self.five:
            return self.old.step(action)
        observation, reward, done, info = self.old.step(action)
        truncated = bool(done and info.get("TimeLimit.truncated", False))
        return observation, float(reward), bool(done) and not truncated, truncated, info

    def close(self) -> None:
        self.old.close()


def space(old: Any) -> spaces.Space:
    """A space of gym as gymnasium's; they differ in their module alone."""
    kind = type(old).__name__
    if kind == "Box":
        return spaces.Box(np.asarray(old.low), np.asarray(old.high), old.shape, old.dtype.type)
    if kind == "Discrete":
        return spaces.Discrete(int(old.n), start=int(getattr(old, "start", 0)))
    if kind == "MultiDiscrete":
        return spaces.MultiDiscrete(old.nvec)
    if kind == "Dict":
        return spaces.Dict({key: space(part) for key, part in old.spaces.items()})
    raise TypeError(f"space {old} of the old gym is none of Box, Discrete, MultiDiscrete and Dict")


def _five(version: str) -> bool:
    return tuple(int(part) for part in version.split(".")[:2]) >= (0, 26)
