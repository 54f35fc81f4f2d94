"""The one way to build a simulator, for recording and for playing.

    EnvironmentSpec -> its suite (simulators/suites/) -> gymnasium.Env with observations {key: array of one timestep}

A module of the user's own registers what the project lacks: an environment with gymnasium ('MODULE:Id' imports it), or
a whole suite here (simulators/suite.py).

Invariant: an agent sees in evaluation exactly what the recorder writes into logs, because both call `make`.
"""

from __future__ import annotations

import inspect
import json
import warnings
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
from gymnasium.envs.registration import load_env_creator

from schemas.episode import ActionSpec, EnvironmentSpec, FieldSpec, ScoreReference
from simulators import opengl, plugins, spaces
from simulators.registry import environment, register, suite_named, suite_of_id, versions
from simulators.suite import SimulatorError, Suite, UnknownEnvironment

opengl.name_glfw()

__all__ = [
    "SimulatorError",
    "Suite",
    "UnknownEnvironment",
    "action_spec",
    "environment",
    "environment_spec",
    "frame",
    "make",
    "observation_fields",
    "reference",
    "register",
    "require",
    "settings",
    "suite_named",
    "suite_of_id",
    "versions",
]


def environment_spec(id: str, **kwargs: Any) -> EnvironmentSpec:
    """The spec of an environment that can be made. SimulatorError for an unknown id or a missing package."""
    spec = environment(id, kwargs)
    require(spec)
    return spec


def require(environment: EnvironmentSpec) -> None:
    """SimulatorError where there is no such environment, or its package is missing."""
    suite_named(environment.suite).require(environment.id)


def make(
    environment: EnvironmentSpec,
    seed: int | None = None,
    render: bool = False,
    inner: Callable[[gymnasium.Env], gymnasium.Env] | None = None,
) -> gymnasium.Env:
    """Build a simulator whose observations are {key: array of one timestep}.

    Args:
        environment: id and arguments; those that its suite does not take for itself go to gymnasium.make.
        seed: the simulator is reset once with it, so that later resets without a seed continue from it.
        render: `env.render()` is the picture of `frame`, by the simulator's own renderer where it has one.
        inner: wraps the simulator below our preprocessing, such as a recorder of raw observations.

    Raises:
        SimulatorError: an unknown id, a missing package, arguments that the simulator refuses, a space that has no
            counterpart in a task.
    """
    suite = suite_named(environment.suite)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*is out of date.*", category=DeprecationWarning)
            raw = suite.build(environment, render)
    except SimulatorError:
        raise
    except gymnasium.error.DependencyNotInstalled as error:
        raise SimulatorError(f"{environment.id}: {' '.join(map(str, error.args))}") from None
    except Exception as error:  # a simulator's constructor may raise anything
        detail = f"{type(error).__name__}: {error}; check its kwargs {environment.kwargs}"
        raise SimulatorError(f"{environment.id}: {detail}") from error
    try:
        env = Simulator(suite.observe(inner(raw) if inner else raw, environment), suite, environment)
    except spaces.SpaceError as error:
        raw.close()
        raise SimulatorError(str(error)) from None
    if seed is not None:
        env.reset(seed=seed)
        env.action_space.seed(seed)
    return env


class Simulator(gymnasium.Wrapper):
    """Environment that `make` returns; knows its suite and its spec."""

    def __init__(self, env: gymnasium.Env, suite: Suite, environment: EnvironmentSpec):
        super().__init__(env)
        self.suite, self.environment = suite, environment

    def render(self) -> Any:
        return frame(self)


def settings(environment: EnvironmentSpec) -> dict[str, Any]:
    """Settings of `make`, for result rows: arguments, time limit, protocol, and of an environment or suite of the
    user's own the hashes of its modules. SimulatorError as of `make`."""
    suite = suite_named(environment.suite)
    found = suite.settings(environment)
    module, _, id = environment.id.rpartition(":")
    entry = gymnasium.registry[id].entry_point if id in gymnasium.registry else None
    own = plugins.module_sha256({module, plugins.module_of(entry), type(suite).__module__})
    return found | ({"module_sha256": own} if own else {})


def reference(environment: EnvironmentSpec) -> ScoreReference | None:
    """The returns that a score of this environment is normalised by, where its suite knows them: they were measured
    with the arguments of its id, and there are none for others."""
    found = suite_named(environment.suite).reference(environment.id)
    return found if found is None or _as_registered(environment) else None


def _as_registered(environment: EnvironmentSpec) -> bool:
    """True if its arguments are those that its id has without them: registered ones, or defaults of its constructor."""
    given = {name: value for name, value in environment.kwargs.items() if name != "render_mode"}  # how it was watched
    if not given:
        return True
    try:
        require(environment)
        spec = gymnasium.spec(environment.id)
        entry: Any = spec.entry_point
        parameters = inspect.signature(load_env_creator(entry) if isinstance(entry, str) else entry).parameters
    except Exception:  # its package is missing or fails, and what it would take is unknown
        return False
    own = {name: one.default for name, one in parameters.items()} | {"max_episode_steps": spec.max_episode_steps}
    own = json.loads(json.dumps(own | spec.kwargs, default=str))  # tuples as logs have them
    return all(name in own and own[name] == value for name, value in given.items())


def action_spec(env: gymnasium.Env) -> ActionSpec:
    """The action space in a task's terms. SimulatorError for a space without bounds, or of several arrays."""
    try:
        return spaces.action(env.action_space)
    except spaces.SpaceError as error:
        raise SimulatorError(f"{spaces.id_of(env)}: {error}") from None


def observation_fields(env: gymnasium.Env) -> tuple[FieldSpec, ...]:
    """The fields of one observation of a simulator from `make`. A text's length is that of the task: 0 here."""
    return _suite(env).fields(env)


def frame(env: gymnasium.Env) -> np.ndarray:
    """A picture of the current state of a simulator from `make`, uint8 (H, W, 3). Raises where there is none."""
    return _suite(env).picture(env)


def _suite(env: gymnasium.Env) -> Suite:
    return env.get_wrapper_attr("suite")
