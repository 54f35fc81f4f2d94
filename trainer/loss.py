"""Cross-entropy on the supervised tokens only: text and actions (paper §2.3).

    batch -> Gato -> hidden states (N, W) that predict a supervised token -> head -> summed cross-entropy

Targets of continuous actions may be softened over neighbouring bins; 0 bins is the paper's form.

Invariant: `FusedCrossEntropy` is the same sum with the same gradients as `cross_entropy`, the slow reference. It works
on a few rows at a time in one reused buffer, because writing N x V logits costs a CPU more than the arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from schemas.episode import STRICT
from schemas.vocabulary import IdRange, Vocabulary
from shards.batch import Batch
from shards.stream import Stream
from trainer.model import Gato


@dataclass(frozen=True)
class LossConfig:
    """Targets of continuous actions, and how the sum is computed."""

    __pydantic_config__ = STRICT

    soft_bins: float = 0.0
    """Standard deviation, in bins, of the Gaussian that spreads a continuous target over its neighbours."""
    softmax: Literal["vocabulary", "targets"] = "vocabulary"
    """Ids that the softmax runs over: the whole vocabulary (paper), or only the action ids if no task has text, since
    no other id is ever a target (ours)."""
    stride: int = 1
    """Score only every `stride`-th bin of a continuous action, starting at another bin in each batch (ours, for
    softened targets and bins that move smoothly): the same minimum, at a fraction of the head's cost."""
    squared: float = 100.0
    """Weight of the squared error of what a model with `values` decodes, actions scaled to [-1, 1]."""
    discrete: float = 1.0
    """Weight of tokens that are no ordered bins: discrete actions, of which a timestep has one where a body has several
    numbers, and text."""
    chunk: int = 128
    """Rows of logits in memory at a time; 0 for all at once (the plain form)."""


