"""What a batch holds that follows from its tasks alone: roles, positions, separators, loss mask, places of patches.

tasks (B,) -> rows of tables, one a task -> a Batch but for stored tokens, pixels and segments

Invariant: sequences of one task differ only in what `Timeline.fill` copies and in their patches' drawn positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from schemas.layout import TimestepLayout
from shards.assembly import Timeline
from shards.batch import Batch, Memory


class Tables:
    """Of T tasks and sequences of L tokens. `patches` (T,): patches of a sequence of each."""

    def __init__(self, timelines: Sequence[Timeline], length: int, seed: int):
        T, L = len(timelines), length
        self.timelines, self.length, self.seed = timelines, length, seed
        self.tokens, self.positions = np.empty((T, L), np.int32), np.empty((T, L), np.int16)
        self.roles, self.supervised = np.empty((T, L), np.uint8), np.empty((T, L), bool)
        self.patches, self.channels, self.kind = (np.empty(T, np.int64) for _ in range(3))
        first: dict[TimestepLayout, int] = {}
        for n, timeline in enumerate(timelines):
            layout = timeline.layout
            like = first.setdefault(layout, n)
            if like < n:  # tasks of one layout look alike
                for table in (self.tokens, self.positions, self.roles, self.supervised, self.patches, self.channels):
                    table[n] = table[like]
                self.kind[n] = like
                continue
            self.tokens[n], self.supervised[n] = timeline.plain, timeline.supervised
            self.roles[n] = np.tile(layout.roles, timeline.width)[:L]
            self.positions[n] = np.tile(layout.local_positions, timeline.width)[:L]
            self.patches[n] = len(timeline.patch_index)
            self.channels[n] = layout.channels if layout.patches else 1
            self.kind[n] = n
        self._drawn: dict[tuple[TimestepLayout, bool], np.ndarray] = {}

    def batch(self, task: np.ndarray, draws: np.ndarray, mean: bool, memory: Memory) -> tuple[Batch, np.ndarray]:
        """A batch of sequences of tasks (B,), and the first patch of each (B,). `draws` (B,): the timestep from which
        each one's patch positions are drawn; `mean`: their means instead. Segments are 0."""
        patches = self.patches[task]
        batch = Batch.empty(task, self.length, int(patches.sum()), int(self.channels[task].max()), memory)
        for name in ("tokens", "roles", "positions", "supervised"):
            np.take(getattr(self, name), task, axis=0, out=getattr(batch, name), mode="clip")
        batch.segments.fill(0)
        patches_at = np.cumsum(patches) - patches
        kinds = self.kind[task]
        for kind in sorted(set(kinds[patches > 0].tolist())):
            rows = np.flatnonzero(kinds == kind)
            self._place(batch, self.timelines[int(task[rows[0]])], rows, patches_at[rows], draws[rows], mean)
        return batch, patches_at

    def _place(
        self, batch: Batch, timeline: Timeline, rows: np.ndarray, patches_at: np.ndarray, draws: np.ndarray, mean: bool
    ) -> None:
        """Where the patches of rows of one layout stand among the tokens, and in their pictures."""
        M, tokens = len(timeline.patch_index), (rows * self.length).astype(np.int32)[:, None]
        table, first = self._bins(timeline, mean), draws * timeline.layout.patches * 2
        if len(rows) * M == len(batch.patches):  # all are of one layout, end to end
            np.add(timeline.patch_index, tokens, out=batch.patch_index.reshape(-1, M))
            batch.patch_positions.reshape(-1, 2 * M)[:] = table[first]
            return
        places = patches_at[:, None] + np.arange(M)
        batch.patch_index[places] = timeline.patch_index + tokens
        batch.patch_positions[places] = table[first].reshape(len(rows), M, 2)

    def _bins(self, timeline: Timeline, mean: bool) -> np.ndarray:
        """See `Timeline.patch_positions`: what a sequence takes from each place on, uint8 (places, 2 M), a view. Tasks
        of one layout share it."""
        key = (timeline.layout, mean)
        if key not in self._drawn:
            bins = timeline.patch_positions(None if mean else self.seed).reshape(-1)
            self._drawn[key] = np.lib.stride_tricks.sliding_window_view(bins, 2 * len(timeline.patch_index))
        return self._drawn[key]
