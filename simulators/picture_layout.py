"""Arrays that are pictures, however they are stored: which axes are what, and their bytes as (H, W, C).

    shape, dtype, bounds -> `picture_layout` -> PictureLayout.pixels: (T, *stored) -> (T, H, W, C) uint8

A log and its simulator decide by the same function, so that a picture means the same in both. It says yes only where
the array can be nothing else that is common: whoever gets None asks the user.

Invariant: a layout is a function of shape, dtype and bounds; `pixels` keeps every uint8 as it is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

SMALLEST_PICTURE = 8  # pixels per side; smaller uint8 arrays are numbers, such as minigrid's 7 x 7 symbols
SMALLEST_FLAT = 16  # pixels per side, of grey (32) and of float pictures, which are more easily something else
MOST_CHANNELS = 32
COLOURS = (1, 3, 4)  # channels of a picture of floats
SLACK = 1e-3  # by which floats may leave [0, 1] through rounding


class PictureError(ValueError):
    """Values that are no picture of their layout; `reason`: in a word."""

    def __init__(self, detail: str, reason: str = "out of range"):
        super().__init__(detail)
        self.reason = reason


@dataclass(frozen=True)
class PictureLayout:
    """How an array of one timestep becomes a picture. `stored`: its shape in the log, possibly flattened; `shape`:
    (height, width, channels); `channels_first`: it is (C, H, W), flattened or not; `unit`: floats in [0, 1]."""

    stored: tuple[int, ...]
    shape: tuple[int, int, int]
    channels_first: bool = False
    unit: bool = False

    @property
    def is_plain(self) -> bool:
        """True if the array is the picture already: bytes (H, W, C)."""
        return self.stored == self.shape and not self.channels_first and not self.unit

    def pixels(self, values: np.ndarray) -> np.ndarray:
        """(T, *stored) of any real dtype to (T, H, W, C) uint8. PictureError for values beyond [0, 255], or [0, 1]
        where `unit`, for NaN, and for fractions where not."""
        if values.dtype != np.uint8:
            values = _as_uint8(values, self.unit)
        height, width, channels = self.shape
        if self.channels_first:
            return np.ascontiguousarray(values.reshape(-1, channels, height, width).transpose(0, 2, 3, 1))
        return values.reshape(-1, height, width, channels)


def picture_layout(shape: tuple[int, ...], dtype: Any, low: Any = None, high: Any = None) -> PictureLayout | None:
    """The layout of an array of one timestep that is certainly a picture, else None.

    uint8 (H, W, C) and (C, H, W) of at most 32 channels and grey (H, W) from 32 x 32; floats of 1, 3 or 4 channels
    from 16 x 16 whose bounds `low` and `high` (numbers or arrays) are exactly 0 and 1, or 0 and 255.
    """
    kind, shape = np.dtype(dtype), tuple(shape)
    if kind != np.uint8 and kind.kind != "f":
        return None
    unit = False
    if kind.kind == "f":
        if low is None or high is None or np.any(np.asarray(low) != 0):
            return None
        tops = np.unique(np.asarray(high, np.float64))
        if len(tops) != 1 or tops[0] not in (1.0, 255.0):
            return None
        unit = bool(tops[0] == 1.0)
    smallest = SMALLEST_FLAT if kind.kind == "f" else SMALLEST_PICTURE
    if len(shape) == 2 and min(shape) >= 2 * SMALLEST_FLAT:
        return PictureLayout(shape, (*shape, 1), unit=unit)
    if len(shape) != 3 or min(shape) < 1:
        return None
    # the channel axis is the last one, unless only the first one can be, or only that leaves a square
    C, H, W = shape
    last = min(shape[:2]) >= smallest and shape[2] <= MOST_CHANNELS
    first = min(shape[1:]) >= smallest and shape[0] <= MOST_CHANNELS
    if last and first:
        last = not (H == W and C < H)
    if not last and not first:
        return None
    picture = shape if last else (H, W, C)
    if kind.kind == "f" and picture[2] not in COLOURS:
        return None
    return PictureLayout(shape, picture, not last, unit)


def flattened_shapes(size: int) -> list[tuple[int, int, int]]:
    """Shapes (H, W, C) of square pictures of `size` values, colour first: what rows of that many bytes may be."""
    found = []
    for channels in (3, 1, 4):
        side = math.isqrt(size // channels)
        if side >= SMALLEST_FLAT and side * side * channels == size:
            found.append((side, side, channels))
    return found


def _as_uint8(values: np.ndarray, unit: bool) -> np.ndarray:
    if not values.size:
        return values.astype(np.uint8)
    low, high = float(values.min()), float(values.max())
    if not math.isfinite(low) or not math.isfinite(high):
        raise PictureError("a picture holds NaN or infinity", "not finite")
    most = 1.0 if unit else 255.0
    if low < -SLACK or high > most + SLACK:
        raise PictureError(f"pixels span [{low:g}, {high:g}], expected [0, {most:g}]; record pictures as uint8")
    if unit:
        return np.rint(np.clip(values, 0, 1) * np.float32(255)).astype(np.uint8)
    whole = np.rint(values)
    if np.abs(whole - values).max() > SLACK:
        raise PictureError("pixels in [0, 255] have fractions; record pictures as uint8", "wrong dtype")
    return whole.astype(np.uint8)
