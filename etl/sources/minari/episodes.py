"""The scan of a Minari dataset's episodes: where they are, their actions, what is odd about their flags.

file of groups or Tables -> scan_episodes -> refs and rejections -> all_actions, odd_flags

Invariant: observations are not read; a damaged episode is a rejection of its own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from gymnasium import spaces

from etl.sources import EpisodeRef, Rejection
from etl.sources._numbers import as_float32
from etl.sources.minari import disk
from etl.sources.minari.disk import AGAIN, damage
from etl.sources.minari.tables import SUFFIXES, Episode, Tables
from schemas.episode import EpisodeError
from simulators import spaces as rules

FLAGS = ("terminations", "truncations")
FLAGS_SAMPLED = 64  # episodes whose flags are looked at by `scan`
MISSING_LISTED = 10_000  # groups that the metadata counts and the file lacks: beyond, one line for all
_EPISODE = re.compile(r"episode_(0|[1-9]\d{0,8})")


def scan_episodes(
    file: h5py.File | Tables, name: str, path: Path, counted: Any
) -> tuple[list[EpisodeRef], list[Rejection]]:
    """Episodes by number; those that the metadata counts and the file lacks are rejected."""
    numbers = {int(match[1]) for key in file if (match := _EPISODE.fullmatch(key))}
    count = counted if isinstance(counted, int) and counted >= 0 else max(numbers, default=-1) + 1
    missing = count - sum(number < count for number in numbers)
    refs: list[EpisodeRef] = []
    rejected: list[Rejection] = []
    if missing > MISSING_LISTED:
        error = EpisodeError("missing group", f"{missing} of {count} episodes are not in the file; {AGAIN}")
        rejected.append(rejection(name, path, -1, 0, error))
    elif missing:
        numbers |= set(range(count))
    if not numbers:
        raise EpisodeError("empty", f"no episode in the file; {AGAIN}")
    row = 0
    for number in sorted(numbers):
        try:
            with damage():
                group = disk.episode_group(file, number)
                values = as_float32(disk.column(group, "rewards"))
                counted_steps = group.attrs.get("total_steps")  # fewer where Minari put an episode together
                if isinstance(counted_steps, int | np.integer) and counted_steps > len(values):
                    detail = f"'rewards' has {len(values)} rows of the {counted_steps} that were recorded; {AGAIN}"
                    raise EpisodeError("wrong length", detail)
                with np.errstate(invalid="ignore"):
                    total = float(values.sum(dtype=np.float64))
        except EpisodeError as error:
            rejected.append(rejection(name, path, number, row, error))
            continue
        place = str(path if isinstance(group, h5py.Group) else group.path)
        refs.append(EpisodeRef(place, number, row, row + len(values), total if math.isfinite(total) else None))
        row += len(values)
    return refs, rejected


def all_actions(file: h5py.File | Tables, space: spaces.Space, refs: list[EpisodeRef]) -> Iterator[np.ndarray]:
    """Actions (T, ...) of all episodes but damaged ones, which become rejections when they are read."""
    for ref in refs:
        try:
            with damage():
                group, T = disk.episode_group(file, ref.position), ref.timesteps
                stored = disk.rows_of(group, ("actions",), space, T, T, math.prod(rules.shape_of(space)))
        except EpisodeError:
            continue
        yield stored.reshape(T, -1)


def odd_flags(
    file: h5py.File | Tables, refs: list[EpisodeRef], limit: int | None
) -> tuple[list[EpisodeRef], tuple[str, ...]]:
    """Warnings of episodes beyond the limit, of ends inside an episode and of none at all, by a sample of them. Where
    none has a flag at its end, those of the limit's length end by it."""
    warnings: tuple[str, ...] = ()
    long = [ref.timesteps for ref in refs if limit and ref.timesteps > limit]
    if long:
        line = f"{len(long)} of {len(refs)} episodes are longer than the limit of {limit:,} (up to {max(long):,} rows)"
        warnings += (f"{line}: they may be several, or give --max-episode-steps {max(long)}",)
    inside, ended, looked = 0, 0, 0
    for ref in refs[:: max(1, len(refs) // FLAGS_SAMPLED)]:
        try:
            with damage():
                group = disk.episode_group(file, ref.position)
                if isinstance(group, Episode):
                    group.load(FLAGS)
                flags = [disk.column(group, key, ref.timesteps) for key in FLAGS]
        except EpisodeError:
            continue
        looked += 1
        inside += any(values[:-1].any() for values in flags)
        ended += any(values[-1] for values in flags)
    if inside:
        line = f"{inside} of {looked} episodes looked at have terminations or truncations before their last row"
        warnings += (f"{line}: they are read to their last row; cut them there if they end there",)
    if looked and not ended:
        refs = [ref._replace(end="truncated") if ref.timesteps == limit else ref for ref in refs]
        cut = sum(not ref.end for ref in refs)
        line = f"none of {looked} episodes looked at has terminations or truncations set at its end"
        remedy = "set them, or give --max-episode-steps"
        warnings += (
            (f"{line}: {cut} of {len(refs)} count as cut by the log, without a return; {remedy}",) if cut else ()
        )
    return refs, warnings


def label_of(task: str, path: Path) -> str:
    """All files have one name: the task tells them apart, of a file per episode its folder too."""
    return f"{task}/{path.parent.name}/{path.name}" if path.suffix in SUFFIXES else f"{task}/{path.name}"


def rejection(task: str, path: Path, position: int, row: int, error: EpisodeError) -> Rejection:
    return Rejection(task, label_of(task, path), position, row, error.reason, error.detail)
