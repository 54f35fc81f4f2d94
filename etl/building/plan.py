"""What will be written, decided before anything is: a list of shards, each with its episodes.

scans -> tasks by name, episodes in log order -> cut into equal shards below the shard size -> items

An item is all that a worker needs, and plain JSON: it crosses to other processes and machines, and its digest
says whether a shard that already lies there was made by the same plan.

Invariant: the plan is a function of (scans, config), not of the runner, the clock or what is already written.
"""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from etl import sources
from etl.building.filters import Filter
from etl.sources import EpisodeRef, TaskScan
from schemas.layout import layout_of

Item = dict[str, Any]
SAMPLE_OVERHEAD = 4096  # tar and .npy headers, padding, meta.json


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
    filter: tyro.conf.OmitArgPrefixes[Filter] = field(default_factory=Filter)


def make_plan(
    source: str,
    scans: list[TaskScan],
    config: BuildConfig,
    text_model: str | None = None,
    origins: dict[str, str] | None = None,
) -> list[Item]:
    """Shards in order. `text_model`: sha256 of the SentencePiece model; `origins`: path -> address of each input
    file that was fetched from elsewhere, so that a worker on another machine can fetch it too."""
    plan: list[Item] = []
    for scan in sorted((s for s in scans if s.task and s.episodes), key=lambda s: s.task.name if s.task else ""):
        assert scan.task is not None
        bytes_each = _bytes_of_timestep(scan)
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
                {
                    "number": len(plan),
                    "source": source,
                    "task": asdict(scan.task),
                    "config": asdict(config),
                    "text_model": text_model if layout_of(scan.task).text else None,
                    "first_episode": first,
                    "files": files,
                    "refs": [[number_of_file[r.file], r.position, r.start, r.stop] for r in refs],
                    "stamps": [[str(part), *_stamp(part)] for part in parts],
                    "origins": {str(p): origins[str(p)] for p in parts if origins and str(p) in origins},
                }
            )
            first += len(refs)
    return plan


def _bytes_of_timestep(scan: TaskScan) -> float:
    task = scan.task
    assert task is not None
    if task.action is None:
        return 0.5  # a document's place is counted in bytes, some four of which make a token of two
    layout = layout_of(task)
    values = sum(int(np.prod(f.shape)) for f in task.observation if f.kind == "continuous")
    values += task.action.size if task.action.kind == "continuous" else 0
    return 2 * layout.stored + layout.patch_bytes + 4 + 4 * values


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def digest(item: Item) -> str:
    """sha256 of a plan item, 64 hex digits."""
    return hashlib.sha256(json.dumps(item, sort_keys=True).encode()).hexdigest()


def refs_of(item: Item) -> list[EpisodeRef]:
    """The episodes of an item."""
    return [EpisodeRef(item["files"][file], *place) for file, *place in item["refs"]]


def timesteps_of(item: Item) -> int:
    """Timesteps (of documents: bytes) that an item plans to write."""
    return sum(stop - start for _, _, start, stop in item["refs"])


def packed(item: Item) -> bytes:
    """The item for its way to a worker: some bytes an episode, since a pipeline's size is limited and runners copy
    it about."""
    return zlib.compress(json.dumps(item).encode())


def unpacked(data: bytes) -> Item:
    """The item that `packed` packed."""
    return json.loads(zlib.decompress(data))


def inputs_of(plan: list[Item]) -> list[list]:
    """[task, name, bytes] of every source file of a plan, sorted."""
    found = {(item["task"]["name"], Path(s[0]).name, s[1]) for item in plan for s in item["stamps"]}
    return [list(entry) for entry in sorted(found)]


def described(plan: list[Item], config: BuildConfig) -> dict[str, Any]:
    """What a manifest keeps of the options: equal for equal builds, whatever the machine."""
    tasks = sorted({json.dumps(item["task"], sort_keys=True) for item in plan})
    about = {"source": plan[0]["source"], "text_model": sorted({item["text_model"] or "" for item in plan})}
    about["tasks"] = hashlib.sha256("\n".join(tasks).encode()).hexdigest()
    return asdict(config) | about | {"inputs": inputs_of(plan)}
