"""A batch of token sequences, as arrays: what the stream makes and the model takes.

Shapes: B sequences, L tokens, M patches and N targets in the whole batch.
"""

from __future__ import annotations

import math
from copy import copy
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from schemas.layout import PAD, PATCH_SIZE

PAGE = 4096

if TYPE_CHECKING:
    import torch


@dataclass
class Batch:
    """Fields are numpy arrays, or tensors after `to`.

    tokens (B, L) int32, 0 at patches and padding; roles (B, L) uint8 of schemas.layout;
    positions (B, L) int16, index within the timestep; segments (B, L) int16, ascending, attention stays within one;
    supervised (B, L) bool, True where the token AT that place is a target of the loss;
    patches (M, 16, 16, C) uint8, grey ones repeated where others have colours; patch_index (M,) int32, place of
    each in the flattened (B * L); patch_positions (M, 2) uint8, row and column bin; tasks (B,) int64;
    sequence (B,) int64, the i of each; returns (B, S) float32, the standardised return of each segment's episode (the
    one after a prompt), 0 where there is none.

    `seal` derives four more on the host, since asking a GPU for them would make the host wait:
    predict_index (N,) int32, the place in the flattened (B * L) before each target; cu_seqlens (S,) int32, ascending,
    where each segment begins in it, padded with B * L to a length S that few batches exceed; packed, whether any
    sequence holds two segments; timesteps, the largest number of timesteps in a sequence.
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
    returns: Any = None
    predict_index: Any = None
    cu_seqlens: Any = None
    packed: bool = False
    timesteps: int = 0

    def seal(self, buffers: BufferPool | None = None) -> Batch:
        """Derive `predict_index`, `cu_seqlens`, `packed` and `timesteps` once all other arrays are filled."""
        B, L = self.tokens.shape
        get, places = (buffers or BufferPool()).get, np.flatnonzero(self.supervised)
        self.predict_index = get("predict_index", np.int32, len(places))
        np.subtract(places, 1, out=self.predict_index, casting="same_kind")
        rows = np.flatnonzero(self.segments[:, -1] != self.segments[:, 0])
        inside = self.segments[rows]
        row, place = np.nonzero(inside[:, 1:] != inside[:, :-1])
        cu_seqlens = np.sort(np.concatenate([np.arange(0, B * L, L), rows[row] * L + place + 1]))
        # powers of two, so that a compiled model meets few shapes
        self.cu_seqlens = get("cu_seqlens", np.int32, 1 << max(2 * B, len(cu_seqlens) + 1).bit_length())
        self.cu_seqlens[: len(cu_seqlens)], self.cu_seqlens[len(cu_seqlens) :] = cu_seqlens, B * L
        self.packed = len(cu_seqlens) > B
        self.timesteps = int(np.count_nonzero((self.positions == 0) & (self.roles != PAD), axis=1).max())
        return self

    def to(self, device: torch.device | str) -> Batch:
        """The same batch as tensors on `device`. A CPU's share the arrays' memory."""
        import torch

        moved = copy(self)
        for part in fields(self):
            value = getattr(self, part.name)
            if not isinstance(value, bool | int | None):
                setattr(moved, part.name, torch.as_tensor(value).to(device, non_blocking=True))
        return moved

    @staticmethod
    def empty(tasks: np.ndarray, length: int, patches: int, channels: int, buffers: BufferPool | None = None) -> Batch:
        """Numpy arrays to be filled, for sequences of `tasks` (B,) with so many patches; in `buffers`, if given."""
        B = len(tasks)
        get = (buffers or BufferPool()).get
        batch = Batch(
            tokens=get("tokens", np.int32, B, length),
            roles=get("roles", np.uint8, B, length),
            positions=get("positions", np.int16, B, length),
            segments=get("segments", np.int16, B, length),
            supervised=get("supervised", bool, B, length),
            patches=get("patches", np.uint8, patches, PATCH_SIZE, PATCH_SIZE, channels),
            patch_index=get("patch_index", np.int32, patches),
            patch_positions=get("patch_positions", np.uint8, patches, 2),
            tasks=get("tasks", np.int64, B),
            sequence=get("sequence", np.int64, B),
            returns=np.zeros((B, 1), np.float32),
        )
        batch.tasks[:] = tasks
        return batch


class BufferPool:
    """Memory for a batch's arrays, reused for the next batch: fresh pages cost more than what is written to them.
    `pinned`: page-locked, so that copies to a GPU run beside its work; needs a GPU."""

    def __init__(self, pinned: bool = False):
        self.pinned = pinned
        self._rooms: dict[str, np.ndarray] = {}
        self._last: dict[str, np.ndarray] = {}

    def get(self, name: str, dtype: type, *shape: int) -> np.ndarray:
        """An array of any content. It and the last one of this name are the same memory."""
        last = self._last.get(name)
        if last is not None and last.shape == shape and last.dtype == dtype:
            return last
        size = math.prod(shape) * np.dtype(dtype).itemsize
        room = self._rooms.get(name)
        if room is None or len(room) < size:
            room = self._rooms[name] = self._allocate(size)
        self._last[name] = np.ndarray(shape, dtype, room)
        return self._last[name]

    def _allocate(self, size: int) -> np.ndarray:
        """Bytes (size,) uint8 that begin a page: copies to places off a cache line take twice as long and more."""
        if self.pinned:
            import torch

            room = torch.empty(size + PAGE, dtype=torch.uint8, pin_memory=True).numpy()
        else:
            room = np.empty(size + PAGE, np.uint8)
        first = -room.__array_interface__["data"][0] % PAGE
        return room[first : first + size]
