"""Suites of environments: the one protocol of everything that the project knows about its simulators.

    EnvironmentSpec -> Suite.register, Suite.build -> raw gymnasium.Env -> Suite.observe -> observations {key: array}

A suite is an instance of a subclass, in a file of its own: simulators/suites/NAME.py with `SUITE`, or in another
package under the entry point group `gato.suites`, or in a module that `--import` names. All that differs between
simulators is asked of the suite; nothing outside its file knows its name.

Invariant: `owns`, `time_limit`, `action_range` and `reference` import no simulator.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any, ClassVar

import gymnasium
import numpy as np

from schemas.episode import EnvironmentSpec, FieldSpec, ScoreReference
from simulators import opengl, spaces
from simulators.policy import Player, PolicyError
from simulators.uninterrupted import uninterrupted


class SimulatorError(RuntimeError):
    """A simulator cannot be built or drawn; the message names the id and the remedy."""


class UnknownEnvironment(SimulatorError):
    """No such id is registered."""


class Suite:
    """One family of environments. Override what differs; the defaults suit any gymnasium environment."""

    name: ClassVar[str]
    """Its name in EnvironmentSpec.suite and in manifests."""
    module: ClassVar[str] = "gymnasium"
    """The module whose import registers the ids."""
    extra: ClassVar[str] = ""
    """The extra of gato-open that installs it; empty where gymnasium is enough."""
    install: ClassVar[str] = ""
    """The command that installs it, where that is not an extra of ours."""
    distributions: ClassVar[tuple[str, ...]] = ("gymnasium",)
    """Packages whose versions decide what it does."""
    experts: Mapping[str, Callable[[gymnasium.Env], Player]] = {}
    """Beginning of an id -> maker of the expert of that environment."""
    recorded_as: ClassVar[str | None] = None
    """The source whose layout etl.record writes; None: decided by the observations."""
    film_every: ClassVar[int] = 5
    """Timesteps between two pictures of a film."""
    renders: ClassVar[bool] = False
    """True if a picture needs the simulator to be made with `render`."""
    sees_screen: ClassVar[bool] = False
    """True if `picture` is the game's own screen, and observations are made of it."""

    def owns(self, id: str) -> bool:
        """True if the id is this suite's."""
        return False

    def time_limit(self, id: str) -> int | None:
        """max_episode_steps of an id, None where it is not known without the simulator."""
        return None

    def action_range(self, id: str) -> tuple[float, float] | None:
        """Bounds of every action value, None where they are not known without the simulator."""
        return None

    def reference(self, id: str) -> ScoreReference | None:
        """The returns of random and expert play that a score is normalised by; those in scores.json."""
        from simulators import scores  # which asks the suites

        return scores.reference(id)

    def score(self, episode_return: float, reference: ScoreReference | None) -> tuple[float, str] | None:
        """Score and its kind where returns are not normalised by a reference; None where they are."""
        return None

    def clips_rewards(self, source: str) -> bool:
        """True if logs of that source hold rewards clipped to ±1."""
        return False

    def tasks(self) -> tuple[str, ...]:
        """Ids whose expert is shipped, the newest version of each. SimulatorError names the package to install."""
        if not self.experts:
            return ()
        self.register()
        newest: dict[str, tuple[int, str]] = {}
        for id in gymnasium.registry:
            name, _, version = id.rpartition("-v")
            if id.startswith(tuple(self.experts)) and version.isdigit():
                newest[name] = max(newest.get(name, (-1, "")), (int(version), id))
        return tuple(sorted(id for _, id in newest.values()))

    def register(self) -> None:
        """Import what provides the ids. SimulatorError names the package to install."""
        try:
            with uninterrupted():
                gymnasium.register_envs(opengl.import_module(self.module))
        except ImportError as error:
            remedy = f"pip install 'gato-open[{self.extra}]'" if self.extra else self.install or "pip install gymnasium"
            raise SimulatorError(f"suite '{self.name}' needs the package {self.module} ({error}); {remedy}") from None

    def require(self, id: str) -> None:
        """UnknownEnvironment where the id is not registered, SimulatorError where the package is missing."""
        self.register()
        if id in gymnasium.registry:
            return
        near = get_close_matches(id, gymnasium.registry, n=3, cutoff=0.4)
        near = near or get_close_matches(f"ALE/{id}", gymnasium.registry, n=3, cutoff=0.4)
        own = f"an environment of your own is written MODULE:{id}, or MODULE is named by --import"
        examples = ", ".join(near) or "Hopper-v4"
        raise UnknownEnvironment(
            f"unknown environment '{id}'; use a gymnasium id with its version, e.g. {examples}; {own}"
        )

    def build(self, environment: EnvironmentSpec, render: bool) -> gymnasium.Env:
        """The raw environment; raises whatever its constructor raises."""
        self.require(environment.id)
        mode = "rgb_array" if render else None
        return gymnasium.make(environment.id, disable_env_checker=True, render_mode=mode, **environment.kwargs)

    def observe(self, raw: gymnasium.Env, environment: EnvironmentSpec) -> gymnasium.Env:
        """`raw` with observations {key: array of one timestep}. simulators.spaces.SpaceError where it has none."""
        return spaces.Fields(raw)

    def fields(self, env: gymnasium.Env) -> tuple[FieldSpec, ...]:
        """The observation fields of what `observe` returned."""
        return spaces.fields(env.observation_space)

    def settings(self, environment: EnvironmentSpec) -> dict[str, Any]:
        """Settings of an episode, for result rows: arguments, time limit, protocol."""
        self.require(environment.id)
        return {"max_episode_steps": gymnasium.spec(environment.id).max_episode_steps} | environment.kwargs

    def picture(self, env: gymnasium.Env) -> np.ndarray:
        """The current state, uint8 (H, W, 3), on any machine; raises where there is no picture."""
        found = env.unwrapped.render()
        if not isinstance(found, np.ndarray) or found.ndim != 3:
            raise SimulatorError(f"{spaces.id_of(env)}: its render() returns no array (H, W, 3)")
        return found

    def state(self, env: gymnasium.Env) -> dict[str, np.ndarray]:
        """The simulator's own state, key -> array, which logs keep beside the observations where there is one."""
        return {}

    def expert(self, env: gymnasium.Env, id: str, noise: float) -> Player | None:
        """The shipped expert of an environment, None where there is none. PolicyError where it bears no noise."""
        for prefix, make in self.experts.items():
            if id.startswith(prefix):
                expert = make(env)
                if noise and getattr(expert, "reads_state", False):
                    raise PolicyError("the bot plans on its own actions and cannot follow others; leave --noise out")
                return expert
        return None

    def log_name(self, id: str) -> tuple[str, str]:
        """(name, version) of an environment in the path of a log: 'Hopper-v4' -> ('hopper', 'v4'), without a module."""
        name, _, version = id.rpartition(":")[2].rpartition("-")
        name, version = (name, version) if name else (version, "v0")
        return name.lower().replace("/", "-"), version
