"""Discrete values <-> tokens: the integer itself, counted from its space's start, moved into its id range (paper §2.1).

values (T, N) in [start, start + choices) -> values - start + first id -> tokens (T, N)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from schemas.vocabulary import IdRange

Numbers = int | Sequence[int]


def encode(values: np.ndarray, ids: IdRange, start: Numbers = 0, choices: Numbers | None = None) -> np.ndarray:
    """Integers (..., N) in [start, start + choices) to tokens uint16, same shape. `start`, `choices`: one number per
    element, or one for all; ids.size choices where not given. ValueError for a value outside."""
    ordinals = np.asarray(values, np.int64) - np.asarray(start)
    size = np.asarray(ids.size if choices is None else choices)
    if ((ordinals < 0) | (ordinals >= size)).any():
        first, last = (np.min(start), np.max(np.asarray(start) + size - 1))
        raise ValueError(f"discrete value outside [{first}, {last}]: {np.min(values)} to {np.max(values)}")
    return (ordinals + ids.start).astype(np.uint16)


def decode(tokens: np.ndarray, ids: IdRange, start: Numbers = 0) -> np.ndarray:
    """Tokens (..., N) to integers, int64, same shape."""
    return np.asarray(tokens, np.int64) - ids.start + np.asarray(start)
