"""The baselines' view of the same shards: whole episodes as raw arrays, with rewards.

Decision Transformer and Trajectory Transformer read returns-to-go, observations
and actions from here, so that all three models learn from the same episodes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from schemas.layout import PATCH_SIZE
from schemas.vocabulary import IdRange
from shards.reader import Dataset


@dataclass(frozen=True)
class Trajectory:
    """One episode. observation (T, D) float32 for control tasks, frames (T, H, W, C) uint8 for image
    tasks; action (T, A) float32 or (T,) int64; reward (T,) float32. complete: the log did not cut it."""

    observation: np.ndarray | None
    frames: np.ndarray | None
    action: np.ndarray
    reward: np.ndarray
    terminated: bool
    complete: bool

    @property
    def returns_to_go(self) -> np.ndarray:
        """Sum of the rewards from each timestep on, float64 (T,) (Decision Transformer, section 3)."""
        return np.cumsum(self.reward[::-1], dtype=np.float64)[::-1]


def trajectories(dataset: Dataset, task: int, held_out: bool = False) -> list[Trajectory]:
    """All episodes of a task's split, pieces of long ones joined again."""
    rows = dataset.rows(task, held_out)
    firsts = np.flatnonzero(np.diff(dataset.column("split_episode")[rows]) > 0) + 1
    return [_join(dataset, task, own) for own in np.split(rows, firsts) if len(own)]


def _join(dataset: Dataset, task: int, rows: np.ndarray) -> Trajectory:
    layout, spec = dataset.layouts[task], dataset.manifest.tasks[task].spec
    vocabulary = dataset.manifest.vocabulary
    assert spec.action is not None
    frames = None
    if layout.patches:
        patches = np.concatenate([dataset.patches(int(row)) for row in rows])
        grid = patches.reshape(-1, layout.patch_rows, layout.patch_columns, PATCH_SIZE, PATCH_SIZE, layout.channels)
        height, width = layout.patch_rows * PATCH_SIZE, layout.patch_columns * PATCH_SIZE
        frames = grid.transpose(0, 1, 3, 2, 4, 5).reshape(-1, height, width, layout.channels)
    observations = [o for row in rows if (o := dataset.observation(int(row))) is not None]
    if spec.action.kind == "continuous":
        action = np.concatenate([a for row in rows if (a := dataset.action(int(row))) is not None])
    else:
        ids: IdRange = vocabulary.action_discrete
        action = np.concatenate([dataset.tokens(int(row))[:, -layout.action :] for row in rows]).astype(np.int64)
        action = action[:, 0] - ids.start if layout.action == 1 else action - ids.start
    terminated, truncated = (bool(dataset.column(name)[rows[-1]]) for name in ("terminated", "truncated"))
    return Trajectory(
        observation=np.concatenate(observations) if observations else None,
        frames=frames,
        action=action,
        reward=np.concatenate([dataset.reward(int(row)) for row in rows]),
        terminated=terminated,
        complete=terminated or truncated,
    )
