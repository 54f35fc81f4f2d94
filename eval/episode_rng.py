"""Random numbers for a batch of episodes: each episode's are its own.

policy seed, episode seeds -> a generator a row -> points in [0, 1) for the rows that still run

Invariant: what a row draws depends on the two seeds and on how much it drew before, never on the
other rows; so an episode is played alike alone and among others that end before or after it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class Draws:
    """The generators of some rows. Where rows are computed alike, any `numpy.random.Generator` stands in for it."""

    def __init__(self, generators: Sequence[np.random.Generator]):
        self.generators = generators

    @classmethod
    def seeded(cls, policy_seed: int, seeds: Sequence[int]) -> Draws:
        return cls([np.random.default_rng((policy_seed, seed)) for seed in seeds])

    def of(self, active: np.ndarray) -> Draws:
        """Those of the rows marked in `active` (B,) bool, in their order."""
        return Draws([generator for generator, runs in zip(self.generators, active) if runs])

    def random(self, shape: tuple[int, ...]) -> np.ndarray:
        """float64 in [0, 1); the first dimension is a multiple of the rows, of which each has its share in a piece."""
        count, left = divmod(shape[0], len(self.generators))
        assert not left, f"{shape[0]} draws for {len(self.generators)} rows"
        return np.concatenate([generator.random((count, *shape[1:])) for generator in self.generators])
