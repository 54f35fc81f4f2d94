"""Sampling: the window that is training sequence i, a pure function of seed and i.

    i -> block and slot (mixture weights, exact in every block) -> task and ordinal within the task
      -> epoch and place -> keyed permutation -> window number

Random numbers are counter-based: uint64 words, mixed from a key (seed and purpose) and counters, so that they need no
history and whole arrays of sequences are placed at once.

Invariant: within one epoch of a task every window number appears exactly once, whatever the world size, the number of
workers or the step at which a run resumed.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.random import Generator, Philox

# As arrays of no dimension, constants cost a call half of what scalars do.
ONE, HALF = (np.array(n, np.uint64) for n in (1, 32))
GAMMA = np.array(0x9E3779B97F4A7C15, np.uint64)  # splitmix64's step, and its finaliser:
FIRST_SHIFT, SECOND_SHIFT, LAST_SHIFT = (np.array(n, np.uint64) for n in (30, 27, 31))
FIRST_FACTOR, SECOND_FACTOR = (np.array(n, np.uint64) for n in (0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
ROUNDS = 4
LARGEST_BLOCK = 2**18  # that is chosen by itself
Counter = np.ndarray | int


def random(seed: int, purpose: str, *counter: int) -> Generator:
    """Generator (Philox) that is a pure function of its arguments."""
    counters = [*counter, 0, 0, 0][:3]
    # the last counter word stays zero: it is the one that counts the draws up
    return Generator(Philox(key=[seed, _purpose(purpose)], counter=[0, *counters]))


def random_bits(seed: int, purpose: str, *counters: Counter) -> np.ndarray:
    """Random uint64 words, one for each element of the broadcast counters (integers from 0 on)."""
    return fold_in(np.uint64(seed ^ _purpose(purpose)), *counters)


def fold_in(key: np.ndarray | np.uint64, *counters: Counter) -> np.ndarray:
    """Mix a uint64 word, the key, with counters into further words: a chain of splitmix64 steps."""
    word = np.atleast_1d(np.asarray(key, np.uint64))
    for counter in counters:
        if isinstance(counter, np.ndarray):
            word = _mix(word + GAMMA * (counter.astype(np.uint64) + ONE))
        else:
            word = _mix(word + np.uint64(int(GAMMA) * (int(counter) + 1) % 2**64))
    return word


def uniform_below(word: np.ndarray, size: Counter) -> np.ndarray:
    """Uniform integers in [0, size), int64, from uint64 words: by their upper half, or their remainder where
    that is too short."""
    size = np.asarray(size).astype(np.uint64)
    number = (word >> HALF) * size >> HALF
    if (long := size > np.uint64(2**32)).any():
        number = np.where(long, word % np.maximum(size, np.uint64(1)), number)
    return number.astype(np.int64)


def permuted(index: Counter, n: Counter, key: np.ndarray) -> np.ndarray:
    """Image of each index under the permutation of [0, n) that its key names, int64; all three broadcast. A Feistel
    network of 4 rounds with cycle walking: 25 ns an index and no memory."""
    x, n, key = (np.atleast_1d(np.asarray(a)).astype(np.uint64) for a in (index, n, key))
    zero = (x + n + key) * 0  # of their common shape; broadcast_arrays takes six times as long
    x, n, key = x + zero, n + zero, key + zero
    bits = np.frexp((n - ONE).astype(np.float64))[1]
    half = np.maximum(1, (bits + 1) // 2).astype(np.uint64)
    keys = fold_in(key, np.arange(ROUNDS).reshape(-1, *[1] * key.ndim))
    x = _feistel(x, half, keys)
    while (outside := x >= n).any():
        x[outside] = _feistel(x[outside], half[outside], keys[:, outside])
    return x.astype(np.int64)


def _feistel(x: np.ndarray, half: np.ndarray, keys: np.ndarray) -> np.ndarray:
    mask = (ONE << half) - ONE
    left, right = x >> half, x & mask
    for key in keys:
        left, right = right, left ^ (_mix(right + key) & mask)
    return (left << half) | right


@lru_cache(maxsize=64)
def _purpose(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser, uint64 -> uint64."""
    x = (x ^ (x >> FIRST_SHIFT)) * FIRST_FACTOR
    x = (x ^ (x >> SECOND_SHIFT)) * SECOND_FACTOR
    return x ^ (x >> LAST_SHIFT)


@dataclass(frozen=True)
class SampledWindows:
    """Windows `window` of tasks `task` in those tasks' epochs `epoch`, at `place` of the epoch; int64 arrays (n,)."""

    task: np.ndarray
    epoch: np.ndarray
    window: np.ndarray
    place: np.ndarray


