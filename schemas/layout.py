"""The tokens of one timestep: how many, in which order, which role each plays (paper §2.1).

A timestep is text, then patches in raster order, then tensor tokens (keys in
lexicographic order, row-major), then a separator, then actions. Every timestep of
a task has the same length K, so a sequence of one task is a regular (timestep,
column) grid, and roles, positions and loss mask follow from the column alone.
Only text, tensor and action tokens are stored; patches are stored as pixels.

A text document is the degenerate layout K = 1: one text token a "timestep".
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from schemas.episode import TaskSpec

PAD, TEXT, PATCH, OBSERVATION, SEPARATOR, ACTION = range(6)
ROLE_NAMES = ("pad", "text", "patch", "observation", "separator", "action")
PATCH_SIZE = 16
POSITION_BINS = 128


@dataclass(frozen=True)
class TimestepLayout:
    """Token counts of one timestep. `patch_rows` x `patch_columns` patches of 16x16x`channels` uint8."""

    text: int
    patch_rows: int
    patch_columns: int
    channels: int
    observation: int
    action: int

    @property
    def patches(self) -> int:
        return self.patch_rows * self.patch_columns

    @property
    def stored(self) -> int:
        """Tokens a timestep in the `tokens` member: text, observation, action."""
        return self.text + self.observation + self.action

    @property
    def length(self) -> int:
        """K: tokens a timestep in a training sequence."""
        return self.text + self.patches + self.observation + (1 + self.action if self.action else 0)

    @cached_property
    def roles(self) -> np.ndarray:
        """Role of each column, uint8 (K,)."""
        counts = [self.text, self.patches, self.observation, int(self.action > 0), self.action]
        return np.repeat(np.array([TEXT, PATCH, OBSERVATION, SEPARATOR, ACTION], np.uint8), counts)

    @cached_property
    def local_positions(self) -> np.ndarray:
        """Index of each column within the timestep, int16 (K,)."""
        return np.arange(self.length, dtype=np.int16)

    @cached_property
    def stored_columns(self) -> np.ndarray:
        """Columns that the stored tokens fill, in stored order, int64 (stored,)."""
        return np.flatnonzero(np.isin(self.roles, (TEXT, OBSERVATION, ACTION)))

    @cached_property
    def stored_blocks(self) -> list[tuple[int, int, int]]:
        """The stored tokens as blocks (first stored one, first column, width): text, observation, action."""
        blocks = [(0, 0, self.text), (self.text, self.text + self.patches, self.observation)]
        blocks.append((self.text + self.observation, self.length - self.action, self.action))
        return [block for block in blocks if block[2]]

    @cached_property
    def patch_slots(self) -> np.ndarray:
        """Columns that hold patches, int64 (P,)."""
        return np.flatnonzero(self.roles == PATCH)

    @cached_property
    def patch_intervals(self) -> np.ndarray:
        """Row and column interval of each patch among the 128 position bins (appendix C.3),
        int64 (P, 2, 2): [patch, row or column, first bin or one behind the last]."""
        rows, columns = (
            np.stack([np.arange(n) * POSITION_BINS // n, -(-np.arange(1, n + 1) * POSITION_BINS // n)], axis=1)
            for n in (max(1, self.patch_rows), max(1, self.patch_columns))
        )
        return np.stack([np.repeat(rows, self.patch_columns, axis=0), np.tile(columns, (self.patch_rows, 1))], axis=1)[
            : self.patches
        ]

    @cached_property
    def patch_centres(self) -> np.ndarray:
        """Rounded mean of each interval, used in evaluation, int64 (P, 2)."""
        return self.patch_intervals.sum(axis=2) // 2


def layout_of(task: TaskSpec) -> TimestepLayout:
    """The layout that a task's fields imply. ValueError for image sizes that 16 does not divide,
    or more than one image field of different sizes."""
    text = observation = rows = columns = channels = 0
    for spec in task.observation:
        if spec.kind == "text":
            text += spec.shape[0]
        elif spec.kind == "image":
            height, width = spec.resized or spec.shape[:2]
            if height % PATCH_SIZE or width % PATCH_SIZE:
                raise ValueError(f"task '{task.name}': image '{spec.key}' is {height}x{width}, not multiples of 16")
            if rows:
                raise ValueError(f"task '{task.name}': more than one image field")
            rows, columns, channels = height // PATCH_SIZE, width // PATCH_SIZE, spec.shape[2]
        else:
            observation += math.prod(spec.shape)
    return TimestepLayout(text, rows, columns, channels, observation, task.action.size if task.action else 0)


def members_of(task: TaskSpec) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The arrays that every sample of a task has: member -> (dtype, shape of one timestep)."""
    layout = layout_of(task)
    members: dict[str, tuple[str, tuple[int, ...]]] = {"tokens": ("<u2", (layout.stored,))}
    if layout.patches:
        members["patches"] = ("|u1", (layout.patches, PATCH_SIZE, PATCH_SIZE, layout.channels))
    if task.action is None:
        return members
    members["reward"] = ("<f4", ())
    continuous = [field for field in task.observation if field.kind == "continuous"]
    if continuous:
        members["observation"] = ("<f4", (sum(math.prod(f.shape) for f in continuous),))
    if task.action.kind == "continuous":
        members["action"] = ("<f4", (task.action.size,))
    return members
