"""Decoder-only, pre-norm transformer with causal segment attention and a static key/value cache.

Shape suffixes: B sequences, T tokens in, S tokens attended to, H heads, D head size, W width.

Attention has no position term, so a cache may hold its keys in any order: slots of
evicted timesteps are simply written anew.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.model.presets import ModelConfig


class Cache:
    """Keys and values of `slots` tokens for each block: (blocks, B, H, S, D)."""

    def __init__(self, config: ModelConfig, batch: int, slots: int, device: torch.device | str, dtype: torch.dtype):
        shape = (config.blocks, batch, config.heads, slots, config.head_size)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.seen = 0
        """Tokens written so far, evicted ones too: the place of the next."""


class Attention(nn.Module):
    """Multi-head self-attention; `mask` bool (B, 1, T, S), True where attended, or None for plain causal."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.heads, self.head_size, self.qk_norm = config.heads, config.head_size, config.qk_norm
        inner = config.heads * config.head_size
        self.qkv = nn.Linear(config.width, 3 * inner, bias=False)
        self.out = nn.Linear(inner, config.width, bias=False)

    def forward(
        self,
        x_BTW: Tensor,
        mask: Tensor | None,
        cache: tuple[Tensor, Tensor] | None = None,
        slots: Tensor | None = None,
        turns: Tensor | None = None,
    ) -> Tensor:
        B, T, _ = x_BTW.shape
        q, k, v = self.qkv(x_BTW).view(B, T, 3, self.heads, self.head_size).permute(2, 0, 3, 1, 4)
        if self.qk_norm:
            q, k = F.rms_norm(q, q.shape[-1:]), F.rms_norm(k, k.shape[-1:])
        if turns is not None:
            q, k = rotate(q, turns), rotate(k, turns)
        if cache is not None:
            assert slots is not None
            keys_BHSD, values_BHSD = cache
            keys_BHSD.index_copy_(2, slots, k)
            values_BHSD.index_copy_(2, slots, v)
            k, v = keys_BHSD, values_BHSD
        y_BHTD = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and T > 1)
        return self.out(y_BHTD.transpose(1, 2).reshape(B, T, -1))


class FeedForward(nn.Module):
    """gelu: W2 gelu(W1 x); geglu: W2 (gelu(W1 x) * W3 x) (appendix C.1)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gated = config.feed_forward_form == "geglu"
        self.up = nn.Linear(config.width, config.feed_forward * (2 if self.gated else 1), bias=False)
        self.down = nn.Linear(config.feed_forward, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        if self.gated:
            x, gate = x.chunk(2, dim=-1)
            return self.down(F.gelu(x) * gate)
        return self.down(F.gelu(x))


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x)). `keep` (B, 2, 1 or W) scales the two branches. With
    `chosen` (B, T) bool the latter, and the result (N, W), is of these places alone."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.norm_1, self.attention = nn.LayerNorm(config.width), Attention(config)
        self.norm_2, self.feed_forward = nn.LayerNorm(config.width), FeedForward(config)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None,
        keep: Tensor | None = None,
        cache: tuple[Tensor, Tensor] | None = None,
        slots: Tensor | None = None,
        turns: Tensor | None = None,
        chosen: Tensor | None = None,
    ) -> Tensor:
        branch = self.attention(self.norm_1(x), mask, cache, slots, turns)
        x = x + (branch if keep is None else branch * keep[:, :1])
        scale = None if keep is None else keep[:, 1:]
        if chosen is not None:
            x, scale = x[chosen], None if scale is None else scale.expand(*chosen.shape, -1)[chosen]
        branch = self.feed_forward(self.norm_2(x))
        return x + (branch if scale is None else branch * scale)


def rotary_turns(places: Tensor, head_size: int, dtype: torch.dtype) -> Tensor:
    """places (T,) -> cosines and sines (2, T, D / 2) of place * 10000 ** (-2 i / D), made in float32."""
    powers = torch.arange(0, head_size, 2, device=places.device) / head_size
    angles = places[:, None].float() * 10000.0**-powers
    return torch.stack([angles.cos(), angles.sin()]).to(dtype)


def rotate(x_BHTD: Tensor, turns: Tensor) -> Tensor:
    """Turn feature pairs (i, i + D / 2) by their angles: products of two such vectors know only the difference of
    their places, so the cache may hold them in any order."""
    a, b = x_BHTD.chunk(2, dim=-1)
    cos, sin = turns
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


def causal_segment_mask(segments: Tensor) -> Tensor:
    """segments (B, L) -> bool (B, 1, L, L): earlier or same place, and same segment."""
    same = segments[:, None, :, None] == segments[:, None, None, :]
    return same & torch.ones(segments.shape[1], segments.shape[1], dtype=torch.bool, device=segments.device).tril()