class Sampler:
    """windows: windows per epoch of each task; weights: mixture weights (any positive scale);
    block: sequences in which the weights hold exactly, up to rounding to 1 / block; None: 256, or the least power of
    two that gives every task one; runs, together: of each task, how many windows are kept together as a run and how
    many runs are mixed at a time, see `_window`; None: all windows are mixed."""

    def __init__(
        self,
        windows: list[int],
        weights: list[float],
        seed: int,
        block: int | None = None,
        runs: list[int] | None = None,
        together: list[int] | None = None,
    ):
        share = np.asarray(weights, np.float64)
        if len(share) != len(windows) or not len(share):
            raise ValueError("one weight per task, and at least one task")
        if not any(weights) or not all(0 <= weight < math.inf for weight in weights):
            raise ValueError(f"mixture weights must be finite, not negative, not all zero: {weights}")
        share /= share.max()
        share /= share.sum()
        least = share[share > 0].min()
        if block is None and least < 1 / LARGEST_BLOCK:
            raise ValueError(
                f"a task's weight is {least:.1e} of the mixture; make it 0, or {1 / LARGEST_BLOCK:.1e} or more"
            )
        block = block or max(256, 2 ** math.ceil(math.log2(1 / least)))
        exact = share * block
        counts = np.floor(exact).astype(np.int64)
        # largest remainder, ties to the earlier task
        counts[np.argsort(counts - exact, kind="stable")[: block - counts.sum()]] += 1
        if (counts[share > 0] == 0).any():
            raise ValueError(f"a task's weight is below 1/{block} of the mixture; raise it or the mixture block")
        self.windows, self.counts, self.seed, self.block = np.asarray(windows, np.int64), counts, seed, block
        self.runs, self.together = (None if a is None else np.asarray(a, np.int64) for a in (runs, together))
        self.task_of_slot = np.repeat(np.arange(len(counts)), counts)
        self.first_slot = np.cumsum(counts) - counts

    def places(self, i: np.ndarray) -> SampledWindows:
        """Sources of training sequences i (n,)."""
        block, offset = np.divmod(np.asarray(i, np.int64), self.block)
        slot = permuted(offset, self.block, random_bits(self.seed, "block", block))
        task = self.task_of_slot[slot]
        ordinal = block * self.counts[task] + slot - self.first_slot[task]
        epoch, place = np.divmod(ordinal, self.windows[task])
        return SampledWindows(task, epoch, self._window(task, epoch, place), place)

    @property
    def mixes_runs(self) -> bool:
        """True if runs of windows are kept together."""
        return self.runs is not None

    def neighbour_windows(self, places: SampledWindows, word: np.ndarray) -> np.ndarray:
        """Other windows (n,), chosen by random uint64 words (n,) from the runs that are mixed with each place's own."""
        first, size = self._group(places.task, places.place)
        return self._window(places.task, places.epoch, first + uniform_below(word, size))

    def _group(self, task: np.ndarray, place: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """First place and size of the group of runs that each place is in."""
        assert self.runs is not None and self.together is not None
        windows, size = self.windows[task], self.runs[task] * self.together[task]
        groups = np.maximum(1, -(-(windows // self.runs[task]) // self.together[task]))
        group = np.minimum(place // size, groups - 1)
        return group * size, np.where(group == groups - 1, windows - group * size, size)

    def _window(self, task: np.ndarray, epoch: np.ndarray, place: np.ndarray) -> np.ndarray:
        """The window at each place of an epoch. Runs of neighbouring windows, which are in the same shard or two, are
        shuffled. Groups of runs are used one after the other, the windows of a group mixed. Windows after the last
        complete run belong to the last group: every epoch has another phase, so they are others each time."""
        key, windows = random_bits(self.seed, "epoch", epoch, task), self.windows[task]
        if self.runs is None or self.together is None:
            return permuted(place, windows, key)
        first, size = self._group(task, place)
        within = first + permuted(place - first, size, fold_in(key, first))
        run = self.runs[task]
        number, count = within // run, windows // run
        shuffled = permuted(np.minimum(number, np.maximum(count, 1) - 1), np.maximum(count, 1), key)
        return np.where(number < count, shuffled * run + within % run, within)

    def seen(self, i: int) -> np.ndarray:
        """How many of the sequences [0, i) are of each task, int64 (tasks,)."""
        blocks, rest = divmod(i, self.block)
        tail = self.places(np.arange(i - rest, i)).task
        return blocks * self.counts + np.bincount(tail, minlength=len(self.counts))
