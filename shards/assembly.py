"""Windows of timesteps -> token sequences of exactly L tokens, many at once.

A task's timesteps lie on a circle, episode after episode. An epoch cuts the circle at a random phase into windows of
W = ceil(L / K) timesteps; a window is a regular (W, K) grid, copied from the mapped arrays, flattened and cut at L.
Where an episode ends inside the window the next one follows with its own segment number. A prompt, where one is drawn,
takes the first timesteps of the grid and shares the segment of the episode behind it (paper §2.2).

    runs (timesteps [a, b) of the circle) -> spans (runs cut at rows of the index) -> copies of bytes -> rows of a Batch

What needs random numbers and searches is done for many sequences at once (`Timeline.part`), what is left for a batch
are copies (`fill`), one a span, and look-ups in tables of the tasks.

Invariant: the windows of an epoch hold every timestep at least once, fewer than W of them twice (a prompt takes the
place of a window's last timesteps);
loss falls only on text and action tokens that have a predecessor in their segment, and not on a text's padding.

Shapes: n sequences, s spans, W timesteps, K tokens a timestep, L tokens, P patches a timestep, M patches a sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from schemas.dataset import DatasetError
from schemas.layout import ACTION, PATCH_SIZE, SEPARATOR, TEXT, TimestepLayout
from shards.batch import Batch, Memory
from shards.reader import BadShard, Dataset
from shards.sampler import below, mixed, random

PATCH = (PATCH_SIZE, PATCH_SIZE)
DRAWS = 1024  # timesteps of a task for which patch positions are drawn; a sequence takes W in a row of them


@dataclass(frozen=True)
class Spans:
    """Timesteps [start, start + count) of index row `row`, for timesteps `place` and on of grid `grid`; `fresh` where
    they begin another segment. Arrays (s,), ordered by grid and place."""

    row: np.ndarray
    start: np.ndarray
    count: np.ndarray
    grid: np.ndarray
    place: np.ndarray
    fresh: np.ndarray


@dataclass(frozen=True)
class Part:
    """The sequences of one task in a plan: spans as places of bytes. All arrays int64 but `fresh`.

    at (n,): where the sequences stand in the plan, ascending; first (n + 1,): each one's first span; prompt (n,):
    timesteps of its prompt. Of each span (s,): its shard; the first byte of its tokens and of its patches there;
    timesteps; timestep in the grids of all sequences, end to end."""

    at: np.ndarray
    first: np.ndarray
    prompt: np.ndarray
    shard: np.ndarray
    tokens: np.ndarray
    patches: np.ndarray
    count: np.ndarray
    place: np.ndarray
    fresh: np.ndarray


class Timeline:
    """One task's episodes of one split (training or held out), end to end on a circle; or its first `episodes`."""

    def __init__(self, dataset: Dataset, task: int, held_out: bool, sequence_length: int, episodes: int = 0):
        self.dataset, self.task, self.sequence_length = dataset, task, sequence_length
        self.layout: TimestepLayout = dataset.layouts[task]
        self.total, self.count = dataset.manifest.tasks[task].split(held_out)
        self.first, stop = dataset.span(task, held_out)
        self.pieces = stop - self.first
        if 0 < episodes < self.count:
            self.pieces = int(np.searchsorted(self._column("split_episode"), episodes))
            self.total, self.count = int(self._column("split_stop")[-1]), episodes
        self.width = -(-sequence_length // self.layout.length)
        self.windows = -(-self.total // self.width)
        text = dataset.manifest.text_model
        self.padding = text.padding if text else -1

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

    @cached_property
    def patch_index(self) -> np.ndarray:
        """Places of a sequence's patches among its tokens, int32 (M,)."""
        slots = np.arange(self.width, dtype=np.int32)[:, None] * self.layout.length + self.layout.patch_slots
        return slots.reshape(-1)[slots.reshape(-1) < self.sequence_length].astype(np.int32)

    @property
    def plain(self) -> np.ndarray:
        """The tokens of a sequence that are not stored: separators, and 0 elsewhere, int32 (L,)."""
        separator = self.dataset.manifest.vocabulary.separator
        tokens = np.where(self.layout.roles == SEPARATOR, separator, 0).astype(np.int32)
        return np.tile(tokens, self.width)[: self.sequence_length]

    @property
    def supervised(self) -> np.ndarray:
        """Where loss may fall, bool (L,)."""
        mask = np.isin(self.layout.roles, (TEXT, ACTION))
        mask = np.tile(mask, self.width)[: self.sequence_length]
        mask[0] = False
        return mask

    def patch_positions(self, seed: int | None) -> np.ndarray:
        """Row and column bins of the patches of DRAWS + W timesteps, uint8 (.., 2): drawn from their intervals (paper,
        appendix C.3), or without a seed the intervals' means."""
        layout = self.layout
        if seed is None:
            return np.tile(layout.patch_centres.astype(np.uint8), (self.width, 1))
        low, high = (layout.patch_intervals[:, :, end].astype(np.float32) for end in (0, 1))
        shape = DRAWS, layout.patches, 2
        drawn = low + random(seed, "patch").random(shape, np.float32) * (high - low)
        bins = np.minimum(drawn, high - 1).astype(np.uint8).reshape(-1, 2)
        return np.resize(bins, (len(bins) + self.width * layout.patches, 2))

    def prompts(
        self, first: np.ndarray, length: np.ndarray, from_end: np.ndarray, word: np.ndarray, near: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Circle positions [a, b) of prompts for windows that begin at `first` (n,): at most `length` timesteps of
        another episode than the window's first, its end or from anywhere; a = b where length is 0 or there is none.
        The episode is any, all alike, or where positions `near` (n,) are given, the one there or the next."""
        a, b = np.zeros((2, len(first)), np.int64)
        drawn = np.flatnonzero(length) if self.count > 1 else np.arange(0)
        word, own = word[drawn], self._episode(first[drawn])
        if near is None:
            other = below(word, self.count - 1)
            other += other >= own
        else:
            other = self._episode(near[drawn])
            other += other == own
            other[other == self.count] = 0
        row, behind = (np.searchsorted(self.episodes, other, side=side) for side in ("left", "right"))
        start, stop = self.ends[row] - self.lengths[row], self.ends[behind - 1]
        taken = np.minimum(length[drawn], stop - start)
        anywhere = start + below(mixed(word, 0), stop - start - taken + 1)
        a[drawn] = np.where(from_end[drawn], stop - taken, anywhere)
        b[drawn] = a[drawn] + taken
        return a, b

    def _episode(self, position: np.ndarray) -> np.ndarray:
        return self.episodes[np.searchsorted(self.ends, position % self.total, side="right")]

    def spans(self, first: np.ndarray, prompt: tuple[np.ndarray, np.ndarray]) -> Spans:
        """What fills the grids of windows that begin at circle positions `first` (n,), behind their prompts."""
        n, R = len(first), self.pieces
        taken = prompt[1] - prompt[0]
        a, b, place = np.zeros((3, 2 * n), np.int64)  # runs: each grid's prompt, then its body
        a[::2], a[1::2] = prompt[0], first
        b[::2], b[1::2] = prompt[1], first + self.width - taken
        place[1::2] = taken
        runs = np.flatnonzero(b > a)
        low = self._unrolled(a[runs])
        lap, row = np.divmod(low, R)
        further = np.flatnonzero(b[runs] > lap * self.total + self.ends[row])
        high = low.copy()
        high[further] = self._unrolled(b[runs[further]] - 1)
        counts = high - low + 1
        run, begins = np.repeat(runs, counts), np.cumsum(counts) - counts
        lap, row = np.divmod(np.repeat(low - begins, counts) + np.arange(len(run)), R)
        start = np.maximum(a[run], lap * self.total + self.ends[row] - self.lengths[row])
        stop = np.minimum(b[run], lap * self.total + self.ends[row])
        grid = run // 2
        # a prompt is of one episode, and so are the pieces of a long one; the body's first shares its segment
        previous = np.maximum(np.arange(len(run)) - 1, 0)
        fresh = (self.episodes[row] != self.episodes[row[previous]]) | (lap != lap[previous])
        fresh &= (run == run[previous]) & (np.arange(len(run)) > 0)
        return Spans(
            row=self.first + row,
            start=start - lap * self.total - self.ends[row] + self.lengths[row],
            count=stop - start,
            grid=grid,
            place=place[run] + start - a[run],
            fresh=fresh,
        )

    def _unrolled(self, position: np.ndarray) -> np.ndarray:
        """Number of the row at each circle position, counted on from lap to lap."""
        lap, within = np.divmod(position, self.total)
        return lap * self.pieces + np.searchsorted(self.ends, within, side="right")

    def part(self, at: np.ndarray, first: np.ndarray, prompt: tuple[np.ndarray, np.ndarray]) -> Part:
        """What the sequences `at` (n,) of a plan, whose windows begin at `first` (n,), are copied from."""
        spans, column, layout = self.spans(first, prompt), self.dataset.column, self.layout
        tokens, patches = column("tokens_offset")[spans.row], column("patches_offset")[spans.row]
        if (tokens < 0).any() or (layout.patches and (patches < 0).any()):
            raise DatasetError(f"{self.dataset.place}: a sample of '{self.name}' lacks tokens or patches; rebuild it")
        return Part(
            at=at,
            first=np.searchsorted(spans.grid, np.arange(len(at) + 1)),
            prompt=prompt[1] - prompt[0],
            shard=column("shard")[spans.row],
            tokens=tokens + spans.start * (2 * layout.stored),
            patches=patches + spans.start * (layout.patches * PATCH_SIZE**2 * layout.channels),
            count=spans.count,
            place=spans.grid * self.width + spans.place,
            fresh=spans.fresh,
        )

    def fill(
        self,
        batch: Batch,
        part: Part,
        begin: int,
        end: int,
        at: np.ndarray,
        patches_at: np.ndarray,
        memory: Memory,
    ) -> None:
        """Copy sequences [begin, end) of a part into rows `at` (n,) of a batch, their patches from `patches_at` (n,)
        on. What follows from the tasks alone is there already. BadShard where one cannot be read."""
        layout, W, L, n = self.layout, self.width, self.sequence_length, end - begin
        K, size = layout.length, 2 * layout.stored
        spans = slice(part.first[begin], part.first[end])
        place, count = part.place[spans] - begin * W, part.count[spans]
        stored = memory.take("stored", np.uint8, n * W * size)
        self._copy(part, part.tokens, spans, place * size, count * size, stored)
        if layout.patches:
            self._fill_patches(batch, part, spans, np.divmod(place, W), count, patches_at)
        values = stored.view(np.uint16).reshape(n, W, layout.stored)
        rows: np.ndarray | slice = slice(None) if n == len(batch.tokens) else at
        full, cut = L // K, L % K
        grid = batch.tokens[:, : full * K].reshape(-1, full, K)
        for first, column, width in layout.stored_blocks:
            grid[rows, :, column : column + width] = values[:, :full, first : first + width]
            if cut > column:
                last = values[:, full, first : first + min(width, cut - column)]
                batch.tokens[rows, full * K + column : full * K + column + last.shape[1]] = last
        if part.fresh[spans].any():
            fresh = part.fresh[spans]
            begun, behind = at[place[fresh] // W], place[fresh] % W * K
            batch.supervised[begun, behind] = False
            for row, token in zip(begun.tolist(), behind.tolist()):
                batch.segments[row, token:] += 1
        if layout.text and layout.action:
            batch.supervised[at] &= np.tile(layout.roles != TEXT, W)[:L] | (batch.tokens[at] != self.padding)

    def _fill_patches(
        self,
        batch: Batch,
        part: Part,
        spans: slice,
        where: tuple[np.ndarray, np.ndarray],
        count: np.ndarray,
        patches_at: np.ndarray,
    ) -> None:
        """Copy the pixels of spans, which begin at timestep where[1] of sequence where[0]."""
        P, M, size = self.layout.patches, len(self.patch_index), PATCH_SIZE**2 * self.layout.channels
        sequence, place = where
        shown = np.minimum(count * P, M - place * P)  # the last timestep may be cut
        target = patches_at[sequence] + place * P
        if batch.patches.shape[3] == self.layout.channels:
            self._copy(part, part.patches, spans, target * size, shown * size, batch.patches.reshape(-1))
            return
        grey = np.empty(int((target + shown).max()) * size, np.uint8)
        self._copy(part, part.patches, spans, target * size, shown * size, grey)
        for first in patches_at.tolist():
            batch.patches[first : first + M] = grey[first * size : (first + M) * size].reshape(M, *PATCH, -1)

    def _copy(
        self, part: Part, sources: np.ndarray, spans: slice, target: np.ndarray, length: np.ndarray, out: np.ndarray
    ) -> None:
        """Copy bytes of shards, from `sources` of a part's spans on, to `out`, one shard after the other."""
        order = np.argsort(part.shard[spans], kind="stable")
        current, data = -1, out
        for number, source, first, size in zip(
            part.shard[spans][order].tolist(),
            sources[spans][order].tolist(),
            target[order].tolist(),
            length[order].tolist(),
        ):
            if number != current:
                current, data = number, self.dataset.mapped(number)
            piece = data[source : source + size]
            if len(piece) < size:
                name = self.dataset.place.path(self.dataset.shard(number).name)
                raise BadShard(f"{name}: the index points behind its end; rebuild it", self.dataset, number)
            out[first : first + size] = piece
