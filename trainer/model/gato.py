"""Gato: embed a batch, run the transformer, score tokens with the embedding table itself.

tokens, roles, positions, patches -> x (B, L, W) -> blocks -> norm -> hidden (B, L, W) -> logits (paper §2.2, §2.3)

Invariant: hidden at place p depends on places <= p of p's segment alone, so the
logits that predict an action never see it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from schemas.layout import ACTION, OBSERVATION, PATCH, TEXT
from schemas.vocabulary import Vocabulary, bin_centres
from shards.batch import Batch
from trainer.model.patch import PatchEmbedding
from trainer.model.presets import ModelConfig
from trainer.model.transformer import Block, Cache, causal_segment_mask, flash_serves, rope_cos_sin

Blocks = Sequence[Callable[..., Tensor]]
"""What does a model's blocks' work: these themselves, or compiled."""


class Gato(nn.Module):
    """One network for all tasks of a vocabulary."""

    def __init__(self, config: ModelConfig, vocabulary: Vocabulary):
        super().__init__()
        self.config, self.vocabulary = config, vocabulary
        self.tokens = nn.Embedding(vocabulary.padded_size, config.width)
        # local positions of observation tokens, then the action tokens' shared one, then zeros for the rest
        self.positions = nn.Embedding(config.local_positions + 1, config.width)
        self.patches = PatchEmbedding(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.blocks))
        self.norm = nn.LayerNorm(config.width)

    def initialise(self, seed: int) -> Gato:
        """GPT-2's start: normal 0.02, residual outputs by 1 / sqrt(2 blocks), zero biases. A function of the seed."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                nn.init.constant_(parameter, float("norm" in name and name.endswith("weight")))
            elif "patches" in name and parameter.ndim == 4:
                fan_in = math.prod(parameter.shape[1:])
                parameter.data.normal_(0.0, fan_in**-0.5, generator=generator)
            else:
                residual = name.endswith(("attention.out.weight", "feed_forward.down.weight"))
                std = 0.02 / math.sqrt(2 * self.config.blocks) if residual else 0.02
                parameter.data.normal_(0.0, std, generator=generator)
        if self.config.smooth_bins:
            self._smooth_bins(generator)
        return self

    @torch.no_grad()
    def _smooth_bins(self, generator: torch.Generator) -> None:
        """Bins of a continuous value start close to their neighbours: random mixtures of sines and cosines
        of the bin's centre, periods from the whole range down to 16 bins, plus a tenth as much independent noise."""
        count = self.vocabulary.bins
        centres = torch.as_tensor(bin_centres(count), dtype=torch.float32)
        frequencies = torch.logspace(0, math.log2(count / 16), 16, base=2.0) * math.pi
        waves = torch.cat([(centres[:, None] * frequencies).sin(), (centres[:, None] * frequencies).cos()], dim=1)
        mixture = torch.randn(waves.shape[1], self.config.width, generator=generator)
        smooth = waves @ mixture * (0.02 / 4.0)
        starts = {self.vocabulary.observation_continuous.start, self.vocabulary.action_continuous.start}
        for start in sorted(starts):
            rows = self.tokens.weight[start : start + count]
            rows.copy_(smooth.to(rows) + rows * 0.1)

    def embed(self, batch: Batch) -> Tensor:
        """(B, L, W): token, or patch, plus local position (paper §2.2, appendix C.3)."""
        x = self.tokens(batch.tokens.int())
        # also where a batch has no patches: every rank must make the same gradients, or their reduction jams
        embedded = self.patches(batch.patches, batch.patch_positions).to(x.dtype)
        x = x.flatten(0, 1).index_copy(0, batch.patch_index.long(), embedded).view_as(x)
        return x + self.local(batch.roles, batch.positions)

    def local(self, roles: Tensor, positions: Tensor) -> Tensor:
        """(..., W): what tokens of these roles get added for their index within the timestep."""
        observed = (roles == TEXT) | (roles == PATCH) | (roles == OBSERVATION)
        last, action, form = self.config.local_positions, roles == ACTION, self.config.action_position
        shown = (observed if form == "none" else observed | action)[..., None]
        index = positions.int().clamp(max=last - 1)
        if form != "own":
            index = torch.where(action, last, index)
        return self.positions(index) * shown

    def rope(self, places: Tensor) -> Tensor | None:
        """Rotary angles of tokens at `places` (T,) of an episode or a sequence."""
        if self.config.rotary == "none":
            return None
        return rope_cos_sin(places, self.config.head_size, self.tokens.weight.dtype)

    def forward(self, batch: Batch, branch_scale: Tensor | None = None, predict_index: Tensor | None = None) -> Tensor:
        """Hidden states (B, L, W) after the last norm, or (N, W) of the places `predict_index` (N,) int32 of the
        flattened (B L) alone, which saves work in the last block. `branch_scale` (B, blocks, 2, 1 or W) scales the
        residual branches, for stochastic depth and dropout. Nothing here depends on a tensor's values, so a GPU's
        host never waits."""
        x = self.embed(batch)
        # one segment a sequence needs no mask: the plain causal kernel is the same function, faster
        mask = None
        if batch.packed:
            mask = batch.cu_seqlens if flash_serves(x) else causal_segment_mask(batch.segments)
        rope = self.rope(torch.arange(x.shape[1], device=x.device))
        # a float32 scale would make float32 of all that follows
        branch_scale = None if branch_scale is None else branch_scale.to(x.dtype)
        for number, block in enumerate(self.blocks):
            last = {"predict_index": predict_index} if number == len(self.blocks) - 1 else {}
            x = block(x, mask, None if branch_scale is None else branch_scale[:, number], rope=rope, **last)
        return self.norm(x)

    def step(
        self,
        x: Tensor,
        cache: Cache,
        slots: Tensor,
        mask: Tensor,
        rope: Tensor | None,
        blocks: Blocks | None = None,
    ) -> Tensor:
        """Hidden states of new embedded tokens x (B, T, W). Their keys are written to cache `slots` (T,) int64, then
        they attend to all S slots where `mask` (T, S) float is 0 and not -inf. Rows of x behind those that the cache
        has are padding, which matrix products may want (see eval/agent.py). All shapes stay while a window moves, and
        nothing is decided here by a tensor's values, so a graph may be captured of it. `blocks`: the model's own in
        another form."""
        form: Blocks = list(self.blocks) if blocks is None else blocks
        for block, held in zip(form, cache.blocks):
            x = block(x, mask, None, held, slots, rope)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., W) -> (..., vocabulary size): the embedding table is the head (paper, appendix C.1)."""
        return F.linear(hidden, self.tokens.weight[: self.vocabulary.size])

    def parameter_counts(self) -> dict[str, int]:
        """True counts: embedding (tied with the head, padded rows included), vision, transformer, total."""
        vision = sum(p.numel() for p in self.patches.parameters())
        embedding = self.tokens.weight.numel() + self.positions.weight.numel()
        total = sum(p.numel() for p in self.parameters())
        counts = {"embedding": embedding, "vision": vision, "transformer": total - vision - embedding}
        return counts | {"total": total}

    def flops_per_token(self, length: int) -> float:
        """FLOPs of a training step (forward and backward) for each token of sequences of `length` tokens: 6 N + 12
        blocks x attention width x length, N the transformer's parameters and the vocabulary's rows of the head. The
        usual convention: the head counts for every token and attention as if it were not causal; patches apart."""
        config = self.config
        N = self.parameter_counts()["transformer"] + self.vocabulary.size * config.width
        return 6.0 * N + 12.0 * config.blocks * config.heads * config.head_size * length
