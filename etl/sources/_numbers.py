"""Numbers of logs in the types that episodes have: float32 and int64.

Invariant: what is beyond float32 becomes infinite, without a word from numpy, and `RawEpisode.check` refuses it.
"""

from __future__ import annotations

import numpy as np

from etl.sources._hdf5 import AGAIN
from schemas.episode import EpisodeError


def as_float32(values: np.ndarray, copy: bool = True) -> np.ndarray:
    """Numbers as float32. Without `copy`, an array that is float32 already may be a view of what it was read into."""
    if values.dtype == np.float32:
        return values.copy() if copy else values
    with np.errstate(over="ignore", invalid="ignore"):
        return values.astype(np.float32, copy=copy)


def float32(values: np.ndarray, name: str) -> np.ndarray:
    """As float32; EpisodeError for what is no number."""
    if values.dtype.kind not in "fiub":
        raise EpisodeError("wrong dtype", f"'{name}' is {values.dtype}, expected numbers; {AGAIN}")
    return as_float32(values, copy=False)


def integers(values: np.ndarray, name: str) -> np.ndarray:
    """As int64; EpisodeError for what is no integer."""
    if values.dtype.kind not in "iub":
        raise EpisodeError("wrong dtype", f"'{name}' is {values.dtype}, expected integers; {AGAIN}")
    return values.astype(np.int64)
