"""Images -> 16x16 patches in raster order (paper §2.1), kept as uint8.

Resizing is Pillow's fixed-point bilinear filter with antialiasing: integer
arithmetic, so the same bytes on every processor. Scaling to [-1, 1] and the
division by sqrt(16) happen in the model.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from schemas.layout import PATCH_SIZE


def resize(frames: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(T, H, W, C) uint8 -> (T, *size, C) uint8; C is 1 or 3."""
    if frames.shape[1:3] == tuple(size):
        return frames
    out = np.empty((len(frames), *size, frames.shape[3]), np.uint8)
    for t, frame in enumerate(frames):
        image = Image.fromarray(frame[..., 0] if frame.shape[2] == 1 else frame)
        out[t] = np.asarray(image.resize((size[1], size[0]), Image.Resampling.BILINEAR)).reshape(out.shape[1:])
    return out


def pad(frames: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(T, H, W, C) uint8 -> (T, *size, C) uint8, zeros at the bottom and the right."""
    down, right = size[0] - frames.shape[1], size[1] - frames.shape[2]
    return np.pad(frames, ((0, 0), (0, down), (0, right), (0, 0)))


def to_patches(frames: np.ndarray) -> np.ndarray:
    """(T, H, W, C) uint8 -> (T, P, 16, 16, C) uint8, raster order; H and W are multiples of 16."""
    T, H, W, C = frames.shape
    grid = frames.reshape(T, H // PATCH_SIZE, PATCH_SIZE, W // PATCH_SIZE, PATCH_SIZE, C)
    return np.ascontiguousarray(grid.transpose(0, 1, 3, 2, 4, 5)).reshape(T, -1, PATCH_SIZE, PATCH_SIZE, C)


def from_patches(patches: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Inverse of `to_patches`: (T, rows * columns, 16, 16, C) -> (T, 16 rows, 16 columns, C)."""
    T, C = len(patches), patches.shape[-1]
    grid = patches.reshape(T, rows, columns, PATCH_SIZE, PATCH_SIZE, C).transpose(0, 1, 3, 2, 4, 5)
    return grid.reshape(T, rows * PATCH_SIZE, columns * PATCH_SIZE, C)
