"""Held-out loss, accuracy and action error of each task: the first windows of episodes never trained on."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from schemas.vocabulary import bin_centres
from shards.stream import Stream
from trainer.loss import held_out_logits
from trainer.model import Gato


@torch.no_grad()
def evaluate(
    model: Gato, stream: Stream, tasks: Iterable[int], sequences: int, micro_batch: int, device: torch.device
) -> dict[str, float]:
    """`held_out/TASK/{loss, accuracy, action_error, ...}` of some tasks, over at most `sequences` windows of each.

    loss: nats a token against the exact bin, whatever the training targets are; accuracy: share of tokens
    whose most likely id is the logged one. Continuous actions only: action_error: mean |greedy bin centre - logged
    one|, in units of the action space scaled to [-1, 1]; bin_error: the same in bins; mean_error: mean |expected bin
    centre - logged one|, for the decoding by the mean of bins."""
    training, ids = model.training, model.vocabulary.action_continuous
    centres = torch.as_tensor(bin_centres(ids.size), dtype=torch.float32, device=device)
    model.eval()
    figures: dict[str, float] = {}
    for task in tasks:
        name, timeline = stream.tasks[task], stream.timelines[task]
        windows = min(sequences, timeline.windows)
        loss = correct = error = mean_error = count = 0.0
        for first in range(0, windows, micro_batch):
            batch = stream.evaluation_batch(task, np.arange(first, min(first + micro_batch, windows))).to(device)
            logits, targets = held_out_logits(model, batch)
            loss += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
            best = logits.argmax(dim=1)
            correct += float((best == targets).sum())
            count += len(targets)
            restricted, logged = logits[:, ids.start : ids.stop], centres[(targets - ids.start).clamp(0, ids.size - 1)]
            error += float((centres[restricted.argmax(dim=1)] - logged).abs().sum())
            mean_error += float((restricted.softmax(dim=1) @ centres - logged).abs().sum())
        figures[f"held_out/{name}/loss"] = loss / max(1.0, count)
        figures[f"held_out/{name}/accuracy"] = correct / max(1.0, count)
        action = timeline.dataset.manifest.tasks[timeline.task].spec.action
        if action and action.kind == "continuous":
            figures[f"held_out/{name}/action_error"] = error / max(1.0, count)
            figures[f"held_out/{name}/bin_error"] = error / max(1.0, count) / float(centres[1] - centres[0])
            figures[f"held_out/{name}/mean_error"] = mean_error / max(1.0, count)
    model.train(training)
    return figures
