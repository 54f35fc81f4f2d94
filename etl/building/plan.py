"""The plan of a build, decided before anything is written: a list of shards, each with its episodes.

scans -> tasks by name, episodes in log order -> cut into equal shards below the shard size -> ShardPlans

A ShardPlan is all that a worker needs, and plain JSON: it crosses to other processes and machines, and its digest says
whether a shard that is already there was made by the same plan.

Invariant: the plan is a function of (scans, config), not of the runner, the clock or what is already written.
"""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from pydantic import TypeAdapter

from etl import sources
from etl.building.filters import Filter
from etl.sources import EpisodeRef, TaskScan
from schemas import upgrade
from schemas.layout import layout_of
from schemas.task import STRICT, TaskSpec
from schemas.vocabulary import FORMER_NAMES

SAMPLE_OVERHEAD = 4096  # bytes of tar and .npy headers, padding, meta.json


@dataclass(frozen=True)
class BuildConfig:
    """Options that shape a dataset's bytes; kept in its manifest."""

    vocabulary: str = "disjoint"
    """Token ids: disjoint, or the paper's own layout."""
    shard_megabytes: float = 64.0
    """About how large a shard may become; a task's shards are of about one size, and an episode is never split."""
    piece_timesteps: int = 1024
    """Longer episodes are stored in pieces of this many timesteps (documents in pieces of 64 times as many tokens)."""
    held_out_share: float = 0.05
    """Share of episodes, chosen by a hash of where they come from, that are never trained on; at least
    one of each task that has two."""
    image_size: tuple[int, int] | None = None
    """Height and width in pixels, multiples of 16, that all pictures are resized to; their own (the nearest multiples)
    where not given."""
    rename: tuple[str, ...] = ()
    """OLD=NEW: observation fields under other names, such as those of the environment they are to be played in; OLD=
    leaves one out."""
    frame_stack: int | None = None
    """Pictures are so many stacked frames, the oldest first: only the newest becomes tokens."""
    source_options: tyro.conf.Suppress[dict[str, Any]] = field(default_factory=dict)
    """The source's options that are not at their defaults; the build fills them in."""
    filter: tyro.conf.OmitArgPrefixes[Filter] = field(default_factory=Filter)

    def __post_init__(self) -> None:
        # equal builds have equal configurations, whichever name was given
        object.__setattr__(self, "vocabulary", FORMER_NAMES.get(self.vocabulary, self.vocabulary))


@dataclass(frozen=True)
class ShardPlan:
    """One shard to write: `number` among all shards, of episodes of one task.

    `text_model`: sha256 of the SentencePiece model, where the task holds text. `first_episode`: ordinal in the task of
    the shard's first. `files`: source files. `refs`: one (ordinal of its file, position, first row, row after the last,
    `EpisodeRef.end`) per episode. `stamps`: one (path, bytes, time of the last change in ns) per file that is read.
    `origins`: path -> address of each file that was fetched from elsewhere. `held_out`: one mark per episode, empty
    where the logs have none.
    """

    __pydantic_config__ = STRICT
    number: int
    source: str
    task: TaskSpec
    config: BuildConfig
    text_model: str | None
    first_episode: int
    files: tuple[str, ...]
    refs: tuple[tuple[int, int, int, int, str], ...]
    stamps: tuple[tuple[str, int, int], ...]
    origins: dict[str, str]
    held_out: tuple[bool | None, ...] = ()

    @property
    def episodes(self) -> list[EpisodeRef]:
        """Reference of each episode in the source files."""
        return [EpisodeRef(self.files[n], place, a, b, end=end) for n, place, a, b, end in self.refs]

    @property
    def timesteps(self) -> int:
        """Timesteps (of documents: bytes) that are to be written."""
        return sum(stop - start for _, _, start, stop, _ in self.refs)

    @cached_property
    def digest(self) -> str:
        """sha256 of the JSON form, 64 hex digits."""
        return hashlib.sha256(json.dumps(self._body(), sort_keys=True).encode()).hexdigest()

    def to_bytes(self) -> bytes:
        """The form that travels to a worker: a few bytes per episode, since a pipeline's size is limited and runners
        copy it about."""
        return zlib.compress(json.dumps(self._body()).encode())

    @staticmethod
    def from_bytes(data: bytes) -> ShardPlan:
        """Inverse of `to_bytes`."""
        return _PLAN.validate_json(zlib.decompress(data))

    def _body(self) -> dict[str, Any]:
        body = {one.name: getattr(self, one.name) for one in fields(self)}  # shallow: refs are many
        return body | {"task": asdict(self.task), "config": asdict(self.config)}


_PLAN: TypeAdapter[ShardPlan] = TypeAdapter(ShardPlan)


