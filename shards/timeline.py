"""Tasks' timesteps on circles: which timesteps fill a sequence, planned for many sequences of many tasks at once.

A task's timesteps form a circle, episode after episode. An epoch cuts the circle at a random phase into windows of
W = ceil(L / K) timesteps; a window is a regular (W, K) grid, cut at L tokens.
Where an episode ends inside the window the next one follows with its own segment number. A prompt, where one is drawn,
takes the first timesteps of the grid and shares the segment of the episode that follows (paper §2.2).

    runs (timesteps [a, b) of a circle) -> spans (runs cut at rows of the index), as places of bytes in shards

Each task's rows are searched once for all its sequences; what is left is done for all tasks together.

Invariant: the windows of an epoch hold every timestep at least once, fewer than W of them twice (a prompt
replaces a window's last timesteps, and where an episode's start is to follow it, that start replaces its first).

Shapes: n sequences, s spans, T tasks, W timesteps, K tokens per timestep, L tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np

from schemas.dataset import DatasetError
from schemas.layout import TimestepLayout
from schemas.task import TaskSpec
from shards.reader import Dataset
from shards.sampler import fold_in, uniform_below

Groups = list[tuple[int, np.ndarray]]
COLUMNS = "split_stop", "timesteps", "split_episode", "shard", "tokens_offset", "patches_offset"


class Timeline:
    """One task's episodes of one split (training or held out), end to end on a circle; or its first `episodes`."""

    def __init__(self, dataset: Dataset, task: int, held_out: bool, sequence_length: int, episodes: int = 0):
        self.dataset, self.task = dataset, task
        self.layout: TimestepLayout = dataset.layouts[task]
        self.total, self.count = dataset.manifest.tasks[task].split(held_out)
        self.first, self.stop = dataset.span(task, held_out)
        if 0 < episodes < self.count:
            self.stop = self.first + int(self.column("split_episode").searchsorted(episodes))
            self.total, self.count = int(self.column("split_stop")[-1]), episodes
        self.pieces = self.stop - self.first
        self.width = -(-sequence_length // self.layout.length)
        self.windows = -(-self.total // self.width)
        text = dataset.manifest.text_model
        self.padding = text.padding if text else -1

    def column(self, name: str) -> np.ndarray:
        """An index column of its rows (pieces,), mapped. `split_stop`: circle position after each row;
        `split_episode`: ordinal of its episode."""
        return self.dataset.column(name)[self.first : self.stop]

    @property
    def shards(self) -> int:
        """Number of shards that its rows are in, about."""
        numbers = self.column("shard")
        return int(abs(numbers[-1] - numbers[0])) + 1

    @property
    def spec(self) -> TaskSpec:
        return self.dataset.manifest.tasks[self.task].spec

    @property
    def name(self) -> str:
        return self.spec.name


@dataclass(frozen=True)
class Spans:
    """Places that n sequences are copied from. All arrays int64 but the last two.

    first (n + 1,): each sequence's first span. Of each span (s,), ordered by sequence and place: its sequence; its
    shard; the first byte of its tokens and of its patches there; timesteps; the first one in the sequence's grid;
    whether it begins another segment; the return of its episode, float64."""

    first: np.ndarray
    sequence: np.ndarray
    shard: np.ndarray
    tokens: np.ndarray
    patches: np.ndarray
    count: np.ndarray
    place: np.ndarray
    starts_segment: np.ndarray
    episode_return: np.ndarray


class TimelineTable:
    """The circles of T tasks. `task` (n,) is the task of each sequence; rows are those of its dataset's index."""

    def __init__(self, timelines: Sequence[Timeline]):
        self.timelines = timelines
        self.datasets = list(dict.fromkeys(timeline.dataset for timeline in timelines))
        number = {dataset: n for n, dataset in enumerate(self.datasets)}
        facts = [(t.total, t.count, t.first, t.pieces, t.width, number[t.dataset]) for t in timelines]
        self.total, self.count, self.first, self.pieces, self.width, self.dataset_of_task = np.array(facts).T
        sizes = [(2 * t.layout.stored, t.layout.patch_bytes) for t in timelines]
        self.token_bytes, self.patch_bytes = np.array(sizes).T  # per timestep

    def search(
        self, name: str, groups: Groups, values: np.ndarray, side: Literal["left", "right"] = "right"
    ) -> np.ndarray:
        """Rows (n,) int64 at which values (n,) belong in a column that ascends within a task."""
        found = np.empty(len(values), np.int64)
        for task, at in groups:
            timeline = self.timelines[task]
            found[at] = timeline.first + timeline.column(name).searchsorted(values[at], side)
        return found

    def take(self, names: Sequence[str], task: np.ndarray, row: np.ndarray, dtype: type = np.int64) -> np.ndarray:
        """Columns of rows (n,), of `dtype` (names, n)."""
        found: np.ndarray = np.empty((len(names), len(row)), dtype)
        for number, at in group_indices(self.dataset_of_task[task]):
            own, dataset = row[at], self.datasets[number]
            for values, name in zip(found, names):
                values[at] = dataset.column(name)[own]
        return found

    def prompts(
        self,
        task: np.ndarray,
        first: np.ndarray,
        length: np.ndarray,
        from_end: np.ndarray,
        word: np.ndarray,
        near: np.ndarray | None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Circle positions [a, b) of prompts for windows that begin at `first` (n,): at most `length` timesteps of
        another episode than the window's first, its end or from anywhere; a = b where length is 0 or there is none.
        The episode is any, all alike, or where positions `near` (n,) are given, the one there or the next."""
        a, b = np.zeros((2, len(first)), np.int64)
        drawn = np.flatnonzero((length > 0) & (self.count[task] > 1))
        task, word = task[drawn], word[drawn]
        groups, count = group_indices(task), self.count[task]
        own = self._episode(task, groups, first[drawn])
        if near is None:
            other = uniform_below(word, count - 1)
            other += other >= own
        else:
            other = self._episode(task, groups, near[drawn])
            other += other == own
            other[other == count] = 0
        after = self.search("split_episode", groups, other)
        start, stop = self._start(task, groups, other), self.take(("split_stop",), task, after - 1)[0]
        taken = np.minimum(length[drawn], stop - start)
        anywhere = start + uniform_below(fold_in(word, 0), stop - start - taken + 1)
        a[drawn] = np.where(from_end[drawn], stop - taken, anywhere)
        b[drawn] = a[drawn] + taken
        return a, b

    def starts(self, task: np.ndarray, position: np.ndarray) -> np.ndarray:
        """Circle positions (n,) at which the episodes that hold `position` (n,) start."""
        groups = group_indices(task)
        return self._start(task, groups, self._episode(task, groups, position))

    def _start(self, task: np.ndarray, groups: Groups, episode: np.ndarray) -> np.ndarray:
        row = self.search("split_episode", groups, episode, "left")
        stop, timesteps = self.take(("split_stop", "timesteps"), task, row)
        return stop - timesteps

    def _episode(self, task: np.ndarray, groups: Groups, position: np.ndarray) -> np.ndarray:
        row = self.search("split_stop", groups, position % self.total[task])
        return self.take(("split_episode",), task, row)[0]

    def spans(self, task: np.ndarray, first: np.ndarray, prompt: tuple[np.ndarray, np.ndarray]) -> Spans:
        """Spans that fill the grids of windows from circle positions `first` (n,) on, after their prompts [a, b)."""
        n, taken = len(first), prompt[1] - prompt[0]
        a, b, place = np.zeros((3, 2 * n), np.int64)  # runs: each grid's prompt, then its body
        a[::2], a[1::2] = prompt[0], first
        b[::2], b[1::2] = prompt[1], first + self.width[task] - taken
        place[1::2] = taken
        runs = np.flatnonzero(b > a)
        a, b, place, sequence = a[runs], b[runs], place[runs], runs // 2
        task = task[sequence]
        total, pieces = self.total[task], self.pieces[task]
        lap, within = np.divmod(a, total)
        row = self.search("split_stop", group_indices(task), within)
        low = lap * pieces + row  # rows are counted on from lap to lap
        high = low.copy()
        further = np.flatnonzero(b > lap * total + self.take(("split_stop",), task, row)[0])
        lap, within = np.divmod(b[further] - 1, total[further])
        high[further] = lap * pieces[further] + self.search("split_stop", group_indices(task[further]), within)
        counts = high - low + 1
        run, begins = np.repeat(np.arange(len(runs)), counts), np.cumsum(counts) - counts
        task = task[run]
        lap, row = np.divmod((low - begins)[run] + np.arange(len(run)) - self.first[task], self.pieces[task])
        row += self.first[task]
        end, timesteps, episode, shard, tokens, patches = self.take(COLUMNS, task, row)
        lacking = (tokens < 0) | ((patches < 0) & (self.patch_bytes[task] > 0))
        if lacking.any():
            timeline = self.timelines[int(task[lacking.argmax()])]
            said = f"a sample of '{timeline.name}' lacks tokens or patches; rebuild it"
            raise DatasetError(f"{timeline.dataset.place}: {said}")
        end += lap * self.total[task]
        start = np.maximum(a[run], end - timesteps)
        inside, sequence = start - end + timesteps, sequence[run]
        # a prompt is of one episode, and so are the pieces of a long one; the body's first shares its segment
        starts_segment = np.zeros(len(run), bool)
        starts_segment[1:] = (run[1:] == run[:-1]) & ((episode[1:] != episode[:-1]) | (lap[1:] != lap[:-1]))
        return Spans(
            first=sequence.searchsorted(np.arange(n + 1)),
            sequence=sequence,
            shard=shard,
            tokens=tokens + inside * self.token_bytes[task],
            patches=patches + inside * self.patch_bytes[task],
            count=np.minimum(b[run], end) - start,
            place=place[run] + start - a[run],
            starts_segment=starts_segment,
            episode_return=self.take(("episode_return",), task, row, np.float64)[0],
        )


def group_indices(task: np.ndarray) -> Groups:
    """(task, its indices, ascending) for every task in an array (n,)."""
    order = np.argsort(task, kind="stable")
    ordered = task[order]
    edges = np.flatnonzero(ordered[1:] != ordered[:-1]) + 1
    return [(int(ordered[a]), order[a:b]) for a, b in pairwise([0, *edges.tolist(), len(task)]) if a < b]
