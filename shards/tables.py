"""The part of a batch that follows from its tasks' layouts alone: roles, positions, separators, loss mask, places of
patches.

tasks (B,) -> rows of tables, one per layout -> a Batch without stored tokens, pixels and segments

Invariant: sequences of one layout differ only in what `Assembly` copies and in their patches' drawn positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from schemas.layout import ACTION, PATCH, SEPARATOR, TEXT, TimestepLayout
from shards.batch import Batch, BufferPool
from shards.sampler import random
from shards.timeline import Timeline, group_indices

DRAWS = 1024  # timesteps of a layout for which patch positions are drawn; a sequence takes W consecutive ones


class Tables:
    """Of sequences of L tokens. `kind` (T,): ordinal of each task's layout in `layouts`; `patch_index` of each layout:
    places of a sequence's patches among its tokens, int32 (M,)."""

    def __init__(self, timelines: Sequence[Timeline], length: int, seed: int, predicted: Sequence[bool]):
        self.length, self.seed = length, seed
        self.layouts = list(dict.fromkeys(timeline.layout for timeline in timelines))
        number = {layout: n for n, layout in enumerate(self.layouts)}
        self.kind = np.array([number[timeline.layout] for timeline in timelines])
        shape = len(self.layouts), length
        self.positions, self.roles = np.empty(shape, np.int16), np.empty(shape, np.uint8)
        for n, layout in enumerate(self.layouts):
            self.positions[n] = np.arange(length) % layout.length
            self.roles[n] = layout.roles[self.positions[n]]
        separator = timelines[0].dataset.manifest.vocabulary.separator
        self.tokens = (self.roles == SEPARATOR) * np.int32(separator)
        # a layout decides whether its text is a target, so tasks of one layout agree
        text = np.zeros((len(self.layouts), 1), bool)
        text[self.kind, 0] = predicted
        self.supervised = ((self.roles == TEXT) & text) | (self.roles == ACTION)
        self.supervised[:, 0] = False  # nothing comes before it
        self.patch_index = [np.flatnonzero(roles == PATCH).astype(np.int32) for roles in self.roles]
        self.patches = np.array([len(index) for index in self.patch_index])
        self.channels = np.array([max(1, layout.channels) for layout in self.layouts])
        self._drawn: dict[tuple[int, bool], np.ndarray] = {}

    def batch(self, task: np.ndarray, draws: np.ndarray, mean: bool, buffers: BufferPool) -> tuple[Batch, np.ndarray]:
        """A batch of sequences of tasks (B,), and the first patch of each (B,). `draws` (B,): the timestep from which
        each one's patch positions are drawn; `mean`: their means instead. Segments are 0."""
        kinds = self.kind[task]
        patches = self.patches[kinds]
        batch = Batch.empty(task, self.length, int(patches.sum()), int(self.channels[kinds].max()), buffers)
        for name in ("tokens", "roles", "positions", "supervised"):
            np.take(getattr(self, name), kinds, axis=0, out=getattr(batch, name), mode="clip")
        batch.segments.fill(0)
        patches_at = np.cumsum(patches) - patches
        for kind, rows in group_indices(kinds):
            if self.patches[kind]:
                self._place(batch, kind, rows, patches_at[rows], draws[rows], mean)
        return batch, patches_at

    def _place(
        self, batch: Batch, kind: int, rows: np.ndarray, patches_at: np.ndarray, draws: np.ndarray, mean: bool
    ) -> None:
        """Fill in where the patches of rows of one layout are among the tokens, and in their pictures."""
        index, tokens = self.patch_index[kind], (rows * self.length).astype(np.int32)[:, None]
        M, table, first = len(index), self._bins(kind, mean), draws * self.layouts[kind].patches * 2
        if len(rows) * M == len(batch.patches):  # all are of one layout, end to end
            np.add(index, tokens, out=batch.patch_index.reshape(-1, M))
            batch.patch_positions.reshape(-1, 2 * M)[:] = table[first]
            return
        places = patches_at[:, None] + np.arange(M)
        batch.patch_index[places] = index + tokens
        batch.patch_positions[places] = table[first].reshape(len(rows), M, 2)

    def _bins(self, kind: int, mean: bool) -> np.ndarray:
        """See `patch_positions`: what a sequence takes from each place on, uint8 (places, 2 M), a view."""
        key = kind, mean
        if key not in self._drawn:
            layout = self.layouts[kind]
            bins = patch_positions(layout, -(-self.length // layout.length), None if mean else self.seed).reshape(-1)
            self._drawn[key] = np.lib.stride_tricks.sliding_window_view(bins, 2 * len(self.patch_index[kind]))
        return self._drawn[key]


def patch_positions(layout: TimestepLayout, width: int, seed: int | None) -> np.ndarray:
    """Row and column bins of the patches of DRAWS + W timesteps, uint8 (.., 2): drawn from their intervals (paper,
    appendix C.3), or without a seed the intervals' means."""
    if seed is None:
        return np.tile(layout.patch_centres.astype(np.uint8), (width, 1))
    low, high = (layout.patch_intervals[:, :, end].astype(np.float32) for end in (0, 1))
    drawn = low + random(seed, "patch").random((DRAWS, layout.patches, 2), np.float32) * (high - low)
    bins = np.minimum(drawn, high - 1).astype(np.uint8).reshape(-1, 2)
    return np.resize(bins, (len(bins) + width * layout.patches, 2))
