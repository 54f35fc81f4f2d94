"""Sequences against a slow reference; the same global batches for any world size and resume point."""

from dataclasses import fields

import numpy as np
import pytest

from schemas.layout import ACTION, OBSERVATION, PAD, PATCH, SEPARATOR
from shards.reader import Dataset
from shards.sampler import random
from shards.stream import Stream, StreamConfig

L = 120


@pytest.fixture(scope="module")
def stream(hopper, pong):
    return Stream([hopper, pong], StreamConfig(sequence_length=L, mixture_block=16), seed=5)


def equal(a, b) -> bool:
    return all(np.array_equal(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))


def joined(batches):
    return [part for step in batches for part in step]


def test_a_sequence_is_a_function_of_its_number(stream, hopper, pong):
    again = Stream([pong, hopper], StreamConfig(sequence_length=L, mixture_block=16), seed=5)
    other = Stream([pong, hopper], StreamConfig(sequence_length=L, mixture_block=16), seed=6)
    assert stream.fingerprint == again.fingerprint != other.fingerprint
    assert all(equal(stream.sequence(i), again.sequence(i)) for i in reversed(range(40)))
    assert not all(equal(stream.sequence(i), other.sequence(i)) for i in range(8))


@pytest.mark.parametrize(("world", "threads"), [(1, 1), (1, 3), (2, 1), (4, 2), (8, 1)])
def test_global_batches_do_not_depend_on_world_size_or_threads(stream, world, threads):
    wanted = [stream.batch(16, 8), stream.batch(24, 8)]
    ranks = [stream.batches(16, 8, 1, rank, world, threads) for rank in range(world)]
    for step in wanted:
        pieces = [batch for rank in ranks for batch in next(rank)]
        for name in ("tokens", "roles", "segments", "supervised", "patches", "patch_positions", "sequence"):
            assert np.array_equal(np.concatenate([getattr(p, name) for p in pieces]), getattr(step, name)), name
    for rank in ranks:
        rank.close()


def slow_sequence(stream: Stream, i: int):
    """Tokens, roles, segments and supervision of sequence i, one timestep and one token at a time."""
    got = stream.sequence(i)
    timeline = stream.timelines[int(got.tasks[0])]
    dataset: Dataset = timeline.dataset
    layout, place = timeline.layout, stream.sampler.place(i)
    phase = int(random(stream.seed, "phase", place.epoch, place.task).integers(timeline.total))
    steps = [(int(row), t) for row in timeline.rows for t in range(dataset.column("timesteps")[row])]
    first = phase + place.window * timeline.width
    body = [steps[(first + n) % len(steps)] for n in range(timeline.width)]
    return got, dataset, layout, body, steps


@pytest.mark.parametrize("i", range(24))
def test_sequences_match_the_slow_reference(stream, i):
    got, dataset, layout, body, steps = slow_sequence(stream, i)
    tokens, roles = got.tokens[0], got.roles[0]
    K = layout.length
    grid = [tokens[n : n + K] for n in range(0, L - K + 1, K)]
    stored = {tuple(dataset.tokens(row)[t].tolist()) for row, t in steps}
    for step in grid:
        assert tuple(step[layout.stored_columns].tolist()) in stored
    # behind the prompt come the body's timesteps in order, from its first
    wanted = [dataset.tokens(row)[t].tolist() for row, t in body]
    shown = [step[layout.stored_columns].tolist() for step in grid]
    offsets = [n for n in range(len(shown)) if shown[n:] == wanted[: len(shown) - n]]
    assert offsets, "the body is not in the sequence"
    assert (tokens[roles == SEPARATOR] == dataset.manifest.vocabulary.separator).all()
    previous = None
    for p in range(L):
        is_target = roles[p] == ACTION and p > 0 and got.segments[0, p] == got.segments[0, p - 1]
        assert got.supervised[0, p] == is_target
        assert roles[p] == layout.roles[p % K]
        if previous is not None and got.segments[0, p] != previous:
            assert p % K == 0, "a segment starts inside a timestep"
        previous = got.segments[0, p]
    pixels = {dataset.patches(row)[t].tobytes() for row, t in steps} if layout.patches else set()
    for n, step in enumerate(grid if layout.patches else []):
        mine = (got.patch_index >= n * K) & (got.patch_index < (n + 1) * K)
        assert got.patches[mine].tobytes() in pixels
        low, high = layout.patch_intervals[..., 0], layout.patch_intervals[..., 1]
        assert ((got.patch_positions[mine] >= low) & (got.patch_positions[mine] < high)).all()
        assert len(step) == K


def test_no_loss_on_anything_but_actions(stream):
    batch = stream.batch(0, 32)
    for role in (PAD, PATCH, OBSERVATION, SEPARATOR):
        assert not batch.supervised[batch.roles == role].any()
    assert batch.supervised[batch.roles == ACTION].mean() > 0.9


def test_an_epoch_shows_every_timestep(hopper):
    config = StreamConfig(sequence_length=L, prompt_probability=0.0, mixture_block=8)
    stream = Stream([hopper], config, seed=0)
    timeline = stream.timelines[0]
    counts: dict[tuple, int] = {}
    for i in range(-(-timeline.windows // 8) * 8):
        place = stream.sampler.place(i)
        if place.epoch > 0:
            continue
        phase = int(random(0, "phase", place.epoch, place.task).integers(timeline.total))
        for piece in timeline.pieces(phase + place.window * timeline.width, timeline.width):
            for t in range(piece.start, piece.stop):
                counts[piece.row, t] = counts.get((piece.row, t), 0) + 1
    assert len(counts) == timeline.total
    assert sum(count > 1 for count in counts.values()) < timeline.width


def test_held_out_episodes_are_never_trained_on(hopper):
    training = Stream([hopper], StreamConfig(sequence_length=L), seed=0).timelines[0]
    held_out = Stream([hopper], StreamConfig(sequence_length=L), seed=0, held_out=True).timelines[0]
    assert not set(training.episodes) & set(held_out.episodes)
    assert len(held_out.episodes) and len(training.episodes)


def test_prompts_come_as_often_as_asked_and_from_other_episodes(hopper):
    config = StreamConfig(sequence_length=L, mixture_block=8)
    stream = Stream([hopper], config, seed=1)
    timeline = stream.timelines[0]
    body = timeline.pieces(0, 4)
    ends = 0
    for n in range(50):
        prompt = timeline.prompt(body[0], 3, n % 2 == 0, np.random.default_rng(n))
        episode = timeline.dataset.column("episode")
        assert {episode[p.row] for p in prompt} != {episode[body[0].row]}
        row = prompt[0].row
        ends += prompt[-1].stop == timeline.dataset.column("timesteps")[row]
    assert ends >= 25


def test_bad_requests_are_refused(stream, hopper, pong):
    with pytest.raises(ValueError, match="unknown task"):
        Stream([hopper], StreamConfig(weights={"nonsense": 1.0}), seed=0)
    with pytest.raises(ValueError, match="multiple"):
        next(stream.batches(0, 6, 4))
    with pytest.raises(ValueError, match="more than one dataset"):
        Stream([hopper, hopper], StreamConfig(), seed=0)