def make_plan(
    source: str,
    scans: list[TaskScan],
    config: BuildConfig,
    text_model: str | None = None,
    origins: dict[str, str] | None = None,
) -> list[ShardPlan]:
    """Shards in order. `text_model`: sha256 of the SentencePiece model; `origins`: path -> address of each input
    file that was fetched from elsewhere, so that a worker on another machine can fetch it too."""
    plan: list[ShardPlan] = []
    for scan in sorted((s for s in scans if s.task and s.episodes), key=lambda s: s.task.name if s.task else ""):
        assert scan.task is not None
        bytes_each = _bytes_of_timestep(scan.task)
        sizes = np.array([ref.timesteps * bytes_each + SAMPLE_OVERHEAD for ref in scan.episodes])
        count = max(1, math.ceil(sizes.sum() / (config.shard_megabytes * 2**20)))
        # of about one size, so that workers with equally many have equally much to do; by where its middle lies
        number_of = ((np.cumsum(sizes) - sizes / 2) / sizes.sum() * count).astype(int)
        first = 0
        for _, group in groupby(zip(number_of, scan.episodes), key=lambda pair: pair[0]):
            refs = [ref for _, ref in group]
            files = sorted({ref.file for ref in refs})
            number_of_file = {file: n for n, file in enumerate(files)}
            parts = sorted({part for file in files for part in sources.load(source).parts(file)})
            plan.append(
                ShardPlan(
                    number=len(plan),
                    source=source,
                    task=scan.task,
                    config=config,
                    text_model=text_model if layout_of(scan.task).text else None,
                    first_episode=first,
                    files=tuple(files),
                    refs=tuple((number_of_file[r.file], r.position, r.start, r.stop, r.end) for r in refs),
                    stamps=tuple((str(part), *_stamp(part)) for part in parts),
                    origins={str(p): origins[str(p)] for p in parts if origins and str(p) in origins},
                    held_out=() if all(r.held_out is None for r in refs) else tuple(r.held_out for r in refs),
                )
            )
            first += len(refs)
    return plan


def given_options(options: Any) -> dict[str, Any]:
    """The fields of a source's options that are not at their defaults, as JSON has them."""
    default = type(options)()
    changed = {one.name: getattr(options, one.name) for one in fields(options)}
    changed = {name: value for name, value in changed.items() if value != getattr(default, name)}
    return json.loads(json.dumps(changed, default=str))


def with_pictures(scan: TaskScan, config: BuildConfig) -> TaskScan:
    """The scan with the pictures of its task as the options say. ValueError where they do not fit."""
    if scan.task is None or (config.image_size is None and config.frame_stack is None):
        return scan
    observation = []
    for spec in scan.task.observation:
        if spec.kind == "image" and config.image_size is not None:
            spec = replace(spec, resized=config.image_size, fit="resize")
        if spec.kind == "image" and config.frame_stack is not None:
            spec = replace(spec, stack=config.frame_stack)
        observation.append(spec)
    return replace(scan, task=replace(scan.task, observation=tuple(observation)))


def _bytes_of_timestep(task: TaskSpec) -> float:
    layout = layout_of(task)
    if task.action is None:  # a document's place is counted in bytes, some four of which make a token of two
        return 2 * layout.stored + layout.patch_bytes if layout.captioned else 0.5
    values = sum(spec.size for spec in task.observation if spec.kind == "continuous")
    values += task.action.size if task.action.kind == "continuous" else 0
    return 2 * layout.stored + layout.patch_bytes + 4 + 4 * values


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def inputs_of(plan: list[ShardPlan]) -> list[list]:
    """[task, name, bytes] of every source file of a plan, sorted."""
    found = {(shard.task.name, Path(path).name, size) for shard in plan for path, size, _ in shard.stamps}
    return [list(entry) for entry in sorted(found)]


def manifest_config(plan: list[ShardPlan], config: BuildConfig) -> dict[str, Any]:
    """Options as the manifest keeps them: equal for equal builds on any machine."""
    about = {"source": plan[0].source, "text_model": sorted({shard.text_model or "" for shard in plan})}
    tasks = {shard.task.name: shard.task for shard in plan}
    about["tasks"] = upgrade.digest_of_tasks(map(asdict, tasks.values()))
    if keys := sorted({_named_keys(shard.source, file) for shard in plan for file in shard.files} - {""}):
        about["keys"] = keys
    if marks := [[shard.task.name, shard.first_episode, shard.held_out] for shard in plan if shard.held_out]:
        about["held_out"] = hashlib.sha256(json.dumps(marks).encode()).hexdigest()
    given = asdict(config)
    for name in ("image_size", "frame_stack", "source_options", "rename"):  # older manifests have none
        value = given.pop(name)
        given |= {name: list(value) if isinstance(value, tuple) else value} if value else {}
    return given | about | {"inputs": inputs_of(plan)}


def _named_keys(source: str, file: str) -> str:
    """The part of a ref's file after its path: the names that the user gave to a source's keys."""
    own = next(map(str, sources.load(source).parts(file)), file)  # a source in memory has no file
    return file.removeprefix(own) if file.startswith(own) else ""
