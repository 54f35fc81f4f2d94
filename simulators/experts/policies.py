"""Choice of the policy that records: a shipped expert, a file, a function of the user's own, or random actions.

    'expert' | 'random' | policy file | 'module:function' -> Policy of one environment

Invariant: a policy that is returned fits the environment.
"""

from __future__ import annotations

import inspect
import re
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

import simulators
from simulators import plugins
from simulators.experts import PolicyError, open_safetensors, perceptron
from simulators.experts.sb3 import StableBaselines
from simulators.policy import OnePlayer, RandomPolicy
from simulators.registry import all_suites

OWN = re.compile(r"[\w.]+:\w+")  # MODULE:FUNCTION; a module may lie in packages


def load(name: str, env: gymnasium.Env, noise: float = 0.0, temperature: float = 1.0) -> OnePlayer | RandomPolicy:
    """The policy that `name` says, for the simulator `env` (of simulators.make), which it will play with that much
    noise, and where it samples its actions at that temperature.

    Args:
        name: 'expert', 'random', a policy file, or 'module:function': function(env) returns a function of an
            observation, or an object with `act`; either may take a generator too. Observations are {key: array}.

    Raises:
        PolicyError: what does not fit, and the remedy.
    """
    path = Path(name)
    recurrent = path.suffix == ".safetensors" and path.is_file() and _has_convolutions(path)
    if temperature != 1.0 and not recurrent:
        raise PolicyError(f"{name}: has no temperature, which A3C alone samples with; leave --temperature out")
    if name == "random":
        return RandomPolicy(simulators.action_spec(env))
    if name == "expert":
        return OnePlayer(_expert(env, noise))
    if not path.is_file():
        if OWN.fullmatch(name):
            return OnePlayer(_own(name, env))
        raise PolicyError(f"{name}: no such policy file; give one, or MODULE:FUNCTION, or 'expert', or 'random'")
    if path.suffix == ".zip":
        policy: Any = StableBaselines(path)
    elif recurrent:
        from simulators.experts.a3c import A3C  # torch, which no other policy takes a second to start for

        policy = A3C(path, env, temperature)
    else:
        policy = perceptron.load(path)
    size = sum(int(np.prod(field.shape)) for field in simulators.observation_fields(env))
    policy.check(size, simulators.action_spec(env).size, _id(env))
    return OnePlayer(policy)


def _expert(env: gymnasium.Env, noise: float) -> Any:
    suite, id = env.get_wrapper_attr("suite"), _id(env)
    found = suite.expert(env, id, noise)
    if found is None:
        known = ", ".join(f"{prefix}v*" for suite in all_suites().values() for prefix in suite.experts)
        remedy = "give --policy a file, MODULE:FUNCTION or random"
        raise PolicyError(f"no expert of {id} is shipped (there are {known}); {remedy}")
    return found


class Own:
    """A policy of the user's own: a function of the observation, or an object with `act`; with a generator where it
    takes two arguments."""

    def __init__(self, name: str, policy: Any, size: int):
        self.size = size
        self.algorithm = str(getattr(policy, "algorithm", name.replace(":", ".")))
        self.name = name
        self.function: Callable[..., Any] = getattr(policy, "act", policy)
        self.begin: Callable[[], Any] | None = getattr(policy, "reset", None)
        self.arguments = _arguments(self.function, usual=2 if hasattr(policy, "act") else 1)

    def reset(self) -> None:
        if self.begin is not None:
            self._called("reset()", self.begin)

    def act(self, observation: Mapping[str, np.ndarray], rng: np.random.Generator) -> np.ndarray:
        found = self._called("the policy", self.function, *(observation, rng)[: self.arguments])
        action = np.asarray(np.nan if found is None else found)
        if action.size != self.size or action.dtype.kind not in "fiub" or not np.isfinite(action).all():
            raise PolicyError(f"{self.name}: returned the action {found!r}; return {self.size} finite numbers")
        return action

    def _called(self, what: str, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except Exception as error:  # a user's policy may raise anything
            frames = traceback.extract_tb(error.__traceback__)[1:]
            where = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
            detail = f"{type(error).__name__}: {error}{where}"
            raise PolicyError(f"{self.name}: {what} raised {detail}; correct it") from error


def _arguments(function: Callable[..., Any], usual: int) -> int:
    """How many of (observation, rng) a policy takes: `usual` where it takes one or both. PolicyError where neither."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # of C's functions
        return usual
    for count in (usual, 3 - usual):
        with suppress(TypeError):
            signature.bind(*range(count))
            return count
    raise PolicyError(f"act{signature}: give it the parameters (observation) or (observation, rng)")


def _own(name: str, env: gymnasium.Env) -> Own:
    """The policy that function(env) of a module returns."""
    module, _, function = name.partition(":")
    try:
        policy = getattr(plugins.import_module(module), function)(env)
    except Exception as error:  # a user's module may raise anything
        detail = f"{type(error).__name__}: {error}"
        raise PolicyError(f"--policy {name}: {detail}; it is MODULE:FUNCTION, and FUNCTION(env) returns the policy"
                          ) from error  # fmt: skip
    if not callable(getattr(policy, "act", policy)):
        kind = type(policy).__name__
        raise PolicyError(f"--policy {name}: returned a {kind}; return a function observation -> action, or an "
                          "object with act(observation) or act(observation, rng)")  # fmt: skip
    try:
        return Own(name, policy, simulators.action_spec(env).size)
    except PolicyError as error:
        raise PolicyError(f"--policy {name}: {error}") from None


def _has_convolutions(path: Path) -> bool:
    with open_safetensors(path) as file:
        return "conv1.weight" in file.keys()  # noqa: SIM118


def _id(env: gymnasium.Env) -> str:
    return env.get_wrapper_attr("environment").id
