"""Patches to vectors: one ResNet v2 block and two position tables (paper §2.2, appendices C.2, C.3).

uint8 (M, 16, 16, C) -> [-1, 1] / sqrt(16) -> 3x3 stem, stride 2 -> norm, GELU, conv
(stride 2) -> norm, GELU, conv, + 1x1 skip -> flatten 4x4 -> linear (M, width)
+ row table[row bin] + column table[column bin]

The norm is the paper's GroupNorm, or one of each channel's own (ours). Where channels are taken together, a flat patch
keeps their differences and comes out as large as any other: what most patches show in common is then most of every
embedding. Each channel for itself, a flat patch comes out as zero. Its level goes through the skip alone.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from schemas.layout import PATCH_SIZE, POSITION_BINS
from trainer.model.presets import ModelConfig

GROUP_EPSILON = 1e-5
CHANNEL_EPSILON = 1e-4  # of variances: what differs by less than a hundredth counts as flat
MULTIPLIER = 6364136223846793005  # odd, of a congruential generator: its powers mix the words of a row


def different_rows(words: Tensor) -> tuple[Tensor, Tensor]:
    """Different rows of int64 (M, K), ascending, and (M,) which of them each row is: as torch.unique(words, dim=0,
    return_inverse=True), which sorts all rows. Here one number per row is sorted, then a row of each kind."""
    powers = torch.full_like(words[0], MULTIPLIER).cumprod(0)  # integers wrap
    found, kind = torch.unique((words * powers).sum(1), return_inverse=True)
    some = words[torch.empty_like(found).index_copy_(0, kind, torch.arange(len(words)))]
    if not torch.equal(some[kind], words):  # two kinds of rows have one number
        return torch.unique(words, dim=0, return_inverse=True)
    rows, number = torch.unique(some, dim=0, return_inverse=True)
    return rows, number[kind]


class PatchEmbedding(nn.Module):
    """patches uint8 (M, 16, 16, C), C of 1 or 3 (grey is repeated), positions (M, 2) -> (M, width)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        channels, groups = config.patch_channels, config.patch_groups
        if channels % groups or channels == groups:
            raise ValueError(f"--model.patch-channels {channels}: must be 2, 3 ... times --model.patch-groups {groups}")
        own = config.patch_norm == "channel"
        groups, epsilon = (channels, CHANNEL_EPSILON) if own else (groups, GROUP_EPSILON)
        # zeros around it would give a flat patch edges
        self.stem = nn.Conv2d(3, channels, 3, stride=2, padding=1, padding_mode="replicate" if own else "zeros")
        self.norm_1 = nn.GroupNorm(groups, channels, epsilon)
        self.conv_1 = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        self.norm_2 = nn.GroupNorm(groups, channels, epsilon)
        self.conv_2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.skip = nn.Conv2d(channels, channels, 1, stride=2)
        self.out = nn.Linear(channels * (PATCH_SIZE // 4) ** 2, config.width)
        self.row = nn.Embedding(POSITION_BINS, config.width)
        self.column = nn.Embedding(POSITION_BINS, config.width)

    def forward(self, patches: Tensor, positions: Tensor) -> Tensor:
        row, column = positions.int().unbind(1)
        return self.appearance(patches) + self.row(row) + self.column(column)

    def appearance(self, patches: Tensor) -> Tensor:
        """Vectors (M, width) of patches (M, 16, 16, C) wherever they lie. On a CPU each different one is embedded once:
        of a game's patches nine in ten repeat. A GPU's host would have to wait for their number."""
        if patches.device.type != "cpu" or not len(patches):
            return self.each(patches)
        words = patches.flatten(1).contiguous().view(torch.int64)  # eight bytes are compared at once
        different, index = different_rows(words)
        return self.each(different.view(patches.dtype).view(-1, *patches.shape[1:])).index_select(0, index)

    def each(self, patches: Tensor) -> Tensor:
        """`appearance` without comparing patches, the slow reference."""
        x = (patches.to(self.out.weight.dtype) / 127.5 - 1.0) / PATCH_SIZE**0.5
        x = self.stem(x.permute(0, 3, 1, 2).expand(-1, 3, -1, -1))
        h = self.conv_1(F.gelu(self.norm_1(x)))
        h = self.conv_2(F.gelu(self.norm_2(h))) + self.skip(x)
        return self.out(h.flatten(1))
