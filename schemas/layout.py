"""The tokens of one timestep: how many, in which order, which role each plays (paper §2.1).

    TaskSpec -> ordered_fields -> field_columns: where each field lies -> TimestepLayout -> members of a sample

A timestep is text, then patches (picture by picture, in raster order), then tensor tokens (row-major), then a
separator, then actions. Fields of one kind are ordered by key, nested keys level by level; this is the one place that
knows. A task of pictures and texts without actions (captions) has its text last: what is predicted follows what it is
about. Every timestep of a task has the same length K, so a sequence of one task is a regular (timestep, column) grid,
and roles, positions and loss mask follow from the column alone. Only text, tensor and action tokens are stored;
patches are stored as pixels. A text document is the degenerate layout K = 1: one text token per "timestep".

Invariant: layout and order are functions of the task alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

import numpy as np

from schemas.task import FieldSpec, TaskSpec

PAD, TEXT, PATCH, OBSERVATION, SEPARATOR, ACTION = range(6)
ROLE_NAMES = ("pad", "text", "patch", "observation", "separator", "action")
PATCH_SIZE = 16
POSITION_BINS = 128
_ORDER = {"text": 0, "image": 1, "continuous": 2, "discrete": 2}


@dataclass(frozen=True)
class Picture:
    """A picture of `rows` x `columns` patches of 16x16x`channels` uint8; channels are 1 or 3."""

    rows: int
    columns: int
    channels: int

    @property
    def patches(self) -> int:
        return self.rows * self.columns

    @property
    def bytes(self) -> int:
        return self.patches * PATCH_SIZE**2 * self.channels

    @cached_property
    def intervals(self) -> np.ndarray:
        """Row and column interval of each patch among the 128 position bins (appendix C.3), int64 (P, 2, 2):
        [patch, row or column, first bin or one after the last]."""
        rows, columns = (
            np.stack([np.arange(n) * POSITION_BINS // n, -(-np.arange(1, n + 1) * POSITION_BINS // n)], axis=1)
            for n in (self.rows, self.columns)
        )
        return np.stack([np.repeat(rows, self.columns, axis=0), np.tile(columns, (self.rows, 1))], axis=1)


@dataclass(frozen=True)
class TimestepLayout:
    """Token counts of one timestep, and its pictures in order. `captioned`: text comes after the pictures."""

    text: int
    pictures: tuple[Picture, ...]
    observation: int
    action: int
    captioned: bool = False

    @property
    def patches(self) -> int:
        """P: patches of all pictures."""
        return sum(picture.patches for picture in self.pictures)

    @property
    def channels(self) -> int:
        """Most channels of a picture; 0 without pictures."""
        return max((picture.channels for picture in self.pictures), default=0)

    @property
    def patch_bytes(self) -> int:
        """Bytes of all patches."""
        return sum(picture.bytes for picture in self.pictures)

    @property
    def patch_shape(self) -> tuple[int, ...]:
        """Of one timestep in the `patches` member: (P, 16, 16, C) where all pictures have C channels, else their
        bytes one after the other."""
        if len({picture.channels for picture in self.pictures}) == 1:
            return self.patches, PATCH_SIZE, PATCH_SIZE, self.channels
        return (self.patch_bytes,)

    @property
    def stored(self) -> int:
        """Tokens per timestep in the `tokens` member: text, observation, action."""
        return self.text + self.observation + self.action

    @property
    def length(self) -> int:
        """K: tokens per timestep in a training sequence."""
        return self.text + self.patches + self.observation + (1 + self.action if self.action else 0)

    @cached_property
    def roles(self) -> np.ndarray:
        """Role of each column, uint8 (K,)."""
        counts = {TEXT: self.text, PATCH: self.patches, OBSERVATION: self.observation}
        counts |= {SEPARATOR: int(self.action > 0), ACTION: self.action}
        order = [PATCH, TEXT] if self.captioned else [TEXT, PATCH]
        order += [OBSERVATION, SEPARATOR, ACTION]
        return np.repeat(np.array(order, np.uint8), [counts[role] for role in order])

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
        blocks = [
            (0, self.patches if self.captioned else 0, self.text),
            (self.text, self.text + self.patches, self.observation),
        ]
        blocks.append((self.text + self.observation, self.length - self.action, self.action))
        return [block for block in blocks if block[2]]

    @cached_property
    def patch_slots(self) -> np.ndarray:
        """Columns that hold patches, int64 (P,)."""
        return np.flatnonzero(self.roles == PATCH)

    @cached_property
    def patch_intervals(self) -> np.ndarray:
        """Position intervals of all patches, each within its own picture, int64 (P, 2, 2); see `Picture.intervals`."""
        return np.concatenate([np.empty((0, 2, 2), np.int64), *(picture.intervals for picture in self.pictures)])

    @cached_property
    def patch_centres(self) -> np.ndarray:
        """Rounded mean of each interval, used in evaluation, int64 (P, 2)."""
        return self.patch_intervals.sum(axis=2) // 2

    def split_patches(self, stored: np.ndarray) -> list[np.ndarray]:
        """Pixels (T, ...) of the `patches` member to one view (T, P, 16, 16, C) per picture."""
        flat = stored.reshape(len(stored), self.patch_bytes)
        ends = accumulate((picture.bytes for picture in self.pictures), initial=0)
        return [
            flat[:, first:end].reshape(-1, picture.patches, PATCH_SIZE, PATCH_SIZE, picture.channels)
            for picture, (first, end) in zip(self.pictures, pairwise(ends))
        ]

    def join_patches(self, pictures: list[np.ndarray]) -> np.ndarray:
        """Inverse of `split_patches`: (T, *patch_shape)."""
        if len(pictures) == 1:
            return pictures[0]
        T = len(pictures[0])
        return np.concatenate([p.reshape(T, -1) for p in pictures], axis=1).reshape(T, *self.patch_shape)

    def level_patches(self, stored: np.ndarray, channels: int | None = None) -> np.ndarray:
        """Pixels (T, ...) of the `patches` member to (T, P, 16, 16, channels), grey ones repeated; `channels`: 1 or
        3, by default the most of a picture."""
        channels = channels or self.channels
        if len(self.patch_shape) == 4 and channels == self.channels:
            return stored.reshape(-1, *self.patch_shape)
        out = np.empty((len(stored), self.patches, PATCH_SIZE, PATCH_SIZE, channels), np.uint8)
        ends = accumulate((picture.patches for picture in self.pictures), initial=0)
        for pixels, (first, end) in zip(self.split_patches(stored), pairwise(ends)):
            for c in range(channels):  # five times as fast as broadcasting to so short an axis
                out[:, first:end, ..., c] = pixels[..., min(c, pixels.shape[-1] - 1)]
        return out


@dataclass(frozen=True)
class FieldColumns:
    """Columns of a field: `tokens`, its columns among the stored tokens; `raw`, among the values of the
    `observation` member; `pictures`, its ordinals among the layout's. All but one kind's are empty."""

    spec: FieldSpec
    tokens: slice
    raw: slice
    pictures: slice


def ordered_fields(task: TaskSpec) -> list[FieldSpec]:
    """The observation's fields in the order of their tokens: text, images, tensors; of one kind by key, nested keys
    ("a/b") level by level."""
    return sorted(task.observation, key=lambda spec: (_ORDER[spec.kind], spec.key.split("/")))


def field_columns(task: TaskSpec) -> list[FieldColumns]:
    """Columns of each of the `ordered_fields`."""
    found = []
    tokens = raw = pictures = 0
    for spec in ordered_fields(task):
        counts = (
            0 if spec.kind == "image" else spec.size,
            spec.size if spec.kind == "continuous" else 0,
            len(pictures_of(spec)),
        )
        ends = tokens + counts[0], raw + counts[1], pictures + counts[2]
        found.append(FieldColumns(spec, slice(tokens, ends[0]), slice(raw, ends[1]), slice(pictures, ends[2])))
        tokens, raw, pictures = ends
    return found


def picture_size(spec: FieldSpec) -> tuple[int, int]:
    """Height and width of an image's patches together: `resized`, or the next multiples of 16."""
    height, width = spec.resized or (-(-side // PATCH_SIZE) * PATCH_SIZE for side in spec.shape[:2])
    return height, width


def pictures_of(spec: FieldSpec) -> tuple[Picture, ...]:
    """Pictures of a field's newest frame: of 3 channels as long as there are as many, then of 1."""
    if spec.kind != "image":
        return ()
    height, width = picture_size(spec)
    channels = [3] * (spec.channels // 3) + [1] * (spec.channels % 3)
    return tuple(Picture(height // PATCH_SIZE, width // PATCH_SIZE, C) for C in channels)


def layout_of(task: TaskSpec) -> TimestepLayout:
    """The layout that a task's fields imply. ValueError for `resized` image sizes that 16 does not divide."""
    text = observation = 0
    pictures: list[Picture] = []
    for spec in ordered_fields(task):
        if spec.kind == "text":
            text += spec.size
        elif spec.kind == "image":
            height, width = picture_size(spec)
            if min(height, width) < 1 or height % PATCH_SIZE or width % PATCH_SIZE:
                raise ValueError(f"task '{task.name}': image '{spec.key}' is {height}x{width}, not multiples of 16")
            pictures += pictures_of(spec)
        else:
            observation += spec.size
    captioned = task.action is None and text > 0 and len(pictures) > 0
    return TimestepLayout(text, tuple(pictures), observation, task.action.size if task.action else 0, captioned)


def members_of(task: TaskSpec) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The arrays that every sample of a task has: member -> (dtype, shape of one timestep)."""
    layout = layout_of(task)
    members: dict[str, tuple[str, tuple[int, ...]]] = {"tokens": ("<u2", (layout.stored,))}
    if layout.patches:
        members["patches"] = ("|u1", layout.patch_shape)
    if task.action is None:
        return members
    members["reward"] = ("<f4", ())
    if continuous := [spec for spec in task.observation if spec.kind == "continuous"]:
        members["observation"] = ("<f4", (sum(spec.size for spec in continuous),))
    if task.action.kind == "continuous":
        members["action"] = ("<f4", (task.action.size,))
    return members


def continuous_values(task: TaskSpec, observation: Mapping[str, np.ndarray]) -> np.ndarray | None:
    """{key: (T, ...)} to the values of all continuous fields, (T, D), as the `observation` member holds them; None
    where the task has none."""
    own = [np.asarray(observation[spec.key]) for spec in ordered_fields(task) if spec.kind == "continuous"]
    flat = [values.reshape(len(values), -1) for values in own]
    if not flat:
        return None
    return flat[0] if len(flat) == 1 else np.concatenate(flat, axis=1)
