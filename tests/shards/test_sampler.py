import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.sampler import SampledWindows, Sampler, permuted, random, random_bits, uniform_below


def key(number: int) -> np.ndarray:
    return random_bits(number, "test")


@given(st.integers(1, 3000), st.integers(0, 2**62))
@settings(max_examples=60)
def test_permutation_visits_each_index_once(n, seed):
    assert sorted(permuted(np.arange(n), n, key(seed)).tolist()) == list(range(n))


def test_permutation_depends_on_its_key():
    first, second = (permuted(np.arange(1000), 1000, key(seed)) for seed in (1, 2))
    assert (first != second).mean() > 0.9
    # far from the identity: neighbours are not kept together
    assert np.abs(np.diff(first)).mean() > 200


def test_permutations_of_many_sizes_and_keys_at_once():
    rng = np.random.default_rng(0)
    n = rng.integers(1, 10_000, 500)
    index, keys = rng.integers(0, n), random_bits(0, "test", np.arange(500))
    together = permuted(index, n, keys)
    assert together.tolist() == [int(permuted(i, m, k)[0]) for i, m, k in zip(index, n, keys)]


def test_words_are_a_function_of_their_arguments_and_even():
    i = np.arange(100_000)
    a = random_bits(3, "x", i)
    assert (a[[7, 99]] == random_bits(3, "x", np.array([7, 99]))).all()
    for other in (
        random_bits(4, "x", i),
        random_bits(3, "y", i),
        random_bits(3, "x", i, 1),
        random_bits(3, "x", i + 1),
    ):
        assert (other != a).all()
    counts = np.bincount(uniform_below(a, 10), minlength=10)
    assert len(counts) == 10 and np.abs(counts - 10_000).max() < 500
    bits = np.unpackbits(a.view(np.uint8)).reshape(-1, 64).mean(axis=0)
    assert np.abs(bits - 0.5).max() < 0.01


def test_random_is_a_function_of_its_arguments():
    a, b = random(3, "x", 5).random(8), random(3, "x", 5).random(8)
    assert (a == b).all()
    others = [random(3, "x", 6), random(3, "y", 5), random(4, "x", 5), random(3, "x", 5, 1)]
    assert all((other.random(8) != a).all() for other in others)


@given(
    st.lists(st.integers(1, 200), min_size=1, max_size=6),
    st.lists(st.floats(1, 8), min_size=6, max_size=6),
    st.integers(0, 2**31),
)
@settings(max_examples=25, deadline=None)
def test_weights_hold_in_every_block_and_windows_once_an_epoch(windows, weights, seed):
    sampler = Sampler(windows, weights[: len(windows)], seed, block=64)
    found = sampler.places(np.arange(64 * 8))
    places = list(zip(found.task.tolist(), found.epoch.tolist(), found.window.tolist()))
    again = [sampler.places(np.array([i])) for i in range(0, 64 * 8, 7)]
    assert [(int(p.task[0]), int(p.epoch[0]), int(p.window[0])) for p in again] == places[::7]
    share = np.array(weights[: len(windows)]) / sum(weights[: len(windows)])
    for block in range(8):
        counts = np.bincount([task for task, _, _ in places[block * 64 : block * 64 + 64]], minlength=len(windows))
        assert (np.abs(counts - share * 64) < 1).all()
    for task, count in enumerate(windows):
        seen = [(epoch, window) for own, epoch, window in places if own == task]
        whole = [window for epoch, window in seen if epoch == 0]
        assert len(set(whole)) == len(whole) == min(count, len(seen))
        assert len(set(seen)) == len(seen)


def test_a_weight_too_small_to_hold_is_refused():
    with pytest.raises(ValueError, match="mixture"):
        Sampler([5, 5], [1.0, 1e-6], 0, block=64)
    with pytest.raises(ValueError, match="weights"):
        Sampler([5], [-1.0], 0)


@given(st.integers(1, 3000), st.integers(1, 60), st.integers(1, 9), st.integers(0, 2**40))
@settings(max_examples=60, deadline=None)
def test_a_stretch_of_an_epoch_uses_few_runs_and_every_window_comes_once(windows, run, together, seed):
    sampler = Sampler([windows], [1.0], seed, runs=[run], together=[together])
    found = sampler.places(np.arange(2 * windows + 256))  # a block's places come in any order
    for epoch in range(2):
        assert sorted(found.window[found.epoch == epoch].tolist()) == list(range(windows))
    place = np.arange(windows)
    task, epoch = np.zeros(windows, np.int64), np.zeros(windows, np.int64)
    window = sampler._window(task, epoch, place)
    size = run * together
    tail = windows // run * run
    for first in range(0, windows, size):
        part = window[first : first + size]
        assert len(set((part[part < tail] // run).tolist())) <= together
    # prompts come from the same runs
    neighbour_windows = sampler.neighbour_windows(
        SampledWindows(task, epoch, window, place), random_bits(seed, "x", place)
    )
    whole = max(1, -(-(windows // run) // together))
    group = np.minimum(place // size, whole - 1)
    for number in range(whole):
        assert set(neighbour_windows[group == number].tolist()) <= set(window[group == number].tolist())


def test_a_working_set_mixes_runs():
    sampler = Sampler([10_000], [1.0], 3, runs=[100], together=[8])
    first = sampler._window(np.zeros(800, np.int64), np.zeros(800, np.int64), np.arange(800))
    assert len(set((first // 100).tolist())) == 8 and np.abs(np.diff(first)).mean() > 500
    assert np.abs(np.diff(np.unique(first // 100))).max() > 1, "runs of a group are not neighbours"


def test_blocks_grow_with_the_number_of_tasks():
    sampler = Sampler([50] * 1000, [1.0] * 1000, 0)
    assert sampler.block == 1024 and sampler.counts.min() == 1
    assert Sampler([50, 50], [3.0, 1.0], 0).block == 256


def test_what_was_seen_is_counted_at_once():
    sampler = Sampler([7, 30, 4], [1.0, 2.0, 5.0], 3, block=64)
    tasks = sampler.places(np.arange(1000)).task
    for i in (0, 1, 63, 64, 65, 500, 999):
        assert sampler.seen(i).tolist() == np.bincount(tasks[:i], minlength=3).tolist()


@pytest.mark.parametrize("size", [1, 7, 2**31 + 5, 2**32, 2**33 + 1, 10**12])
def test_numbers_below_any_size_are_even(size):
    found = uniform_below(random_bits(0, "x", np.arange(20_000)), size)
    assert found.min() >= 0 and found.max() < size
    assert abs(found.mean() / max(1, size - 1) - (0.5 if size > 1 else 0)) < 0.01
