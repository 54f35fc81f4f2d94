"""Pictures in logs: axes, floats, coded bytes, and what is refused."""

import contextlib
import io

import numpy as np
import pytest
from PIL import Image

from etl.sources._pictures import as_pictures, decode, flattened_shapes, picture_layout, size_of
from schemas.episode import EpisodeError

RNG = np.random.default_rng(0)


def coded(pixels: np.ndarray, form: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(buffer, form, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("stored", "shape", "first"),
    [
        ((84, 84, 3), (84, 84, 3), False),
        ((84, 84), (84, 84, 1), False),
        ((4, 84, 84), (84, 84, 4), True),
        ((2, 64, 64), (64, 64, 2), True),
        ((4, 16, 16), (16, 16, 4), True),
        ((9, 32, 32), (32, 32, 9), True),
        ((3, 480, 640), (480, 640, 3), True),
        ((480, 640, 3), (480, 640, 3), False),
        ((16, 16, 16), (16, 16, 16), False),
    ],
)
def test_axes_of_bytes(stored, shape, first):
    layout = picture_layout(stored, np.uint8)
    assert layout is not None and (layout.shape, layout.channels_first) == (shape, first)
    values = RNG.integers(0, 256, (5, *stored), np.uint8)
    expected = values.transpose(0, 2, 3, 1) if first else values.reshape(5, *shape)
    np.testing.assert_array_equal(as_pictures(values, "frame"), expected)


@pytest.mark.parametrize("stored", [(7, 7, 3), (3,), (6912,), (31, 31), (40, 40, 40), (2, 84, 84, 3)])
def test_what_is_no_picture(stored):
    assert picture_layout(stored, np.uint8) is None
    with pytest.raises(EpisodeError, match="no picture; record pictures as uint8"):
        as_pictures(np.zeros((2, *stored), np.uint8), "frame")


def test_floats_need_their_bounds():
    shape = (32, 48, 3)
    assert picture_layout(shape, np.float32) is None
    assert picture_layout(shape, np.float32, -1, 1) is None
    assert picture_layout((32, 48, 2), np.float32, 0, 1) is None
    layout = picture_layout(shape, np.float64, np.zeros(shape), np.ones(shape))
    pixels = RNG.integers(0, 256, (4, *shape), np.uint8)
    np.testing.assert_array_equal(as_pictures(pixels / 255, "frame", layout), pixels)
    np.testing.assert_array_equal(as_pictures((pixels / 255).astype(np.float32), "frame"), pixels)
    np.testing.assert_array_equal(as_pictures(pixels.astype(np.float32), "frame"), pixels)
    first = (pixels / np.float32(255)).transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(as_pictures(first, "frame"), pixels)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda v: v * 300, "out of range"),
        (lambda v: v - 1, "out of range"),
        (lambda v: v * 0 + np.nan, "out of range|not finite"),
        (lambda v: np.rint(v), "wrong dtype"),  # only 0 and 1: of either range
        (lambda v: v * 200, "wrong dtype"),  # fractions of a byte
        (lambda v: v[..., 0], "wrong shape"),
    ],
)
def test_floats_that_are_not_certain(change, reason):
    values = change(RNG.random((2, 16, 16, 3)).astype(np.float32))
    with pytest.raises(EpisodeError, match=reason) as caught:
        as_pictures(values, "frame")
    assert "frame" in caught.value.detail and "uint8" in caught.value.detail


def test_flattened():
    assert flattened_shapes(6912) == [(48, 48, 3)]
    assert flattened_shapes(84 * 84) == [(84, 84, 1), (42, 42, 4)]
    assert flattened_shapes(17) == []


def test_decoded_bytes():
    pixels = RNG.integers(0, 256, (24, 30, 3), np.uint8)
    grey = pixels[..., :1]
    np.testing.assert_array_equal(decode(coded(pixels), "wrist", (24, 30, 3)), pixels)
    np.testing.assert_array_equal(decode(coded(grey), "wrist"), grey)
    four = RNG.integers(0, 256, (24, 30, 4), np.uint8)
    np.testing.assert_array_equal(decode(coded(four), "wrist"), four)
    flat = np.full((24, 30, 3), 90, np.uint8)
    assert np.abs(decode(coded(flat, "JPEG", quality=95), "wrist").astype(int) - 90).max() <= 2
    assert size_of(coded(pixels), "wrist") == (24, 30, 3) and size_of(coded(grey), "wrist") == (24, 30, 1)
    with pytest.raises(EpisodeError, match=r"picture of \(24, 30, 3\), expected \(24, 30, 1\)"):
        decode(coded(pixels), "wrist", (24, 30, 1))


def test_damaged_bytes_are_a_reason():
    good = coded(RNG.integers(0, 256, (24, 30, 3), np.uint8))
    for data in (b"", b"GIF89a", good[: len(good) // 2], bytes(reversed(good))):
        with pytest.raises(EpisodeError, match="corrupt picture: 'wrist'"):
            decode(data, "wrist")
    for n in range(0, len(good), 7):
        flipped = bytearray(good)
        flipped[n] ^= 0x55
        with contextlib.suppress(EpisodeError):
            decode(bytes(flipped), "wrist")
    deep = io.BytesIO()
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(deep, "PNG")
    with pytest.raises(EpisodeError, match="mode I;16"):
        decode(deep.getvalue(), "wrist")
