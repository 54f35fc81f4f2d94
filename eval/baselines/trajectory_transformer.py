"""Trajectory Transformer (arXiv 2106.02039) for continuous control, in one file.

episodes -> transitions of D + A + 2 tokens (observation, action, reward, value), each dimension cut
into bins of its own -> GPT over short runs of transitions -> beam search that plans by predicted
reward and value; the first action of the best plan is played

Invariant: the cached beam search and the plain one (`cached=False`) take the same actions.

Shape suffixes: E environments, B beams, T tokens, W width, N bins.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eval.baselines import load_folder, save_folder
from schemas.episode import STRICT, TaskSpec
from shards.views import Trajectory

FORMAT = "gato.baseline.tt"


@dataclass(frozen=True)
class Config:
    """Defaults: the paper's for MuJoCo (its appendix C)."""

    __pydantic_config__ = STRICT
    bins: int = 100
    discretisation: Literal["quantile", "uniform"] = "quantile"
    transitions: int = 10
    """Transitions of a training sequence."""
    layers: int = 4
    heads: int = 4
    width: int = 128
    dropout: float = 0.1
    discount: float = 0.99
    action_weight: float = 5.0
    steps: int = 100_000
    batch: int = 256
    lr: float = 6e-4
    warmup: int = 100
    weight_decay: float = 0.1
    clip: float = 1.0
    context: int = 5
    """Past transitions that planning sees."""
    beams: int = 64
    expand: int = 2
    """Continuations tried of each beam at a transition."""
    horizon: int = 5
    action_mass: float = 0.6
    """Actions are sampled from the most likely bins that hold this much probability."""

    @classmethod
    def paper(cls, task: TaskSpec) -> Config:
        return cls()

    @classmethod
    def quick(cls, task: TaskSpec) -> Config:
        """About a minute on two cores; a short, narrow search."""
        small = replace(cls(), transitions=4, layers=3, steps=500, batch=32, lr=1e-3)
        return replace(small, context=2, beams=4, horizon=2, action_mass=0.3)


class Discretiser:
    """Bins of each dimension: `edges` (dimensions, N + 1), by quantiles or uniform between the extremes."""

    def __init__(self, edges: np.ndarray):
        self.edges = edges
        self.centres = (edges[:, 1:] + edges[:, :-1]) / 2

    @classmethod
    def fit(cls, rows: np.ndarray, config: Config) -> Discretiser:
        steps = np.linspace(0, 1, config.bins + 1)
        if config.discretisation == "quantile":
            return cls(np.quantile(rows, steps, axis=0).T)
        low, high = rows.min(axis=0), rows.max(axis=0)
        return cls(low[:, None] + (high - low)[:, None] * steps)

    def encode(self, rows: np.ndarray, first: int = 0) -> np.ndarray:
        """Values (n, d) of dimensions first, first + 1, ... to bins (n, d) int64."""
        columns = [np.searchsorted(self.edges[first + d, 1:-1], rows[:, d], side="right") for d in range(rows.shape[1])]
        return np.stack(columns, axis=1).astype(np.int64)


class Block(nn.Module):
    """Pre-norm GPT block; with a cache it appends its keys and values to it."""

    def __init__(self, config: Config):
        super().__init__()
        W = config.width
        self.heads, self.dropout = config.heads, config.dropout
        self.norm_1, self.norm_2 = nn.LayerNorm(W), nn.LayerNorm(W)
        self.qkv, self.out = nn.Linear(W, 3 * W), nn.Linear(W, W)
        self.up, self.down = nn.Linear(W, 4 * W), nn.Linear(4 * W, W)

    def forward(self, x: Tensor, cache: list[Tensor] | None = None) -> Tensor:
        B, T, W = x.shape
        q, k, v = self.qkv(self.norm_1(x)).view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        if cache is not None:
            if cache:
                k, v = torch.cat([cache[0], k], dim=2), torch.cat([cache[1], v], dim=2)
            cache[:] = [k, v]
        rate = self.dropout if self.training else 0.0
        causal = k.shape[2] == T  # new tokens behind a cache come one at a time and see all of it
        y = F.scaled_dot_product_attention(q, k, v, is_causal=causal and T > 1, dropout_p=rate)
        x = x + F.dropout(self.out(y.transpose(1, 2).reshape(B, T, W)), rate)
        return x + F.dropout(self.down(F.gelu(self.up(self.norm_2(x)))), rate)


