"""Decoder-only, pre-norm transformer with causal segment attention and a static key/value cache.

Shape suffixes: B sequences, T tokens in, S tokens attended to, H heads, D head size, W width.

Attention has no position term, so a cache may hold its keys in any order: slots of evicted timesteps are overwritten.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.model import segments
from trainer.model.presets import ModelConfig


class Cache:
    """Keys and values of `slots` tokens, a pair (B, H, S, D) for each block."""

    def __init__(self, config: ModelConfig, batch: int, slots: int, device: torch.device | str, dtype: torch.dtype):
        shape = (batch, config.heads, slots, config.head_size)
        self.blocks = [
            (torch.zeros(shape, device=device, dtype=dtype), torch.zeros(shape, device=device, dtype=dtype))
            for _ in range(config.blocks)
        ]

    def keep(self, rows: Tensor) -> None:
        """Sequences `rows` (n,) int64 of those held, in this order; one may be asked for several times."""
        self.blocks = [(keys[rows], values[rows]) for keys, values in self.blocks]

    def copy_(self, other: Cache) -> None:
        """Hold what another cache of the same shape holds, in this one's memory."""
        for mine, given in zip(self.blocks, other.blocks):
            for held, value in zip(mine, given):
                held.copy_(value)


class Attention(nn.Module):
    """Multi-head self-attention; `mask` bool (B, 1, T, S), True where attended, or None for plain causal, or int32, see
    `segment_attention`. With a cache float (T, S), 0 or -inf; rows of x beyond the cache's are left without attention
    (see Gato.step)."""

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
        rope: Tensor | None = None,
    ) -> Tensor:
        B, T, _ = x_BTW.shape
        qkv = self.qkv(x_BTW).view(B, T, 3, self.heads, self.head_size).permute(2, 0, 3, 1, 4)
        qk, v = qkv.split((2, 1))
        if self.qk_norm:
            qk = F.rms_norm(qk, qk.shape[-1:])
        if rope is not None:
            qk = rotate(qk, rope)
        (q, k), v = qk, v[0]
        if cache is not None:
            assert slots is not None
            keys_BHSD, values_BHSD = cache
            held = len(keys_BHSD)
            keys_BHSD.index_copy_(2, slots, k[:held])
            values_BHSD.index_copy_(2, slots, v[:held])
            q, k, v = q[:held], keys_BHSD, values_BHSD
        if mask is not None and mask.dtype == torch.int32:
            y_BHTD = segment_attention(q, k, v, mask)
        elif cache is not None and T == 1 and q.is_cuda:
            assert mask is not None
            y_BHTD = one_query_attention(q, k, v, mask)
        else:
            y_BHTD = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and T > 1)
        y_BTW = y_BHTD.transpose(1, 2).flatten(2)
        return self.out(y_BTW if len(y_BTW) == B else F.pad(y_BTW, (0, 0, 0, 0, 0, B - len(y_BTW))))


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
    """x + attention(norm(x)), then x + feed-forward(norm(x)). `branch_scale` (B, 2, 1 or W) scales the two branches.
    With `predict_index` (N,) int32, places of the flattened (B T), the feed-forward and the result (N, W) are of
    these places alone."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.norm_1, self.attention = nn.LayerNorm(config.width), Attention(config)
        self.norm_2, self.feed_forward = nn.LayerNorm(config.width), FeedForward(config)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None,
        branch_scale: Tensor | None = None,
        cache: tuple[Tensor, Tensor] | None = None,
        slots: Tensor | None = None,
        rope: Tensor | None = None,
        predict_index: Tensor | None = None,
    ) -> Tensor:
        branch = self.attention(self.norm_1(x), mask, cache, slots, rope)
        x = x + (branch if branch_scale is None else branch * branch_scale[:, :1])
        scale = None if branch_scale is None else branch_scale[:, 1:]
        if predict_index is not None:
            T, x = x.shape[1], x.flatten(0, 1).index_select(0, predict_index)
            scale = None if scale is None else scale[:, 0].index_select(0, predict_index // T)
        branch = self.feed_forward(self.norm_2(x))
        return x + (branch if scale is None else branch * scale)


def rope_cos_sin(places: Tensor, head_size: int, dtype: torch.dtype) -> Tensor:
    """places (T,) -> (2, T, D): cosines of place * 10000 ** (-2 i / D) for features i and i + D / 2, and sines,
    negative for the former. Made in float64: an episode's places go into the hundred thousands, where float32 angles
    are off by hundredths."""
    powers = torch.arange(0, head_size, 2, device=places.device, dtype=torch.float64) / head_size
    angles = places[:, None] * 10000.0**-powers
    cos, sin = angles.cos(), angles.sin()
    return torch.stack([torch.cat([cos, cos], dim=1), torch.cat([-sin, sin], dim=1)]).to(dtype)


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """x (..., T, D): turn feature pairs (i, i + D / 2) by their angles. Products of two such vectors know only the
    difference of their places, so the cache may hold them in any order."""
    cos, sin = rope
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def flash_serves(x: Tensor) -> bool:
    """True if `segment_attention` can run on what blocks make of x: on a GPU, in two bytes."""
    return x.is_cuda and (x.element_size() == 2 or torch.is_autocast_enabled("cuda"))


def segment_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Causal attention (B, H, T, D) within the segments that begin at `cu_seqlens` (S,) int32 of the flattened (B T):
    the same function as a `causal_segment_mask`, by a kernel for sequences of varying length (see
    trainer/model/segments.py), which reads no mask and skips what one would hide."""
    B, _, T, _ = v.shape
    # rotary angles in float32 make float32 of q and k under autocast
    q, k, v = (x.to(v.dtype).transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    return segments.attend(q, k, v, cu_seqlens, T).unflatten(0, (B, T)).transpose(1, 2)


def one_query_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention (B, H, 1, D) of one query to S keys by plain products: with a mask, a GPU's kernels give all keys of a
    head to one of its processors, and leave most of them idle."""
    scores = (q @ k.transpose(2, 3)).float() * q.shape[-1] ** -0.5 + mask.float()
    return scores.softmax(dim=-1).to(v.dtype) @ v


def causal_segment_mask(segments: Tensor) -> Tensor:
    """segments (B, L) -> bool (B, 1, L, L): earlier or same place, and same segment."""
    same = segments[:, None, :, None] == segments[:, None, None, :]
    return same & torch.ones(segments.shape[1], segments.shape[1], dtype=torch.bool, device=segments.device).tril()
