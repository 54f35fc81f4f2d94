"""The one loop that plays episodes, for recording and for evaluation.

    environments + seeds -> reset -> policy.act on the batch -> step of each active one -> Step, Step, ...

An environment that raises, at reset or in a step, or returns what is not finite, ends its own episode with an error;
the others go on. Which errors end more than that is the caller's decision.

Invariant: an episode's steps depend on its own environment, seed and random numbers alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from simulators.policy import EpisodeRng, Policy, Rng

COMPARED = range(1000, 2000)


def reset_seed(seed: int, episode: int) -> int:
    """What a recording's episode is reset with: never one of COMPARED, which comparisons play by default."""
    return seed * 1_000_003 + (episode if seed or episode < COMPARED.start else episode + len(COMPARED))


@dataclass(frozen=True)
class Step:
    """One timestep of episode `row`, and its outcome. Where `error` is set the environment failed, and there is no
    outcome; an error at the reset has no action either."""

    row: int
    observation: dict[str, np.ndarray]
    action: np.ndarray | None
    reward: float = 0.0
    terminated: bool = False
    truncated: bool = False
    next_observation: dict[str, np.ndarray] | None = None
    error: Exception | None = None
    before: Any = None
    """Result of the caller's `before`."""

    @property
    def ended(self) -> bool:
        return self.terminated or self.truncated or self.error is not None


def rollout(
    policy: Policy,
    environments: Sequence[gymnasium.Env],
    seeds: Sequence[int],
    rng: Rng,
    before: Callable[[int, gymnasium.Env], Any] = lambda row, environment: None,
    step_limit: int | None = None,
) -> Iterator[Step]:
    """Play one episode in each environment, all together, and yield the steps of each timestep in row order.

    Args:
        environments: simulators as `simulators.make` returns them.
        seeds: environment n is reset with seeds[n].
        rng: random numbers of the policy; an EpisodeRng has one generator per row, of which those of active rows draw.
        before: called ahead of each step with row and environment; its value is in `Step.before`.
        step_limit: rows are left alone after this many timesteps, though nothing ended them.
    """
    latest: list[dict[str, np.ndarray]] = []
    active = np.ones(len(environments), bool)
    for row, (environment, seed) in enumerate(zip(environments, seeds)):
        try:
            observation, _ = environment.reset(seed=seed)
            require_finite(observation)
        except Exception as error:  # a simulator may raise anything
            observation, active[row] = _zeros(environment), False
            yield Step(row, observation, None, error=error)
        latest.append(observation)
    policy.reset(len(environments))
    reward = np.zeros(len(environments), np.float32)
    timesteps = 0
    while active.any() and (step_limit is None or timesteps < step_limit):
        timesteps += 1
        observations = {key: np.stack([observation[key] for observation in latest]) for key in latest[0]}
        drawing = rng.of(active) if isinstance(rng, EpisodeRng) else rng
        actions = policy.act(observations, reward, active.copy(), drawing)
        reward = np.zeros(len(environments), np.float32)
        for row in map(int, np.flatnonzero(active)):
            environment, observation, action = environments[row], latest[row], actions[row]
            seen = before(row, environment)
            try:
                following, gained, terminated, truncated, _ = environment.step(action)
                require_finite(following, float(gained))
            except Exception as error:  # as at reset
                latest[row], active[row] = _zeros(environment), False
                yield Step(row, observation, action, error=error, before=seen)
                continue
            latest[row], reward[row] = following, gained
            active[row] = not (terminated or truncated)
            yield Step(row, observation, action, float(gained), terminated, truncated, following, before=seen)


def require_finite(observation: dict[str, np.ndarray], reward: float = 0.0) -> None:
    """FloatingPointError names what a simulator returned that is NaN or infinite."""
    for key, value in observation.items():
        if value.dtype.kind == "f" and not np.isfinite(value).all():
            raise FloatingPointError(f"the simulator returned an observation '{key}' that is not finite")
    if not np.isfinite(reward):
        raise FloatingPointError(f"the simulator returned a reward of {reward}")


def _zeros(environment: gymnasium.Env) -> dict[str, np.ndarray]:
    """Observation of an episode that has failed."""
    assert isinstance(environment.observation_space, spaces.Dict)
    return {
        key: np.asarray("") if isinstance(space, spaces.Text) else np.zeros(space.shape or (), space.dtype)
        for key, space in environment.observation_space.spaces.items()
    }
