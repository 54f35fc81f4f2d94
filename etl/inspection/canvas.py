"""All pictures of a timestep on one canvas, side by side, and where each patch lies on it.

pixels (T, *patch_shape) of shards -> pictures (T, H, W, C) -> canvas (T, H, W, C), grey ones repeated beside colours
"""

from __future__ import annotations

import numpy as np

from etl.tokenizers.image import from_patches
from schemas.layout import PATCH_SIZE, TimestepLayout

GAP = 4  # white pixels between two pictures


def canvas(layout: TimestepLayout, pixels: np.ndarray) -> np.ndarray:
    """Pixels (T, *patch_shape) uint8 to (T, H, W, C) uint8."""
    sizes = [(PATCH_SIZE * p.rows, PATCH_SIZE * p.columns) for p in layout.pictures]
    width = sum(w for _, w in sizes) + GAP * (len(sizes) - 1)
    out = np.full((len(pixels), max(h for h, _ in sizes), width, layout.channels), 255, np.uint8)
    left = 0
    for picture, patches, (h, w) in zip(layout.pictures, layout.split_patches(pixels), sizes):
        out[:, :h, left : left + w] = from_patches(patches, picture.rows, picture.columns)
        left += w + GAP
    return out


def patch_corners(layout: TimestepLayout) -> list[tuple[int, int]]:
    """Left and top of each patch on the canvas, in the order in which the model gets them."""
    found, left = [], 0
    for picture in layout.pictures:
        for n in range(picture.patches):
            row, column = divmod(n, picture.columns)
            found.append((left + column * PATCH_SIZE, row * PATCH_SIZE))
        left += picture.columns * PATCH_SIZE + GAP
    return found
