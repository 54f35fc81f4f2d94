"""Batches in order: the same for any world size, number of threads and restart; property tests over any dataset."""

import tempfile
import time
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.loader import Loader
from shards.sampler import random_bits, uniform_below
from shards.stream import Stream, StreamConfig
from shards.verify import verify
from tests.shards.made import Task, make
from tests.shards.slow import check_batch

L = 48
CONFIG = StreamConfig(sequence_length=L, mixture_block=8)
TASKS = [
    Task("body", (40, 7, 65, 12, 41, 80, 19, 33), held_out=(2,)),
    Task("films", (9, 14, 3, 22, 31, 8), patches=(2, 1), observation=0, action=1),
    Task("words", (200, 30, 77), observation=0, action=0, text=1),
]
GLOBAL = 8


@pytest.fixture(scope="module")
def stream(tmp_path_factory):
    return Stream([make(tmp_path_factory.mktemp("made") / "made", TASKS, piece=16, shards=3)], CONFIG, seed=3)


def copied(batch):
    return replace(batch, **{f.name: np.copy(getattr(batch, f.name)) for f in fields(batch)})


def steps(stream, start, count, world=1, threads=0, micro=1):
    """Global batches: for each step, the sequences of all ranks, by their number."""
    ranks = [Loader(stream, start, GLOBAL, micro, rank, world, threads) for rank in range(world)]
    found = []
    for _ in range(count):
        parts = [copied(batch) for rank in ranks for batch in next(rank)]
        found.append({int(i): one for part in parts for i, one in zip(part.sequence, split(part))})
    for rank in ranks:
        rank.close()
    return found


def split(batch):
    """The sequences of a batch, each as bytes."""
    B, L = batch.tokens.shape
    owner = batch.patch_index // L
    for n in range(B):
        arrays = [
            getattr(batch, name)[n] for name in ("tokens", "roles", "positions", "segments", "supervised", "tasks")
        ]
        own = owner == n
        colours = np.broadcast_to(batch.patches[own], (own.sum(), 16, 16, 3))  # grey beside colours is repeated
        arrays += [colours, batch.patch_index[own] - n * L, batch.patch_positions[own]]
        yield b"".join(np.ascontiguousarray(a).tobytes() for a in arrays)


def epoch(stream):
    """Steps after which every task has seen all of its windows."""
    n = 0
    while (stream.sampler.seen(n * GLOBAL) < stream.sampler.windows).any():
        n += 1
    return n


def test_resumed_at_every_step_of_an_epoch_the_rest_is_the_same(stream):
    count = epoch(stream)
    assert count >= 10
    whole = steps(stream, 0, count, threads=2)
    for begin in range(count):
        assert steps(stream, begin * GLOBAL, count - begin) == whole[begin:]


@pytest.mark.parametrize("threads", [0, 1, 4])
@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_global_batches_are_the_same_for_any_world_size_and_threads(stream, world, threads):
    assert steps(stream, 0, 12, world, threads) == steps(stream, 0, 12, micro=GLOBAL)


def test_a_change_of_world_size_loses_and_doubles_nothing(stream):
    whole = steps(stream, 0, 12)
    found, done = [], 0
    for world, count in ((2, 3), (8, 2), (1, 4), (4, 3)):
        found += steps(stream, done * GLOBAL, count, world, threads=1)
        done += count
    assert found == whole
    assert sorted(i for step in found for i in step) == list(range(12 * GLOBAL))


@pytest.mark.parametrize("threads", [0, 1, 4])
def test_a_steps_arrays_last_until_the_next_is_asked_for(stream, threads):
    loader = Loader(stream, 0, GLOBAL, 2, threads=threads)
    places = set()
    for n in range(20):
        held = next(loader)
        kept = [copied(batch) for batch in held]
        if n % 5 == 0:  # the threads have time to run ahead
            time.sleep(0.05)
        for batch, copy in zip(held, kept):
            for f in fields(batch):
                assert np.array_equal(getattr(batch, f.name), getattr(copy, f.name))
        places |= {batch.tokens.ctypes.data for batch in held}
    loader.close()
    assert len(places) <= 4 + max(4, threads), "the ring's buffers are used again"


def test_what_a_loader_tells(stream):
    loader = Loader(stream, 0, GLOBAL, GLOBAL)
    for _ in range(6):
        next(loader)
    metrics = loader.metrics()
    loader.close()
    counts = np.bincount(stream.sampler.places(np.arange(6 * GLOBAL)).task, minlength=3)
    assert [metrics[f"data/sequences/{name}"] for name in stream.tasks] == counts.tolist()
    assert metrics["data/epochs/body"] == counts[0] / stream.timelines[0].windows
    assert 0 < metrics["data/wait_share"] <= 1 and metrics["data/padding_share"] == 0


