"""Windows of timesteps -> token sequences of exactly L tokens.

A task's timesteps lie on a circle, episode after episode. An epoch cuts the circle
at a random phase into windows of W = ceil(L / K) timesteps; a window is a regular
(W, K) grid, filled from the mapped arrays, flattened and cut at L. Where an episode
ends inside the window the next one follows with its own segment number. A prompt,
where one is drawn, takes the first timesteps of the grid and shares the segment of
the episode behind it (paper §2.2).

Invariant: an epoch shows every timestep at least once, fewer than W of them twice;
loss falls only on text and action tokens that have a predecessor in their segment, and not on a text's padding.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from schemas.layout import ACTION, PATCH_SIZE, SEPARATOR, TEXT, TimestepLayout
from shards.batch import Batch
from shards.reader import Dataset


@dataclass(frozen=True)
class Piece:
    """Timesteps [start, stop) of index row `row`, in segment `segment`."""

    row: int
    start: int
    stop: int
    segment: int


class Timeline:
    """One task's episodes of one split (training or held out), end to end on a circle."""

    def __init__(self, dataset: Dataset, task: int, held_out: bool, sequence_length: int):
        self.dataset, self.task = dataset, task
        self.layout: TimestepLayout = dataset.layouts[task]
        self.rows = dataset.rows(task, held_out)
        lengths = dataset.column("timesteps")[self.rows].astype(np.int64)
        self.ends = np.cumsum(lengths)
        self.starts = self.ends - lengths
        self.episodes = dataset.column("episode")[self.rows]
        self.total = int(lengths.sum())
        self.sequence_length = sequence_length
        text = dataset.manifest.text_model
        self.padding = text.padding if text else -1
        self.width = -(-sequence_length // self.layout.length)
        self.windows = -(-self.total // self.width)

    @property
    def name(self) -> str:
        return self.dataset.manifest.tasks[self.task].spec.name

    def pieces(self, first: int, count: int) -> list[Piece]:
        """`count` timesteps from circle position `first` on, cut at episode ends and at the circle's seam."""
        found: list[Piece] = []
        position = first % self.total
        place = int(np.searchsorted(self.ends, position, side="right"))
        segment = 0
        while count:
            offset = position - int(self.starts[place])
            taken = min(count, int(self.ends[place]) - position)
            found.append(Piece(int(self.rows[place]), offset, offset + taken, segment))
            count -= taken
            previous, place = place, (place + 1) % len(self.rows)
            position = int(self.starts[place])
            segment += int(self.episodes[place] != self.episodes[previous] or place <= previous)
        return found

    def prompt(self, body: Piece, length: int, from_end: bool, rng: np.random.Generator) -> list[Piece]:
        """A run of at most `length` timesteps of another episode of this task: its end, or from anywhere.
        None where the task has no other episode."""
        own = self.dataset.column("episode")[body.row]
        others = len(np.unique(self.episodes)) - 1
        if others < 1:
            return []
        place = int(rng.integers(len(self.rows)))
        while self.episodes[place] == own:
            place = (place + 1) % len(self.rows)
        if from_end:
            while place + 1 < len(self.rows) and self.episodes[place + 1] == self.episodes[place]:
                place += 1
        T = int(self.ends[place] - self.starts[place])
        length = min(length, T)
        start = T - length if from_end else int(rng.integers(T - length + 1))
        return [Piece(int(self.rows[place]), start, start + length, body.segment)]

    def sequence(
        self,
        i: int,
        body: list[Piece],
        prompt: list[Piece],
        patch_rng: np.random.Generator | None,
        prompt_loss: bool,
        separator: int,
    ) -> Batch:
        """One sequence as a batch of one. `patch_rng` draws patch positions; None takes the intervals' means."""
        layout, W, L = self.layout, self.width, self.sequence_length
        pieces = [*prompt, *body]
        counts = [piece.stop - piece.start for piece in pieces]
        used = sum(counts)
        grid = np.zeros((W, layout.length), np.int32)
        stored = [self.dataset.tokens(piece.row)[piece.start : piece.stop] for piece in pieces]
        grid[:used, layout.stored_columns] = np.concatenate(stored)
        grid[:, layout.roles == SEPARATOR] = separator
        segments = np.full((W, layout.length), -1, np.int16)
        segments[:used] = np.repeat([piece.segment for piece in pieces], counts)[:, None]
        roles = np.tile(layout.roles, W)[:L]
        supervised = np.isin(roles, (TEXT, ACTION))
        if layout.text and layout.action:
            supervised &= (roles != TEXT) | (grid.reshape(-1)[:L] != self.padding)
        flat = segments.reshape(-1)[:L]
        supervised &= flat >= 0
        supervised[1:] &= flat[1:] == flat[:-1]
        supervised[0] = False
        if not prompt_loss:
            supervised[: sum(counts[: len(prompt)]) * layout.length] = False
        patches, index, positions = self._patches(pieces, used, patch_rng)
        return Batch(
            tokens=grid.reshape(1, -1)[:, :L],
            roles=np.where(flat >= 0, roles, 0).astype(np.uint8)[None],
            positions=np.tile(layout.local_positions, W)[None, :L],
            segments=flat[None],
            supervised=supervised[None],
            patches=patches,
            patch_index=index,
            patch_positions=positions,
            tasks=np.array([self.task], np.int64),
            sequence=np.array([i], np.int64),
        )

    def _patches(
        self, pieces: list[Piece], used: int, rng: np.random.Generator | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        layout = self.layout
        if not layout.patches:
            return np.empty((0, PATCH_SIZE, PATCH_SIZE, 1), np.uint8), np.empty(0, np.int64), np.empty((0, 2), np.int64)
        pixels = np.concatenate([self.dataset.patches(p.row)[p.start : p.stop] for p in pieces])
        pixels = pixels.reshape(-1, *pixels.shape[2:])
        index = (np.arange(used)[:, None] * layout.length + layout.patch_slots).reshape(-1)
        if rng is None:
            positions = np.tile(layout.patch_centres, (used, 1))
        else:
            low, high = layout.patch_intervals[..., 0], layout.patch_intervals[..., 1]
            positions = rng.integers(low, high, (used, *low.shape)).reshape(-1, 2)
        keep = index < self.sequence_length
        return pixels[keep], index[keep], positions[keep]