def select(
    gato: Gato, batch: Batch, branch_scale: Tensor | None = None, table: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For every supervised position p: hidden states (N, W) at p - 1, targets (N,) int64 at p, index in the timestep
    (N,) of p, and tasks (N,)."""
    hidden, places = gato(batch, branch_scale, batch.predict_index, table), batch.predict_index.long()
    targets, positions = (values.flatten()[places + 1] for values in (batch.tokens, batch.positions))
    return hidden, targets.long(), positions, batch.tasks[places // batch.tokens.shape[1]]


def soft_targets(targets: Tensor, ordered: Tensor, ids: IdRange, soft_bins: float) -> tuple[Tensor, Tensor]:
    """Token ids (N, R) int64 and their probabilities (N, R) float32: a Gaussian over the neighbouring bins
    of `ids` where `ordered`, all on the target elsewhere."""
    reach = int(3 * soft_bins)
    offsets = torch.arange(-reach, reach + 1, device=targets.device)
    neighbours = targets[:, None] + offsets
    inside = (neighbours >= ids.start) & (neighbours < ids.stop)
    spread = torch.exp(-0.5 * (offsets / max(soft_bins, 1e-9)) ** 2) * inside
    weights = torch.where(ordered[:, None], spread, (offsets == 0).float())
    neighbours = torch.where(inside, neighbours, targets[:, None])
    return neighbours, weights / weights.sum(dim=1, keepdim=True)


def action_ids(vocabulary: Vocabulary) -> IdRange:
    """The smallest range with the ids of all actions, continuous and discrete."""
    ranges = (vocabulary.action_continuous, vocabulary.action_discrete)
    start = min(ids.start for ids in ranges)
    return IdRange(start, max(ids.stop for ids in ranges) - start)


def centre_of(targets: Tensor, ids: IdRange) -> Tensor:
    """Centres, float32, of the bins `ids` that targets (N,) are; no meaning where they are none."""
    return (targets - ids.start + 0.5).float() * (2 / ids.size) - 1


def cross_entropy(logits: Tensor, neighbours: Tensor, weights: Tensor) -> Tensor:
    """The plain form: cross-entropy of each row (N,), float32, of logits (N, V) against soft targets."""
    logits = logits.float()
    return logits.logsumexp(dim=1) - (weights * logits.gather(1, neighbours)).sum(dim=1)


def strided_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, first: Tensor | int, stride: int, soft_bins: float
) -> Tensor:
    """Sum over rows of the cross-entropy of bins first, first + stride, ... against a Gaussian around the targets (N,),
    counted from the first bin, with all bins' rows `weight`. `first` () in [0, stride) stays on the device."""
    count = len(weight)
    bins = first + torch.arange(0, count, stride, device=hidden.device)
    logits = functional.linear(hidden, weight.index_select(0, bins.clamp(max=count - 1))).float()
    near = -0.5 * ((bins - targets[:, None]) / soft_bins) ** 2
    if count % stride:  # the last bin may lie beyond the range
        near, logits = (x.masked_fill(bins >= count, -1e9) for x in (near, logits))
    weights = torch.softmax(near, dim=1)
    return (logits.logsumexp(dim=1) - (weights * logits).sum(dim=1)).sum()


def aligned(size: int) -> int:
    """Rows of the head that are multiplied for `size` ids: a GPU's kernels are slow at other than multiples of 64."""
    return -(-size // 64) * 64


class FusedCrossEntropy(torch.autograd.Function):
    """Sum over rows of cross_entropy(hidden @ weight[:size].T, ...), gradients computed in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, neighbours: Tensor, weights: Tensor, size: int, chunk: int
    ) -> Tensor:
        rows = len(hidden)
        hidden_gradient, weight_gradient = torch.empty_like(hidden), torch.zeros_like(weight)
        buffer = torch.empty(min(chunk, rows), len(weight), dtype=hidden.dtype, device=hidden.device)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for first in range(0, rows, chunk):
            part = slice(first, min(first + chunk, rows))
            logits = torch.mm(hidden[part], weight.T, out=buffer[: part.stop - first])
            logits[:, size:] = -torch.inf
            peak = logits.amax(dim=1, keepdim=True)
            near = logits.gather(1, neighbours[part]).float()
            mass = logits.sub_(peak).exp_().sum(dim=1, keepdim=True, dtype=torch.float32)
            total += (mass.log() + peak.float()).sum() - (weights[part] * near).sum()
            gradient = logits.div_(mass.to(logits.dtype))
            gradient.scatter_add_(1, neighbours[part], -weights[part].to(logits.dtype))
            torch.mm(gradient, weight, out=hidden_gradient[part])
            weight_gradient.addmm_(gradient.T, hidden[part])
        ctx.save_for_backward(hidden_gradient, weight_gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden_gradient, weight_gradient = ctx.saved_tensors
        scale = upstream[0].to(hidden_gradient.dtype)
        return hidden_gradient.mul_(scale), weight_gradient.mul_(scale), None, None, None, None


@dataclass(frozen=True)
class Targets:
    """Requirements of a stream's tasks on the loss."""

    ordered: tuple[bool, ...]
    """For each task, whether its actions are continuous: bins in an order."""
    text: bool
    """True if any task's text is predicted."""
    text_shown: bool
    """True if any task has text at all; where none has, the rows of its ids take no part."""


def targets_of(stream: Stream) -> Targets:
    """Of a stream's tasks."""
    actions = [timeline.dataset.manifest.tasks[timeline.task].spec.action for timeline in stream.timelines]
    return Targets(
        ordered=tuple(bool(action and action.kind == "continuous") for action in actions),
        text=any(stream.predicts_text(timeline) for timeline in stream.timelines),
        text_shown=any(timeline.layout.text for timeline in stream.timelines),
    )


class Objective(nn.Module):
    """Gato and its loss as one module: batch -> summed cross-entropy. All parameters are used inside one forward, as
    ZeRO 3 needs."""

    def __init__(self, gato: Gato, config: LossConfig, asked: Targets):
        super().__init__()
        self.gato, self.config, self.asked = gato, config, asked
        whole = asked.text or config.softmax == "vocabulary"
        self.ids = IdRange(0, gato.vocabulary.size) if whole else action_ids(gato.vocabulary)
        # text's rows, 15 of 16 that a table has, get no gradient to be made, added and measured where there is no text
        above = min(action_ids(gato.vocabulary).start, gato.vocabulary.observation_discrete.start)
        without = not whole and not asked.text_shown
        self.first = gato.vocabulary.text.stop if without and above >= gato.vocabulary.text.stop else 0
        self.ordered: Tensor
        self.register_buffer("ordered", torch.tensor(asked.ordered), persistent=False)

    def forward(self, batch: Batch, branch_scale: Tensor | None = None) -> Tensor:
        table = self.gato.tokens.weight[self.first :]
        hidden, targets, positions, tasks = select(self.gato, batch, branch_scale, table if self.first else None)
        ids = self.gato.vocabulary.action_continuous
        ordered = self.ordered[tasks] & (targets >= ids.start) & (targets < ids.stop)
        total = hidden.new_zeros((), dtype=torch.float32)
        if self.gato.config.values:
            errors = self.gato.values_at(hidden, positions).float() - centre_of(targets, ids)
            total = total + self.config.squared * (errors.square() * ordered).sum()
        if self.config.stride > 1:
            rows, stride = table[ids.start - self.first : ids.stop - self.first], self.config.stride
            first = batch.tokens.sum() % stride  # any number that the batch alone decides
            bins = targets[ordered] - ids.start
            total = total + strided_cross_entropy(hidden[ordered], rows, bins, first, stride, self.config.soft_bins)
        elif self.config.discrete != 1:
            total = total + self._whole(table, hidden[ordered], targets[ordered], ordered[ordered])
        else:
            return total + self._whole(table, hidden, targets, ordered)
        rest = ~ordered
        return total + self.config.discrete * self._whole(table, hidden[rest], targets[rest], ordered[rest])

    def _whole(self, table: Tensor, hidden: Tensor, targets: Tensor, ordered: Tensor) -> Tensor:
        """Summed cross-entropy over all ids."""
        if not len(targets):
            return hidden.sum() * 0
        ids = self.gato.vocabulary.action_continuous
        neighbours, weights = soft_targets(targets, ordered, ids, self.config.soft_bins)
        neighbours = neighbours - self.ids.start
        start = self.ids.start - self.first
        if self.config.chunk == 0:
            weight = table[start : start + self.ids.size]
            return cross_entropy(functional.linear(hidden, weight), neighbours, weights).sum()
        weight = table[start : start + aligned(self.ids.size)]
        if torch.is_autocast_enabled(hidden.device.type):
            # norms give float32 there, and the head's products below are not among those that autocast converts
            dtype = torch.get_autocast_dtype(hidden.device.type)
            hidden, weight = hidden.to(dtype), weight.to(dtype)
        return FusedCrossEntropy.apply(hidden, weight, neighbours, weights, self.ids.size, self.config.chunk)


@torch.no_grad()
def held_out_logits(gato: Gato, batch: Batch, ids: IdRange) -> tuple[Tensor, Tensor, Tensor | None]:
    """Logits (N, ids) float32 and targets (N,), counted from the first of `ids`, of a batch's supervised tokens; the
    numbers (N,) that a model with `values` decodes."""
    hidden, targets, positions, _ = select(gato, batch)
    logits = functional.linear(hidden, gato.tokens.weight[ids.start : ids.stop]).float()
    return logits, targets - ids.start, gato.values_at(hidden, positions) if gato.config.values else None
