"""A batch of token sequences, as arrays: what the stream makes and the model takes.

Shapes: B sequences, L tokens, M patches in the whole batch.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch


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
    def stack(samples: list[Batch]) -> Batch:
        """Batches of one sequence each (numpy) to one batch."""
        L = samples[0].tokens.shape[1]
        shift = np.repeat(np.arange(len(samples)) * L, [len(sample.patch_index) for sample in samples])
        columns = {f.name: [getattr(sample, f.name) for sample in samples] for f in fields(Batch)}
        columns["patches"] = _same_channels(columns["patches"])
        joined = {name: np.concatenate(parts) for name, parts in columns.items()}
        joined["patch_index"] = joined["patch_index"] + shift
        return Batch(**joined)


def _same_channels(patches: list[np.ndarray]) -> list[np.ndarray]:
    """Grey patches beside colour ones become colour with three equal channels."""
    channels = max((p.shape[-1] for p in patches if len(p)), default=1)
    return [np.broadcast_to(p[..., :1] if p.shape[-1] != channels else p, (*p.shape[:3], channels)) for p in patches]
