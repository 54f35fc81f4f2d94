"""Held-out loss, accuracy and action error of each task: the first windows of episodes never trained on."""

from __future__ import annotations

import numpy as np
import torch

from schemas.vocabulary import IdRange, bin_centres
from shards.stream import Stream
from trainer.loss import held_out_logits
from trainer.model import Gato


@torch.no_grad()
def evaluate(model: Gato, stream: Stream, sequences: int, micro_batch: int, device: torch.device) -> dict[str, float]:
    """`held_out/TASK/{loss, accuracy, action_error}` over at most `sequences` windows a task.

    loss: nats a token against the exact bin, whatever the training targets are, over the ids that can stand there
    (actions', where a task's text is not supervised); accuracy: share of tokens whose most likely id is the logged
    one; action_error: mean |greedy bin centre - logged one|, mean_action_error: the same of the mean of bins, in
    units of the action space scaled to [-1, 1], continuous actions only."""
    training, vocabulary = model.training, model.vocabulary
    ids = vocabulary.action_continuous
    centres = torch.as_tensor(bin_centres(ids.size), dtype=torch.float32, device=device)
    model.eval()
    figures: dict[str, float] = {}
    for task, (name, timeline) in enumerate(zip(stream.tasks, stream.timelines)):
        windows = min(sequences, timeline.windows)
        loss = correct = error = mean_error = count = 0.0
        action = timeline.dataset.manifest.tasks[timeline.task].spec.action
        scored = IdRange(0, vocabulary.size)
        if action and not timeline.layout.text:
            scored = vocabulary.range("action", action.kind)
        for first in range(0, windows, micro_batch):
            batch = stream.evaluation_batch(task, np.arange(first, min(first + micro_batch, windows))).to(device)
            logits, targets = held_out_logits(model, batch, scored)
            loss += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
            best = logits.argmax(dim=1)
            correct += float((best == targets).sum())
            count += len(targets)
            if action and action.kind == "continuous":
                first_bin = ids.start - scored.start
                bins = logits[:, first_bin : first_bin + ids.size]
                logged = centres[(targets - first_bin).clamp(0, ids.size - 1)]
                error += float((centres[bins.argmax(dim=1)] - logged).abs().sum())
                mean_error += float((bins.softmax(dim=1) @ centres - logged).abs().sum())
        figures[f"held_out/{name}/loss"] = loss / max(1.0, count)
        figures[f"held_out/{name}/accuracy"] = correct / max(1.0, count)
        if action and action.kind == "continuous":
            figures[f"held_out/{name}/action_error"] = error / max(1.0, count)
            figures[f"held_out/{name}/mean_action_error"] = mean_error / max(1.0, count)
    model.train(training)
    return figures
