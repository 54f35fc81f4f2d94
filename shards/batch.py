"""A batch of token sequences, as arrays: what the stream makes and the model takes.

Shapes: B sequences, L tokens, M patches in the whole batch.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch

from schemas.layout import PATCH_SIZE


@dataclass
class Batch:
    """Fields are numpy arrays, or tensors after `to`.

    tokens (B, L) int32, 0 where a patch or padding stands; roles (B, L) uint8 of schemas.layout;
    positions (B, L) int16, index within the timestep; segments (B, L) int16, attention stays within one,
    -1 is padding; supervised (B, L) bool, True where the token AT that place is a target of the loss;
    patches (M, 16, 16, C) uint8; patch_index (M,) int64, place of each in the flattened (B * L);
    patch_positions (M, 2) int64, row and column bin; tasks (B,) int64; sequence (B,) int64, the i of each.
    """

    tokens: Any
    roles: Any
    positions: Any
    segments: Any
    supervised: Any
    patches: Any
    patch_index: Any
    patch_positions: Any
    tasks: Any
    sequence: Any

    def to(self, device: torch.device | str) -> Batch:
        """The same batch as tensors on `device`."""
        return Batch(
            **{
                field.name: torch.as_tensor(getattr(self, field.name)).to(device, non_blocking=True)
                for field in fields(self)
            }
        )

    @staticmethod
    def empty(tasks: np.ndarray, length: int, patches: int, channels: int) -> Batch:
        """Numpy arrays to be filled, for sequences of `tasks` (B,) with so many patches in all."""
        B = len(tasks)
        return Batch(
            tokens=np.empty((B, length), np.int32),
            roles=np.empty((B, length), np.uint8),
            positions=np.empty((B, length), np.int16),
            segments=np.empty((B, length), np.int16),
            supervised=np.empty((B, length), bool),
            patches=np.empty((patches, PATCH_SIZE, PATCH_SIZE, channels), np.uint8),
            patch_index=np.empty(patches, np.int64),
            patch_positions=np.empty((patches, 2), np.int64),
            tasks=np.array(tasks, np.int64),
            sequence=np.empty(B, np.int64),
        )
