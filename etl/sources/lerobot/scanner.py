"""Places of a LeRobot dataset's episodes, and the task that they are.

meta/, data/**/*.parquet -> TaskScan: fields, actions, an EpisodeRef each; what the metadata has and the data lacks

Invariant: an episode is where its rows are, whatever the metadata says of them; one whose length differs is rejected.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from etl.sources import EpisodeRef, Rejection, TaskScan, environment_warnings
from etl.sources.lerobot import metadata, table
from etl.sources.lerobot.fields import Options, action_space, fields_of
from etl.sources.lerobot.metadata import AGAIN, INFO, Dataset
from schemas.episode import EpisodeError, TaskSpec
from schemas.layout import layout_of
from simulators.registry import environment, suite_of_id

SOURCE_NAME = "lerobot"
MISSING_LISTED = 10_000  # episodes of the metadata that the data lacks: beyond, one line for all


def scan_dataset(name: str, root: Path, options: Options) -> list[TaskScan]:
    try:
        dataset = metadata.load(root)
        fields, notes = fields_of(dataset, options)
        paths = metadata.tables(root / "data")
        if not paths:
            raise EpisodeError("missing file", f"no Parquet file in data; {AGAIN}")
        refs, tasks, rejected = _scan_rows(name, dataset, paths)
        action, more = action_space(dataset, paths, options)
        spec = environment(options.environment) if options.environment else None
        limit = options.max_episode_steps or (suite_of_id(spec.id).time_limit(spec.id) if spec else None)
        longest = max((ref.timesteps for ref in refs), default=1)
        task = TaskSpec(name, SOURCE_NAME, fields, action, spec, None, limit or longest)
        try:
            layout_of(task)
        except ValueError as error:
            raise EpisodeError("unsupported space", str(error)) from None
        instructions = dataset.instructions if options.task_per_instruction else {}
    except EpisodeError as error:
        return [TaskScan(None, (), (rejection(name, root / INFO, -1, 0, error),))]
    notes += (*more, *environment_warnings(spec))
    if "next.reward" not in dataset.features:
        notes += ("there is no next.reward: rewards and returns are 0",)
    lines = tuple(f"{name}: {line}" for line in notes)
    if not options.task_per_instruction:
        return [TaskScan(task, tuple(refs), tuple(rejected), notes=lines)]
    scans, used = [], set()
    for index in sorted({tasks[ref.position] for ref in refs}, key=lambda index: -1 if index is None else index):
        own = f"{name}-{_slug(instructions.get(-1 if index is None else index, '')) or index}"
        own = own if own not in used else f"{own}-{index}"
        used.add(own)
        mine = tuple(ref for ref in refs if tasks[ref.position] == index)
        scans.append(TaskScan(replace(task, name=own), mine, tuple(rejected), notes=lines))
        rejected, lines = [], ()  # with the first task
    return scans


def _scan_rows(
    name: str, dataset: Dataset, paths: list[Path]
) -> tuple[list[EpisodeRef], dict[int, int | None], list[Rejection]]:
    """Place of each episode, by episode_index; the task_index of each; what cannot be used."""
    found: dict[int, tuple[EpisodeRef, int | None]] = {}
    rejected, twice = [], set()
    reward = "next.reward" if "next.reward" in dataset.features else None
    for path in paths:
        try:
            for run in table.runs(path, reward):
                if run.episode in found:
                    twice.add(run.episode)
                found[run.episode] = (EpisodeRef(str(path), run.episode, run.start, run.stop, run.total), run.task)
        except EpisodeError as error:
            rejected.append(rejection(name, path, -1, 0, error))
    for episode in sorted(twice):
        ref, _ = found.pop(episode)
        doubled = EpisodeError("wrong length", f"episode {episode} lies in several places; {AGAIN}")
        rejected.append(rejection(name, Path(ref.file), episode, ref.start, doubled))
    rejected += _against_meta(name, dataset, found, twice)
    order = sorted(found)
    return [found[n][0] for n in order], {n: found[n][1] for n in order}, rejected


def _against_meta(
    name: str, dataset: Dataset, found: dict[int, tuple[EpisodeRef, int | None]], twice: set[int]
) -> list[Rejection]:
    """Rejections of episodes that the metadata has and the data lacks, or that are of another length; these are taken
    out of `found`."""
    rejected = []
    try:
        lengths = dataset.lengths
    except EpisodeError as error:
        if dataset.version == "v3.0" and any(feature.dtype == "video" for feature in dataset.features.values()):
            raise
        return [rejection(name, dataset.root / INFO, -1, 0, error)] if error.reason != "missing file" else []
    missing = sorted(set(lengths) - set(found) - twice)
    if not lengths and dataset.total_episodes:
        missing = sorted(set(range(min(dataset.total_episodes, 2**24))) - set(found) - twice)
    if len(missing) > MISSING_LISTED:
        lost = EpisodeError("missing file", f"the data of {len(missing)} episodes is not here; {AGAIN}")
        rejected.append(rejection(name, dataset.root / INFO, -1, 0, lost))
    else:
        for episode in missing:
            lost = EpisodeError("missing file", f"the data of episode {episode} is not here; {AGAIN}")
            rejected.append(rejection(name, dataset.root / INFO, episode, 0, lost))
    for episode in sorted(set(lengths) & set(found)):
        ref, _ = found[episode]
        if ref.timesteps != lengths[episode]:
            detail = f"episode {episode} has {ref.timesteps} rows, its metadata says {lengths[episode]}; {AGAIN}"
            rejected.append(rejection(name, Path(ref.file), episode, ref.start, EpisodeError("wrong length", detail)))
            del found[episode]
    return rejected


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:60]


def rejection(task: str, path: Path, position: int, row: int, error: EpisodeError) -> Rejection:
    return Rejection(task, path.name, position, row, error.reason, error.detail)
