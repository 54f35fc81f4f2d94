"""Plans -> batches: spans of mapped shards, copied to where a sequence's tokens and pixels stand.

    Plan: spans as places of bytes -> one copy of bytes a span -> (W, K) grids, flattened, cut at L -> rows of a Batch

What needs random numbers and searches was done for many sequences at once, when they were planned; what is left for a
batch are copies, and look-ups in tables of the layouts.

Invariant: loss falls only on text and action tokens that have a predecessor in their segment, and not on a text's
padding.

Shapes: n sequences, s spans, W timesteps, K tokens a timestep, L tokens, P patches a timestep, M patches a sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from schemas.dataset import DatasetError
from schemas.layout import PATCH_SIZE, TEXT, TimestepLayout
from shards.batch import Batch, Memory
from shards.reader import BadShard
from shards.tables import Tables
from shards.timeline import Circles, Timeline, grouped

PATCH = (PATCH_SIZE, PATCH_SIZE)


@dataclass(frozen=True)
class Sources:
    """Where the sequences of a plan are copied from. All arrays int64 but `fresh`.

    first (n + 1,): each sequence's first span. Of each span (s,): its sequence; its shard; the first byte of its tokens
    and of its patches there; timesteps; the first one in the sequence's grid; whether it begins another segment."""

    first: np.ndarray
    grid: np.ndarray
    shard: np.ndarray
    tokens: np.ndarray
    patches: np.ndarray
    count: np.ndarray
    place: np.ndarray
    fresh: np.ndarray


@dataclass(frozen=True)
class Plan:
    """Sequences i (n,), their tasks, how often each was drawn anew, the first timestep of its patch positions' draws,
    how many of its first timesteps carry no loss, and its sources."""

    i: np.ndarray
    task: np.ndarray
    redraw: np.ndarray
    draws: np.ndarray
    silent: np.ndarray
    sources: Sources
    evaluation: bool


