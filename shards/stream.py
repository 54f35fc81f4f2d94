"""The stream: training sequence i of a mixture of datasets, a pure function.

    StreamConfig + datasets -> sampler: task, epoch, window -> Plan: spans of episodes, as bytes -> copies -> Batch

The state of a run is the next i, an integer; `shards.loader` walks through i in order and ahead of the trainer.

Invariant: sequence i depends on the datasets' content, the configuration, the seed and i, and on which shards are
damaged where these are skipped: a sequence that touches one is drawn again until it touches none.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np

from schemas.dataset import MANIFEST_NAME, TEXT_MODEL_NAME, DatasetError, ReturnScale, return_scales
from schemas.episode import STRICT
from schemas.ranges import require
from schemas.vocabulary import Vocabulary
from shards.assembly import Assembly, Plan
from shards.batch import Batch, BufferPool
from shards.folder import Folder
from shards.mixture import task_weights
from shards.reader import BadShard, Dataset, Store, Verify, check
from shards.sampler import Sampler, fold_in, random_bits, uniform_below
from shards.tables import DRAWS
from shards.timeline import Timeline, TimelineTable

OnBadShard = Literal["stop", "skip"]
REDRAWS = 100


@dataclass(frozen=True)
class StreamConfig:
    """How sequences are made. `weights`: task name -> mixture weight, 1 where not named."""

    __pydantic_config__ = STRICT

    sequence_length: int = 1024
    tasks: tuple[str, ...] = ()
    """Only these tasks; all where none is named."""
    excluded_tasks: tuple[str, ...] = ()
    """None of these tasks: what is left of the mixture, so that they stay unseen."""
    demonstrations: int = 0
    """Only this many training episodes of each task, the first ones; 0: all."""
    weights: dict[str, float] = field(default_factory=dict)
    domains: dict[str, float] = field(default_factory=dict)
    """Domain (a simulators' suite, such as metaworld) -> its share of the mixture, whatever its number of tasks; 1
    where not named. Without any, every task counts by itself."""
    mixture_block: int | None = None
    """Sequences in which the weights hold exactly; by default 256, or as many more as every task needs to have one."""
    working_set: int | None = None
    """Shards that a stretch of sequences and their prompts are drawn from, shared among the tasks by weight; all where
    not given. For remote datasets larger than the cache."""
    prompt_probability: float = 0.25
    """Share of control sequences that start with a piece of another episode (paper §2.2)."""
    prompt_end_share: float = 0.5
    """Share of the prompts taken from an episode's end."""
    prompt_max_share: float = 0.5
    """Longest prompt, as a share of the window's timesteps; the length is drawn uniformly from 1 up to it."""
    prompt_start_share: float = 0.0
    """Share of the prompts that are followed by the start of an episode, as at play; the others by what the window
    holds (paper), which is hardly ever one."""
    prompt_loss: bool = True
    """Loss on prompt tokens too; the paper leaves it open."""
    text_loss: bool = True
    """Predict texts of timesteps that have actions too, such as instructions (paper), or only show them."""


class Stream:
    """Sequences of all tasks of `folders`, training split or held-out split."""

    def __init__(
        self,
        folders: Sequence[Path | str] | Path | str,
        config: StreamConfig,
        seed: int,
        held_out: bool = False,
        verify: Verify = "auto",
        on_bad_shard: OnBadShard = "stop",
        store: Store | None = None,
    ):
        folders = [folders] if isinstance(folders, str | Path) else list(folders)
        if not folders:
            raise DatasetError("no dataset given; build one with python -m etl.build and name its folder")
        _check_config(config, seed)
        self.store = store or Store()
        skip = on_bad_shard == "skip"
        datasets = [Dataset(folder, None, self.store, skip) for folder in sorted(folders, key=str)]
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
        check(datasets, verify)
        timelines = [
            Timeline(dataset, task, held_out, config.sequence_length, 0 if held_out else config.demonstrations)
            for dataset in datasets
            for task in range(len(dataset.manifest.tasks))
        ]
        known = sorted({timeline.name for timeline in timelines})
        for option, names in (("tasks", config.tasks), ("excluded-tasks", config.excluded_tasks)):
            if strange := sorted(set(names) - set(known)):
                raise DatasetError(f"--data.stream.{option}: unknown task '{strange[0]}'; tasks: {', '.join(known)}")
        chosen = set(config.tasks or known) - set(config.excluded_tasks)
        wanted = [timeline for timeline in timelines if timeline.total and timeline.name in chosen]
        # by name, so that the datasets' folders do not matter
        self.timelines = sorted(wanted, key=lambda timeline: timeline.name)
        if not self.timelines:
            raise DatasetError(
                f"no {'held-out' if held_out else 'training'} episodes in {', '.join(map(str, folders))}"
            )
        self.tasks, self.table = [timeline.name for timeline in self.timelines], TimelineTable(self.timelines)
        if twice := [name for name, following in pairwise(self.tasks) if name == following]:
            raise DatasetError(f"task '{twice[0]}' is in more than one dataset folder; name only one of them")
        unknown = sorted(set(config.weights) - set(known))
        if unknown:
            raise DatasetError(f"mixture weight for unknown task '{unknown[0]}'; tasks: {', '.join(self.tasks)}")
        domains = sorted({timeline.spec.domain for timeline in timelines})
        if unknown := sorted(set(config.domains) - set(domains)):
            raise DatasetError(f"--data.stream.domains: unknown domain '{unknown[0]}'; domains: {', '.join(domains)}")
        self.sampler = self._sampler()
        self._check_cache()

    def _sampler(self) -> Sampler:
        config, windows = self.config, [timeline.windows for timeline in self.timelines]
        weights = task_weights([timeline.spec for timeline in self.timelines], config.weights, config.domains)
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
        """Refuses a cache too small for what remote datasets need at a time: all of them, or two working sets, the last
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

    @cached_property
    def _assembly(self) -> Assembly:
        predicted = [self.predicts_text(timeline) for timeline in self.timelines]
        return Assembly(self.timelines, self.config.sequence_length, self.seed, self.return_scales, predicted)

    def predicts_text(self, timeline: Timeline) -> bool:
        """True if a task's text is a target."""
        return bool(timeline.layout.text) and (self.config.text_loss or not timeline.layout.action)

    @cached_property
    def return_scales(self) -> dict[str, ReturnScale]:
        """How returns are standardised, by task."""
        return return_scales([timeline.dataset.manifest.tasks[timeline.task] for timeline in self.timelines])

    @property
    def fingerprint(self) -> str:
        """sha256 of all that decides sequence i; a resumed run must match it."""
        chosen = {"tasks": sorted(self.config.tasks), "demonstrations": self.config.demonstrations}
        chosen |= {"excluded_tasks": sorted(self.config.excluded_tasks)}
        chosen |= {"prompt_start_share": self.config.prompt_start_share, "domains": self.config.domains}
        chosen |= {"text_loss": "" if self.config.text_loss else "none"}
        # defaults are left out: older checkpoints, made before these options existed, still resume
        config = {name: value for name, value in (asdict(self.config) | chosen).items() if value or name not in chosen}
        body = [sorted(d.manifest.fingerprint for d in self.datasets), config, self.seed, self.held_out]
        return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()

    def sequence(self, i: int) -> Batch:
        """Training sequence i, a batch of one."""
        return self.batch(i, 1)

    def batch(self, first: int, count: int) -> Batch:
        """Training sequences [first, first + count). BadShard where a shard that they need cannot be read, unless
        these are skipped."""
        return self.fill(self.plan(np.arange(first, first + count)), 0, count)[0]

    def evaluation_batch(self, task: int, windows: np.ndarray) -> Batch:
        """Windows (n,) of a task (modulo its count), no prompts, no phase, mean patch positions."""
        return self.fill(self._evaluation_plan(task, np.asarray(windows)), 0, len(windows))[0]

    def plan(self, i: np.ndarray, redraw: np.ndarray | None = None) -> Plan:
        """Sources of training sequences i (n,). `redraw` (n,): how often each was drawn again."""
        places, table = self.sampler.places(i), self.table
        task, redraw = places.task, np.zeros(len(i), np.int64) if redraw is None else redraw
        total, width = table.total[task], table.width[task]
        phase = uniform_below(random_bits(self.seed, "phase", places.epoch, task), total)
        begin = (phase + places.window * width) % total
        length, from_end, to_start, choice = self._prompts(i, self._longest[task])
        if redraw.any():
            drawn = uniform_below(random_bits(self.seed, "redraw", i, redraw), total)
            begin, choice = np.where(redraw > 0, drawn, begin), np.where(redraw > 0, fold_in(choice, redraw), choice)
        if to_start.any():
            begin[to_start] = table.starts(task[to_start], begin[to_start])
        near = (
            phase + self.sampler.neighbour_windows(places, fold_in(choice, 1)) * width
            if self.sampler.mixes_runs
            else None
        )
        prompt = table.prompts(task, begin, length, from_end, choice, near)
        silent = np.zeros(len(i), np.int64) if self.config.prompt_loss else prompt[1] - prompt[0]
        draws = uniform_below(random_bits(self.seed, "patch", i), DRAWS)
        return Plan(i, task, redraw, draws, silent, table.spans(task, begin, prompt), evaluation=False)

    def _evaluation_plan(self, task: int, windows: np.ndarray, redraw: np.ndarray | None = None) -> Plan:
        timeline, none = self.timelines[task], np.zeros(len(windows), np.int64)
        redraw = none if redraw is None else redraw
        drawn = uniform_below(random_bits(self.seed, "redraw", windows, redraw), timeline.total)
        begin = np.where(redraw > 0, drawn, (windows % timeline.windows) * timeline.width)
        spans = self.table.spans(none + task, begin, (begin, begin))
        return Plan(windows, none + task, redraw, none, none, spans, evaluation=True)

    def fill(self, plan: Plan, begin: int, end: int, buffers: BufferPool | None = None) -> tuple[Batch, int]:
        """Sequences [begin, end) of a plan, in `buffers` where it is given, and how many of them were drawn again."""
        buffers = buffers or BufferPool()
        while True:
            try:
                return self._assembly.batch(plan, begin, end, buffers), int((plan.redraw[begin:end] > 0).sum())
            except BadShard as error:
                if not self.skip:
                    raise
                plan = self._redrawn(plan, begin, end, error)
                begin, end = 0, end - begin

    def _redrawn(self, plan: Plan, begin: int, end: int, error: BadShard) -> Plan:
        """Another plan of sequences [begin, end), those that touch a bad shard drawn again."""
        if error.shard not in error.dataset.bad:
            print(f"skipping a bad shard: {error}", file=sys.stderr, flush=True)
            error.dataset.bad[error.shard] = str(error)
        theirs = np.array([timeline.dataset is error.dataset for timeline in self.timelines])
        bad = theirs[plan.task[plan.spans.sequence]] & np.isin(plan.spans.shard, list(error.dataset.bad))
        redraw = plan.redraw + np.logical_or.reduceat(bad, plan.spans.first[:-1])
        redraw = redraw[begin:end]
        if redraw.max() > REDRAWS:
            name = self.tasks[int(plan.task[begin + redraw.argmax()])]
            raise DatasetError(f"task '{name}': too little of it can be read; {error}") from error
        if plan.evaluation:
            return self._evaluation_plan(int(plan.task[0]), plan.i[begin:end], redraw)
        return self.plan(plan.i[begin:end], redraw)

    def prefetch(self, first: int, count: int) -> None:
        """Bring the remote shards of sequences [first, first + count) into the cache. Bad ones are left to `fill`."""
        plan = self.plan(np.arange(first, first + count))
        task = plan.task[plan.spans.sequence]
        for t, number in dict.fromkeys(zip(task.tolist(), plan.spans.shard.tolist())):
            dataset = self.timelines[t].dataset
            if dataset.place.local is None:
                dataset.prefetch(number)

    def _prompts(self, i: np.ndarray, longest: np.ndarray) -> tuple[np.ndarray, ...]:
        """Length in timesteps (0: none) up to `longest`, whether from an episode's end, whether an episode's start
        follows, and the random bits that choose the episode, of sequences i."""
        asked, end, size, choice, start = random_bits(self.seed, "prompt", i, np.arange(5)[:, None])
        wanted = (_unit(asked) < self.config.prompt_probability) & (longest > 0)
        to_start = wanted & (_unit(start) < self.config.prompt_start_share)
        from_end = _unit(end) < self.config.prompt_end_share
        return np.where(wanted, 1 + uniform_below(size, longest), 0), from_end, to_start, choice

    @cached_property
    def _longest(self) -> np.ndarray:
        """Timesteps of each task's longest prompt, int64 (T,)."""
        share = self.config.prompt_max_share
        longest = [min(max(1, int(t.width * share)), t.width - 1) if t.layout.action else 0 for t in self.timelines]
        return np.array(longest)


def _check_config(config: StreamConfig, seed: int) -> None:
    """ValueError names a setting that makes no sense."""
    shares = ("prompt_probability", "prompt_end_share", "prompt_max_share", "prompt_start_share")
    for name, least, most in (
        ("sequence_length", 2, 2**24),
        ("mixture_block", 1, 2**24),
        ("working_set", 1, 2**31),
        ("demonstrations", 0, 2**31),
        *((name, 0, 1) for name in shares),
    ):
        value = getattr(config, name)
        if value is not None:
            require(f"data.stream.{name}", value, least, most)
    require("seed", seed, 0, 2**63 - 1)


def _unit(word: np.ndarray) -> np.ndarray:
    """uint64 words to uniform float64 in [0, 1)."""
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
