"""Which window is training sequence i? A pure function, with no state but i.

    i -> block and slot (mixture weights, exact in every block) -> task and ordinal within the task
      -> epoch and place -> keyed permutation -> window number

Random numbers are counter-based (Philox keyed by seed and purpose, counted by i),
so they need no history either.

Invariant: within one epoch of a task every window number appears exactly once,
whatever the world size, the worker count or the place where a run was resumed.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np


def random(seed: int, purpose: str, *counter: int) -> np.random.Generator:
    """Generator that is a pure function of its arguments."""
    key = int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:8], "little")
    words = [*counter, 0, 0, 0][:3]
    # the last counter word stays zero: it is the one that counts the draws up
    return np.random.Generator(np.random.Philox(key=[seed, key], counter=[0, *words]))


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser, uint64 -> uint64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Permutation:
    """Keyed pseudo-random permutation of [0, n): a 4-round Feistel network with cycle walking; no memory."""

    ROUNDS = 4

    def __init__(self, n: int, key: int):
        if n < 1:
            raise ValueError("a permutation needs n >= 1")
        self.n = n
        half = max(1, ((n - 1).bit_length() + 1) // 2)
        self.half, self.mask = np.uint64(half), np.uint64((1 << half) - 1)
        self.keys = [np.uint64(word) for word in random(key, "feistel").integers(0, 2**63, self.ROUNDS)]

    def __call__(self, index: np.ndarray | int) -> np.ndarray:
        """Images of `index` (any shape), int64."""
        x = np.atleast_1d(np.asarray(index)).astype(np.uint64)
        x = self._once(x)
        while (outside := x >= self.n).any():
            x[outside] = self._once(x[outside])
        return x.astype(np.int64).reshape(np.shape(index))

    def _once(self, x: np.ndarray) -> np.ndarray:
        left, right = x >> self.half, x & self.mask
        for key in self.keys:
            left, right = right, left ^ (_mix(right + key) & self.mask)
        return (left << self.half) | right


@dataclass(frozen=True)
class Place:
    """Window `window` of task `task` in that task's epoch `epoch`."""

    task: int
    epoch: int
    window: int


class Sampler:
    """windows: windows an epoch of each task; weights: mixture weights (any positive scale);
    block: sequences in which the weights hold exactly, up to rounding to 1 / block."""

    def __init__(self, windows: list[int], weights: list[float], seed: int, block: int = 256):
        share = np.asarray(weights, np.float64)
        if len(share) != len(windows) or not len(share):
            raise ValueError("one weight a task, and at least one task")
        if not np.isfinite(share).all() or (share < 0).any() or not share.sum():
            raise ValueError(f"mixture weights must be finite, not negative, not all zero: {weights}")
        exact = share / share.sum() * block
        counts = np.floor(exact).astype(np.int64)
        # largest remainder, ties to the earlier task
        counts[np.argsort(counts - exact, kind="stable")[: block - counts.sum()]] += 1
        if (counts[share > 0] == 0).any():
            raise ValueError(f"a task's weight is below 1/{block} of the mixture; raise it or the mixture block")
        self.windows, self.counts, self.seed, self.block = windows, counts, seed, block
        self.task_of_slot = np.repeat(np.arange(len(counts)), counts)
        self.first_slot = np.cumsum(counts) - counts

    def place(self, i: int) -> Place:
        """Where training sequence i comes from."""
        block, offset = divmod(i, self.block)
        slot = int(Permutation(self.block, self._key("block", block))(offset))
        task = int(self.task_of_slot[slot])
        ordinal = block * int(self.counts[task]) + slot - int(self.first_slot[task])
        epoch, place = divmod(ordinal, self.windows[task])
        window = Permutation(self.windows[task], self._key("epoch", epoch, task))(place)
        return Place(task, epoch, int(window))

    def _key(self, purpose: str, *counter: int) -> int:
        return int(random(self.seed, purpose, *counter).integers(0, 2**63))
