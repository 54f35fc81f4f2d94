"""Any other environment that gymnasium knows: its own classics, and those of users.

    'CartPole-v1', or 'MODULE:Id', where importing MODULE registers Id -> gymnasium.make -> observations {key: array}

An environment's constructor need not know `render_mode`; one whose class lists "rgb_array" is drawn by its own
`render`, one with a MuJoCo body by our drawing.

Invariant: nothing is imported until an environment is made, or asked whether it exists.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import gymnasium
import numpy as np

from schemas.episode import EnvironmentSpec
from simulators import pictures, plugins
from simulators.suite import Suite, UnknownEnvironment
from simulators.suites.mujoco import body_of

SCREENS = {"DISPLAY", "WAYLAND_DISPLAY"}


class AnyGymnasium(Suite):
    name = "gymnasium"
    renders = True

    def owns(self, id: str) -> bool:
        """True for all ids: asked last, this suite has what no other owns."""
        return True

    def time_limit(self, id: str) -> int | None:
        """As gymnasium has it registered, or a module that --import named; that of 'MODULE:Id' takes an import."""
        spec = gymnasium.registry.get(id)
        return spec.max_episode_steps if spec else None

    def require(self, id: str) -> None:
        module, _, name = id.rpartition(":")
        if module:
            _import(module, id)
            if name not in gymnasium.registry:
                raise UnknownEnvironment(f"unknown environment '{id}': {module} registers no '{name}'; "
                                         f"it has {_of_module(module) or 'none'}")  # fmt: skip
        else:
            super().require(id)

    def build(self, environment: EnvironmentSpec, render: bool) -> gymnasium.Env:
        self.require(environment.id)
        name = environment.id.rpartition(":")[2]
        mode = {"render_mode": "rgb_array"} if render and _draws_itself(name) else {}  # it may know no render_mode
        if mode and not SCREENS & set(os.environ):
            os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # pygame looks for a screen, and complains
        return gymnasium.make(name, disable_env_checker=True, **environment.kwargs | mode)

    def settings(self, environment: EnvironmentSpec) -> dict[str, Any]:
        self.require(environment.id)
        return super().settings(replace(environment, id=environment.id.rpartition(":")[2]))

    def picture(self, env: gymnasium.Env) -> np.ndarray:
        if env.unwrapped.render_mode != "rgb_array" and (body := body_of(env)) is not None:
            return pictures.draw(body.model, body.data)
        return super().picture(env)


SUITE = AnyGymnasium()


def _import(module: str, id: str) -> None:
    try:
        gymnasium.register_envs(plugins.import_module(module))
    except Exception as error:  # a module of the user's own may raise anything
        detail = f"{type(error).__name__}: {error}"
        raise UnknownEnvironment(f"environment '{id}': cannot import {module} ({detail}); "
                                 f"run it in the folder of {module}, or put that on PYTHONPATH") from error  # fmt: skip


def _of_module(module: str) -> str:
    """The ids whose entry point lies in a module."""
    root = module.split(".")[0]
    where = {id: spec.entry_point for id, spec in gymnasium.registry.items()}
    return ", ".join(id for id, entry in where.items() if plugins.module_of(entry).split(".")[0] == root)


def _draws_itself(id: str) -> bool:
    entry = gymnasium.spec(id).entry_point
    try:
        maker = gymnasium.envs.registration.load_env_creator(entry) if isinstance(entry, str) else entry
    except Exception:  # its own import fails: said when it is made
        return False
    metadata = getattr(maker, "metadata", None)  # of a wrapper's class it is a property
    return isinstance(metadata, dict) and "rgb_array" in metadata.get("render_modes", ())
