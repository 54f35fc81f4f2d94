"""The stream: training sequence i of a mixture of datasets, and batches of them in order.

    StreamConfig + dataset folders -> Stream.batch(first, count) -> Stream.batches(start, ...) -> Batch

Threads of the trainer's own process assemble ahead; order and content do not depend
on them. The state of a run is the next i, an integer.

Invariant: global batch n holds sequences [n G, (n + 1) G); a rank takes a contiguous
slice of it, so the same global batch is seen at any world size.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from schemas.dataset import TEXT_MODEL_NAME, DatasetError
from schemas.episode import STRICT
from schemas.vocabulary import Vocabulary
from shards.assembly import Timeline
from shards.batch import Batch
from shards.reader import Dataset, Verify
from shards.sampler import Sampler, below, words


@dataclass(frozen=True)
class StreamConfig:
    """How sequences are made. `weights`: task name -> mixture weight, 1 where not named."""

    __pydantic_config__ = STRICT

    sequence_length: int = 1024
    weights: dict[str, float] = field(default_factory=dict)
    mixture_block: int = 256
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
        self, folders: list[Path], config: StreamConfig, seed: int, held_out: bool = False, verify: Verify = "auto"
    ):
        if not folders:
            raise DatasetError("no dataset given; build one with python -m etl.build and name its folder")
        datasets = [Dataset(folder, verify) for folder in sorted(folders)]
        self.vocabulary: Vocabulary = datasets[0].manifest.vocabulary
        for dataset in datasets[1:]:
            self.vocabulary.require(dataset.manifest.vocabulary_fingerprint, str(dataset.folder))
        models = {d.manifest.text_model.file.sha256: d.folder for d in datasets if d.manifest.text_model}
        if len(models) > 1:
            raise DatasetError(
                f"{' and '.join(map(str, models.values()))} were made with different text models; rebuild all but one "
                f"with --text-model {next(iter(models.values()))}/{TEXT_MODEL_NAME}"
            )
        self.config, self.seed, self.held_out, self.datasets = config, seed, held_out, datasets
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
        twice = sorted({name for name in self.tasks if self.tasks.count(name) > 1})
        if twice:
            raise DatasetError(f"task '{twice[0]}' is in more than one dataset folder; name only one of them")
        unknown = sorted(set(config.weights) - {timeline.name for timeline in timelines})
        if unknown:
            raise DatasetError(f"mixture weight for unknown task '{unknown[0]}'; tasks: {', '.join(self.tasks)}")
        weights = [config.weights.get(name, 1.0) for name in self.tasks]
        self.sampler = Sampler([t.windows for t in self.timelines], weights, seed, config.mixture_block)

    @property
    def fingerprint(self) -> str:
        """sha256 of all that decides sequence i; a resumed run must match it."""
        body = [[d.manifest.fingerprint for d in self.datasets], asdict(self.config), self.seed, self.held_out]
        return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()

    def sequence(self, i: int) -> Batch:
        """Training sequence i, a batch of one."""
        return self.batch(i, 1)

    def batch(self, first: int, count: int) -> Batch:
        """Training sequences [first, first + count)."""
        i = np.arange(first, first + count)
        places = self.sampler.places(i)
        batch, patches_at = self._empty(places.task)
        batch.sequence[:] = i
        for task in np.unique(places.task).tolist():
            at = np.flatnonzero(places.task == task)
            timeline, own = self.timelines[task], i[at]
            phase = below(words(self.seed, "phase", places.epoch[at], task), timeline.total)
            begin = (phase + places.window[at] * timeline.width) % timeline.total
            prompts = timeline.prompts(begin, *self._prompts(timeline, own))
            without = None if self.config.prompt_loss else prompts[1] - prompts[0]
            spans, word = timeline.spans(begin, prompts), words(self.seed, "patch", own)
            timeline.fill(batch, at, patches_at[at], spans, without, self.vocabulary.separator, word)
        return batch

    def evaluation_batch(self, task: int, windows: np.ndarray) -> Batch:
        """Windows (n,) of a task (modulo its count), no prompts, no phase, mean patch positions."""
        timeline = self.timelines[task]
        batch, patches_at = self._empty(np.full(len(windows), task))
        batch.sequence[:] = windows
        begin = (np.asarray(windows) % timeline.windows) * timeline.width
        spans = timeline.spans(begin, (begin, begin))
        timeline.fill(batch, np.arange(len(windows)), patches_at, spans, None, self.vocabulary.separator, None)
        return batch

    def _prompts(self, timeline: Timeline, i: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Length in timesteps (0: none), whether from an episode's end, and the word that chooses, of sequences i."""
        asked, end, size, choice = (words(self.seed, "prompt", i, n) for n in range(4))
        longest = min(max(1, int(timeline.width * self.config.prompt_max_share)), timeline.width - 1)
        wanted = (_unit(asked) < self.config.prompt_probability) & bool(timeline.layout.action and longest)
        return np.where(wanted, 1 + below(size, longest), 0), _unit(end) < self.config.prompt_end_share, choice

    def _empty(self, task: np.ndarray) -> tuple[Batch, np.ndarray]:
        """A batch to be filled with sequences of those tasks (n,), and where the patches of each begin (n,)."""
        patches = np.array([len(timeline.patch_index) for timeline in self.timelines])[task]
        channels = max((self.timelines[t].layout.channels for t in np.unique(task[patches > 0])), default=1)
        batch = Batch.empty(task, self.config.sequence_length, int(patches.sum()), channels)
        return batch, np.cumsum(patches) - patches

    def batches(
        self, start: int, global_batch: int, micro_batch: int, rank: int = 0, world: int = 1, threads: int = 1
    ) -> Generator[list[Batch]]:
        """Endless steps from sequence `start` on: this rank's micro-batches of each global batch."""
        if global_batch % (world * micro_batch):
            raise ValueError(
                f"global batch {global_batch} is not a multiple of world size {world} x micro-batch {micro_batch}"
            )
        share = global_batch // world

        def step(first: int) -> list[Batch]:
            own = first + rank * share
            return [self.batch(own + offset, micro_batch) for offset in range(0, share, micro_batch)]

        with ThreadPoolExecutor(threads, "stream") as pool:
            ahead: deque[Future[list[Batch]]] = deque()
            try:
                while True:
                    while len(ahead) < threads + 1:
                        ahead.append(pool.submit(step, start))
                        start += global_batch
                    yield ahead.popleft().result()
            finally:
                for future in ahead:
                    future.cancel()


def _unit(word: np.ndarray) -> np.ndarray:
    """Words to uniform float64 in [0, 1)."""
    return (word >> np.uint64(11)) * 2.0**-53


def find_datasets(root: Path) -> list[Path]:
    """All finished dataset folders in `root`, itself included, sorted."""
    root = Path(root)
    if (root / "dataset.json").is_file():
        return [root]
    return sorted(path.parent for path in root.glob("*/dataset.json"))
