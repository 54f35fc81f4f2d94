"""Sequences against a slow reference; the same global batches for any world size and resume point."""

import shutil
from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.dataset import return_scales
from schemas.layout import ACTION, OBSERVATION, PAD, PATCH, SEPARATOR, TimestepLayout
from shards.loader import Loader
from shards.reader import Dataset
from shards.sampler import random_bits, uniform_below
from shards.stream import Stream, StreamConfig
from shards.timeline import Timeline, TimelineTable
from tests.shards.slow import check_batch

L = 120


@pytest.fixture(scope="module")
def stream(hopper, pong):
    return Stream([hopper, pong], StreamConfig(sequence_length=L, mixture_block=16), seed=5)


def equal(a, b) -> bool:
    return all(np.array_equal(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))


def test_a_sequence_is_a_function_of_its_number(stream, hopper, pong):
    again = Stream([pong, hopper], StreamConfig(sequence_length=L, mixture_block=16), seed=5)
    other = Stream([pong, hopper], StreamConfig(sequence_length=L, mixture_block=16), seed=6)
    assert stream.fingerprint == again.fingerprint != other.fingerprint
    assert all(equal(stream.sequence(i), again.sequence(i)) for i in reversed(range(40)))
    assert not all(equal(stream.sequence(i), other.sequence(i)) for i in range(8))


def test_where_the_datasets_lie_does_not_matter(stream, hopper, pong, tmp_path):
    moved = [shutil.copytree(pong, tmp_path / "a"), shutil.copytree(hopper, tmp_path / "b")]
    again = Stream(moved, StreamConfig(sequence_length=L, mixture_block=16), seed=5)
    assert stream.fingerprint == again.fingerprint and equal(stream.batch(0, 32), again.batch(0, 32))


@pytest.mark.parametrize(("prompt_loss", "prompt_start_share"), [(True, 0.0), (False, 0.5)])
def test_sequences_match_the_slow_reference(hopper, pong, prompt_loss, prompt_start_share):
    config = StreamConfig(L, mixture_block=16, prompt_loss=prompt_loss, prompt_probability=0.5,
                          prompt_start_share=prompt_start_share)  # fmt: skip
    stream = Stream([hopper, pong], config, seed=5)
    batch = stream.batch(30, 40)
    check_batch(stream, batch)
    assert len(batch.patches) > 0


def test_patches_lie_in_their_intervals(stream, pong):
    layout = Dataset(pong).layouts[0]
    batch = stream.batch(0, 64)
    column = batch.patch_index % L % layout.length
    low, high = (layout.patch_intervals[column, :, end] for end in (0, 1))
    assert ((batch.patch_positions >= low) & (batch.patch_positions < high)).all()
    for patch in range(layout.patches):  # all of the interval is drawn from
        drawn = batch.patch_positions[column == patch] - layout.patch_intervals[patch, :, 0]
        assert len(np.unique(drawn[:, 0])) > 15 and len(np.unique(drawn[:, 1])) > 15


def test_no_loss_on_anything_but_actions(stream):
    batch = stream.batch(0, 32)
    for role in (PAD, PATCH, OBSERVATION, SEPARATOR):
        assert not batch.supervised[batch.roles == role].any()
    assert batch.supervised[batch.roles == ACTION].mean() > 0.9


