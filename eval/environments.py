"""Playing episodes: one policy, one task, a batch of simulators that start together.

seeds -> simulators -> {key: (B, ...)} -> policy.act -> actions -> ... until every episode has ended

An environment that raises, at reset or in a step, or gives what is not finite, ends its own episode with an error; the
others go on. A picture that cannot be drawn ends the film alone. A policy is told which rows still run, and draws for
them alone, each from its own generator.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from gymnasium import spaces

import simulators
from eval.episode_rng import Draws
from schemas.episode import TaskSpec


class Policy(Protocol):
    """What Gato, the baselines and the random policy have in common."""

    def reset(self, batch: int) -> None:
        """So many episodes begin."""

    def act(
        self,
        observations: dict[str, np.ndarray],
        previous_reward: np.ndarray,
        active: np.ndarray,
        rng: Draws,
    ) -> np.ndarray:
        """observations {key: (B, ...)} and previous_reward (B,) -> actions (B, ...). `active` (B,) bool only ever
        falls; what an ended row gets is of no use. `rng` draws for the active rows, in their order."""
        ...


class RandomPolicy:
    """Uniform over the action space."""

    def __init__(self, task: TaskSpec):
        assert task.action is not None
        self.spec = task.action

    def reset(self, batch: int) -> None:
        pass

    def act(
        self,
        observations: dict[str, np.ndarray],
        previous_reward: np.ndarray,
        active: np.ndarray,
        rng: Draws,
    ) -> np.ndarray:
        spec, points = self.spec, np.zeros((len(active), self.spec.size))
        points[active] = rng.random((int(active.sum()), spec.size))
        if spec.kind == "continuous":
            low, high = np.array(spec.low), np.array(spec.high)
            return (low + (high - low) * points).astype(np.float32)
        chosen = (np.array(spec.choices) * points).astype(np.int64) + np.array(spec.start)
        return chosen[:, 0] if spec.size == 1 else chosen


@dataclass
class Played:
    """One episode: raw return, timesteps, how it ended, pictures where asked for."""

    seed: int
    total: float = 0.0
    timesteps: int = 0
    ending: str = ""
    error: str = ""
    seconds: float = 0.0
    frames: list[np.ndarray] = field(default_factory=list)


def play(
    policy: Policy,
    task: TaskSpec,
    seeds: list[int],
    step_limit: int | None = None,
    policy_seed: int = 0,
    film: int = 0,
    film_every: int = 1,
    progress: Callable[[int, int], None] = lambda timesteps, active: None,
) -> list[Played]:
    """One episode a seed, all at once. `film`: how many pictures of the first episode to keep, one every
    `film_every` timesteps. SimulatorError where the simulator cannot be made at all or its spaces differ from
    the task's."""
    assert task.environment is not None
    played = [Played(seed) for seed in seeds]
    begun = time.monotonic()
    environments = [simulators.make(task.environment) for _ in seeds]
    try:
        _check_spaces(task, environments[0])
        draws = Draws.seeded(policy_seed, seeds)
        latest = [_begin(one, environment) for one, environment in zip(played, environments)]
        active = np.array([not one.ending for one in played])
        reward = np.zeros(len(seeds), np.float32)
        policy.reset(len(seeds))
        while active.any():
            observations = {key: np.stack([o[key] for o in latest]) for key in latest[0]}
            actions = policy.act(observations, reward, active, draws.of(active))
            reward = np.zeros(len(seeds), np.float32)
            for n in np.flatnonzero(active):
                one = played[n]
                if n == 0 and one.timesteps % film_every == 0 and len(one.frames) < film:
                    try:
                        one.frames.append(simulators.frame(environments[0]))
                    except Exception:  # drawing may raise anything, and no return depends on it
                        film = 0
                try:
                    latest[n], gained, terminated, truncated, _ = environments[n].step(actions[n])
                    _require_finite(latest[n], float(gained))
                except Exception as error:  # a simulator may raise anything; its episode says so, others go on
                    one.ending, one.error = "error", f"{type(error).__name__}: {error}"
                    latest[n] = _nothing(environments[n])
                else:
                    reward[n] = gained
                    one.total += float(gained)
                    one.timesteps += 1
                    limit = step_limit is not None and one.timesteps >= step_limit
                    one.ending = (
                        "terminated" if terminated else "truncated" if truncated else "step limit" if limit else ""
                    )
                if one.ending:
                    active[n] = False
                    one.seconds = time.monotonic() - begun
            progress(max(one.timesteps for one in played), int(active.sum()))
    finally:
        for environment in environments:
            environment.close()
    return played


def _begin(one: Played, environment: simulators.gymnasium.Env) -> dict[str, np.ndarray]:
    """The first observation; where there is none, the episode has ended and it is all zeros."""
    try:
        observation, _ = environment.reset(seed=one.seed)
        _require_finite(observation)
        return observation
    except Exception as error:  # as in a step
        one.ending, one.error = "error", f"{type(error).__name__} at reset: {error}"
        return _nothing(environment)


def _require_finite(observation: dict[str, np.ndarray], reward: float = 0.0) -> None:
    for key, value in observation.items():
        if value.dtype.kind == "f" and not np.isfinite(value).all():
            raise FloatingPointError(f"the simulator returned an observation '{key}' that is not finite")
    if not np.isfinite(reward):
        raise FloatingPointError(f"the simulator returned a reward of {reward}")


def _nothing(environment: simulators.gymnasium.Env) -> dict[str, np.ndarray]:
    """What a policy is shown of an episode that has failed."""
    assert isinstance(environment.observation_space, spaces.Dict)
    return {
        key: np.asarray("") if isinstance(space, spaces.Text) else np.zeros(space.shape or (), space.dtype)
        for key, space in environment.observation_space.spaces.items()
    }


def _check_spaces(task: TaskSpec, environment: simulators.gymnasium.Env) -> None:
    fields, action = simulators.observation_fields(environment), simulators.action_spec(environment)
    have, wanted = (
        {s.key: (s.kind, s.kind == "text" or s.shape) for s in specs} for specs in (fields, task.observation)
    )
    kinds = [(spec.kind, spec.size, spec.choices, spec.start) for spec in (action, task.action) if spec is not None]
    if have != wanted or kinds[0] != kinds[1]:
        raise simulators.SimulatorError(
            f"task '{task.name}': logged with observations {wanted} and actions {kinds[1]}, but "
            f"{task.environment.id if task.environment else '?'} has {have} and {kinds[0]}; "
            "rebuild the dataset with --environment naming the right one"
        )
