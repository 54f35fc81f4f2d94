"""The baselines' view of the same shards: whole episodes as raw arrays, with rewards.

Decision Transformer and Trajectory Transformer read returns-to-go, observations
and actions from here, so that all three models learn from the same episodes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from schemas.layout import PATCH_SIZE, Picture
from shards.reader import Dataset


@dataclass(frozen=True)
class Trajectory:
    """One episode. observation (T, D) float32: all continuous fields; None where there are none; pictures: one
    (T, H, W, 3 or 1) uint8 per picture of the layout; action (T, A) float32, or (T, A) or (T,) int64 as the environment
    takes it; reward (T,) float32. complete: the log did not cut it."""

    observation: np.ndarray | None
    pictures: tuple[np.ndarray, ...]
    action: np.ndarray
    reward: np.ndarray
    terminated: bool
    complete: bool

    @property
    def frames(self) -> np.ndarray | None:
        """All pictures as one with the channels of all, (T, H, W, C); None where there are none. ValueError where they
        differ in size."""
        if len({picture.shape[:3] for picture in self.pictures}) > 1:
            raise ValueError("the pictures of a timestep differ in size and cannot be joined to one")
        if len(self.pictures) > 1:
            return np.concatenate(self.pictures, axis=3)
        return self.pictures[0] if self.pictures else None

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
    pictures: tuple[np.ndarray, ...] = ()
    if layout.patches:
        parts = zip(*(layout.split_patches(dataset.patches(int(row))) for row in rows))
        pictures = tuple(map(_picture, layout.pictures, map(np.concatenate, parts)))
    observations = [o for row in rows if (o := dataset.observation(int(row))) is not None]
    if spec.action.kind == "continuous":
        action = np.concatenate([a for row in rows if (a := dataset.action(int(row))) is not None])
    else:
        tokens = np.concatenate([dataset.tokens(int(row))[:, -layout.action :] for row in rows]).astype(np.int64)
        action = tokens - vocabulary.action_discrete.start + np.array(spec.action.start)
        action = action[:, 0] if layout.action == 1 else action
    terminated, truncated = (bool(dataset.column(name)[rows[-1]]) for name in ("terminated", "truncated"))
    return Trajectory(
        observation=np.concatenate(observations) if observations else None,
        pictures=pictures,
        action=action,
        reward=np.concatenate([dataset.reward(int(row)) for row in rows]),
        terminated=terminated,
        complete=terminated or truncated,
    )


def _picture(picture: Picture, patches: np.ndarray) -> np.ndarray:
    """(T, P, 16, 16, C) to (T, H, W, C)."""
    grid = patches.reshape(-1, picture.rows, picture.columns, PATCH_SIZE, PATCH_SIZE, picture.channels)
    height, width = picture.rows * PATCH_SIZE, picture.columns * PATCH_SIZE
    return grid.transpose(0, 1, 3, 2, 4, 5).reshape(-1, height, width, picture.channels)
