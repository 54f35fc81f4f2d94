"""Discrete values <-> tokens: the integer itself, moved into its id range (paper §2.1)."""

from __future__ import annotations

import numpy as np

from schemas.vocabulary import IdRange


def encode(values: np.ndarray, ids: IdRange) -> np.ndarray:
    """Integers in [0, ids.size) to tokens uint16, same shape. ValueError outside the range."""
    values = np.asarray(values, np.int64)
    if values.size and (values.min() < 0 or values.max() >= ids.size):
        raise ValueError(f"discrete value outside [0, {ids.size}): {values.min()} to {values.max()}")
    return (values + ids.start).astype(np.uint16)


def decode(tokens: np.ndarray, ids: IdRange) -> np.ndarray:
    """Tokens to integers, int64, same shape."""
    return np.asarray(tokens, np.int64) - ids.start
