"""Observation fields under other names than the log's, such as those of the environment in which a task is played.

--rename OLD=NEW ... -> Renamed(source): scan with fields NEW, and read with them; OLD= leaves a field out

Invariant: values are the source's own; only keys change.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium

import simulators
from etl.sources import EpisodeRef, Known, LogWriter, Rejection, Source, SourceError, TaskScan
from schemas.episode import Document, RawEpisode, TaskSpec


def names_of(rename: Iterable[str]) -> dict[str, str]:
    """OLD -> NEW of 'OLD=NEW'; ValueError for what is none, and where two would have one name."""
    names: dict[str, str] = {}
    for one in rename:
        old, sign, new = one.partition("=")
        if not old or not sign or old in names:
            raise ValueError(f"--rename {one}: give OLD=NEW, once for each observation field, or OLD= to leave it out")
        names[old] = new
    kept = [new for new in names.values() if new]
    if len(set(kept)) < len(kept):
        raise ValueError(f"--rename {' '.join(rename)}: two fields would have one name")
    return names


def with_names(source: Source, rename: Iterable[str]) -> Source:
    """The source, with the fields of its tasks renamed where `rename` asks for it."""
    names = names_of(rename)
    return Renamed(source, names) if names else source


class Renamed:
    """A source whose fields have other names."""

    def __init__(self, source: Source, names: dict[str, str]):
        self.source, self.names, self.old = source, names, {new: old for old, new in names.items() if new}
        self.name, self.default_dataset = source.name, source.default_dataset
        self.options: type[Any] = source.options
        self.writer: type[LogWriter] | None = source.writer

    def known(self, cache: Path) -> list[Known]:
        return self.source.known(cache)

    def recognise(self, input: Path) -> Any:
        return self.source.recognise(input)

    def resolve(self, input: Path | None, dataset: str | None, cache: Path) -> list[Path]:
        return self.source.resolve(input, dataset, cache)

    def parts(self, file: str) -> list[Path]:
        return self.source.parts(file)

    def scan(self, files: list[Path], options: Any) -> list[TaskScan]:
        """As the source's, with each field under its new name. SourceError for a name that no task has, and where a
        task would have two fields of one name or none."""
        scans = self.source.scan(files, options)
        known = {spec.key for scan in scans if scan.task for spec in scan.task.observation}
        if known and (unknown := sorted(set(self.names) - known)):
            raise SourceError(f"--rename {unknown[0]}=: no observation field is called so; there are "
                              f"{', '.join(sorted(known))}")  # fmt: skip
        return [replace(scan, task=self._task(scan.task)) if scan.task else scan for scan in scans]

    def read(self, task: TaskSpec, refs: Iterable[EpisodeRef]) -> Iterator[RawEpisode | Document | Rejection]:
        """As the source's, for a task of `scan` or some of its fields."""
        keys = {spec.key: self.old.get(spec.key, spec.key) for spec in task.observation}
        fields = tuple(replace(spec, key=keys[spec.key]) for spec in task.observation)
        for found in self.source.read(replace(task, observation=fields), refs):
            if isinstance(found, RawEpisode):
                given = found.observation
                found = replace(found, observation={n: given[old] for n, old in keys.items() if old in given})
            yield found

    def _task(self, task: TaskSpec) -> TaskSpec:
        if task.action is None:
            raise SourceError(f"--rename: task '{task.name}' is not of a simulator; leave the option out")
        fields = [replace(spec, key=new) for spec in task.observation if (new := self.names.get(spec.key, spec.key))]
        keys = [spec.key for spec in fields]
        if not keys or len(set(keys)) < len(keys):
            what = f"two fields called '{max(keys, key=keys.count)}'" if keys else "no field"
            raise SourceError(f"--rename {' '.join(f'{a}={b}' for a, b in self.names.items())}: task '{task.name}' "
                              f"would have {what}")  # fmt: skip
        return replace(task, observation=tuple(fields))


def unlike_environment(task: TaskSpec) -> str | None:
    """A line where a task cannot be played in its environment because their fields have other names or shapes, with the
    --rename that may mend it; None where they agree, or the environment cannot be made here."""
    if task.environment is None or task.action is None:
        return None
    try:
        env: gymnasium.Env = simulators.make(task.environment)
    except (simulators.SimulatorError, ValueError):
        return None
    try:
        theirs = {s.key: (s.kind, () if s.kind == "text" else s.shape) for s in simulators.observation_fields(env)}
    except (simulators.SimulatorError, ValueError):
        return None
    finally:
        env.close()
    ours = {s.key: (s.kind, () if s.kind == "text" else s.shape) for s in task.observation}
    if ours == theirs:
        return None
    missing = {key: about for key, about in theirs.items() if ours.get(key) != about}
    spare = {key: about for key, about in ours.items() if theirs.get(key) != about}
    pairs = []
    for old, about in sorted(spare.items()):
        new = next((key for key, other in sorted(missing.items()) if other == about), "")
        missing.pop(new, None)
        pairs.append(f"{old}={new}")
    lists = [", ".join(f"{key} {kind} {shape}" for key, (kind, shape) in sorted(of.items())) for of in (ours, theirs)]
    mend = f"--rename {' '.join(pairs)} makes them agree" if not missing else "record it with the environment's fields"
    return f"fields are {lists[0]}; {task.environment.id} has {lists[1]}, so it cannot be played there: {mend}"
