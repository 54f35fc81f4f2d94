"""Tokens against an independent slow reference, written from the paper's formulas in plain Python."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from etl.tokenizers import continuous, discrete, image
from etl.tokenizers.timestep import TimestepTokenizer
from schemas.episode import ActionSpec, FieldSpec, TaskSpec
from schemas.vocabulary import DISJOINT, PAPER, IdRange

finite = st.floats(-1e6, 1e6, allow_nan=False)


def slow_bin(y: float) -> int:
    y = max(-1.0, min(1.0, y))
    return min(1023, math.floor((y + 1) / 2 * 1024))


def slow_observation(x: float) -> int:
    sign = (x > 0) - (x < 0)
    return 32000 + slow_bin(sign * math.log(abs(x) * 100 + 1.0) / math.log(256 * 100 + 1.0))


@given(st.lists(finite, min_size=1, max_size=50))
def test_observations_match_the_slow_reference(values):
    tokens, clipped = continuous.encode_observation(np.array(values), DISJOINT)
    assert tokens.tolist() == [slow_observation(x) for x in values]
    assert clipped == sum(abs(x) > 256.0000001 for x in values) or any(256 < abs(x) < 256.001 for x in values)


@given(st.lists(st.floats(-1.5, 1.5), min_size=1, max_size=50))
def test_actions_match_the_slow_reference(values):
    tokens, outside = continuous.encode_action(np.array(values), -1.0, 1.0, DISJOINT)
    assert tokens.tolist() == [33024 + slow_bin(a) for a in values]
    assert outside == sum(abs(a) > 1 for a in values)


@given(st.lists(st.floats(-256, 256), min_size=1, max_size=50))
def test_decoding_lies_within_half_a_bin(values):
    x = np.array(values)
    tokens, _ = continuous.encode_observation(x, DISJOINT)
    back = continuous.compand(continuous.decode_observation(tokens, DISJOINT), DISJOINT)
    assert np.abs(back - continuous.compand(x, DISJOINT)).max() <= 1 / 1024 + 1e-12
    a = x / 256
    tokens, _ = continuous.encode_action(a, -1.0, 1.0, DISJOINT)
    assert np.abs(continuous.decode_action(tokens, -1.0, 1.0, DISJOINT) - a).max() <= 1 / 1024 + 1e-12


def test_a_float32_log_gives_the_tokens_of_its_float64_values():
    x = np.random.default_rng(0).normal(0, 5, 10_000).astype(np.float32)
    tokens, _ = continuous.encode_observation(x, DISJOINT)
    assert tokens.tolist() == [slow_observation(float(value)) for value in x]


@pytest.mark.parametrize("vocabulary", [DISJOINT, PAPER])
def test_looking_up_equals_computing(vocabulary):
    edges = continuous.expand(np.linspace(-1, 1, vocabulary.bins + 1), vocabulary)
    steps = np.arange(-40, 41, dtype=np.int32)
    around = (edges.astype(np.float32).view(np.int32)[:, None] + steps).view(np.float32)
    bits = np.random.default_rng(0).integers(0, 2**32, 1_000_000, dtype=np.uint32)
    corners = (np.arange(2**16, dtype=np.uint32)[:, None] << 16) | np.array([0, 1, 0x7FFF, 0xFFFF], np.uint32)
    for values in (around, bits.view(np.float32), corners.view(np.float32), np.empty((0, 3), np.float32)):
        finite = values[np.isfinite(values)]
        tokens, clipped = continuous.encode_observation(finite, vocabulary)
        wanted, beyond = continuous.computed(finite, vocabulary)
        assert (tokens == wanted).all()
        assert clipped == beyond


def test_scaled_action_ranges_round_trip():
    a = np.linspace(-3, 3, 101)
    tokens, outside = continuous.encode_action(a, -3.0, 3.0, DISJOINT)
    assert outside == 0
    assert np.abs(continuous.decode_action(tokens, -3.0, 3.0, DISJOINT) - a).max() <= 3 / 1024 + 1e-12


def test_discrete_values_move_into_their_range():
    assert discrete.encode(np.array([0, 5]), DISJOINT.action_discrete).tolist() == [33024, 33029]
    assert discrete.encode(np.array([0, 5]), PAPER.action_discrete).tolist() == [0, 5]
    with pytest.raises(ValueError, match="outside"):
        discrete.encode(np.array([1024]), IdRange(0, 1024))


def test_patches_are_in_raster_order_and_come_back():
    frames = np.random.default_rng(0).integers(0, 256, (2, 32, 48, 3), np.uint8)
    patches = image.to_patches(frames)
    assert patches.shape == (2, 6, 16, 16, 3)
    for row in range(2):
        for column in range(3):
            wanted = frames[:, row * 16 : row * 16 + 16, column * 16 : column * 16 + 16]
            assert (patches[:, row * 3 + column] == wanted).all()
    assert (image.from_patches(patches, 2, 3) == frames).all()


def test_fields_are_ordered_by_key_and_actions_decode():
    task = TaskSpec(
        "t",
        "d4rl",
        (FieldSpec("b", "discrete", (), choices=(9,)), FieldSpec("a", "continuous", (2,))),
        ActionSpec.discrete(4),
    )
    tokenizer = TimestepTokenizer(task, DISJOINT)
    encoded = tokenizer.encode_observation({"b": np.array([7]), "a": np.array([[0.5, -2.0]])})
    assert encoded.tokens.tolist() == [[slow_observation(0.5), slow_observation(-2.0), 32007]]
    assert tokenizer.action_ids == [IdRange(33024, 4)]
    assert tokenizer.decode_action(np.array([[33026]])).tolist() == [2]


SIZES = [((84, 84, 1), (64, 80)), ((72, 90, 3), (64, 80)), ((64, 64, 3), (96, 96)), ((100, 120, 1), (96, 128))]


@pytest.mark.parametrize("shape, size", SIZES)
def test_resizing_is_the_slow_reference(shape, size):
    frames = np.random.default_rng(0).integers(0, 256, (image.BLOCK + 5, *shape), np.uint8)
    np.testing.assert_array_equal(image.resize(frames, size), image.bilinear(frames, size))
    assert image._block(*shape, *size) > 0, "the fast path is not taken at all"


def test_another_opencv_would_not_change_the_bytes(monkeypatch):
    frames = np.random.default_rng(0).integers(0, 256, (3, 84, 84, 1), np.uint8)
    expected = image.resize(frames, (64, 80))
    resize = image.cv2.resize

    def brighter(source, size, dst, interpolation):
        resize(source, size, dst=dst, interpolation=interpolation)
        dst += 1

    monkeypatch.setattr(image.cv2, "resize", brighter)
    image._block.cache_clear()
    try:
        np.testing.assert_array_equal(image.resize(frames, (64, 80)), expected)
    finally:
        image._block.cache_clear()


@pytest.mark.parametrize("row, column", [(r, c) for r in (0, 1, 41, 82, 83) for c in (0, 40, 83)])
def test_every_pixel_of_a_small_frame_counts(row, column):
    frames = np.zeros((1, 84, 84, 1), np.uint8)
    frames[0, row, column] = 255
    assert image.resize(frames, (64, 80)).max() > 60


def test_large_frames_are_averaged():
    frames = np.zeros((1, 210, 160, 3), np.uint8)
    frames[0, :, ::2] = 200
    assert image.resize(frames, (64, 80)).std() < 20  # two neighbours alone would show stripes


@pytest.mark.parametrize("fit", ["resize", "pad"])
def test_patches_are_those_of_whole_frames(fit):
    frames = np.random.default_rng(0).integers(0, 256, (2 * image.BLOCK + 1, 84, 84, 1), np.uint8)
    size = (96, 96) if fit == "pad" else (64, 80)
    spec = FieldSpec("frame", "image", (84, 84, 1), resized=size, fit=fit)
    whole = image.pad(frames, size) if fit == "pad" else image.resize(frames, size)
    (patches,) = image.encode(frames, spec)
    np.testing.assert_array_equal(patches, image.to_patches(whole))
