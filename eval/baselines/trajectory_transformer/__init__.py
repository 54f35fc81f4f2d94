"""Trajectory Transformer (arXiv 2106.02039), for vectors of real observations and actions.

episodes -> transitions of D + A + 2 tokens (observation, action, reward, value), each dimension in
bins of its own (tokens.py) -> GPT over short runs of transitions (model.py) -> at play a beam search
for predicted reward and value at each timestep, whose best plan gives the action (planning.py)

Invariant: training is a function of episodes, config and seed on a CPU; a loaded policy has the trained one's weights
and bins.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eval.baselines import complete_episodes, device, load_folder, optimise, save_folder
from eval.baselines.trajectory_transformer.model import TrajectoryTransformer
from eval.baselines.trajectory_transformer.planning import Policy
from eval.baselines.trajectory_transformer.tokens import Config, Discretiser, Windows, soft_targets, transition_rows
from schemas.episode import TaskSpec
from shards.views import Trajectory

FORMAT = "gato.baseline.tt"


def train(
    trajectories: Sequence[Trajectory],
    task: TaskSpec,
    config: Config,
    seed: int,
    out: Path,
    progress: Callable[[dict[str, Any]], None] | None = None,
) -> Path:
    """Train and export to `out`: weights.safetensors, then config.json. On a CPU a function of its arguments.
    ValueError for images and discrete actions, for which the paper defines no form, and for a task without episodes."""
    if any(f.kind != "continuous" for f in task.observation) or not task.action or task.action.kind != "continuous":
        raise ValueError(
            f"task '{task.name}': Trajectory Transformer plays vectors of real observations and actions, not images, "
            "text or discrete values; leave 'tt' out of --models"
        )
    if not 2 <= config.context <= config.transitions:
        raise ValueError(f"context {config.context}: must be from 2 to transitions ({config.transitions})")
    episodes = complete_episodes(trajectories, task)
    rows = [transition_rows(episode, config) for episode in episodes]
    discretiser = Discretiser.fit(np.concatenate(rows), config)
    windows, where, rng = Windows(rows, episodes, discretiser, config), device(), np.random.default_rng(seed)
    A, S = task.action.size, rows[0].shape[1]
    weights = torch.ones(S)
    weights[-A - 2 :] = torch.tensor([config.action_weight] * A + [config.reward_weight, config.value_weight])
    weights, soft = weights.repeat(config.transitions)[1:].to(where), soft_targets(config).to(where)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = TrajectoryTransformer(config, S - A - 2, A).to(where)

        def loss() -> Tensor:
            tokens, known = (column.to(where) for column in windows.batch(rng))
            odds = model(tokens[:, :-1]).log_softmax(dim=-1)
            if config.smoothing:
                each = -(soft[tokens[:, 1:]] * odds).sum(dim=-1)
            else:
                each = -odds.gather(-1, tokens[:, 1:, None])[..., 0]
            return (each * weights * known[:, 1:]).mean()

        curve = optimise(model, config, loss, progress)
    extra = {"edges": discretiser.edges.tolist(), "observations": model.observations, "losses": curve}
    return save_folder(out, FORMAT, model, config, task, seed, extra)


def load(folder: Path, cached: bool = True) -> Policy:
    """The policy that `train` exported to `folder`; ValueError names what is missing or damaged."""
    config, task, extra, weights = load_folder(folder, FORMAT, Config)
    assert task.action is not None
    model = TrajectoryTransformer(config, extra["observations"], task.action.size)
    model.load_state_dict(weights)
    return Policy(model, Discretiser(np.array(extra["edges"])), task, cached)
