import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.sampler import Permutation, Sampler, random


@given(st.integers(1, 3000), st.integers(0, 2**62))
@settings(max_examples=60)
def test_permutation_visits_each_index_once(n, key):
    assert sorted(Permutation(n, key)(np.arange(n)).tolist()) == list(range(n))


def test_permutation_depends_on_its_key_and_works_on_scalars():
    first, second = Permutation(1000, 1), Permutation(1000, 2)
    assert (first(np.arange(1000)) != second(np.arange(1000))).mean() > 0.9
    assert int(first(17)) == first(np.arange(1000))[17]
    # far from the identity: neighbours are not kept together
    assert np.abs(np.diff(first(np.arange(1000)))).mean() > 200


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
    places = [sampler.place(i) for i in range(64 * 8)]
    share = np.array(weights[: len(windows)]) / sum(weights[: len(windows)])
    for block in range(8):
        counts = np.bincount([p.task for p in places[block * 64 : block * 64 + 64]], minlength=len(windows))
        assert (np.abs(counts - share * 64) < 1).all()
    for task, count in enumerate(windows):
        seen = [(p.epoch, p.window) for p in places if p.task == task]
        whole = [window for epoch, window in seen if epoch == 0]
        assert len(set(whole)) == len(whole) == min(count, len(seen))
        assert len(set(seen)) == len(seen)


def test_a_weight_too_small_to_hold_is_refused():
    with pytest.raises(ValueError, match="mixture"):
        Sampler([5, 5], [1.0, 1e-6], 0, block=64)
    with pytest.raises(ValueError, match="weights"):
        Sampler([5], [-1.0], 0)
