"""Pictures in logs: coded bytes, channels first, floats in [0, 1], flattened rows.

PNG or JPEG bytes -> `decode`, `decode_all` -> (H, W, C), (T, H, W, C) uint8
(T, ...) of an episode + the layout that `scan` found -> `as_pictures` -> (T, H, W, C) uint8

`scan` decides once a field, by `picture_layout` (shape, dtype, bounds) or by what the user says; `read` applies it.

Invariant: lossless bytes come out as they were written; what is not certain is an EpisodeError that names
the remedy, never a guess.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image

from schemas.episode import EpisodeError, FieldSpec
from schemas.layout import PATCH_SIZE
from simulators.picture_layout import PictureError, PictureLayout, flattened_shapes, picture_layout

__all__ = [
    "PictureLayout",
    "as_pictures",
    "decode",
    "decode_all",
    "flattened_shapes",
    "image_field",
    "picture_layout",
    "size_of",
]

FORMATS = ("PNG", "JPEG")
MOST_PIXELS = 2**24
MODES = {"1": "L", "P": "RGB", "PA": "RGBA", "CMYK": "RGB", "YCbCr": "RGB"}  # what is brought to bytes a channel
PLAIN = {"L", "LA", "RGB", "RGBA"}
# what Pillow raises for bytes that make no sense
DAMAGE: tuple[type[Exception], ...] = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError)
DAMAGE += (AttributeError, ArithmeticError, MemoryError, RuntimeError, AssertionError, Image.DecompressionBombError)
REMEDY = "record pictures as uint8 (T, H, W, C)"


def decode(data: bytes, where: str, shape: tuple[int, int, int] | None = None) -> np.ndarray:
    """(H, W, C) uint8 of a coded PNG or JPEG, C as stored (palettes become colours). `where` names it in errors;
    `shape`: what it must have. EpisodeError ('corrupt picture', 'too large', 'wrong shape', 'wrong dtype')."""
    with opened(data, where) as image:
        pixels = np.asarray(image, np.uint8)
    pixels = pixels if pixels.ndim == 3 else pixels[..., None]
    if shape is not None and pixels.shape != tuple(shape):
        raise EpisodeError("wrong shape", f"'{where}' is a picture of {pixels.shape}, expected {tuple(shape)}")
    return pixels


@contextmanager
def opened(data: bytes, where: str) -> Iterator[Image.Image]:
    """A coded PNG or JPEG, decoded, as a picture of 1 to 4 channels of bytes. EpisodeError as of `decode`; it turns
    what Pillow raises in the block into one."""
    with _opened(data, where) as image:
        mode = MODES.get(image.mode, image.mode)
        if mode not in PLAIN:
            raise EpisodeError("wrong dtype", f"'{where}' is a picture of mode {image.mode}; {REMEDY}")
        try:
            image.load()
            yield image if image.mode == mode else image.convert(mode)
        except EpisodeError:
            raise
        except DAMAGE as error:
            raise _corrupt(where, error) from error


def decode_all(
    codes: Iterable[bytes], count: int, where: str, shape: tuple[int, int, int], channels: slice = slice(None)
) -> np.ndarray:
    """(count, H, W, C) uint8 of `count` coded pictures that must have one shape, or of some of their channels.
    EpisodeError as of `decode`."""
    out = np.empty((count, *shape[:2], len(range(shape[2])[channels])), np.uint8)
    for n, code in enumerate(codes):
        out[n] = decode(code, where, shape)[..., channels]
    return out


def size_of(data: bytes, where: str) -> tuple[int, int, int]:
    """(H, W, C) that `decode` would give, from the header alone."""
    with _opened(data, where) as image:
        return image.height, image.width, len(Image.new(MODES.get(image.mode, image.mode), (1, 1)).getbands())


def image_field(key: str, shape: tuple[int, int, int], stack: int = 1) -> FieldSpec:
    """The field of pictures of that shape, resized to the nearest multiples of a patch's 16 pixels."""
    height, width = (max(1, (side + PATCH_SIZE // 2) // PATCH_SIZE) * PATCH_SIZE for side in shape[:2])
    return FieldSpec(key, "image", shape, resized=(height, width), stack=stack)


def as_pictures(values: np.ndarray, where: str, layout: PictureLayout | None = None) -> np.ndarray:
    """(T, ...) of one episode to (T, H, W, C) uint8. Without a `layout`, only what is certain by itself: uint8, or
    floats that show by their values whether they lie in [0, 1] or in [0, 255]. `where` names the field in errors.
    EpisodeError ('wrong shape', 'wrong dtype', 'out of range', 'not finite') with a remedy otherwise."""
    layout = layout or _certain(values, where)
    if values.shape[1:] != layout.stored:
        raise EpisodeError("wrong shape", f"'{where}' is {values.shape[1:]} a timestep, expected {layout.stored}")
    if values.dtype.kind not in "fiu":
        raise EpisodeError("wrong dtype", f"'{where}' is {values.dtype}; {REMEDY}")
    try:
        return layout.pixels(values)
    except PictureError as error:
        raise EpisodeError(error.reason, f"'{where}': {error}") from None


def _certain(values: np.ndarray, where: str) -> PictureLayout:
    high: float | None = None
    if values.dtype.kind == "f" and values.size:
        low, high = float(values.min()), float(values.max())
        between = bool(((values > 0) & (values < 1)).any())
        if not (low >= 0 and high <= 255):
            raise EpisodeError("out of range", f"'{where}' spans [{low:g}, {high:g}]; {REMEDY}")
        if 0 < high <= 1 and not between:
            raise EpisodeError("wrong dtype", f"'{where}' holds 0 and 1 alone, as floats: of [0, 1] or of [0, 255]; "
                               f"{REMEDY}")  # fmt: skip
        high = 1.0 if high <= 1 else 255.0
    layout = picture_layout(values.shape[1:], values.dtype, 0, high)
    if layout is None:
        raise EpisodeError("wrong shape", f"'{where}' of {values.dtype} {values.shape[1:]} is no picture; {REMEDY}")
    return layout


def _opened(data: bytes, where: str) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the bound below is ours
            image = Image.open(io.BytesIO(data), formats=FORMATS)
    except DAMAGE as error:
        raise _corrupt(where, error) from error
    if image.width * image.height > MOST_PIXELS:
        raise EpisodeError("too large", f"'{where}' is a picture of {image.height}x{image.width}; resize it")
    return image


def _corrupt(where: str, error: Exception) -> EpisodeError:
    why = " ".join(str(error).split())[:200] or type(error).__name__
    return EpisodeError("corrupt picture", f"'{where}': {why}; record it again")
