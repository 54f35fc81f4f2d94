"""Mixture weights of tasks: by task, by domain (a suite of simulators, or a log format without one), or both.

    TaskSpec of every task, StreamConfig.weights, StreamConfig.domains -> one weight per task

Without domains every task has its own weight. With domains each domain has a share of the mixture, however many tasks
it has, and its tasks divide that share by their weights (the paper's table 1 weighs its data in this way).

Invariant: a weight is a function of the tasks' names and domains and the configuration alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from schemas.task import TaskSpec


def task_weights(tasks: Sequence[TaskSpec], weights: Mapping[str, float], domains: Mapping[str, float]) -> list[float]:
    """The mixture weight of each task; a task or a domain that is not named has the weight 1. A domain whose tasks all
    have the weight 0 takes no part."""
    own = [weights.get(task.name, 1.0) for task in tasks]
    if not domains:
        return own
    totals: dict[str, float] = defaultdict(float)
    for task, weight in zip(tasks, own):
        totals[task.domain] += weight
    return [domains.get(task.domain, 1.0) * weight / (totals[task.domain] or 1.0) for task, weight in zip(tasks, own)]
