"""Cross-entropy on the supervised tokens only: text and actions (paper §2.3).

The head is applied to the places that predict a supervised token and to no other.
Targets of continuous actions may be softened over neighbouring bins; 0 bins is the
paper's form.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from schemas.episode import STRICT
from schemas.vocabulary import IdRange
from shards.batch import Batch
from trainer.model import Gato


@dataclass(frozen=True)
class LossConfig:
    """What a continuous action's target is."""

    __pydantic_config__ = STRICT

    soft_bins: float = 0.0
    """Standard deviation, in bins, of the Gaussian that spreads a continuous target over its neighbours."""


@dataclass(frozen=True)
class Predictions:
    """Of N supervised tokens: logits (N, V), targets (N,) int64, tasks (N,) int64."""

    logits: Tensor
    targets: Tensor
    tasks: Tensor


def predict(model: Gato, hidden: Tensor, batch: Batch) -> Predictions:
    """The logits at p - 1 for every supervised place p; supervised[:, 0] is never set."""
    chosen = batch.supervised[:, 1:]
    logits = model.logits(hidden[:, :-1][chosen])
    return Predictions(logits, batch.tokens[:, 1:][chosen].long(), batch.tasks[:, None].expand_as(chosen)[chosen])


def cross_entropy(predictions: Predictions, config: LossConfig, continuous: Tensor, ids: IdRange) -> Tensor:
    """Cross-entropy of each supervised token (N,), float32. `continuous` (tasks,) bool says which tasks'
    actions are ordered bins of the range `ids`."""
    logits, targets = predictions.logits.float(), predictions.targets
    loss = F.cross_entropy(logits, targets, reduction="none")
    if config.soft_bins == 0:
        return loss
    reach = int(3 * config.soft_bins)
    offsets = torch.arange(-reach, reach + 1, device=targets.device)
    neighbours = targets[:, None] + offsets
    inside = (neighbours >= ids.start) & (neighbours < ids.stop)
    weights = torch.exp(-0.5 * (offsets / config.soft_bins) ** 2) * inside
    weights = weights / weights.sum(dim=1, keepdim=True).clamp(min=1e-9)
    near = logits.gather(1, neighbours.clamp(0, logits.shape[1] - 1))
    soft = logits.logsumexp(dim=1) - (weights * near).sum(dim=1)
    ordered = continuous[predictions.tasks] & (targets >= ids.start) & (targets < ids.stop)
    return torch.where(ordered, soft, loss)
