"""Plans -> batches: spans of mapped shards, copied to the places of a sequence's tokens and pixels.

    Plan: spans as places of bytes -> one copy per span -> (W, K) grids, flattened, cut at L -> rows of a Batch

Planning does all sampling and searching, for many sequences at once. Building a batch only copies bytes and looks up
tables of the layouts.

Invariant: loss falls only on text and action tokens that have a predecessor in their segment, and not on a text's
padding.

Shapes: n sequences, s spans, W timesteps, K tokens per timestep, L tokens, P patches per timestep, M per sequence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from schemas.dataset import ReturnScale
from schemas.layout import PATCH_SIZE, TEXT, TimestepLayout
from shards.batch import Batch, BufferPool
from shards.reader import BadShard
from shards.tables import Tables
from shards.timeline import Spans, Timeline, group_indices

PATCH = (PATCH_SIZE, PATCH_SIZE)


@dataclass(frozen=True)
class Plan:
    """Sequences i (n,), their tasks, how often each was drawn again, the first timestep of its patch positions' draws,
    how many of its first timesteps carry no loss, and its spans."""

    i: np.ndarray
    task: np.ndarray
    redraw: np.ndarray
    draws: np.ndarray
    silent: np.ndarray
    spans: Spans
    evaluation: bool


class Assembly:
    """Of sequences of L tokens of T tasks; `scales`: of their returns, by name; `predicted`: whether their texts are
    targets."""

    def __init__(
        self,
        timelines: Sequence[Timeline],
        length: int,
        seed: int,
        scales: Mapping[str, ReturnScale],
        predicted: Sequence[bool],
    ):
        self.timelines, self.length = timelines, length
        self.tables = Tables(timelines, length, seed, predicted)
        none = ReturnScale(np.nan, 1.0, np.nan)
        found = [scales.get(timeline.name, none) for timeline in timelines]
        self.mean, self.std = np.array([(scale.mean, scale.std) for scale in found]).T

    def batch(self, plan: Plan, begin: int, end: int, buffers: BufferPool) -> Batch:
        """Sequences [begin, end) of a plan. BadShard where one cannot be read."""
        task, spans = plan.task[begin:end], plan.spans
        batch, patches_at = self.tables.batch(task, plan.draws[begin:end], plan.evaluation, buffers)
        batch.sequence[:] = plan.i[begin:end]
        batch.returns = self._returns(spans, task, begin, end)
        kinds, first = self.tables.kind[task], int(spans.first[begin])
        of_span = kinds[spans.sequence[first : spans.first[end]] - begin]
        for kind, rows in group_indices(kinds):
            own = first + np.flatnonzero(of_span == kind)
            row = spans.sequence[own] - begin
            layout, M = self.tables.layouts[kind], int(self.tables.patches[kind])
            self._fill_tokens(batch, plan, layout, own, row, rows, buffers)
            if M:
                self._fill_patches(batch, plan, layout, M, own, row, rows, patches_at, buffers)
            starts_segment = spans.starts_segment[own]
            row, first_token = row[starts_segment], spans.place[own][starts_segment] * layout.length
            batch.supervised[row, first_token] = False
            for number, token in zip(row.tolist(), first_token.tolist()):
                batch.segments[number, token:] += 1
            if layout.text and (layout.action or layout.captioned):
                padding = self.timelines[int(task[rows[0]])].padding
                batch.supervised[rows] &= (self.tables.roles[kind] != TEXT) | (batch.tokens[rows] != padding)
            silent = plan.silent[begin + rows]
            if silent.any():
                batch.supervised[rows] &= np.arange(self.length) >= silent[:, None] * layout.length
        return batch.seal(buffers)

    def _returns(self, spans: Spans, task: np.ndarray, begin: int, end: int) -> np.ndarray:
        """Standardised returns (B, S) of the segments of sequences [begin, end)."""
        own = slice(spans.first[begin], spans.first[end])
        row, new = spans.sequence[own] - begin, spans.starts_segment[own]
        before = np.cumsum(new)
        segment = before - before[spans.first[begin:end] - spans.first[begin]][row]
        returns = np.zeros((end - begin, int(segment.max()) + 1), np.float32)
        # of spans of one segment the last one decides: after a prompt, the body
        returns[row, segment] = (spans.episode_return[own] - self.mean[task][row]) / self.std[task][row]
        return np.nan_to_num(returns, copy=False)

    def _fill_tokens(
        self,
        batch: Batch,
        plan: Plan,
        layout: TimestepLayout,
        own: np.ndarray,
        row: np.ndarray,
        rows: np.ndarray,
        buffers: BufferPool,
    ) -> None:
        """Copy the tokens of spans `own` (s,), which are of `row` (s,) of a batch, to its rows (n,) of one layout."""
        n, L, K, size = len(rows), self.length, layout.length, 2 * layout.stored
        W = -(-L // K)
        stored = buffers.get("stored", np.uint8, n * W * size)
        target = (rows.searchsorted(row) * W + plan.spans.place[own]) * size
        self._copy(plan, plan.spans.tokens, own, target, plan.spans.count[own] * size, stored)
        values = stored.view(np.uint16).reshape(n, W, layout.stored)
        at: np.ndarray | slice = slice(None) if n == len(batch.tokens) else rows
        full, cut = L // K, L % K
        grid = batch.tokens[:, : full * K].reshape(len(batch.tokens), full, K)
        for first, column, width in layout.stored_blocks:
            grid[at, :, column : column + width] = values[:, :full, first : first + width]
            if cut > column:
                last = values[:, full, first : first + min(width, cut - column)]
                batch.tokens[at, full * K + column : full * K + column + last.shape[1]] = last

    def _fill_patches(
        self,
        batch: Batch,
        plan: Plan,
        layout: TimestepLayout,
        M: int,
        own: np.ndarray,
        row: np.ndarray,
        rows: np.ndarray,
        patches_at: np.ndarray,
        buffers: BufferPool,
    ) -> None:
        """Copy the pixels of spans `own` (s,), which are of `row` (s,) of a batch, to its rows (n,) of one layout.
        `patches_at` (B,): the first patch of each sequence, of whose M the last timestep's may be cut off."""
        P, size, spans = layout.patches, PATCH_SIZE**2 * layout.channels, plan.spans
        if layout.patch_shape == (P, *batch.patches.shape[1:]):
            place = spans.place[own] * P
            shown = np.minimum(spans.count[own] * P, M - place)
            target = (patches_at[row] + place) * size
            self._copy(plan, spans.patches, own, target, shown * size, batch.patches.reshape(-1))
            return
        W, size = -(-self.length // layout.length), layout.patch_bytes
        stored = buffers.get("pictures", np.uint8, len(rows) * W * size)
        target = (rows.searchsorted(row) * W + spans.place[own]) * size
        self._copy(plan, spans.patches, own, target, spans.count[own] * size, stored)
        for n, first in enumerate(patches_at[rows].tolist()):
            grid = stored[n * W * size : (n + 1) * W * size].reshape(W, size)
            level = layout.level_patches(grid, batch.patches.shape[3])
            batch.patches[first : first + M] = level.reshape(W * P, *PATCH, -1)[:M]

    def _copy(
        self, plan: Plan, starts: np.ndarray, own: np.ndarray, target: np.ndarray, length: np.ndarray, out: np.ndarray
    ) -> None:
        """Copy bytes of shards, of spans `own` (s,) from `starts` on, to `out` (bytes,), one shard after the other."""
        task, shard = plan.task[plan.spans.sequence[own]], plan.spans.shard[own]
        order = np.lexsort((shard, task))
        current, data = (-1, -1), out
        for t, number, source, first, size in zip(
            *(values[order].tolist() for values in (task, shard, starts[own], target, length))
        ):
            if (t, number) != current:
                current, dataset = (t, number), self.timelines[t].dataset
                data = dataset.mapped(number)
            piece = data[source : source + size]
            if len(piece) < size:
                name = dataset.place.path(dataset.shard(number).name)
                raise BadShard(f"{name}: the index points beyond its end; rebuild it", dataset, number)
            out[first : first + size] = piece
