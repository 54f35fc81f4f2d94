"""FLOPs of a training step as they are counted by convention, and as they are executed.

The convention (`Gato.flops_per_token`) counts the head for every token and attention as if it were not causal. We run
the head and the last block's feed-forward on the tokens that predict a target alone, and attention within segments, so
a share of the peak by convention flatters: it is printed beside that of what is executed.
"""

from __future__ import annotations

import numpy as np
import torch

from schemas.vocabulary import Vocabulary
from shards.batch import Batch
from trainer.loss import LossConfig, action_ids, aligned
from trainer.model import Gato, ModelConfig


def by_convention(model: ModelConfig, vocabulary: Vocabulary, length: int) -> float:
    """FLOPs per token of a step, of a model that is not built for it."""
    with torch.device("meta"):
        return Gato(model, vocabulary).flops_per_token(length)


def executed(model: ModelConfig, ids: int, batches: list[Batch]) -> float:
    """FLOPs per token of matrix products, forward and backward, on numpy batches; patches left out. `ids`: rows of
    the head that are multiplied."""
    W, inner, F = model.width, model.heads * model.head_size, model.feed_forward
    feed_forward = (2 if model.feed_forward_form == "gelu" else 3) * W * F
    total = tokens = 0.0
    for batch in batches:
        N, n = batch.tokens.size, len(batch.predict_index)
        segments = np.diff(batch.cu_seqlens.astype(np.int64))
        attention = 6.0 * float(np.square(segments).sum()) * inner
        total += 6.0 * model.blocks * N * 4 * W * inner + model.blocks * attention
        total += 6.0 * feed_forward * ((model.blocks - 1) * N + n) + 6.0 * n * ids * W
        tokens += N
    return total / tokens


def head_ids(loss: LossConfig, vocabulary: Vocabulary, text: bool) -> int:
    """Rows of the head that a loss multiplies."""
    whole = text or loss.softmax == "vocabulary"
    return aligned(vocabulary.size if whole else action_ids(vocabulary).size)
