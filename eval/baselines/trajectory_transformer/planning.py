"""Trajectory Transformer at play: a beam search at each timestep.

last transitions -> beams of drawn actions, rewards, values and observations -> first action of the best beam

Invariant: a prediction is the model's for the last `context` transitions, whether keys and values
are cached or everything is computed again (`cached=False`, the slow reference).

Shapes: E environments, R rows (beams of all environments), T tokens, W width, N bins, S dimensions
of a transition.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from eval.baselines import device
from eval.baselines.trajectory_transformer.model import TrajectoryTransformer
from eval.baselines.trajectory_transformer.tokens import Discretiser
from schemas.episode import TaskSpec
from schemas.layout import continuous_values
from simulators.policy import Observations, Rng


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

    def act(self, observations: Observations, previous_reward: np.ndarray, active: np.ndarray, rng: Rng) -> np.ndarray:
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

    def _values(self, observations: Observations) -> np.ndarray:
        values = continuous_values(self.task, observations)
        assert values is not None
        return values

    @torch.inference_mode()
    def plan(self, prefix: Tensor, rng: Rng) -> Tensor:
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


def draw(logits: Tensor, k: int | None, cdf: float | None, rng: Rng) -> Tensor:
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
