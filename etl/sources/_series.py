"""Numbered files of one episode each are one task: episode_0.hdf5, episode_1.hdf5, ...

paths -> `numbered`: task name -> files of one folder and name, by number -> a TaskScan each -> `merged` -> one TaskScan

Invariant: files are one task only if each of those that can be read holds one episode, of the same fields and the same
kind of actions. Their order is that of their numbers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from etl.sources import TaskScan
from schemas.task import ActionSpec, TaskSpec

NUMBERED = re.compile(r"(.*?)[-_. ]*(\d+)")
VERSION = re.compile(r".*[-_.]v\d+(\.\d+)*")  # the number is a version, as in hopper-medium-v2
COMMON = {"", "data", "demo", "ep", "episode", "file", "log", "rollout", "run", "traj", "trajectory"}


def numbered(files: Iterable[Path]) -> dict[str, list[Path]]:
    """Name of the task -> at least two files of one folder whose names differ in their number alone, in its order. The
    name is theirs, or the folder's where theirs says nothing. Of two series of one name, both keep their folder."""
    series: dict[tuple[Path, str], list[tuple[int, Path]]] = {}
    for path in files:
        match = NUMBERED.fullmatch(path.stem)
        if match and not VERSION.fullmatch(path.stem):
            series.setdefault((path.parent, match[1]), []).append((int(match[2]), path))
    found: dict[str, list[Path]] = {}
    for (folder, stem), members in sorted(series.items()):
        if len(members) > 1:
            name = folder.name if stem.lower() in COMMON else stem
            name = f"{folder.name}-{name}" if name in found else name
            found[name if name not in found else f"{folder.parent.name}-{name}"] = [path for _, path in sorted(members)]
    return found


def merged(name: str, scans: Mapping[Path, TaskScan]) -> TaskScan | None:
    """One task of the scans of its files, in their order; None where they are several tasks."""
    usable = [scan for scan in scans.values() if scan.task is not None]
    if len(usable) < 2 or any(len(scan.episodes) != 1 for scan in usable):
        return None
    tasks = [scan.task for scan in usable if scan.task is not None]
    first, action = tasks[0], _union([task.action for task in tasks])
    if action is None or any(
        (task.observation, task.environment) != (first.observation, first.environment) for task in tasks
    ):
        return None
    task: TaskSpec = replace(
        first, name=name, action=action, max_episode_steps=max(one.max_episode_steps for one in tasks)
    )
    note = f"{name}: {len(scans)} numbered files of one episode each are one task; --files tasks makes each file one"
    return TaskScan(
        task,
        tuple(scan.episodes[0] for scan in usable),
        tuple(one for scan in scans.values() for one in scan.rejected),
        warnings=_few(name, [line for scan in usable for line in scan.warnings]),
        notes=(note, *dict.fromkeys(line for scan in usable for line in scan.notes)),
    )


def _union(actions: list[ActionSpec | None]) -> ActionSpec | None:
    """The smallest space that holds all of them; None where they are of different kinds."""
    known = [action for action in actions if action is not None]
    if len(known) < len(actions) or len({(action.kind, action.size) for action in known}) != 1:
        return None
    size = known[0].size
    if known[0].kind == "continuous":
        low, high = (zip(*(getattr(one, side) for one in known)) for side in ("low", "high"))
        return ActionSpec.continuous([min(side) for side in low], [max(side) for side in high], size)
    starts = [min(column) for column in zip(*(one.start for one in known))]
    stops = [max(a + n for a, n in column) for column in zip(*(zip(one.start, one.choices) for one in known))]
    return ActionSpec.discrete([stop - start for start, stop in zip(starts, stops)], starts, size)


def _few(name: str, lines: list[str]) -> tuple[str, ...]:
    """The first of many warnings, and how many there are."""
    unique = list(dict.fromkeys(lines))
    more = (f"{name}: so in {len(lines) - 1} more of its files",) if len(lines) > 1 else ()
    return (*unique[:1], *more)
