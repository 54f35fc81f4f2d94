"""Datasets of any spaces, built by the project's own plan, worker and gathering from episodes that are in memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from etl import sources
from etl.building.gather import gather
from etl.building.plan import BuildConfig, ShardPlan, make_plan
from etl.building.shard import write_shard
from etl.sources import EpisodeRef, TaskScan
from schemas.episode import RawEpisode
from schemas.task import FieldSpec, TaskSpec
from shards.folder import Folder
from shards.reader import Dataset


class Memory:
    """A source of one task's episodes."""

    name = "memory"

    def __init__(self, episodes: list[RawEpisode]):
        self.episodes = episodes

    def parts(self, file: str) -> list[Path]:
        return []

    def read(self, task: TaskSpec, refs):
        yield from (self.episodes[ref.position] for ref in refs)


def values_of(spec: FieldSpec, T: int, rng: np.random.Generator) -> np.ndarray:
    """(T, *shape) of a field's space."""
    if spec.kind == "image":
        return rng.integers(0, 256, (T, *spec.shape), np.uint8)
    if spec.kind == "discrete":
        drawn = rng.integers(np.broadcast_to(spec.choices, spec.size), size=(T, spec.size))
        return (drawn + np.array(spec.start)).reshape(T, *spec.shape)
    return (rng.normal(size=(T, *spec.shape)) * 10 ** rng.uniform(-3, 2)).astype(np.float32)


def episode_of(task: TaskSpec, T: int, rng: np.random.Generator, position: int = 0) -> RawEpisode:
    """An episode of T timesteps of values that a task's spaces allow."""
    action = task.action
    assert action is not None
    if action.kind == "continuous":
        actions = rng.uniform(action.low, action.high, (T, action.size)).astype(np.float32)
    else:
        actions = rng.integers(action.choices, size=(T, action.size)) + np.array(action.start)
        actions = actions[:, 0] if action.size == 1 else actions
    observation = {spec.key: values_of(spec, T, rng) for spec in task.observation}
    reward = rng.normal(size=T).astype(np.float32)
    return RawEpisode(observation, actions, reward, True, False, "memory", position)


def build(folder: Path, task: TaskSpec, episodes: list[RawEpisode], monkeypatch, **options) -> Dataset:
    """The finished dataset of these episodes, by way of the bytes that a plan travels as."""
    monkeypatch.setattr(sources, "load", lambda name: Memory(episodes))
    config = BuildConfig(**({"held_out_share": 0.0} | options))
    refs = tuple(EpisodeRef("memory", n, 0, e.timesteps, float(e.reward.sum())) for n, e in enumerate(episodes))
    scan = TaskScan(task, refs)
    plan = make_plan("memory", [scan], config)
    for shard in plan:
        write_shard(ShardPlan.from_bytes(shard.to_bytes()), str(folder))
    gather(plan, [scan], Folder(folder), config)
    return Dataset(folder, "full")
