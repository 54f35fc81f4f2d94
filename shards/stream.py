"""The stream: training sequence i of a mixture of datasets, a pure function.

    StreamConfig + datasets -> sampler: task, epoch, window -> timeline: spans of episodes -> Batch

The state of a run is the next i, an integer; `shards.loader` walks through i in order and ahead of the trainer.

Invariant: sequence i depends on the datasets' content, the configuration, the seed and i, and on which shards are
damaged where these are skipped: a sequence that touches one is drawn anew until it touches none.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from schemas.dataset import MANIFEST_NAME, TEXT_MODEL_NAME, DatasetError
from schemas.episode import STRICT
from schemas.vocabulary import Vocabulary
from shards.assembly import Spans, Timeline
from shards.batch import Batch, Memory
from shards.folder import Folder
from shards.reader import BadShard, Dataset, Store, Verify
from shards.sampler import Sampler, below, mixed, words

OnBadShard = Literal["stop", "skip"]
REDRAWS = 100
Draw = Callable[[np.ndarray], tuple[Spans, np.ndarray | None]]


@dataclass(frozen=True)
class StreamConfig:
    """How sequences are made. `weights`: task name -> mixture weight, 1 where not named."""

    __pydantic_config__ = STRICT

    sequence_length: int = 1024
    weights: dict[str, float] = field(default_factory=dict)
    mixture_block: int | None = None
    """Sequences in which the weights hold exactly; by default 256, or as many more as every task needs to have one."""
    working_set: int | None = None
    """Shards that a stretch of sequences is drawn from, shared among the tasks by weight; all where not given. For
    remote datasets larger than the cache."""
    prompt_probability: float = 0.25
    """Share of control sequences that start with a piece of another episode (paper §2.2)."""
    prompt_end_share: float = 0.5
    """Share of the prompts taken from an episode's end."""
    prompt_max_share: float = 0.5
    """Longest prompt, as a share of the window's timesteps; the length is drawn uniformly from 1 up to it."""
    prompt_loss: bool = True
    """Whether prompt tokens carry loss; the paper leaves it open."""


