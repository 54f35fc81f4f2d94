"""Windows of timesteps -> token sequences of exactly L tokens, many at once.

A task's timesteps lie on a circle, episode after episode. An epoch cuts the circle
at a random phase into windows of W = ceil(L / K) timesteps; a window is a regular
(W, K) grid, filled from the mapped arrays, flattened and cut at L. Where an episode
ends inside the window the next one follows with its own segment number. A prompt,
where one is drawn, takes the first timesteps of the grid and shares the segment of
the episode behind it (paper §2.2).

    runs (timesteps [a, b) of the circle) -> spans (runs cut at rows of the index) -> grids -> rows of a Batch

Invariant: an epoch shows every timestep at least once, fewer than W of them twice;
loss falls only on text and action tokens that have a predecessor in their segment, and not on a text's padding.

Shapes: n sequences, W timesteps, K tokens a timestep, L tokens, M patches a sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from schemas.layout import ACTION, SEPARATOR, TEXT, TimestepLayout
from shards.batch import Batch
from shards.reader import Dataset
from shards.sampler import below, mixed


@dataclass(frozen=True)
class Spans:
    """Timesteps [start, start + count) of index row `row`, for timesteps `place` and on of grid `grid`, in its segment
    `segment`. int64 arrays, ordered by grid and place."""

    row: np.ndarray
    start: np.ndarray
    count: np.ndarray
    grid: np.ndarray
    place: np.ndarray
    segment: np.ndarray


class Timeline:
    """One task's episodes of one split (training or held out), end to end on a circle."""

    def __init__(self, dataset: Dataset, task: int, held_out: bool, sequence_length: int):
        self.dataset, self.task, self.held_out, self.sequence_length = dataset, task, held_out, sequence_length
        self.layout: TimestepLayout = dataset.layouts[task]
        about = dataset.manifest.tasks[task]
        self.total = about.held_out_timesteps if held_out else about.timesteps - about.held_out_timesteps
        self.count = about.held_out_episodes if held_out else about.episodes - about.held_out_episodes
        self.first, stop = dataset.span(task, held_out)
        self.pieces = stop - self.first
        self.width = -(-sequence_length // self.layout.length)
        self.windows = -(-self.total // self.width)
        text = dataset.manifest.text_model
        self.padding = text.padding if text else -1
        L, columns = sequence_length, np.arange(self.layout.length)
        self.roles = np.tile(self.layout.roles, self.width)[:L]
        self.positions = np.tile(self.layout.local_positions, self.width)[:L]
        slots = np.arange(self.width)[:, None] * len(columns) + self.layout.patch_slots
        self.patch_index = slots.reshape(-1)[slots.reshape(-1) < L]

    @cached_property
    def ends(self) -> np.ndarray:
        """Circle position behind each row of the index, int64 (pieces,), mapped; so are the next two."""
        return self._column("split_stop")

    @cached_property
    def lengths(self) -> np.ndarray:
        return self._column("timesteps")

    @cached_property
    def episodes(self) -> np.ndarray:
        """Ordinal of each row's episode."""
        return self._column("split_episode")

    def _column(self, name: str) -> np.ndarray:
        return self.dataset.column(name)[self.first : self.first + self.pieces]

    @property
    def shards(self) -> int:
        """How many shards its rows lie in, about."""
        numbers = self._column("shard")
        return int(abs(numbers[-1] - numbers[0])) + 1

    @property
    def name(self) -> str:
        return self.dataset.manifest.tasks[self.task].spec.name

    def prompts(
        self, first: np.ndarray, length: np.ndarray, from_end: np.ndarray, word: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Circle positions [a, b) of prompts for windows that begin at `first` (n,): at most `length` timesteps of
        another episode than the window's first, its end or from anywhere; a = b where length is 0 or there is none."""
        own = self.episodes[np.searchsorted(self.ends, first % self.total, side="right")]
        other = below(word, self.count - 1)
        other += other >= own
        other = np.minimum(other, self.count - 1)
        row, behind = (np.searchsorted(self.episodes, other, side=side) for side in ("left", "right"))
        start, stop = self.ends[row] - self.lengths[row], self.ends[behind - 1]
        length = np.minimum(length, stop - start) * (self.count > 1)
        anywhere = start + below(mixed(word, 0), stop - start - length + 1)
        a = np.where(from_end, stop - length, anywhere)
        return a, a + length

    def spans(self, first: np.ndarray, prompt: tuple[np.ndarray, np.ndarray]) -> Spans:
        """What fills the grids of windows that begin at circle positions `first` (n,), behind their prompts."""
        n, R = len(first), self.pieces
        taken = prompt[1] - prompt[0]
        a = np.stack([prompt[0], first], axis=1).reshape(-1)  # runs: each grid's prompt, then its body
        b = np.stack([prompt[1], first + self.width - taken], axis=1).reshape(-1)
        place = np.stack([np.zeros(n, np.int64), taken], axis=1).reshape(-1)
        low, high = self._unrolled(a), self._unrolled(b - 1)
        counts = np.where(b > a, high - low + 1, 0)
        run = np.repeat(np.arange(2 * n), counts)
        begins = np.cumsum(counts) - counts
        unrolled = low[run] + np.arange(len(run)) - begins[run]
        lap, row = np.divmod(unrolled, R)
        start = np.maximum(a[run], lap * self.total + self.ends[row] - self.lengths[row])
        stop = np.minimum(b[run], lap * self.total + self.ends[row])
        grid = run // 2
        # a prompt is of one episode, and so are the pieces of a long one; the body's first shares its segment
        previous = np.maximum(np.arange(len(run)) - 1, 0)
        fresh = (self.episodes[row] != self.episodes[row[previous]]) | (lap != lap[previous])
        fresh &= (run == run[previous]) & (np.arange(len(run)) > 0)
        segment = np.cumsum(fresh)
        base = segment[np.searchsorted(grid, np.arange(n))]
        return Spans(
            row=self.first + row,
            start=start - lap * self.total - self.ends[row] + self.lengths[row],
            count=stop - start,
            grid=grid,
            place=place[run] + start - a[run],
            segment=segment - base[grid],
        )

    def _unrolled(self, position: np.ndarray) -> np.ndarray:
        """Number of the row at each circle position, counted on from lap to lap."""
        lap, within = np.divmod(position, self.total)
        return lap * self.pieces + np.searchsorted(self.ends, within, side="right")

    def fill(
        self,
        batch: Batch,
        at: np.ndarray,
        patches_at: np.ndarray,
        spans: Spans,
        prompt: np.ndarray | None,
        separator: int,
        word: np.ndarray | None,
    ) -> None:
        """Write sequences into rows `at` (n,) of a batch, their patches from `patches_at` (n,) on. `prompt` (n,): how
        many timesteps of each carry no loss, None where all do; `word`:
        see `patch_positions`. Not written: tasks, sequence."""
        layout, W, L, n = self.layout, self.width, self.sequence_length, len(at)
        grid = np.zeros((n * W, layout.length), np.int32)
        stored = np.empty((n * W, layout.stored), np.uint16)
        M, P = len(self.patch_index), layout.patches
        for row, start, count, number, place in zip(
            *(a.tolist() for a in (spans.row, spans.start, spans.count, spans.grid, spans.place))
        ):
            first = number * W + place
            stored[first : first + count] = self.dataset.tokens(row)[start : start + count]
            if P:
                shown = min(count * P, M - place * P)  # the last timestep may be cut
                pixels = self.dataset.patches(row)[start : start + count]
                begin = patches_at[number] + place * P
                batch.patches[begin : begin + shown] = pixels.reshape(-1, *pixels.shape[2:])[:shown]
        grid[:, layout.stored_columns] = stored
        grid[:, layout.roles == SEPARATOR] = separator
        segments = np.repeat(spans.segment.astype(np.int16), spans.count * layout.length).reshape(n, -1)[:, :L]
        tokens = grid.reshape(n, -1)[:, :L]
        supervised = np.tile(np.isin(self.roles, (TEXT, ACTION)), (n, 1))
        if layout.text and layout.action:
            supervised &= (self.roles != TEXT) | (tokens != self.padding)
        supervised[:, 1:] &= segments[:, 1:] == segments[:, :-1]
        supervised[:, 0] = False
        if prompt is not None:
            supervised &= np.arange(L) >= prompt[:, None] * layout.length
        batch.tokens[at], batch.segments[at], batch.supervised[at] = tokens, segments, supervised
        batch.roles[at], batch.positions[at] = self.roles, self.positions
        if P:
            places = patches_at[:, None] + np.arange(M)
            batch.patch_index[places] = at[:, None] * L + self.patch_index
            batch.patch_positions[places] = self.patch_positions(word, n)

    def patch_positions(self, word: np.ndarray | None, n: int) -> np.ndarray:
        """Row and column bins (n, M, 2) int64 of n sequences' patches: drawn from their intervals by each sequence's
        word (paper, appendix C.3), or the intervals' means."""
        layout, M = self.layout, len(self.patch_index)
        patch = np.arange(M) % layout.patches
        if word is None:
            return np.broadcast_to(layout.patch_centres[patch], (n, M, 2))
        low, high = (layout.patch_intervals[patch, :, end] for end in (0, 1))
        drawn = mixed(word[:, None], np.arange(M))
        return low + below(np.stack([drawn, drawn << np.uint64(32)], axis=2), high - low)