def test_an_epoch_shows_every_timestep(hopper):
    config = StreamConfig(sequence_length=L, prompt_probability=0.0, mixture_block=8)
    stream = Stream([hopper], config, seed=0)
    timeline = stream.timelines[0]
    counts: dict[tuple[int, int], int] = {}
    places = stream.sampler.places(np.arange(-(-timeline.windows // 8) * 8))
    window = places.window[places.epoch == 0]
    phase = int(uniform_below(random_bits(0, "phase", 0, 0), timeline.total)[0])
    begin = (phase + window * timeline.width) % timeline.total
    spans = stream.table.spans(np.zeros(len(begin), np.int64), begin, (begin, begin))
    for shard, byte, count in zip(spans.shard, spans.tokens, spans.count):
        for t in range(count):
            place = shard, byte + t * 2 * timeline.layout.stored
            counts[place] = counts.get(place, 0) + 1
    assert len(counts) == timeline.total
    assert sum(count > 1 for count in counts.values()) < timeline.width


def test_held_out_episodes_are_never_trained_on(hopper):
    training = Stream([hopper], StreamConfig(sequence_length=L), seed=0).timelines[0]
    held_out = Stream([hopper], StreamConfig(sequence_length=L), seed=0, held_out=True).timelines[0]
    episode = training.dataset.column("episode")
    mine, theirs = (set(episode[t.first : t.stop]) for t in (training, held_out))
    assert mine and theirs and not mine & theirs


def test_prompts_come_as_often_as_asked_and_from_other_episodes(hopper):
    config = StreamConfig(sequence_length=L, mixture_block=8)
    stream = Stream([hopper], config, seed=1)
    timeline, i = stream.timelines[0], np.arange(4000)
    length, from_end, to_start, word = stream._prompts(i, np.full(len(i), timeline.width // 2))
    assert not to_start.any()
    assert abs((length > 0).mean() - 0.25) < 0.03
    assert set(length[length > 0].tolist()) == set(range(1, timeline.width // 2 + 1))
    assert abs(from_end[length > 0].mean() - 0.5) < 0.06
    begin = np.random.default_rng(0).integers(0, timeline.total, 4000)
    a, b = stream.table.prompts(np.zeros(4000, np.int64), begin, length, from_end, word, None)
    last = np.flatnonzero(np.diff(timeline.column("split_episode"), append=-1))
    ends = timeline.column("split_stop")[last]
    starts = np.append(0, ends[:-1])
    asked = length > 0
    assert (a == b)[~asked].all()
    begin, a, b, length, from_end = (array[asked] for array in (begin, a, b, length, from_end))
    own, first, last = (np.searchsorted(ends, p, side="right") for p in (begin, a, b - 1))
    assert ((b - a) == np.minimum(length, ends[first] - starts[first])).all()
    assert (first == last).all() and (first != own).all()
    assert (b == ends[first])[from_end].all()
    assert len(np.unique(first)) == len(ends)


class Columns:
    """A dataset that has an index only."""

    def __init__(self, columns: dict[str, np.ndarray]) -> None:
        self.column = columns.__getitem__


lengths = st.lists(st.integers(1, 30), min_size=1, max_size=8)


@given(st.lists(lengths, min_size=1, max_size=3), st.integers(1, 40), st.integers(0, 500))
@settings(max_examples=100, deadline=None)
def test_spans_walk_the_circles(tasks, width, first):
    """Against one timestep at a time, for circles shorter than a window too; tasks take turns."""
    columns = {
        "split_stop": np.concatenate([np.cumsum(lengths) for lengths in tasks]),
        "timesteps": np.concatenate(tasks),
        "split_episode": np.concatenate([np.arange(len(lengths)) // 2 for lengths in tasks]),
    }
    rows = np.arange(len(columns["timesteps"]))
    columns |= {"shard": rows % 3, "tokens_offset": 1000 * rows, "patches_offset": 0 * rows - 1}
    columns["episode_return"] = rows / 2
    timelines, stop = [], 0
    for lengths in tasks:
        timeline = object.__new__(Timeline)
        timeline.dataset, timeline.width, timeline.total = Columns(columns), width, sum(lengths)
        timeline.layout = TimestepLayout(0, (), 1, 0)
        timeline.pieces, timeline.count, timeline.first = len(lengths), -(-len(lengths) // 2), stop
        timeline.stop = stop = stop + len(lengths)
        timelines.append(timeline)
    task = np.arange(2 * len(tasks)) % len(tasks)
    begin = (first + 3 * np.arange(len(task))) % np.array([timelines[t].total for t in task])
    spans = TimelineTable(timelines).spans(task, begin, (begin, begin))
    for grid, t in enumerate(task.tolist()):
        rows = enumerate(tasks[t])
        steps = [(timelines[t].first + row, step, row // 2) for row, length in rows for step in range(length)]
        walked, segment, previous = [], -1, None
        for n in range(width):
            lap, place = divmod(int(begin[grid]) + n, len(steps))
            row, step, episode = steps[place]
            segment += (episode, lap) != previous
            previous = episode, lap
            walked.append((row, step, segment))
        own = slice(spans.first[grid], spans.first[grid + 1])
        assert (spans.sequence[own] == grid).all() and (spans.shard[own] == spans.tokens[own] // 1000 % 3).all()
        mine = [
            (byte // 1000, byte % 1000 // 2 + n, segment)
            for byte, count, segment in zip(
                spans.tokens[own].tolist(), spans.count[own].tolist(), np.cumsum(spans.starts_segment[own]).tolist()
            )
            for n in range(count)
        ]
        assert mine == walked
        assert (spans.episode_return[own] == spans.tokens[own] // 1000 / 2).all()
        assert (spans.place[own] == np.cumsum(spans.count[own]) - spans.count[own]).all()


def test_returns_are_scaled_alike_where_tasks_share_an_environment(hopper, pong):
    (low,), (cut,) = (Dataset(folder).manifest.tasks for folder in (hopper, pong))
    high = replace(low, spec=replace(low.spec, name="high"), return_mean=9.0, return_std=2.0, episodes=low.episodes * 3)
    high = replace(high, returns=(5.0, 8.0, 9.0, 10.0, 13.0))
    unplayable = replace(low, spec=replace(low.spec, name="log", environment=None))
    alone = replace(low, spec=replace(low.spec, name="alone", environment=cut.spec.environment))
    scales = return_scales([low, cut, high, unplayable, alone])
    assert set(scales) == {low.spec.name, "high", "alone"} and cut.returns is None
    # two numbers, mean +- std, have the moments of a task's returns
    means, stds = np.array([low.return_mean, 9, 9, 9]), np.array([low.return_std, 2, 2, 2])
    pooled = np.concatenate([means - stds, means + stds])
    for task in (low, high):
        scale = scales[task.spec.name]
        assert (scale.mean, scale.std) == pytest.approx((pooled.mean(), pooled.std()))
        assert scale.target == task.returns[3]
    assert scales["alone"].mean == pytest.approx(low.return_mean)


def test_bad_requests_are_refused(stream, hopper, pong):
    with pytest.raises(ValueError, match="unknown task"):
        Stream([hopper], StreamConfig(weights={"nonsense": 1.0}), seed=0)
    with pytest.raises(ValueError, match="multiple"):
        Loader(stream, 0, 6, 4)
    with pytest.raises(ValueError, match="more than one dataset"):
        Stream([hopper, hopper], StreamConfig(), seed=0)


def test_prompts_are_followed_by_the_starts_of_episodes_where_that_is_asked(hopper):
    plain, asked = (
        Stream([hopper], StreamConfig(L, mixture_block=8, prompt_start_share=share), seed=1) for share in (0.0, 0.5)
    )
    assert plain.fingerprint != asked.fingerprint
    i, timeline = np.arange(2000), asked.timelines[0]
    length, _, to_start, _ = asked._prompts(i, np.full(len(i), timeline.width // 2))
    assert (length[to_start] > 0).all() and abs(to_start[length > 0].mean() - 0.5) < 0.06
    position = np.arange(timeline.total)
    ends = timeline.column("split_stop")[np.flatnonzero(np.diff(timeline.column("split_episode"), append=-1))]
    starts = np.append(0, ends[:-1])[np.searchsorted(ends, position, side="right")]
    assert (asked.table.starts(np.zeros_like(position), position) == starts).all()
    same = (plain.batch(0, 256).tokens == asked.batch(0, 256).tokens).all(axis=1)
    assert same[~to_start[:256]].all() and same[to_start[:256]].mean() < 0.1  # but for windows at a start
