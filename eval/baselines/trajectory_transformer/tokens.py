"""Configuration of Trajectory Transformer, and its training batches.

episodes -> rows of observation, action, reward and value -> bins of each dimension -> windows of whole transitions

Invariant: token N of each of the S dimensions means that the episode is over; what is not known is not to be predicted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from eval.baselines import Training
from schemas.episode import TaskSpec
from shards.views import Trajectory

LOCOMOTION = ("Hopper", "HalfCheetah", "Walker2d", "Ant")


@dataclass(frozen=True)
class Config(Training):
    """Defaults: the paper's for MuJoCo, from its code (50 passes over 1M timesteps, the cosine over 20)."""

    steps: int = 195_312
    batch: int = 256
    lr: float = 6e-4
    warmup: int = 3_906
    decay: int | None = 78_125
    weight_decay: float = 0.1
    beta_2: float = 0.95
    clip: float = 1.0
    layers: int = 4
    heads: int = 4
    width: int = 128
    bins: int = 100
    discretisation: Literal["quantile", "uniform"] = "quantile"
    transitions: int = 10
    """Transitions of a training sequence."""
    discount: float = 0.99
    termination_penalty: float | None = -100.0
    """Replaces the reward of a terminal timestep in training; None where ending is no failure."""
    action_weight: float = 5.0
    reward_weight: float = 1.0
    value_weight: float = 1.0
    smoothing: float = 0.0
    """Not in the paper: targets spread over neighbouring bins with this deviation in bins, and bin embeddings that
    start as waves over the bins, so that the order of bins need not be learned. For small budgets; 0: off."""
    context: int = 5
    """Transitions that a prediction sees at play, the current one included."""
    horizon: int = 15
    beams: int = 128
    expand: int = 2
    """Actions tried for each beam at a transition."""
    k_obs: int | None = 1
    """Observations are drawn from the k likeliest bins. None: from all."""
    k_act: int | None = None
    cdf_obs: float | None = None
    cdf_act: float | None = 0.6
    """Actions are not drawn from the least likely bins that together hold this much probability."""

    @classmethod
    def paper(cls, task: TaskSpec) -> Config:
        """The paper's settings; its code searches less far for HalfCheetah and Ant."""
        body = task.environment.id.rsplit("-v", 1)[0] if task.environment else ""
        config = cls(termination_penalty=-100.0 if body in LOCOMOTION else None)
        if body == "HalfCheetah":
            return replace(config, horizon=5, beams=32)
        return replace(config, horizon=5, batch=128) if body == "Ant" else config

    @classmethod
    def quick(cls, task: TaskSpec) -> Config:
        """A smaller model, trained for about a minute on one CPU core, and a short search."""
        small = replace(cls.paper(task), layers=2, width=64, transitions=3, smoothing=2.0, dropout=0.0)
        schedule = replace(small, steps=550, batch=64, lr=3e-3, warmup=50, decay=550)
        return replace(schedule, context=3, horizon=2, beams=4, cdf_act=0.9)

    @classmethod
    def cpu(cls, task: TaskSpec) -> Config:
        """The quick model and its short search, trained for three (Hopper) to four minutes on one CPU core."""
        return replace(cls.quick(task), steps=3_500, decay=3_500, warmup=200)

    @classmethod
    def long(cls, task: TaskSpec) -> Config:
        """The same for eight times as many steps."""
        return replace(cls.cpu(task), steps=28_000, decay=28_000)


class Discretiser:
    """Bins of each dimension: `edges` (S, N + 1) float64; quantiles of the data, or uniform between its extremes."""

    def __init__(self, edges: np.ndarray):
        self.edges = edges
        self.centres = (edges[:, 1:] + edges[:, :-1]) / 2

    @classmethod
    def fit(cls, rows: np.ndarray, config: Config) -> Discretiser:
        if config.discretisation == "quantile":
            places = np.arange(config.bins + 1) * -(-len(rows) // config.bins)
            return cls(np.sort(rows, axis=0)[np.minimum(places, len(rows) - 1)].T)
        low, high = rows.min(axis=0), rows.max(axis=0)
        return cls(low[:, None] + (high - low)[:, None] * np.linspace(0, 1, config.bins + 1))

    def encode(self, rows: np.ndarray, first: int = 0) -> np.ndarray:
        """Values (n, d) of dimensions first, first + 1, ... to bins (n, d) int64; beyond the data: the outer bins."""
        columns = [np.searchsorted(self.edges[first + d, 1:-1], rows[:, d], side="right") for d in range(rows.shape[1])]
        return np.stack(columns, axis=1).astype(np.int64)


def transition_rows(episode: Trajectory, config: Config) -> np.ndarray:
    """(T, S) float64: observation, action, reward, and value: the discounted sum of the rewards after this one."""
    assert episode.observation is not None
    reward = episode.reward.astype(np.float64)
    if episode.terminated and config.termination_penalty is not None:
        reward[-1] = config.termination_penalty
    value = np.zeros(len(reward))
    for t in range(len(value) - 2, -1, -1):
        value[t] = reward[t + 1] + config.discount * value[t + 1]
    return np.concatenate([episode.observation, episode.action, reward[:, None], value[:, None]], axis=1)


class Windows:
    """Random runs of `transitions` timesteps of tokens, all timesteps but an episode's last equally often the first.

    An episode is followed by tokens N. They are to be predicted if it terminated, and not if it ended otherwise,
    since the task would have gone on."""

    def __init__(self, rows: Sequence[np.ndarray], episodes: Sequence[Trajectory], discretiser: Discretiser, c: Config):
        self.config, padding = c, np.full((c.transitions - 1, rows[0].shape[1]), c.bins)
        self.bins = np.concatenate([part for row in rows for part in (discretiser.encode(row), padding)])
        lengths = np.array([len(row) for row in rows])
        begins = np.cumsum(lengths + len(padding)) - lengths - len(padding)
        starts = [begin + np.arange(max(1, length - 1)) for begin, length in zip(begins, lengths)]
        self.starts = np.concatenate(starts)
        inside = [np.arange(length + len(padding)) < length for length in lengths]
        self.known = np.concatenate([part | e.terminated for part, e in zip(inside, episodes)])

    def batch(self, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Tokens (B, transitions * S) int64, and which of them are to be predicted."""
        index = rng.choice(self.starts, self.config.batch)[:, None] + np.arange(self.config.transitions)
        bins = self.bins[index]
        known = np.broadcast_to(self.known[index][..., None], bins.shape)
        return torch.from_numpy(bins.reshape(len(index), -1)), torch.from_numpy(known.reshape(len(index), -1))


def soft_targets(config: Config) -> Tensor:
    """(N + 1, N + 1): for each true token the distribution to be learned."""
    bins = torch.arange(config.bins)
    near = (
        torch.exp(-0.5 * ((bins[:, None] - bins) / config.smoothing) ** 2) if config.smoothing else torch.eye(len(bins))
    )
    return torch.block_diag(near / near.sum(dim=1, keepdim=True), torch.ones(1, 1))
