"""Continuous values <-> tokens (paper §2.1, appendix B).

observation: x -> F(x) = sgn(x) log(|x| mu + 1) / log(scale mu + 1), clipped to [-1, 1] -> 1024 uniform bins
action:      a in [low, high] -> [-1, 1] linearly, no companding -> the same bins

Computed in float64, so that a token does not depend on the processor; float32 observations are looked up in a table
made by that computation, at half its time. Decoding gives the bin's centre. Callers refuse values that are not finite
beforehand.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

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
    if x.dtype == np.float32 and x.size:
        beyond = x.max() > vocabulary.scale or x.min() < -vocabulary.scale
        return _looked_up(x, vocabulary), int(np.count_nonzero(np.abs(x) > vocabulary.scale)) if beyond else 0
    return computed(x, vocabulary)


def computed(x: np.ndarray, vocabulary: Vocabulary) -> tuple[np.ndarray, int]:
    """`encode_observation` by its formula: the reference of the table."""
    return _tokens(compand(x, vocabulary), vocabulary.bins, vocabulary.observation_continuous.start)


def _looked_up(x: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    bits = np.ascontiguousarray(x).view(np.uint32)
    tokens = _table(vocabulary).take((bits >> 16).astype(np.intp), mode="clip")
    tokens += _growing(bits)
    tokens >>= 16
    return tokens.astype(np.uint16)


def _growing(bits: np.ndarray) -> np.ndarray:
    """Those of negative float32s turned over, so that among floats of the same upper 16 bits they grow with the
    value."""
    sign = bits.view(np.int32) >> 31
    sign ^= bits.view(np.int32)
    return sign.view(np.uint32)


@lru_cache(maxsize=4)
def _table(vocabulary: Vocabulary) -> np.ndarray:
    """(65536,) uint32, indexed by a float32's upper 16 bits. Floats that share them differ by less than a bin (1 in 128
    against 1 in 50): they have one token, or two, whose edge among the lower 16 of the `_growing` bits is found by
    bisection. An entry is token << 16 plus the distance of the edge from 65536, less the upper 16 of those bits: adding
    them makes the token, and carries into the next one at the edge and after it."""
    upper = np.arange(2**16, dtype=np.uint32) << 16
    upper[(upper & 0x7F800000) == 0x7F800000] = 0  # infinity and NaN, which are not looked up

    def token(low: np.ndarray) -> np.ndarray:
        bits = upper | np.where(upper >> 31, 0xFFFF - low, low).astype(np.uint32)
        return computed(bits.view(np.float32), vocabulary)[0].astype(np.int64)

    below, above = np.full(2**16, 0), np.full(2**16, 0xFFFF)
    first, last = token(below), token(above)
    assert (last - first).max() <= 1  # of this companding and number of bins
    while (above - below > 1).any():
        middle = (below + above) // 2
        beyond = token(middle) > first
        below, above = np.where(beyond, below, middle), np.where(beyond, middle, above)
    entries = (first << 16) + np.where(last > first, 0x10000 - above, 0)
    return (entries - (_growing(upper) & 0xFFFF0000)).astype(np.uint32)


def _tokens(y: np.ndarray, bins: int, start: int) -> tuple[np.ndarray, int]:
    """Values float64, which it overwrites, to tokens of uniform bins over [-1, 1], and how many lay outside; 1 itself
    falls into the last bin."""
    y += 1.0
    y *= bins / 2
    clipped = 0
    if y.size and not (y.min() >= 0.0 and y.max() < bins):
        clipped = int(np.count_nonzero((y < 0.0) | (y > bins)))
        np.clip(y, 0.0, bins - 1, out=y)
    tokens = y.astype(np.uint16)
    tokens += np.uint16(start)
    return tokens, clipped


def decode_observation(tokens: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    """Bin centres, expanded, float64."""
    bins = np.asarray(tokens, np.int64) - vocabulary.observation_continuous.start
    return expand(bin_centres(vocabulary.bins)[bins], vocabulary)


Bounds = float | Sequence[float]


def scale_action(a: np.ndarray, low: Bounds, high: Bounds) -> np.ndarray:
    """Actions (..., A) scaled so that each dimension's bounds become -1 and 1, float64."""
    y = np.array(a, np.float64)
    least, most = np.asarray(low, np.float64), np.asarray(high, np.float64)
    scaled = (least != -1.0) | (most != 1.0)  # the others are there already, without a rounding
    if scaled.any():
        scaled, least, most = (np.broadcast_to(bound, y.shape[-1:]) for bound in (scaled, least, most))
        least, most = least[scaled], most[scaled]
        y[..., scaled] = 2.0 * (y[..., scaled] - least) / (most - least) - 1.0
    return y


def encode_action(a: np.ndarray, low: Bounds, high: Bounds, vocabulary: Vocabulary) -> tuple[np.ndarray, int]:
    """Tokens uint16 of a's shape (..., A), and how many values lay outside their dimension's [low, high] and were
    clipped."""
    y = scale_action(a, low, high)
    return _tokens(y, vocabulary.bins, vocabulary.action_continuous.start)


def decode_action(tokens: np.ndarray, low: Bounds, high: Bounds, vocabulary: Vocabulary) -> np.ndarray:
    """Tokens (..., A) to bin centres in each dimension's [low, high], float64."""
    bins = np.asarray(tokens, np.int64) - vocabulary.action_continuous.start
    least, most = np.asarray(low, np.float64), np.asarray(high, np.float64)
    return least + (bin_centres(vocabulary.bins)[bins] + 1.0) * (most - least) / 2.0
