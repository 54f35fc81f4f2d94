"""Trajectory Transformer (arXiv 2106.02039), for vectors of real observations and actions.

episodes -> transitions of D + A + 2 tokens (observation, action, reward, value), each dimension in
bins of its own -> GPT over short runs of transitions -> at play a beam search for predicted reward
and value at each timestep, whose best plan gives the action

Invariant: a prediction is the model's for the last `context` transitions, whether keys and values
are cached or everything is computed again (`cached=False`, the slow reference).

Shapes: E environments, R rows (beams of all environments), T tokens, W width, N bins, S dimensions
of a transition. Token N of each dimension means that the episode is over.
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

from eval.baselines import Training, complete_episodes, device, load_folder, optimise, save_folder
from schemas.episode import TaskSpec
from schemas.layout import continuous_values
from shards.views import Trajectory
from simulators.policy import EpisodeRng

FORMAT = "gato.baseline.tt"
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


class Block(nn.Module):
    """Pre-norm GPT block."""

    def __init__(self, config: Config):
        super().__init__()
        W = config.width
        self.heads, self.dropout = config.heads, config.dropout
        self.norm_1, self.norm_2 = nn.LayerNorm(W), nn.LayerNorm(W)
        self.qkv, self.out = nn.Linear(W, 3 * W), nn.Linear(W, W)
        self.up, self.down = nn.Linear(W, 4 * W), nn.Linear(4 * W, W)

    def heads_of(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys, values (R, heads, T, W / heads) of x (R, T, W)."""
        R, T, _ = x.shape
        q, k, v = self.qkv(self.norm_1(x)).view(R, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        return q, k, v

    def attend(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        rate = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=rate)
        x = x + F.dropout(self.out(y.transpose(1, 2).reshape(x.shape)), rate)
        return x + F.dropout(self.down(F.gelu(self.up(self.norm_2(x)))), rate)


class TrajectoryTransformer(nn.Module):
    """Tokens of whole transitions from the first dimension on -> logits over N + 1 of the next token.

    Value tokens are predicted, but no other token attends to them: at play past values are not known."""

    def __init__(self, config: Config, observations: int, actions: int):
        super().__init__()
        self.config, self.observations, self.actions, W = config, observations, actions, config.width
        self.dimensions = observations + actions + 2
        self.tokens = nn.Embedding(self.dimensions * config.bins + 1, W)  # the last row: the episode is over
        self.places = nn.Parameter(torch.zeros(self.dimensions * config.transitions, W))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(W)
        self.head = nn.Parameter(torch.empty(self.dimensions, config.bins + 1, W))  # one for each dimension
        nn.init.uniform_(self.head, -(W**-0.5), W**-0.5)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, 0.0, 0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        if config.smoothing:
            self._order_bins()

    @torch.no_grad()
    def _order_bins(self) -> None:
        """Start each dimension's embeddings as random mixtures of slow waves over its bins."""
        N, waves = self.config.bins, 8
        angles = torch.linspace(0, torch.pi, N)[:, None] * torch.arange(1, waves + 1)
        basis = torch.cat([angles.cos(), angles.sin()], dim=1) / torch.arange(1, waves + 1).repeat(2)
        mixtures = torch.randn(self.dimensions, 2 * waves, self.config.width) * 0.2
        self.tokens.weight[:-1] = (basis @ mixtures).flatten(0, 1)

    def embed(self, tokens: Tensor, places: Tensor) -> Tensor:
        """Tokens (R, T) in [0, N] at places (T,) to (R, T, W)."""
        rows = tokens + places % self.dimensions * self.config.bins
        rows = torch.where(tokens == self.config.bins, self.tokens.num_embeddings - 1, rows)
        return self.tokens(rows) + self.places[places]

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (R, T) -> logits (R, T, N + 1): at t those of token t + 1."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x, _ = self.run(tokens, places)
        return torch.einsum("rtw,tnw->rtn", x, self.head[(places + 1) % self.dimensions])

    def run(self, tokens: Tensor, places: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Last hidden states (R, T, W), and each block's keys and values of all tokens that may be attended to."""
        visible = places % self.dimensions != self.dimensions - 1
        mask = visible & (places[:, None] >= places)
        x = F.dropout(self.embed(tokens, places), self.config.dropout if self.training else 0.0)
        cache = []
        for block in self.blocks:
            assert isinstance(block, Block)
            q, k, v = block.heads_of(x)
            x = block.attend(x, q, k, v, mask)
            cache.append((k[:, :, visible], v[:, :, visible]))
        return self.norm(x), cache

    def step(self, token: Tensor, place: int, cache: list[tuple[Tensor, Tensor]], filled: int) -> Tensor:
        """Token (R,) after `filled` cached ones -> logits (R, N + 1). The cache (R, heads, room, W / heads) gains
        the token unless it is a value."""
        value = place % self.dimensions == self.dimensions - 1
        x = self.embed(token[:, None], torch.tensor([place], device=token.device))
        for block, (keys, values) in zip(self.blocks, cache):
            assert isinstance(block, Block)
            q, k, v = block.heads_of(x)
            if not value:
                keys[:, :, filled : filled + 1], values[:, :, filled : filled + 1] = k, v
            stop = filled + (not value)
            x = block.attend(x, q, keys[:, :, :stop], values[:, :, :stop], None)
        return self.norm(x[:, 0]) @ self.head[(place + 1) % self.dimensions].T


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
        raise ValueError(f"context {config.context} is not in [2, transitions = {config.transitions}]")
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


class Rows:
    """Growing rows of tokens: `logits` (R, N + 1) are those of the next token, given the last `context` transitions."""

    def __init__(self, model: TrajectoryTransformer, tokens: Tensor, cached: bool):
        self.model, self.tokens, self.cached = model, tokens, cached
        self.room = model.config.context * model.dimensions - 1
        self.encode()

    def encode(self) -> None:
        """From scratch; drop whole transitions in front until the last tokens fit."""
        S, excess = self.model.dimensions, self.tokens.shape[1] - self.room
        self.tokens = self.tokens[:, max(0, -(-excess // S) * S) :]
        places = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        x, parts = self.model.run(self.tokens, places)
        self.logits = x[:, -1] @ self.model.head[len(places) % S].T
        self.filled = parts[0][0].shape[2]
        if self.cached:
            self.cache = [(self._roomy(keys), self._roomy(values)) for keys, values in parts]

    def _roomy(self, part: Tensor) -> Tensor:
        return F.pad(part, (0, 0, 0, self.room - self.filled))

    def append(self, token: Tensor) -> None:
        """One more token (R,) int64 a row."""
        place = self.tokens.shape[1]
        self.tokens = torch.cat([self.tokens, token[:, None]], dim=1)
        if not self.cached or place + 1 > self.room:
            self.encode()
            return
        self.logits = self.model.step(token, place, self.cache, self.filled)
        self.filled += place % self.model.dimensions != self.model.dimensions - 1

    def select(self, index: Tensor) -> None:
        """Rows `index`, in that order, repeated where it repeats them."""
        self.tokens, self.logits = self.tokens[index], self.logits[index]
        if self.cached:
            self.cache = [(keys[index], values[index]) for keys, values in self.cache]


class Policy:
    """Plans at every timestep, for all active environments of a batch together."""

    def __init__(self, model: TrajectoryTransformer, discretiser: Discretiser, task: TaskSpec, cached: bool = True):
        assert task.action is not None
        self.model, self.config, self.discretiser = model.eval().to(device()), model.config, discretiser
        self.task, self.cached = task, cached
        self.low, self.high = np.array(task.action.low), np.array(task.action.high)
        self.centres = torch.from_numpy(discretiser.centres).to(device())

    def reset(self, batch: int) -> None:
        """A batch of environments starts."""
        self.past = np.zeros((batch, 0, self.model.dimensions), np.int64)
        self.last: np.ndarray | None = None

    def act(
        self,
        observations: dict[str, np.ndarray],
        previous_reward: np.ndarray,
        active: np.ndarray,
        rng: EpisodeRng | np.random.Generator,
    ) -> np.ndarray:
        """{key: (E, ...)} -> actions (E, A) float32, those of inactive environments meaningless."""
        D, A = self.model.observations, self.model.actions
        observed = self.discretiser.encode(self._values(observations))
        if self.last is not None:
            reward = self.discretiser.encode(np.asarray(previous_reward, np.float64)[:, None], D + A)
            # any bin will do for the value, which is never attended to; the paper's code takes the highest
            value = np.full_like(reward, self.config.bins - 1)
            transition = np.concatenate([self.last, reward, value], axis=1)[:, None]
            self.past = np.concatenate([self.past, transition], axis=1)[
                :, max(0, self.past.shape[1] + 2 - self.config.context) :
            ]
        prefix = np.concatenate([self.past.reshape(len(observed), -1), observed], axis=1)
        chosen = np.zeros((len(observed), A), np.int64)
        chosen[active] = self.plan(torch.from_numpy(prefix[active]).to(device()), rng).cpu().numpy()
        self.last = np.concatenate([observed, chosen], axis=1)
        return self.discretiser.centres[np.arange(D, D + A), chosen].clip(self.low, self.high).astype(np.float32)

    def _values(self, observations: dict[str, np.ndarray]) -> np.ndarray:
        values = continuous_values(self.task, observations)
        assert values is not None
        return values

    @torch.inference_mode()
    def plan(self, prefix: Tensor, rng: EpisodeRng | np.random.Generator) -> Tensor:
        """Beam search from tokens (E, T) that end with an observation: bins (E, A) of the best plan's first action."""
        config, model, E = self.config, self.model, len(prefix)
        rows = Rows(model, prefix, self.cached)
        beams = torch.arange(E, device=prefix.device)[:, None]  # (E, beams): the row of each beam
        gained = torch.zeros(E, dtype=torch.float64, device=prefix.device)
        first = torch.zeros(E, 0, dtype=torch.int64, device=prefix.device)
        for step in range(config.horizon):
            # all beams start out the same: at once as many as the search will try
            tried = beams.repeat_interleave(config.beams * config.expand if step == 0 else config.expand, dim=1)
            rows.select(tried.flatten())
            gained, first = gained[tried.flatten()], first[tried.flatten()]
            for _ in range(model.actions):
                if step == 0:  # what is played must be an action
                    rows.logits[:, config.bins] = -torch.inf
                token = draw(rows.logits, config.k_act, config.cdf_act, rng)
                first = torch.cat([first, token[:, None]], dim=1) if step == 0 else first
                rows.append(token)
            gained = gained + config.discount**step * self._expected(rows.logits, -2)
            rows.append(rows.logits.argmax(dim=1))
            worth = gained + config.discount ** (step + 1) * self._expected(rows.logits, -1)
            token = rows.logits.argmax(dim=1)
            best = worth.view(E, -1).topk(config.beams if step + 1 < config.horizon else 1, dim=1).indices
            best = (best + torch.arange(E, device=best.device)[:, None] * tried.shape[1]).flatten()
            gained, first = gained[best], first[best]
            if step + 1 < config.horizon:
                rows.select(best)
                rows.append(token[best])
                for _ in range(model.observations):
                    rows.append(draw(rows.logits, config.k_obs, config.cdf_obs, rng))
                beams = torch.arange(E * config.beams, device=prefix.device).view(E, -1)
        return first

    def _expected(self, logits: Tensor, dimension: int) -> Tensor:
        """Mean of the bins' centres (R,) float64; the share of token N, the episode's end, counts as nothing."""
        return logits.double().softmax(dim=1)[:, :-1] @ self.centres[dimension]


def draw(logits: Tensor, k: int | None, cdf: float | None, rng: EpisodeRng | np.random.Generator) -> Tensor:
    """Tokens (R,) from logits (R, N + 1), without the least likely ones that together hold `cdf` of the probability
    and without all but the `k` likeliest."""
    if k == 1:
        return logits.argmax(dim=1)
    odds, order = logits.double().softmax(dim=1).sort(dim=1)
    keep = odds.cumsum(dim=1) >= (cdf or 0.0)
    keep[:, : -k if k else 0] = False
    heap = (odds * keep).cumsum(dim=1)
    point = torch.from_numpy(rng.random((len(odds), 1))).to(odds.device) * heap[:, -1:]
    return order.gather(1, (heap <= point).sum(dim=1, keepdim=True).clamp(max=odds.shape[1] - 1))[:, 0]


def load(folder: Path, cached: bool = True) -> Policy:
    """The policy that `train` exported to `folder`; ValueError names what is missing or damaged."""
    config, task, extra, weights = load_folder(folder, FORMAT, Config)
    assert task.action is not None
    model = TrajectoryTransformer(config, extra["observations"], task.action.size)
    model.load_state_dict(weights)
    return Policy(model, Discretiser(np.array(extra["edges"])), task, cached)