class Stream:
    """Sequences of all tasks of `folders`, training split or held-out split."""

    def __init__(
        self,
        folders: Sequence[Path | str],
        config: StreamConfig,
        seed: int,
        held_out: bool = False,
        verify: Verify = "auto",
        on_bad_shard: OnBadShard = "stop",
        store: Store | None = None,
    ):
        if not folders:
            raise DatasetError("no dataset given; build one with python -m etl.build and name its folder")
        self.store = store or Store()
        skip = on_bad_shard == "skip"
        datasets = [Dataset(folder, verify, self.store, skip) for folder in sorted(folders, key=str)]
        self.vocabulary: Vocabulary = datasets[0].manifest.vocabulary
        for dataset in datasets[1:]:
            self.vocabulary.require(dataset.manifest.vocabulary_fingerprint, str(dataset.place))
        models = {d.manifest.text_model.file.sha256: d.place for d in datasets if d.manifest.text_model}
        if len(models) > 1:
            raise DatasetError(
                f"{' and '.join(map(str, models.values()))} were made with different text models; rebuild all but one "
                f"with --text-model {next(iter(models.values()))}/{TEXT_MODEL_NAME}"
            )
        self.config, self.seed, self.held_out, self.datasets, self.skip = config, seed, held_out, datasets, skip
        self.redrawn = 0
        timelines = [
            Timeline(dataset, task, held_out, config.sequence_length)
            for dataset in datasets
            for task in range(len(dataset.manifest.tasks))
        ]
        self.timelines = [timeline for timeline in timelines if timeline.total]
        if not self.timelines:
            raise DatasetError(
                f"no {'held-out' if held_out else 'training'} episodes in {', '.join(map(str, folders))}"
            )
        self.tasks = [timeline.name for timeline in self.timelines]
        if len(set(self.tasks)) < len(self.tasks):
            twice = next(name for name in self.tasks if self.tasks.count(name) > 1)
            raise DatasetError(f"task '{twice}' is in more than one dataset folder; name only one of them")
        unknown = sorted(set(config.weights) - {timeline.name for timeline in timelines})
        if unknown:
            raise DatasetError(f"mixture weight for unknown task '{unknown[0]}'; tasks: {', '.join(self.tasks)}")
        self.sampler = self._sampler()
        self._check_cache()

    def _sampler(self) -> Sampler:
        config, windows = self.config, [timeline.windows for timeline in self.timelines]
        weights = [config.weights.get(name, 1.0) for name in self.tasks]
        if config.working_set is None:
            return Sampler(windows, weights, self.seed, config.mixture_block)
        if config.working_set < len(windows):
            raise DatasetError(f"--data.stream.working-set {config.working_set} is less than a shard for each of the "
                               f"{len(windows)} tasks; raise it")  # fmt: skip
        shards = [timeline.shards for timeline in self.timelines]
        runs = [max(1, -(-timeline.windows // count)) for timeline, count in zip(self.timelines, shards)]
        total = max(sum(weights), 1e-300)
        together = [max(1, int(config.working_set * weight / total)) for weight in weights]
        return Sampler(windows, weights, self.seed, config.mixture_block, runs, together)

    def _check_cache(self) -> None:
        """What remote datasets need at a time must fit into the cache: all of them, or two working sets, the last
        one's and the next one's."""
        limit, together = self.store.cache.limit, self.sampler.together
        remote = [n for n, timeline in enumerate(self.timelines) if timeline.dataset.place.local is None]
        needed = 0.0
        for n in remote:
            timeline = self.timelines[n]
            bytes_ = timeline.dataset.manifest.tasks[timeline.task].bytes
            needed += bytes_ if together is None else bytes_ * min(1.0, 2 * together[n] / timeline.shards)
        if needed > limit:
            remedy = "let fewer shards be used at a time by --data.stream.working-set"
            raise DatasetError(
                f"{self.store.cache.folder}: the remote datasets need {needed / 1e9:.3g} GB at a time, the cache may "
                f"have {limit / 1e9:.3g}; raise --data.cache.gigabytes, or {remedy}"
            )

    @property
    def fingerprint(self) -> str:
        """sha256 of all that decides sequence i; a resumed run must match it."""
        body = [[d.manifest.fingerprint for d in self.datasets], asdict(self.config), self.seed, self.held_out]
        return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()

    def sequence(self, i: int) -> Batch:
        """Training sequence i, a batch of one."""
        return self.batch(i, 1)

    def batch(self, first: int, count: int, memory: Memory | None = None) -> Batch:
        """Training sequences [first, first + count), in `memory` where it is given. BadShard where a shard that they
        need cannot be read, unless these are skipped."""
        i = np.arange(first, first + count)
        places = self.sampler.places(i)
        batch, patches_at = self._empty(places.task, memory)
        batch.sequence[:] = i
        for task in np.unique(places.task).tolist():
            at = np.flatnonzero(places.task == task)
            timeline, own = self.timelines[task], i[at]
            phase = below(words(self.seed, "phase", places.epoch[at], task), timeline.total)
            begin = (phase + places.window[at] * timeline.width) % timeline.total
            word = words(self.seed, "patch", own)
            draw = partial(self._spans, timeline, own, begin)
            self._fill(timeline, batch, at, patches_at[at], draw, word)
        return batch

    def _spans(
        self, timeline: Timeline, i: np.ndarray, begin: np.ndarray, redraw: np.ndarray
    ) -> tuple[Spans, np.ndarray | None]:
        """What sequences i of one task consist of, and how many timesteps of each carry no loss. `redraw`: how often
        each was drawn anew."""
        length, from_end, choice = self._prompts(timeline, i)
        if redraw.any():
            again = words(self.seed, "redraw", i, redraw)
            begin = np.where(redraw > 0, below(again, timeline.total), begin)
            choice = np.where(redraw > 0, mixed(choice, redraw), choice)
        a, b = timeline.prompts(begin, length, from_end, choice)
        return timeline.spans(begin, (a, b)), None if self.config.prompt_loss else b - a

    def _fill(
        self,
        timeline: Timeline,
        batch: Batch,
        at: np.ndarray,
        patches_at: np.ndarray,
        draw: Draw,
        word: np.ndarray | None,
    ) -> None:
        """Fill rows `at` (n,) of a batch. Where bad shards are skipped, the sequences that touch one are drawn anew."""
        redraw = np.zeros(len(at), np.int64)
        while True:
            spans, prompt = draw(redraw)
            try:
                timeline.fill(batch, at, patches_at, spans, prompt, self.vocabulary.separator, word)
                return
            except BadShard as error:
                if not self.skip:
                    raise
                bad = timeline.dataset.bad
                if error.shard not in bad:
                    print(f"skipping a bad shard: {error}", file=sys.stderr, flush=True)
                bad[error.shard] = str(error)
                shards = timeline.dataset.column("shard")[spans.row]
                touched = np.unique(spans.grid[np.isin(shards, list(bad))])
                self.redrawn += len(touched)
                redraw[touched] += 1
                if redraw.max() > REDRAWS:
                    raise DatasetError(f"task '{timeline.name}': too little of it can be read; {error}") from error

    def prefetch(self, first: int, count: int) -> None:
        """Bring the remote shards of sequences [first, first + count) into the cache. Bad ones are left to `batch`."""
        i = np.arange(first, first + count)
        places = self.sampler.places(i)
        for task in np.unique(places.task).tolist():
            at = np.flatnonzero(places.task == task)
            timeline = self.timelines[task]
            if timeline.dataset.place.local is None:
                phase = below(words(self.seed, "phase", places.epoch[at], task), timeline.total)
                begin = (phase + places.window[at] * timeline.width) % timeline.total
                spans, _ = self._spans(timeline, i[at], begin, np.zeros(len(at), np.int64))
                for number in np.unique(timeline.dataset.column("shard")[spans.row]).tolist():
                    timeline.dataset.prefetch(number)

    def evaluation_batch(self, task: int, windows: np.ndarray) -> Batch:
        """Windows (n,) of a task (modulo its count), no prompts, no phase, mean patch positions."""
        timeline = self.timelines[task]
        batch, patches_at = self._empty(np.full(len(windows), task))
        batch.sequence[:] = windows
        begin = (np.asarray(windows) % timeline.windows) * timeline.width

        def draw(redraw: np.ndarray) -> tuple[Spans, None]:
            again = below(words(self.seed, "redraw", windows, redraw), timeline.total)
            first = np.where(redraw > 0, again, begin)
            return timeline.spans(first, (first, first)), None

        self._fill(timeline, batch, np.arange(len(windows)), patches_at, draw, None)
        return batch

    def _prompts(self, timeline: Timeline, i: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Length in timesteps (0: none), whether from an episode's end, and the word that chooses, of sequences i."""
        asked, end, size, choice = (words(self.seed, "prompt", i, n) for n in range(4))
        longest = min(max(1, int(timeline.width * self.config.prompt_max_share)), timeline.width - 1)
        wanted = (_unit(asked) < self.config.prompt_probability) & bool(timeline.layout.action and longest)
        return np.where(wanted, 1 + below(size, longest), 0), _unit(end) < self.config.prompt_end_share, choice

    def _empty(self, task: np.ndarray, memory: Memory | None = None) -> tuple[Batch, np.ndarray]:
        """A batch to be filled with sequences of those tasks (n,), and where the patches of each begin (n,)."""
        patches = np.array([len(timeline.patch_index) for timeline in self.timelines])[task]
        channels = max((self.timelines[t].layout.channels for t in np.unique(task[patches > 0])), default=1)
        batch = Batch.empty(task, self.config.sequence_length, int(patches.sum()), channels, memory)
        return batch, np.cumsum(patches) - patches


def _unit(word: np.ndarray) -> np.ndarray:
    """Words to uniform float64 in [0, 1)."""
    return (word >> np.uint64(11)) * 2.0**-53


def find_datasets(root: Path | str) -> list[str]:
    """All finished datasets in a folder or URL, itself included, sorted."""
    folder = Folder(root)
    if folder.read(MANIFEST_NAME) is not None:
        return [str(root)]
    if folder.local is not None:
        return sorted(str(path.parent) for path in folder.local.glob(f"*/{MANIFEST_NAME}"))
    found = folder.store.glob(f"{folder.root}/*/{MANIFEST_NAME}")
    return sorted(f"{folder.place}/{path.rsplit('/', 2)[-2]}" for path in found)
