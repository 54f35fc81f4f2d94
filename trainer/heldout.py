"""Held-out loss, accuracy and action error of each task: the first windows of episodes never trained on.

held-out Stream -> evaluation batches -> logits at supervised tokens -> sums -> {held_out/TASK/METRIC: mean}
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch.nn import functional

from schemas.task import TaskSpec
from schemas.vocabulary import IdRange, bin_centres
from shards.stream import Stream
from trainer.loss import held_out_logits
from trainer.model import Gato


@torch.no_grad()
def evaluate(
    model: Gato, stream: Stream, tasks: Iterable[int], sequences: int, micro_batch: int, device: torch.device
) -> dict[str, float]:
    """Metrics of the given tasks (ordinals in `stream.tasks`), over at most `sequences` windows of each.

    Returns:
        held_out/TASK/loss: nats per token against the exact bin, whatever the training targets are, over the ids that
            are possible there (only actions' ids if a task's text is no target);
        held_out/TASK/accuracy: share of tokens whose most likely id is the logged one;
        and for continuous actions
        held_out/TASK/action_error: mean |greedy bin centre - logged one|, actions scaled to [-1, 1];
        held_out/TASK/bin_error: the same in bins;
        held_out/TASK/mean_error: mean |expected bin centre - logged one|, the error of decoding by the mean of bins;
        held_out/TASK/value_error: mean |value - logged one|, of a model with values.
    """
    training, vocabulary = model.training, model.vocabulary
    model.eval()
    metrics: dict[str, float] = {}
    for task in tasks:
        name, timeline = stream.tasks[task], stream.timelines[task]
        action = timeline.dataset.manifest.tasks[timeline.task].spec.action
        ids = IdRange(0, vocabulary.size)
        if action and not stream.predicts_text(timeline):
            ids = vocabulary.range("action", action.kind)
        ordered = bool(action and action.kind == "continuous")
        bins = vocabulary.action_continuous
        centres = torch.as_tensor(bin_centres(bins.size), dtype=torch.float32, device=device)
        sums: dict[str, float] = dict.fromkeys(("loss", "accuracy", "action_error", "mean_error"), 0.0)
        windows, count = min(sequences, timeline.windows), 0
        for first in range(0, windows, micro_batch):
            batch = stream.evaluation_batch(task, np.arange(first, min(first + micro_batch, windows))).to(device)
            if model.by_timesteps:
                batch.tasks.fill_(model.task_rows[name])  # a held-out stream may lack tasks and number them otherwise
            logits, targets, values = held_out_logits(model, batch, ids)
            count += len(targets)
            sums["loss"] += float(functional.cross_entropy(logits, targets, reduction="sum"))
            sums["accuracy"] += float((logits.argmax(dim=1) == targets).sum())
            if ordered:
                own = logits[:, bins.start - ids.start : bins.stop - ids.start]
                logged = centres[(targets + ids.start - bins.start).clamp(0, bins.size - 1)]
                sums["action_error"] += float((centres[own.argmax(dim=1)] - logged).abs().sum())
                if values is not None:
                    sums["value_error"] = sums.get("value_error", 0.0) + float((values - logged).abs().sum())
                sums["mean_error"] += float((own.softmax(dim=1) @ centres - logged).abs().sum())
        means = {kind: value / max(1, count) for kind, value in sums.items()}
        if ordered:
            means["bin_error"] = means["action_error"] * bins.size / 2
        else:
            del means["action_error"], means["mean_error"]
        metrics |= {f"held_out/{name}/{kind}": value for kind, value in means.items()}
    model.train(training)
    return metrics


def mean_losses(metrics: Mapping[str, float], tasks: Iterable[TaskSpec]) -> dict[str, float]:
    """held_out/loss, the mean of the tasks' losses in `metrics`; where there are several domains, domains/DOMAIN/loss
    too, the mean of its own tasks."""
    domains: dict[str, list[float]] = {}
    for task in tasks:
        domains.setdefault(task.domain, []).append(metrics[f"held_out/{task.name}/loss"])
    losses = [loss for own in domains.values() for loss in own]
    means = {f"domains/{name}/loss": sum(own) / len(own) for name, own in sorted(domains.items()) if len(domains) > 1}
    return means | {"held_out/loss": sum(losses) / len(losses)}
