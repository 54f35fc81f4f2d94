"""Minari's layout as etl.record writes it, by the minari package, one episode at a time.

raw observations around each step (nested dicts and tuples, pictures, texts) -> EpisodeBuffer -> MinariStorage

A last episode that the log's end cuts is neither terminated nor truncated.

Invariant: a folder under its own name is whole.
"""

from __future__ import annotations

import copy
import shutil
import string
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec

from schemas.episode import EnvironmentSpec
from schemas.files import replace_folder, require_room
from simulators.rollout import Step
from simulators.spaces import native_action

MARGIN = 2**20  # bytes for what HDF5 writes besides arrays


class MinariWriter:
    """One growing dataset."""

    folder = "data/logs/minari"

    @staticmethod
    def path(folder: Path, name: tuple[str, str], level: str, run: int) -> Path:
        return folder / name[0] / f"{level}-{name[1]}"

    def __init__(self, path: Path, environment: EnvironmentSpec, algorithm: str):
        self.dataset = "/".join(path.parts[-2:])
        self.final = path.absolute()  # Minari joins a relative one to itself
        self.environment, self.algorithm = environment, algorithm
        self.temporary = self.final.parents[1] / f".{self.dataset.replace('/', '-')}.tmp"
        self.rows: list[tuple[Step, Any, Any]] = []

    def wrap(self, raw: gymnasium.Env) -> gymnasium.Env:
        """The simulator, its raw observations remembered for the log."""
        from minari.dataset.minari_storage import MinariStorage

        space = raw.observation_space
        if isinstance(space, spaces.Dict) and "mission" in space.spaces:  # minigrid's own space is not Minari's
            space = spaces.Dict(space.spaces | {"mission": spaces.Text(1024, charset=string.printable)})
        data = self.temporary / "data"
        shutil.rmtree(self.temporary, ignore_errors=True)  # of one that was killed
        data.mkdir(parents=True)
        require_room(data, MARGIN)
        spec = _spec(raw.spec, self.environment.id)
        self.storage = MinariStorage.new(data, space, raw.action_space, spec, "hdf5", jpeg_encoding=False)
        about = {"dataset_id": self.dataset, "algorithm_name": self.algorithm, "minari_version": version("minari")}
        self.storage.update_metadata(about)
        self.raw, self.space, self.action_space = _Raw(raw), space, raw.action_space
        return self.raw

    def append(self, step: Step) -> None:
        self.rows.append((step, self.raw.before, self.raw.after))
        if step.ended:
            self._flush()

    def close(self) -> None:
        if self.rows:
            self._flush()
        self.final.parent.mkdir(parents=True, exist_ok=True)
        replace_folder(self.temporary, self.final)

    def discard(self) -> None:
        shutil.rmtree(self.temporary, ignore_errors=True)

    def _flush(self) -> None:
        from minari.data_collector import EpisodeBuffer

        rows, self.rows = self.rows, []
        steps = [step for step, _, _ in rows]
        episode = EpisodeBuffer(
            observations=_columns(self.space, [rows[0][1], *(after for _, _, after in rows)]),
            actions=np.stack([native_action(self.action_space, step.action) for step in steps]),
            rewards=[np.float32(step.reward) for step in steps],
            terminations=[step.terminated for step in steps],
            truncations=[step.truncated and not step.terminated for step in steps],
        )
        require_room(self.temporary, _size(episode.observations) + episode.actions.nbytes + 6 * len(rows) + MARGIN)
        self.storage.update_episodes([episode])


def _columns(space: spaces.Space, observations: list[Any]) -> Any:
    """Observations, one per timestep, as the columns of an EpisodeBuffer: nested as the space is."""
    if isinstance(space, spaces.Dict):
        # in the order of the observation, which decides the file's bytes
        return {
            key: _columns(space[key], [one[key] for one in observations])
            for key in observations[0]
            if key in space.spaces
        }
    if isinstance(space, spaces.Tuple):
        return tuple(_columns(part, [one[n] for one in observations]) for n, part in enumerate(space.spaces))
    return observations if isinstance(space, spaces.Text) else np.stack(observations)


def _size(columns: Any) -> int:
    """Bytes of the columns of an EpisodeBuffer."""
    if isinstance(columns, dict):
        return sum(map(_size, columns.values()))
    if isinstance(columns, tuple | list):
        return sum(map(_size, columns))
    return len(columns.encode()) if isinstance(columns, str) else columns.nbytes


def _spec(spec: EnvSpec | None, id: str) -> EnvSpec | None:
    """gymnasium's spec of the environment, in a form that is JSON: an entry point that is a class is named."""
    if spec is None:
        return None
    spec = copy.deepcopy(spec)
    if ":" in id:
        spec.id = id
    if callable(spec.entry_point):
        spec.entry_point = f"{spec.entry_point.__module__}:{getattr(spec.entry_point, '__qualname__', 'make')}"
    return spec


class _Raw(gymnasium.Wrapper):
    """Remembers the observation before and after the latest step."""

    def reset(self, **arguments: Any) -> Any:
        observation, info = self.env.reset(**arguments)
        self.after = copy.deepcopy(observation)  # an environment may return the same buffer at every step
        return observation, info

    def step(self, action: Any) -> Any:
        observation, *rest = self.env.step(action)
        self.before, self.after = self.after, copy.deepcopy(observation)
        return observation, *rest
