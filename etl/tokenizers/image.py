"""Images -> 16x16 patches in raster order (paper §2.1), kept as uint8.

frames (T, H, W, C) -> newest frame of a stack -> pictures of 3 or 1 channels -> resize or pad
-> (T, 16 rows, 16 columns, C) -> patches (T, P, 16, 16, C), BLOCK frames at a time

Resizing is bilinear: of two neighbours along each side where a side shrinks at most to its half, so that every pixel
counts, with antialiasing where it shrinks more. Both are integer arithmetic. Scaling to [-1, 1] and the division by
sqrt(16) happen in the model.

Invariant: the same bytes on every processor: OpenCV resizes where it gives what `bilinear` gives, which is slow.
"""

from __future__ import annotations

from functools import cache

import cv2
import numpy as np
from PIL import Image

from schemas.layout import PATCH_SIZE, picture_size, pictures_of
from schemas.task import FieldSpec

BLOCK = 32  # frames that OpenCV resizes as one tall picture, and that stay in the processor's cache
UNIT = 2048  # of the weights, which are integers


def encode(frames: np.ndarray, spec: FieldSpec) -> list[np.ndarray]:
    """(T, H, W, C) uint8 of a field -> patches (T, P, 16, 16, 3 or 1) uint8 of each of its `pictures_of`."""
    return [_encode(picture, spec) for picture in split_channels(frames, spec)]


def split_channels(frames: np.ndarray, spec: FieldSpec) -> list[np.ndarray]:
    """(T, H, W, C) uint8 of a field -> views (T, H, W, 3 or 1) of the newest frame's channels."""
    first, parts = spec.shape[2] - spec.channels, []
    for picture in pictures_of(spec):
        parts.append(frames[..., first : first + picture.channels])
        first += picture.channels
    return parts


def fitted(frames: np.ndarray, spec: FieldSpec) -> np.ndarray:
    """(T, H, W, 3 or 1) uint8 of a field -> (T, *picture_size, 3 or 1), resized or padded."""
    size = picture_size(spec)
    return pad(frames, size) if spec.fit == "pad" or spec.resized is None else resize(frames, size)


def _encode(frames: np.ndarray, spec: FieldSpec) -> np.ndarray:
    (height, width), (T, _, _, C) = picture_size(spec), frames.shape
    patches = np.empty((T, height * width // PATCH_SIZE**2, PATCH_SIZE, PATCH_SIZE, C), np.uint8)
    for start in range(0, T, BLOCK):
        patches[start : start + BLOCK] = to_patches(fitted(frames[start : start + BLOCK], spec))
    return patches


def resize(frames: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(T, H, W, C) uint8 -> (T, *size, C) uint8; C is 1 or 3."""
    _, H, W, C = frames.shape
    if tuple(size) == (H, W):
        return frames
    if 2 * size[0] < H or 2 * size[1] < W:
        return _antialiased(frames, size)
    block = _block(H, W, C, *size)
    return _fast(frames, size, block) if block else bilinear(frames, size)


def bilinear(frames: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(T, H, W, C) uint8 -> (T, *size, C) uint8 from two neighbours along each side, in OpenCV's fixed-point
    arithmetic; the slow reference of `resize`."""
    left, right, w0, w1 = _neighbours(frames.shape[2], size[1], inside=True)
    wide = frames.astype(np.int64)
    wide = wide[:, :, left] * w0[:, None] + wide[:, :, right] * w1[:, None] >> 4
    upper, lower, w0, w1 = _neighbours(frames.shape[1], size[0], inside=False)
    sums = (wide[:, upper] * w0[:, None, None] >> 16) + (wide[:, lower] * w1[:, None, None] >> 16)
    return (sums + 2 >> 2).clip(0, 255).astype(np.uint8)


def _neighbours(pixels: int, size: int, inside: bool) -> tuple[np.ndarray, ...]:
    """Indices (size,) of the two source pixels nearest to each target pixel, and their weights in UNITs. Beyond an
    edge the edge's pixel counts twice, with both weights; `inside`: once, with the whole weight."""
    place = ((np.arange(size) + 0.5) * (pixels / size) - 0.5).astype(np.float32)
    first = np.floor(place).astype(np.int64)
    share = place - first.astype(np.float32)
    if inside:
        share[(first < 0) | (first >= pixels - 1)] = 0
    weights = np.rint((np.float32(1) - share) * UNIT), np.rint(share * UNIT)
    return first.clip(0, pixels - 1), (first + 1).clip(0, pixels - 1), *(w.astype(np.int64) for w in weights)


def _fast(frames: np.ndarray, size: tuple[int, int], block: int) -> np.ndarray:
    """OpenCV's, `block` frames at a time, stacked to one tall picture."""
    T, H, W, C = frames.shape
    out = np.empty((T, *size, C), np.uint8)
    for start in range(0, T, block):
        part = np.ascontiguousarray(frames[start : start + block]).reshape(-1, W, C)
        tall = out[start : start + block].reshape(-1, size[1], C)
        cv2.resize(part, (size[1], len(tall)), dst=tall, interpolation=cv2.INTER_LINEAR)
    return out


@cache
def _block(H: int, W: int, C: int, height: int, width: int) -> int:
    """How many frames of this shape OpenCV may resize at once with the result of `bilinear`; 0 where it has another
    one on this processor. Stacked frames that grow run into each other, and positions far down are less exact."""
    cv2.setNumThreads(1)
    probe = np.random.default_rng(0).integers(0, 256, (BLOCK, H, W, C), np.uint8)
    slow = bilinear(probe, (height, width))
    return next((n for n in (BLOCK, 1) if np.array_equal(_fast(probe, (height, width), n), slow)), 0)


def _antialiased(frames: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Pillow's: each target pixel is a weighted mean of all the pixels that it covers."""
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
    # a patch's row of pixels is moved as one item: C of 16 bytes
    rows = np.ascontiguousarray(frames).reshape(T, H // PATCH_SIZE, PATCH_SIZE, W * C).view(np.complex128)
    grid = rows.reshape(*rows.shape[:3], W // PATCH_SIZE, C).transpose(0, 1, 3, 2, 4)
    return np.ascontiguousarray(grid).view(np.uint8).reshape(T, -1, PATCH_SIZE, PATCH_SIZE, C)


def from_patches(patches: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Inverse of `to_patches`: (T, rows * columns, 16, 16, C) -> (T, 16 rows, 16 columns, C)."""
    T, C = len(patches), patches.shape[-1]
    grid = patches.reshape(T, rows, columns, PATCH_SIZE, PATCH_SIZE, C).transpose(0, 1, 3, 2, 4, 5)
    return grid.reshape(T, rows * PATCH_SIZE, columns * PATCH_SIZE, C)
