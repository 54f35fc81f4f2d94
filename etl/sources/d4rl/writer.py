"""D4RL's layout as etl.record writes it: one HDF5 file, a growing dataset per key.

steps {"observation": (D,)} -> observations, actions, rewards, terminals, timeouts, next_observations, infos/*

Attribute env_id names the environment; `action_low` and `action_high` its bounds, where they are not -1 and 1.

Invariant: a file under its own name is whole.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import gymnasium
import h5py
import numpy as np

from schemas.episode import EnvironmentSpec
from schemas.files import require_room, sync_folder
from simulators.rollout import Step

CHUNK = 4096
MARGIN = 2**20  # bytes for what HDF5 writes besides rows


class D4RLWriter:
    """One growing file."""

    folder = "data/logs/d4rl"

    @staticmethod
    def path(folder: Path, name: tuple[str, str], level: str, run: int) -> Path:
        return folder / f"{name[0]}-{level}-{name[1]}.hdf5"

    def __init__(self, path: Path, environment: EnvironmentSpec, algorithm: str):
        self.final, self.temporary = path, path.with_name(f".{path.name}.tmp")
        path.parent.mkdir(parents=True, exist_ok=True)
        require_room(path.parent, MARGIN)
        self.file = h5py.File(self.temporary, "w", track_order=False)
        self.file.attrs["env_id"] = environment.id
        self.file["metadata/algorithm"] = algorithm
        self.rows: dict[str, list] = {}

    def wrap(self, raw: gymnasium.Env) -> gymnasium.Env:
        """Its rows are what an agent sees. The bounds of the actions are noted."""
        space: Any = raw.action_space
        if not (np.all(space.low == -1) and np.all(space.high == 1)):
            self.file.attrs["action_low"], self.file.attrs["action_high"] = np.ravel(space.low), np.ravel(space.high)
        return raw

    def append(self, step: Step) -> None:
        assert step.next_observation is not None
        self.add(
            {
                "observations": step.observation["observation"].reshape(-1),
                "actions": step.action,
                "rewards": np.float32(step.reward),
                "terminals": step.terminated,
                "timeouts": step.truncated and not step.terminated,
                "next_observations": step.next_observation["observation"].reshape(-1),
                **(step.before or {}),
            }
        )

    def add(self, row: dict[str, Any]) -> None:
        """One row {key: value} of the file."""
        for key, value in row.items():
            self.rows.setdefault(key, []).append(value)
        if len(self.rows["rewards"]) >= CHUNK:
            self._flush()

    def close(self) -> None:
        self._flush()
        self.file.close()
        os.replace(self.temporary, self.final)
        sync_folder(self.final.parent)

    def discard(self) -> None:
        self.file.close()
        self.temporary.unlink(missing_ok=True)

    def _flush(self) -> None:
        blocks = {key: np.stack(values) for key, values in self.rows.items() if values}
        require_room(self.temporary.parent, sum(block.nbytes for block in blocks.values()) + MARGIN)
        for key, block in blocks.items():
            if key not in self.file:
                shape = block.shape[1:]
                self.file.create_dataset(
                    key, (0, *shape), block.dtype, maxshape=(None, *shape), chunks=(CHUNK, *shape), compression="gzip",
                    compression_opts=1,
                )  # fmt: skip
            dataset = self.file[key]
            dataset.resize(len(dataset) + len(block), axis=0)
            dataset[-len(block) :] = block
            self.rows[key].clear()
        self.file.flush()
