"""Filters: the good episodes that a dataset keeps, by return, number and size; exact copies are rejected.

    scan -> copies out -> returns -> first episodes -> cap on timesteps -> scan with fewer episodes

Invariant: what stays is a function of the logs and the filters; nothing is drawn at random.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from etl.sources import EpisodeRef, Rejection, Source, SourceError, TaskScan
from schemas.episode import RawEpisode
from schemas.layout import ordered_fields
from schemas.task import TaskSpec

DUPLICATE = "duplicate"


@dataclass(frozen=True)
class Filter:
    """Episodes to keep of each task; all of them by default."""

    min_return: float | None = None
    """Keep episodes with at least this raw return."""
    expert_share: float | None = None
    """Keep episodes with at least this share of the expert's return (the paper's §3 takes 0.8): the highest mean
    return of a window of min(1000, N / 10) successive episodes of the task's N."""
    first_episodes: int | None = None
    """Keep only this many episodes of each task, the first that pass the filters by return."""
    max_timesteps: int | None = None
    """Keep episodes of each task up to this many timesteps in all."""
    keep_duplicates: bool = False
    """Keep exact copies of an episode; otherwise they are rejected."""


def apply(source: Source, scan: TaskScan, filter: Filter) -> TaskScan:
    """The scan with what the filter keeps; `filtered` counts the rest. SourceError where a filter by return meets
    episodes that have none."""
    if scan.task is None:
        return scan
    name = scan.task.name
    if not filter.keep_duplicates:
        scan = without_copies(source, scan)
    kept = list(scan.episodes)
    if (filter.min_return is not None or filter.expert_share is not None) and kept:
        totals = [ref.total for ref in kept]
        returns = np.array([np.nan if total is None else total for total in totals], np.float64)
        if all(total is None for total in totals):
            raise SourceError(f"task '{name}' has no rewards; leave out --min-return and --expert-share")
        lowest = -np.inf if filter.min_return is None else filter.min_return
        if filter.expert_share is not None:
            lowest = max(lowest, threshold(returns, filter.expert_share))
        # an episode whose return is NaN is damaged: reading it reports that
        kept = [ref for ref, value in zip(kept, returns) if not value < lowest]
    if filter.first_episodes is not None:
        kept = kept[: filter.first_episodes]
    if filter.max_timesteps is not None:
        sizes = np.cumsum([ref.timesteps for ref in kept])
        kept = kept[: int(np.searchsorted(sizes, filter.max_timesteps, side="right"))]
    return replace(scan, episodes=tuple(kept), filtered=len(scan.episodes) - len(kept))


def expert_return(returns: np.ndarray) -> float:
    """Paper §3: max over j of the mean of R_j ... R_(j+W-1), W = min(1000, 0.1 N), at least 1. returns: (N,)."""
    finite = returns[np.isfinite(returns)]
    if not len(finite):
        return float("-inf")
    window = max(1, int(min(1000, 0.1 * len(finite))))
    sums = np.concatenate([[0.0], np.cumsum(finite)])
    return float((sums[window:] - sums[:-window]).max() / window)


def threshold(returns: np.ndarray, share: float) -> float:
    """Lowest return kept: `share` of the expert's where that is positive. A negative expert's return is lowered by
    the same distance, (1 - share) of its size: 80 % of -10 means -12."""
    expert = expert_return(returns)
    return expert - (1.0 - share) * abs(expert)


def without_copies(source: Source, scan: TaskScan) -> TaskScan:
    """Exact copies become rejections that name the original. Only episodes equal in length and return are read and
    compared, first without their pictures, so that a log without copies costs next to nothing."""
    assert scan.task is not None
    alike = Counter((ref.timesteps, ref.total) for ref in scan.episodes if ref.total is not None)
    suspects = [ref for ref in scan.episodes if ref.total is not None and alike[ref.timesteps, ref.total] > 1]
    blind = replace(scan.task, observation=tuple(spec for spec in scan.task.observation if spec.kind != "image"))
    if suspects and blind != scan.task:
        suspects = _alike(source, blind, suspects)
    if not suspects:
        return scan
    first: dict[bytes, EpisodeRef] = {}
    copies: set[EpisodeRef] = set()
    rejected = list(scan.rejected)
    for ref, episode in zip(suspects, source.read(scan.task, suspects), strict=True):
        if isinstance(episode, RawEpisode):
            original = first.setdefault(_digest(episode, scan.task), ref)
            if original is not ref:
                copies.add(ref)
                why = f"a copy of episode {original.position} of {Path(original.file).name}; --keep-duplicates keeps it"
                rejected.append(Rejection(scan.task.name, episode.file, ref.position, ref.start, DUPLICATE, why))
    return replace(scan, episodes=tuple(ref for ref in scan.episodes if ref not in copies), rejected=tuple(rejected))


def _alike(source: Source, task: TaskSpec, refs: list[EpisodeRef]) -> list[EpisodeRef]:
    """Those of the episodes that another one equals in all fields of the task."""
    read = zip(refs, source.read(task, refs), strict=True)
    digests = {ref: _digest(episode, task) for ref, episode in read if isinstance(episode, RawEpisode)}
    counts = Counter(digests.values())
    return [ref for ref in refs if ref in digests and counts[digests[ref]] > 1]


def _digest(episode: RawEpisode, task: TaskSpec) -> bytes:
    digest = hashlib.sha256()
    observed = [episode.observation[spec.key] for spec in ordered_fields(task)]
    for array in (*observed, episode.action, episode.reward):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.digest()
