"""One number of a timestep, over all that the survey saw of it: its bins, and how raw values compare with them.

ordinals in the column's ids -> counts; with the raw values that the shards keep -> error in half-bins, clipped or not

Invariant: values are compared in the companded space, where bins are uniform.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from etl.tokenizers import continuous
from schemas.vocabulary import Vocabulary, bin_centres

SLACK = 1e-3  # half-bins: a log may be float64, what is kept beside the tokens is float32


@dataclass
class Dimension:
    """One stored column that is no text: ids [start, start + len(counts)), and what the survey counts of them.

    `raw`: its column in the member of raw values, if it has one. `first`: the value of a discrete column's first id.
    `wrong`: values outside the bin that their token names; `worst`: largest error of values that are not
    clipped, in half-bins."""

    name: str
    role: str
    kind: str
    column: int
    start: int
    counts: np.ndarray
    raw: int | None = None
    low: float = -1.0
    high: float = 1.0
    first: int = 0
    clipped: int = 0
    wrong: int = 0
    worst: float = 0.0

    def position(self, value: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
        """Values scaled to the bins' range [-1, 1]; beyond it where they are clipped."""
        if self.role == "observation":
            return continuous.compand(value, vocabulary)
        return 2.0 * (np.asarray(value, np.float64) - self.low) / (self.high - self.low) - 1.0

    def value(self, position: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
        """Inverse of `position`."""
        if self.role == "observation":
            return continuous.expand(position, vocabulary)
        return self.low + (np.asarray(position, np.float64) + 1.0) * (self.high - self.low) / 2.0

    def compare(self, bins: np.ndarray, raw: np.ndarray, vocabulary: Vocabulary) -> tuple[np.ndarray, np.ndarray]:
        """Distance of raw values from their bin's centre in half-bins, and which lie beyond the range. Those count
        as lying on its edge, so that a clipped value is right in the outermost bin only."""
        y = self.position(raw, vocabulary)
        error = (np.clip(y, -1.0, 1.0) - bin_centres(vocabulary.bins)[bins]) * vocabulary.bins
        return error, np.abs(y) > 1.0

    @property
    def total(self) -> int:
        return int(self.counts.sum())

    @property
    def ends(self) -> tuple[float, float]:
        """Shares of the first and of the last bin."""
        return float(self.counts[0] / max(1, self.total)), float(self.counts[-1] / max(1, self.total))

    def span(self, vocabulary: Vocabulary) -> tuple[float, float]:
        """Lowest and highest value seen, as edges of their bins or as choices."""
        seen = np.flatnonzero(self.counts)
        low, high = (float(seen[0]), float(seen[-1])) if len(seen) else (0.0, 0.0)
        if self.kind == "discrete":
            return low + self.first, high + self.first
        edges = np.array([low, high + 1]) * (2.0 / len(self.counts)) - 1.0
        return tuple(float(v) for v in self.value(edges, vocabulary))  # type: ignore[return-value]
