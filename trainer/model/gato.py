"""Gato: embed a batch, run the transformer, score tokens with the embedding table itself.

tokens, roles, positions, patches -> x (B, L, W) -> blocks -> norm -> hidden (B, L, W) -> logits (paper §2.2, §2.3)

`sequence` "timesteps" is ours: a timestep's observation tokens, each scaled by a vector of its place, are summed to one
element of the sequence, S of them instead of L. A continuous value shows for the most part as what its bin stands for,
standardised place by place, along a vector of its place. A timestep's hidden state, scaled by the vector of an action
token's place, predicts it, all of them at once. Tokens, table and head are the same.

Invariant: hidden at place p depends on places <= p of p's segment alone, so the
logits that predict an action never see it; nor, by timesteps, any other action that is a target.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from schemas.dataset import ObservationScale
from schemas.layout import ACTION, OBSERVATION, PAD, PATCH, SEPARATOR, TEXT
from schemas.vocabulary import Vocabulary, bin_centres, bin_values
from shards.batch import Batch
from trainer.model.patch import PatchEmbedding
from trainer.model.presets import ModelConfig
from trainer.model.transformer import Block, Cache, causal_segment_mask, flash_serves, rope_cos_sin

LARGEST = 10.0  # value that is shown, in deviations
TABLE_SHARE = 0.1  # of its embedding, that a continuous value shows beside what is linear in it (docs/ablations.md)
Blocks = Sequence[Callable[..., Tensor]]
"""A model's blocks as functions: themselves, or compiled."""


def observed(roles: Tensor) -> Tensor:
    """Mask of the observation's tokens, bool."""
    return (roles == TEXT) | (roles == PATCH) | (roles == OBSERVATION)


def timestep_slots(batch: Batch) -> Tensor:
    """(B L,): each token's timestep among the B S of the batch, S as many as any sequence has."""
    first = (batch.positions == 0) & (batch.roles != PAD)
    row = torch.arange(len(batch.tokens), device=batch.tokens.device)[:, None]
    return ((first.cumsum(1) - 1).clamp(min=0) + batch.timesteps * row).flatten()