class TrajectoryTransformer(nn.Module):
    """Tokens (B, T) of whole transitions, bins of each dimension -> logits (B, T, N) of the next token."""

    def __init__(self, config: Config, observations: int, actions: int):
        super().__init__()
        self.config, self.observations, self.actions = config, observations, actions
        self.dimensions = observations + actions + 2
        self.tokens = nn.Embedding(self.dimensions * config.bins, config.width)
        self.positions = nn.Parameter(torch.zeros(self.dimensions * config.transitions, config.width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        # one head for each dimension, as in the paper's code
        self.head = nn.Parameter(torch.randn(self.dimensions, config.bins, config.width) * 0.02)

    def forward(self, bins: Tensor, start: int = 0, caches: list[list[Tensor]] | None = None) -> Tensor:
        places = torch.arange(start, start + bins.shape[1], device=bins.device)
        x = self.tokens(bins + places % self.dimensions * self.config.bins) + self.positions[places]
        for n, block in enumerate(self.blocks):
            x = block(x, None if caches is None else caches[n])
        following = (places + 1) % self.dimensions
        return torch.einsum("btw,tnw->btn", self.norm(x), self.head[following])


def transition_rows(episode: Trajectory, discount: float) -> np.ndarray:
    """(T, D + A + 2) float64: observation, action, reward, discounted sum of the rewards behind it."""
    assert episode.observation is not None
    value = np.zeros(len(episode.reward))
    for t in range(len(value) - 2, -1, -1):
        value[t] = episode.reward[t + 1] + discount * value[t + 1]
    return np.concatenate([episode.observation, episode.action, episode.reward[:, None], value[:, None]], axis=1)


def train(
    trajectories: Sequence[Trajectory],
    task: TaskSpec,
    config: Config,
    seed: int,
    out: Path,
    progress: Callable[[dict[str, Any]], None] = lambda figures: None,
) -> Path:
    """Train and export to `out`. ValueError for image tasks, for which the paper defines no form."""
    if (
        any(field.kind == "image" for field in task.observation)
        or task.action is None
        or task.action.kind != "continuous"
    ):
        raise ValueError(
            f"task '{task.name}': Trajectory Transformer is defined for vectors and continuous actions only"
        )
    if config.context + config.horizon > config.transitions:
        raise ValueError(f"context {config.context} + horizon {config.horizon} exceed {config.transitions} transitions")
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    rows = [transition_rows(episode, config.discount) for episode in trajectories]
    discretiser = Discretiser.fit(np.concatenate(rows), config)
    S = config.transitions
    bins = [discretiser.encode(part) for part in rows if len(part) >= S]
    if not bins:
        raise ValueError(f"task '{task.name}': no episode of at least {S} timesteps")
    starts = np.array([len(part) - S + 1 for part in bins])
    model = TrajectoryTransformer(config, rows[0].shape[1] - task.action.size - 2, task.action.size)
    nn.init.normal_(model.tokens.weight, 0.0, 0.02)
    weights = torch.ones(model.dimensions)
    weights[model.observations : model.observations + model.actions] = config.action_weight
    weights = weights.repeat(S)[1:]
    optimiser = torch.optim.AdamW(model.parameters(), lr=config.lr, betas=(0.9, 0.95), weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: min(1.0, (step + 1) / config.warmup))
    losses: list[float] = []
    for step in range(config.steps):
        chosen = rng.choice(len(bins), config.batch, p=starts / starts.sum())
        windows = [bins[n][s : s + S].reshape(-1) for n in chosen for s in [rng.integers(starts[n])]]
        tokens = torch.from_numpy(np.stack(windows))
        logits = model(tokens[:, :-1])
        each = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(len(tokens), -1)
        loss = (each * weights).mean()
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimiser.step()
        schedule.step()
        losses.append(loss.item())
        if step % 20 == 0 or step + 1 == config.steps:
            progress({"step": step + 1, "of": config.steps, "loss": float(np.mean(losses[-20:]))})
    extra = {
        "edges": discretiser.edges.tolist(),
        "observations": model.observations,
        "losses": losses[:: max(1, config.steps // 200)],
    }
    return save_folder(out, FORMAT, model, config, task, seed, extra)


class Policy:
    """Plans anew at every timestep, for all environments of a batch together."""

    def __init__(self, model: TrajectoryTransformer, discretiser: Discretiser, cached: bool = True):
        self.model, self.config, self.discretiser, self.cached = model.eval(), model.config, discretiser, cached
        self.centres = torch.from_numpy(discretiser.centres)

    def reset(self, batch: int) -> None:
        self.batch = batch
        self.past = np.zeros((batch, 0, self.model.dimensions), np.int64)
        self.last: np.ndarray | None = None

    @torch.inference_mode()
    def act(
        self,
        observations: dict[str, np.ndarray],
        previous_reward: np.ndarray,
        active: np.ndarray,
        rng: np.random.Generator,
    ) -> np.ndarray:
        """{key: (E, ...)} -> actions (E, A) float32."""
        model, O, A = self.model, self.model.observations, self.model.actions
        if self.last is not None:
            reward = self.discretiser.encode(np.asarray(previous_reward, np.float64)[:, None], O + A)
            # the value of a past transition is not known: the highest bin, as in the paper's code
            value = np.full((self.batch, 1), self.config.bins - 1)
            transition = np.concatenate([self.last, reward, value], axis=1)[:, None]
            self.past = np.concatenate([self.past, transition], axis=1)[:, -self.config.context :]
        flat = np.concatenate([observations[key].reshape(self.batch, -1) for key in sorted(observations)], axis=1)
        observed = self.discretiser.encode(flat)
        prefix = np.concatenate([self.past.reshape(self.batch, -1), observed], axis=1)
        chosen = self._plan(torch.from_numpy(prefix), rng)
        self.last = np.concatenate([observed, chosen], axis=1)
        centres = self.discretiser.centres[np.arange(O, O + A), chosen]
        return centres.astype(np.float32)

    def _plan(self, prefix: Tensor, rng: np.random.Generator) -> np.ndarray:
        """Prefix (E, T), ending behind an observation -> bins (E, A) of the best plan's first action."""
        config, model = self.config, self.model
        E, T, rows = self.batch, prefix.shape[1], config.beams * config.expand
        caches: list[list[Tensor]] | None = [[] for _ in model.blocks] if self.cached else None
        logits = model(prefix, 0, caches)[:, -1]
        plan = prefix.repeat_interleave(rows, dim=0)
        logits = logits.repeat_interleave(rows, dim=0)
        if caches is not None:
            caches = [[part.repeat_interleave(rows, dim=0) for part in cache] for cache in caches]
        gained, worth = torch.zeros(E * rows, dtype=torch.float64), torch.zeros(E * rows, dtype=torch.float64)
        first = T
        for step in range(config.horizon):
            discount = config.discount**step
            for place in range(T, T + model.dimensions):
                dimension = place % model.dimensions
                token = self._choose(logits, dimension, rng)
                if dimension == model.dimensions - 2:
                    gained = gained + discount * self._expected(logits, dimension)
                elif dimension == model.dimensions - 1:
                    worth = gained + discount * self._expected(logits, dimension)
                    if step + 1 == config.horizon:
                        break
                plan = torch.cat([plan, token[:, None]], dim=1)
                logits = model(plan[:, -1:], place, caches)[:, -1] if self.cached else model(plan)[:, -1]
                if dimension == model.dimensions - 1:
                    # keep the best beams of each environment, and try each of them `expand` times more
                    best = worth.view(E, rows).topk(config.beams, dim=1).indices.repeat_interleave(config.expand, dim=1)
                    index = (best + torch.arange(E)[:, None] * rows).flatten()
                    plan, logits, gained, worth = plan[index], logits[index], gained[index], worth[index]
                    if caches is not None:
                        caches = [[part[index] for part in cache] for cache in caches]
            T += model.dimensions
        best = worth.view(E, rows).argmax(dim=1) + torch.arange(E) * rows
        return plan[best, first : first + model.actions].numpy()

    def _choose(self, logits: Tensor, dimension: int, rng: np.random.Generator) -> Tensor:
        """The likeliest bin, or for actions one sampled from the likeliest that hold `action_mass`."""
        if not self.model.observations <= dimension < self.model.observations + self.model.actions:
            return logits.argmax(dim=1)
        odds, order = logits.double().softmax(dim=1).sort(dim=1, descending=True)
        odds = torch.where(odds.cumsum(dim=1) - odds < self.config.action_mass, odds, 0.0)
        odds = odds.cumsum(dim=1)
        draw = torch.from_numpy(rng.random((len(odds), 1))) * odds[:, -1:]
        return order.gather(1, (odds <= draw).sum(dim=1, keepdim=True).clamp(max=order.shape[1] - 1))[:, 0]

    def _expected(self, logits: Tensor, dimension: int) -> Tensor:
        return logits.double().softmax(dim=1) @ self.centres[dimension]


def load(folder: Path) -> Policy:
    """The policy that `train` exported; ValueError names what is missing or damaged."""
    body, config, task, weights = load_folder(folder, FORMAT, Config)
    assert task.action is not None
    model = TrajectoryTransformer(config, body["extra"]["observations"], task.action.size)
    model.load_state_dict(weights)
    return Policy(model, Discretiser(np.array(body["extra"]["edges"])))
