"""Policies: what acts in a simulator, for recording and for evaluation alike.

    observations {key: (B, ...)} -> Policy.act -> actions (B, ...)      B episodes that started together
    observation {key: (...)} -> Player.act -> action                    one episode; OnePlayer makes it a Policy

Invariant: what an episode draws depends on its own generator and on how much it drew before, never on the other
episodes of its batch, so it is played the same way alone and among others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from schemas.episode import ActionSpec


class PolicyError(ValueError):
    """A policy cannot be used; the message names the file or name, the field and the remedy."""


class EpisodeRng:
    """One generator per episode. The first dimension of a drawn array is a multiple of the episodes, each of which
    fills a block of its own."""

    def __init__(self, generators: Sequence[np.random.Generator]):
        self.generators = generators

    @classmethod
    def seeded(cls, policy_seed: int, seeds: Sequence[int]) -> EpisodeRng:
        """Generators of the episodes with these seeds, played with this policy seed."""
        return cls([np.random.default_rng((policy_seed, seed)) for seed in seeds])

    def of(self, active: np.ndarray) -> EpisodeRng:
        """Those of the episodes marked in `active` (B,) bool, in their order."""
        return EpisodeRng([generator for generator, runs in zip(self.generators, active) if runs])

    def random(self, size: tuple[int, ...]) -> np.ndarray:
        """float64 in [0, 1)."""
        count, left = divmod(size[0], len(self.generators))
        assert not left, f"{size[0]} draws for {len(self.generators)} rows"
        return np.concatenate([generator.random((count, *size[1:])) for generator in self.generators])

    def uniform(self, low: Any, high: Any, size: tuple[int, ...]) -> np.ndarray:
        """float64 in [low, high), which broadcast to `size`."""
        return low + (np.asarray(high) - low) * self.random(size)

    def integers(self, low: Any, *, size: tuple[int, ...]) -> np.ndarray:
        """int64 in [0, low), which broadcasts to `size`."""
        return (np.asarray(low) * self.random(size)).astype(np.int64)


Rng = EpisodeRng | np.random.Generator
"""Source of a policy's random numbers: an EpisodeRng for a batch of episodes, one generator for a single episode."""
Observations = dict[str, np.ndarray]
"""Arrays (B, ...) by the key of their field, one row per episode."""


class Policy(Protocol):
    """Gato, the baselines, experts and random actions: acts in a batch of episodes."""

    def reset(self, batch: int) -> None:
        """`batch` episodes begin; the simulators have been reset."""

    def act(self, observations: Observations, previous_reward: np.ndarray, active: np.ndarray, rng: Rng) -> np.ndarray:
        """observations {key: (B, ...)} and previous_reward (B,) -> actions (B, ...). `active` (B,) bool only ever
        falls; the action of an ended episode is ignored. `rng` draws for the active episodes, in their order."""
        ...


class Player(Protocol):
    """Plays one environment. `algorithm` names it in the log."""

    @property
    def algorithm(self) -> str: ...

    def reset(self) -> None: ...

    def act(self, observation: Mapping[str, np.ndarray], rng: np.random.Generator) -> np.ndarray: ...


class RandomPolicy:
    """Uniform over the action space."""

    algorithm = "random"

    def __init__(self, action: ActionSpec):
        self.spec = action

    def reset(self, batch: int) -> None:
        """Nothing is kept between timesteps."""

    def act(self, observations: Observations, previous_reward: np.ndarray, active: np.ndarray, rng: Rng) -> np.ndarray:
        """-> (B, A) float32, or (B,) and (B, A) int64 for discrete actions of size 1 and A."""
        drawn = random_actions(self.spec, rng, int(active.sum()))
        actions = np.zeros((len(active), *drawn.shape[1:]), drawn.dtype)
        actions[active] = drawn
        return actions


def random_actions(spec: ActionSpec, rng: Rng, count: int) -> np.ndarray:
    """`count` uniformly random actions, as `RandomPolicy.act` returns them."""
    if spec.kind == "continuous":
        return rng.uniform(np.array(spec.low), np.array(spec.high), (count, spec.size)).astype(np.float32)
    drawn = rng.integers(np.array(spec.choices), size=(count, spec.size)) + np.array(spec.start)
    return drawn[:, 0] if spec.size == 1 else drawn


class OnePlayer:
    """A player as the policy of a batch of one."""

    def __init__(self, player: Player):
        self.player = player

    @property
    def algorithm(self) -> str:
        return self.player.algorithm

    def reset(self, batch: int) -> None:
        assert batch == 1, "a player plays one environment"
        self.player.reset()

    def act(self, observations: Observations, previous_reward: np.ndarray, active: np.ndarray, rng: Rng) -> np.ndarray:
        one = {key: np.array(value[0]) for key, value in observations.items()}
        own = rng.generators[0] if isinstance(rng, EpisodeRng) else rng  # which draws numbers of any kind
        return np.asarray(self.player.act(one, own))[None]


class NoisyPolicy:
    """Another policy with noise. Continuous actions are clipped to their range, get Gaussian noise of standard
    deviation `noise`, and are clipped again; discrete ones are random with that probability."""

    def __init__(self, policy: Policy, action: ActionSpec, noise: float):
        self.policy, self.spec, self.noise = policy, action, noise
        self._values = self._beyond = 0

    @property
    def clipped_share(self) -> float:
        """Share of the other policy's continuous action values that lay beyond their range."""
        return self._beyond / max(1, self._values)

    def reset(self, batch: int) -> None:
        self.policy.reset(batch)

    def act(self, observations: Observations, previous_reward: np.ndarray, active: np.ndarray, rng: Any) -> np.ndarray:
        actions = np.asarray(self.policy.act(observations, previous_reward, active, rng))
        if self.spec.kind == "continuous":
            actions = actions.reshape(len(active), self.spec.size)
            self._values += actions.size
            inside = np.clip(actions, self.spec.low, self.spec.high)
            self._beyond += int((~np.isclose(actions, inside)).sum())
            if self.noise:
                noise = rng.normal(0.0, self.noise, actions.shape)
                inside = np.clip(inside + noise, self.spec.low, self.spec.high)
            return inside.astype(np.float32)
        if self.noise and rng.random() < self.noise:
            return random_actions(self.spec, rng, len(active))
        return actions