class Gato(nn.Module):
    """One network for all tasks of a vocabulary."""

    def __init__(self, config: ModelConfig, vocabulary: Vocabulary):
        super().__init__()
        self.config, self.vocabulary = config, vocabulary
        self.tokens = nn.Embedding(vocabulary.padded_size, config.width)
        # local positions of observation tokens, then the action tokens' shared one, then zeros for the rest
        self.positions = nn.Embedding(config.local_positions + 1, config.width)
        if self.by_timesteps:
            # what each place of a timestep scales its tokens by, in and out
            self.scales = nn.Embedding(config.local_positions, config.width)
            # the direction that a standardised value shows in at each place
            self.slopes = nn.Embedding(config.local_positions, config.width)
            values = torch.as_tensor(bin_values(vocabulary), dtype=torch.float32)
            self.values: Tensor
            self.register_buffer("values", values, persistent=False)
            self.spreads: Tensor
            self.register_buffer("spreads", torch.zeros(0), persistent=False)
        if config.text_gates:
            # from what a timestep's text is to how its patches are scaled and moved
            self.gates = nn.Sequential(nn.LayerNorm(config.width), nn.Linear(config.width, 2 * config.width))
        if config.values:
            # a direction and an offset for each place of a timestep
            self.outputs = nn.Embedding(config.local_positions, config.width + 1)
        if config.returns:
            self.asked = nn.Embedding(1, config.width)
        self.patches = PatchEmbedding(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.blocks))
        self.norm = nn.LayerNorm(config.width)

    @property
    def by_timesteps(self) -> bool:
        """True if an element of the sequence is a timestep."""
        return self.config.sequence == "timesteps"

    def initialise(self, seed: int) -> Gato:
        """GPT-2's start: normal 0.02, residual outputs by 1 / sqrt(2 blocks), zero biases. A function of the seed and
        of the kind of device that holds the model."""
        generator = torch.Generator(self.tokens.weight.device).manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                nn.init.constant_(parameter, float(name.endswith("weight")))
            elif name == "scales.weight":
                parameter.data.normal_(0.0, 1.0, generator=generator)
            elif name == "outputs.weight":
                parameter.data.zero_()
            elif name in ("slopes.weight", "asked.weight", "gates.1.weight"):
                parameter.data.normal_(0.0, self.config.width**-0.5, generator=generator)
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
        count, device = self.vocabulary.bins, self.tokens.weight.device
        centres = torch.as_tensor(bin_centres(count), dtype=torch.float32, device=device)
        frequencies = torch.logspace(0, math.log2(count / 16), 16, base=2.0, device=device) * math.pi
        waves = torch.cat([(centres[:, None] * frequencies).sin(), (centres[:, None] * frequencies).cos()], dim=1)
        mixture = torch.randn(waves.shape[1], self.config.width, generator=generator, device=device)
        smooth = waves @ mixture * (0.02 / 4.0)
        starts = {self.vocabulary.observation_continuous.start, self.vocabulary.action_continuous.start}
        for start in sorted(starts):
            rows = self.tokens.weight[start : start + count]
            rows.copy_(smooth.to(rows) + rows * 0.1)

    def embed(self, batch: Batch, table: Tensor | None = None, slots: Tensor | None = None) -> Tensor:
        """(B, L, W): token, or patch, plus local position (paper §2.2, appendix C.3). `slots`: the batch's
        `timestep_slots`, which texts that gate patches need."""
        if table is None:
            x = self.tokens(batch.tokens.int())
        else:  # patches and padding have id 0, whatever it shows
            x = F.embedding((batch.tokens.int() - len(self.tokens.weight) + len(table)).clamp(min=0), table)
        # also where a batch has no patches: every rank must make the same gradients, or their reduction jams
        embedded = self.patches(batch.patches, batch.patch_positions).to(x.dtype)
        if self.config.text_gates:
            assert slots is not None
            embedded = self.gated(embedded, self._texts(batch, x, slots))
        x = x.flatten(0, 1).index_copy(0, batch.patch_index.long(), embedded).view_as(x)
        if self.by_timesteps:
            # an action token without loss is a prompt's
            shown = observed(batch.roles) | ((batch.roles == ACTION) & ~batch.supervised)
            spread = self.spreads[batch.tasks[:, None], self._rows(batch.positions)]
            x = self.scaled(x, batch.tokens, batch.positions, shown, spread)
        else:
            x = x + self.local(batch.roles, batch.positions)
        if self.config.returns:
            asked = batch.returns.gather(1, batch.segments.long())
            x = x + self.asked_for(asked * (batch.roles == SEPARATOR))
        return x

    def gated(self, patches: Tensor, texts: Tensor) -> Tensor:
        """Patches (..., W), and what of them concerns the text of their timestep, given as `texts` (..., W), the sum
        of its scaled tokens: they are scaled and moved channel by channel (FiLM, arXiv 1709.07871)."""
        scale, move = self.gates(texts).chunk(2, dim=-1)
        return patches + F.gelu(patches * scale + move)

    def _texts(self, batch: Batch, x: Tensor, slots: Tensor) -> Tensor:
        """(M, W): the sum of the scaled text tokens in the timestep of each of a batch's M patches."""
        x = self._placed(x, self._rows(batch.positions)) * (batch.roles == TEXT)[..., None]
        texts = torch.zeros(len(batch.tokens) * batch.timesteps, x.shape[-1], dtype=x.dtype, device=x.device)
        texts = texts.index_add(0, slots, x.flatten(0, 1))
        return texts.index_select(0, slots.index_select(0, batch.patch_index.long()))

    def asked_for(self, returns: Tensor) -> Tensor:
        """(..., W): what standardised returns (...) add to the separators of their timesteps."""
        direction = self.asked(torch.zeros((), dtype=torch.int64, device=returns.device))
        return returns.clamp(-LARGEST, LARGEST)[..., None].to(direction.dtype) * direction

    def scaled(self, x: Tensor, tokens: Tensor, positions: Tensor, shown: Tensor, spread: Tensor) -> Tensor:
        """What `tokens` (...), embedded as x (..., W), at `positions` (...) of their timestep give to its element;
        nothing where not `shown`. `spread` (..., 2): their rows of `spread_of`."""
        index = self._rows(positions)
        value, continuous = self._values_of(tokens)
        factor, move = spread.unbind(-1)
        continuous = continuous & (factor != 0)
        value = ((value * factor + move).clamp(-LARGEST, LARGEST) * continuous).to(x.dtype)
        x = x * torch.where(continuous, TABLE_SHARE, 1.0)[..., None].to(x.dtype)
        x = self._placed(x, index) + value[..., None] * self.slopes(index)
        return x * shown[..., None]

    def _rows(self, positions: Tensor) -> Tensor:
        """Rows (...) int32 of the tables of places for `positions` (...) of a timestep; all after the last share it."""
        return positions.int().clamp(max=self.config.local_positions - 1)

    def _placed(self, x: Tensor, index: Tensor) -> Tensor:
        """Tokens embedded as x (..., W), scaled and moved by their `index` (...) within the timestep."""
        return x * self.scales(index) + self.positions(index)

    def _values_of(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Values (...) of tokens of continuous observations, and which are some."""
        ids = self.vocabulary.observation_continuous
        number = tokens.long() - ids.start
        return self.values[number.clamp(0, ids.size - 1)], (number >= 0) & (number < ids.size)

    def standardise(self, scales: Mapping[str, ObservationScale]) -> None:
        """Set how the values of each task of a stream, in its order, are scaled: a linear function of standardised
        values is what a policy of a body is learned by fastest, and what holds beyond what was seen."""
        self.task_rows = {name: row for row, name in enumerate(scales)}
        self.spreads = torch.stack([self.spread_of(scale) for scale in scales.values()]).to(self.slopes.weight.device)

    def spread_of(self, scale: ObservationScale) -> Tensor:
        """(P, 2) float32: what values are multiplied by and moved by at each position of a task's timestep; zeros where
        tokens stand for no values."""
        spread = torch.tensor([1.0, 0.0]).repeat(self.config.local_positions, 1)
        mean, std = (torch.tensor(values[: len(spread)]) for values in (scale.mean, scale.std))
        spread[: len(mean)] = torch.where(std[:, None] > 0, torch.stack([1 / std, -mean / std], dim=1), 0.0)
        return spread

    def local(self, roles: Tensor, positions: Tensor) -> Tensor:
        """(..., W): what tokens of these roles get added for their index within the timestep."""
        action, form = roles == ACTION, self.config.action_position
        shown = (observed(roles) if form == "none" else observed(roles) | action)[..., None]
        index = self._rows(positions)
        if form != "own":
            index = torch.where(action, self.config.local_positions, index)
        return self.positions(index) * shown

    def rope(self, places: Tensor) -> Tensor | None:
        """Rotary angles of tokens at `places` (T,) of an episode or a sequence."""
        if self.config.rotary == "none":
            return None
        return rope_cos_sin(places, self.config.head_size, self.tokens.weight.dtype)

    def forward(
        self,
        batch: Batch,
        branch_scale: Tensor | None = None,
        predict_index: Tensor | None = None,
        table: Tensor | None = None,
    ) -> Tensor:
        """Hidden states (B, L, W) after the last norm, or (N, W) of the places `predict_index` (N,) int32 of the
        flattened (B L) alone, which saves work in the last block. `branch_scale` (B, blocks, 2, 1 or W) scales the
        residual branches, for stochastic depth and dropout. `table`: the last rows of the embedding table, where a
        batch has no other ids; sharing them with the head saves gradients of all rows. Nothing here depends on a
        tensor's values, so a GPU's host never waits."""
        if self.by_timesteps:
            assert predict_index is not None
            return self._timesteps(batch, branch_scale, predict_index, table)
        x = self.embed(batch, table)
        # one segment a sequence needs no mask: the plain causal kernel is the same function, faster
        mask = None
        if batch.packed:
            mask = batch.cu_seqlens if flash_serves(x) else causal_segment_mask(batch.segments)
        return self.through(x, mask, branch_scale, predict_index)

    def _timesteps(
        self, batch: Batch, branch_scale: Tensor | None, predict_index: Tensor, table: Tensor | None
    ) -> Tensor:
        """`forward` with one element per timestep: hidden states (N, W) that predict the tokens after
        `predict_index`."""
        B, S, device = len(batch.tokens), batch.timesteps, batch.tokens.device
        slots = timestep_slots(batch)
        x = self.embed(batch, table, slots).flatten(0, 1)
        x = torch.zeros(B * S, x.shape[-1], dtype=x.dtype, device=device).index_add(0, slots, x)
        mask = None
        if batch.packed:
            segments = torch.zeros(B * S, dtype=batch.segments.dtype, device=device)
            segments.scatter_(0, slots, batch.segments.flatten())
            mask = causal_segment_mask(segments.view(B, S))
        hidden = self.through(x.view(B, S, -1), mask, branch_scale).flatten(0, 1)
        hidden = hidden.index_select(0, slots.index_select(0, predict_index))
        position = batch.positions.flatten().index_select(0, predict_index + 1)
        return hidden * self.scales_at(position)

    def through(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        branch_scale: Tensor | None = None,
        predict_index: Tensor | None = None,
    ) -> Tensor:
        """Hidden states of embedded elements x (B, S, W), or of the places `predict_index` alone; see `forward`."""
        rope = self.rope(torch.arange(x.shape[1], device=x.device))
        # a float32 scale would make float32 of all that follows
        branch_scale = None if branch_scale is None else branch_scale.to(x.dtype)
        for number, block in enumerate(self.blocks):
            last = {"predict_index": predict_index} if number == len(self.blocks) - 1 else {}
            x = block(x, mask, None if branch_scale is None else branch_scale[:, number], rope=rope, **last)
        return self.norm(x)

    def scales_at(self, positions: Tensor) -> Tensor:
        """(..., W): what tokens at these positions of their timestep are scaled by on the way in, and what a timestep's
        hidden state is scaled by where the token at one is predicted."""
        return self.scales(self._rows(positions))

    def values_at(self, hidden: Tensor, positions: Tensor) -> Tensor:
        """(...): the numbers, in [-1, 1] as bins' centres are, of action tokens at `positions` (...) of their timestep
        that hidden states (..., W) predict."""
        output = self.outputs(self._rows(positions))
        return (hidden * output[..., :-1]).sum(dim=-1) + output[..., -1]

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
        they attend to all S slots where `mask` (T, S) float is 0 and not -inf. Rows of x after those that the cache
        has are padding, which matrix products may want (see eval/agents/base.py). All shapes stay while a window moves,
        and nothing is decided here by a tensor's values, so a graph may be captured of it. `blocks`: the model's own
        in another form."""
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
        embedding = sum(table.weight.numel() for table in self.children() if isinstance(table, nn.Embedding))
        total = sum(p.numel() for p in self.parameters())
        counts = {"embedding": embedding, "vision": vision, "transformer": total - vision - embedding}
        return counts | {"total": total}

    def flops_per_token(self, length: int) -> float:
        """FLOPs of a training step (forward and backward) for each token of sequences of `length` tokens: 6 N + 12
        blocks x attention width x length, N the transformer's parameters and the vocabulary's rows of the head. The
        usual convention: the head counts for every token and attention as if it were not causal; patches apart. Of a
        model that reads timesteps it is what one that reads tokens would need."""
        config = self.config
        N = self.parameter_counts()["transformer"] + self.vocabulary.size * config.width
        return 6.0 * N + 12.0 * config.blocks * config.heads * config.head_size * length