def test_padding_of_texts_is_counted(tmp_path):
    folder = make(tmp_path / "made", [Task("told", (30, 40), text=4)])
    stream = Stream([folder], CONFIG, seed=0)
    loader = Loader(stream, 0, 4, 4)
    (batch,) = next(loader)
    padding = ((batch.tokens == stream.timelines[0].padding) & (batch.roles == 1)).sum()
    assert padding and loader.metrics()["data/padding_share"] == padding / batch.tokens.size
    assert not batch.supervised[(batch.tokens == stream.timelines[0].padding) & (batch.roles == 1)].any()
    loader.close()


def test_an_error_reaches_the_trainer(stream, tmp_path):
    folder = make(tmp_path / "made", TASKS, piece=16, shards=3)
    broken = Stream([folder], CONFIG, seed=3)
    for path in folder.glob("shard-*"):
        path.unlink()
    loader = Loader(broken, 0, GLOBAL, 2, threads=2)
    with pytest.raises(ValueError, match="missing"):
        next(loader)
    loader.close()


def tasks():
    lengths = st.lists(st.integers(1, 40), min_size=1, max_size=7).map(tuple)
    bodies = st.builds(Task, st.just(""), lengths, observation=st.integers(1, 4), action=st.integers(1, 3))
    films = st.builds(
        Task, st.just(""), lengths, observation=st.integers(0, 2), action=st.integers(1, 2),
        patches=st.sampled_from([(1, 1), (2, 1), (1, 3)]), channels=st.sampled_from([1, 3]),
        text=st.sampled_from([0, 2]),
    )  # fmt: skip
    words_ = st.builds(Task, st.just(""), lengths, observation=st.just(0), action=st.just(0), text=st.just(1))
    listed = st.lists(st.one_of(bodies, films, words_), min_size=1, max_size=4)
    return listed.map(lambda found: [replace(task, name=f"task{n}") for n, task in enumerate(found)])


@given(
    tasks(),
    st.lists(st.floats(0.2, 5), min_size=4, max_size=4),
    st.integers(20, 90),
    st.sampled_from([None, 8]),
    st.sampled_from([3, 10, 1000]),
    st.integers(1, 4),
    st.integers(0, 2**40),
    st.booleans(),
    st.sampled_from([0.0, 0.6]),
    st.data(),
)
@settings(max_examples=40, deadline=None)
def test_any_dataset_gives_the_slow_references_sequences(
    made, weights, length, working_set, piece, shards, seed, prompt_loss, prompt_start_share, data
):
    """Shapes, weights, lengths, pieces, shards, held-out episodes: sequences, epochs and mixtures are as promised."""
    held = [
        tuple(data.draw(st.lists(st.integers(0, len(task.lengths) - 1), max_size=len(task.lengths) - 1, unique=True)))
        for task in made
    ]
    made = [replace(task, held_out=own) for task, own in zip(made, held)]
    named = dict(zip([task.name for task in made], weights))
    config = StreamConfig(length, weights=named, prompt_probability=0.5, prompt_loss=prompt_loss,
                          working_set=working_set, prompt_start_share=prompt_start_share)  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        folder = make(Path(name) / "made", made, piece, shards)
        verify(folder, full=True)
        stream = Stream([folder], config, seed)
        first = data.draw(st.integers(0, 10_000))
        batch = stream.batch(first, 6)
        check_batch(stream, batch)
        for n in range(6):
            assert next(split(copied(stream.sequence(first + n)))) == list(split(batch))[n]
        if any(held):
            other = Stream([folder], config, seed, held_out=True)
            numbers = [set(s.datasets[0].column("episode")[t.first : t.first + t.pieces]) for s in (stream, other)
                       for t in s.timelines if t.task == other.timelines[0].task]  # fmt: skip
            assert not numbers[0] & numbers[-1] or len(numbers) == 1
        walk(stream)


def walk(stream):
    """An epoch of each task: every window once, every timestep seen, fewer than a window's twice."""
    block = stream.sampler.block
    blocks = int(max(-(-w // c) for w, c in zip(stream.sampler.windows, stream.sampler.counts)))
    if blocks * block > 4000:
        return
    places = stream.sampler.places(np.arange(blocks * block))
    share = np.array([stream.config.weights[name] for name in stream.tasks])
    share /= share.sum()
    for n in range(blocks):
        counts = np.bincount(places.task[n * block : (n + 1) * block], minlength=len(share))
        assert (np.abs(counts - share * block) < 1).all()
    for task, timeline in enumerate(stream.timelines):
        windows = places.window[(places.task == task) & (places.epoch == 0)]
        assert sorted(windows.tolist()) == list(range(timeline.windows))
        phase = int(uniform_below(random_bits(stream.seed, "phase", 0, task), timeline.total)[0])
        steps = (phase + windows[:, None] * timeline.width + np.arange(timeline.width)) % timeline.total
        seen = np.bincount(steps.reshape(-1), minlength=timeline.total)
        assert seen.min() >= 1 and (seen - 1).sum() < timeline.width