class Assembly:
    """Of sequences of L tokens of T tasks."""

    def __init__(self, timelines: Sequence[Timeline], length: int, seed: int):
        self.timelines, self.length = timelines, length
        self.circles, self.tables = Circles(timelines), Tables(timelines, length, seed)
        layouts = [timeline.layout for timeline in timelines]
        self._token_bytes = np.array([2 * layout.stored for layout in layouts])  # of a timestep
        self._patch_bytes = np.array([layout.patches * PATCH_SIZE**2 * layout.channels for layout in layouts])

    def sources(self, task: np.ndarray, begin: np.ndarray, prompt: tuple[np.ndarray, np.ndarray]) -> Sources:
        """What sequences of tasks (n,), whose windows begin at circle positions `begin` (n,), are copied from."""
        spans = self.circles.spans(task, begin, prompt)
        own = task[spans.grid]
        names = "shard", "tokens_offset", "patches_offset"
        shard, tokens, patches = self.circles.take(names, own, spans.row)
        lacking = (tokens < 0) | ((patches < 0) & (self._patch_bytes[own] > 0))
        if lacking.any():
            timeline = self.timelines[int(own[lacking.argmax()])]
            place = timeline.dataset.place
            raise DatasetError(f"{place}: a sample of '{timeline.name}' lacks tokens or patches; rebuild it")
        return Sources(
            first=spans.grid.searchsorted(np.arange(len(task) + 1)),
            grid=spans.grid,
            shard=shard,
            tokens=tokens + spans.start * self._token_bytes[own],
            patches=patches + spans.start * self._patch_bytes[own],
            count=spans.count,
            place=spans.place,
            fresh=spans.fresh,
        )

    def batch(self, plan: Plan, begin: int, end: int, memory: Memory) -> Batch:
        """Sequences [begin, end) of a plan. BadShard where one cannot be read."""
        task, sources = plan.task[begin:end], plan.sources
        batch, patches_at = self.tables.batch(task, plan.draws[begin:end], plan.evaluation, memory)
        batch.sequence[:] = plan.i[begin:end]
        kinds, first = self.tables.kind[task], int(sources.first[begin])
        of_span = kinds[sources.grid[first : sources.first[end]] - begin]
        for kind, rows in grouped(kinds):
            spans = first + np.flatnonzero(of_span == kind)
            row = sources.grid[spans] - begin
            layout, M = self.tables.layouts[kind], int(self.tables.patches[kind])
            self._fill_tokens(batch, plan, layout, spans, row, rows, memory)
            if M:
                self._fill_patches(batch, plan, layout, M, spans, patches_at[row], patches_at[rows])
            fresh = sources.fresh[spans]
            row, behind = row[fresh], sources.place[spans][fresh] * layout.length
            batch.supervised[row, behind] = False
            for number, token in zip(row.tolist(), behind.tolist()):
                batch.segments[number, token:] += 1
            if layout.text and layout.action:
                padding = self.timelines[int(task[rows[0]])].padding
                batch.supervised[rows] &= (self.tables.roles[kind] != TEXT) | (batch.tokens[rows] != padding)
            silent = plan.silent[begin + rows]
            if silent.any():
                batch.supervised[rows] &= np.arange(self.length) >= silent[:, None] * layout.length
        return batch

    def _fill_tokens(
        self,
        batch: Batch,
        plan: Plan,
        layout: TimestepLayout,
        spans: np.ndarray,
        row: np.ndarray,
        rows: np.ndarray,
        memory: Memory,
    ) -> None:
        """Copy the stored tokens of spans (s,), which are of `row` (s,) of a batch, to its rows (n,) of one layout."""
        n, L, K, size = len(rows), self.length, layout.length, 2 * layout.stored
        W = -(-L // K)
        stored = memory.take("stored", np.uint8, n * W * size)
        target = (rows.searchsorted(row) * W + plan.sources.place[spans]) * size
        self._copy(plan, plan.sources.tokens, spans, target, plan.sources.count[spans] * size, stored)
        values = stored.view(np.uint16).reshape(n, W, layout.stored)
        at: np.ndarray | slice = slice(None) if n == len(batch.tokens) else rows
        full, cut = L // K, L % K
        grid = batch.tokens[:, : full * K].reshape(-1, full, K)
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
        spans: np.ndarray,
        patches_at: np.ndarray,
        firsts: np.ndarray,
    ) -> None:
        """Copy the pixels of spans (s,) of one layout, whose sequences' patches stand from `patches_at` (s,) on;
        `firsts` (n,): the same of each sequence."""
        P, size = layout.patches, PATCH_SIZE**2 * layout.channels
        place = plan.sources.place[spans] * P
        shown = np.minimum(plan.sources.count[spans] * P, M - place)  # the last timestep may be cut
        target = patches_at + place
        if batch.patches.shape[3] == layout.channels:
            self._copy(plan, plan.sources.patches, spans, target * size, shown * size, batch.patches.reshape(-1))
            return
        grey = np.empty(int((target + shown).max()) * size, np.uint8)
        self._copy(plan, plan.sources.patches, spans, target * size, shown * size, grey)
        for first in firsts.tolist():
            batch.patches[first : first + M] = grey[first * size : (first + M) * size].reshape(M, *PATCH, -1)

    def _copy(
        self, plan: Plan, starts: np.ndarray, spans: np.ndarray, target: np.ndarray, length: np.ndarray, out: np.ndarray
    ) -> None:
        """Copy bytes of shards, of spans (s,) from `starts` on, to `out` (bytes,), one shard after the other."""
        task, shard = plan.task[plan.sources.grid[spans]], plan.sources.shard[spans]
        order = np.lexsort((shard, task))
        current, data = (-1, -1), out
        for t, number, source, first, size in zip(
            *(values[order].tolist() for values in (task, shard, starts[spans], target, length))
        ):
            if (t, number) != current:
                current, dataset = (t, number), self.timelines[t].dataset
                data = dataset.mapped(number)
            piece = data[source : source + size]
            if len(piece) < size:
                name = dataset.place.path(dataset.shard(number).name)
                raise BadShard(f"{name}: the index points behind its end; rebuild it", dataset, number)
            out[first : first + size] = piece
