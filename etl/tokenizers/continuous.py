"""Continuous values <-> tokens (paper §2.1, appendix B).

observation: x -> F(x) = sgn(x) log(|x| mu + 1) / log(scale mu + 1), clipped to [-1, 1] -> 1024 uniform bins
action:      a in [low, high] -> [-1, 1] linearly, no companding -> the same bins

Computed in float64, so that a token does not depend on the processor. Decoding
gives the bin's centre. Callers refuse values that are not finite beforehand.
"""

from __future__ import annotations

import numpy as np

from schemas.vocabulary import Vocabulary, bin_centres


def compand(x: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    """F(x) of the paper's appendix B, unclipped, float64, same shape."""
    x = np.asarray(x, np.float64)
    y = np.abs(x, out=np.empty_like(x))
    y *= vocabulary.mu
    y += 1.0
    np.log(y, out=y)
    y /= np.log(vocabulary.scale * vocabulary.mu + 1.0)
    return np.copysign(y, x, out=y)


def expand(y: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    """Inverse of `compand`, float64."""
    y = np.asarray(y, np.float64)
    return np.sign(y) * np.expm1(np.abs(y) * np.log(vocabulary.scale * vocabulary.mu + 1.0)) / vocabulary.mu


def encode_observation(x: np.ndarray, vocabulary: Vocabulary) -> tuple[np.ndarray, int]:
    """Tokens uint16 of x's shape, and how many values lay beyond the mu-law's range and were clipped."""
    y = compand(x, vocabulary)
    return _tokens(y, vocabulary.bins, vocabulary.observation_continuous.start)


def _tokens(y: np.ndarray, bins: int, start: int) -> tuple[np.ndarray, int]:
    """Values float64, which it overwrites, to tokens of uniform bins over [-1, 1], and how many lay outside; 1 itself
    falls into the last bin."""
    y += 1.0
    y *= bins / 2
    clipped = int(np.count_nonzero((y < 0.0) | (y > bins)))
    np.clip(y, 0.0, bins - 1, out=y)
    tokens = y.astype(np.uint16)
    tokens += np.uint16(start)
    return tokens, clipped


def decode_observation(tokens: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    """Bin centres, expanded, float64."""
    bins = np.asarray(tokens, np.int64) - vocabulary.observation_continuous.start
    return expand(bin_centres(vocabulary.bins)[bins], vocabulary)


def encode_action(a: np.ndarray, low: float, high: float, vocabulary: Vocabulary) -> tuple[np.ndarray, int]:
    """Tokens uint16 of a's shape, and how many values lay outside [low, high] and were clipped."""
    y = np.array(a, np.float64)
    if (low, high) != (-1.0, 1.0):
        y = 2.0 * (y - low) / (high - low) - 1.0
    return _tokens(y, vocabulary.bins, vocabulary.action_continuous.start)


def decode_action(tokens: np.ndarray, low: float, high: float, vocabulary: Vocabulary) -> np.ndarray:
    """Bin centres in [low, high], float64."""
    bins = np.asarray(tokens, np.int64) - vocabulary.action_continuous.start
    return low + (bin_centres(vocabulary.bins)[bins] + 1.0) * (high - low) / 2.0
