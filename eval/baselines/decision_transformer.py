"""Decision Transformer (arXiv 2106.01345), control and Atari variants, in one file.

episodes -> windows of K timesteps (return-to-go, state, action) -> GPT -> next action
at play: ask for `target_return`, subtract each reward, act from the last K timesteps

Control: linear state embedding of normalised observations, tanh action head, squared error.
Atari: the paper's CNN over four stacked frames, cross-entropy over the actions. Frames are the
64 x 80 ones of the shards, so that all models see the same pixels.

Shape suffixes: B batch, K timesteps, D observation, A action, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from etl.tokenizers.image import resize
from eval.baselines import load_folder, save_folder
from schemas.episode import STRICT, TaskSpec
from shards.views import Trajectory

FORMAT = "gato.baseline.dt"
STACK = 4
LARGEST_TIMESTEP = 4096


@dataclass(frozen=True)
class Config:
    """Defaults: the paper's for MuJoCo (its table 9)."""

    __pydantic_config__ = STRICT
    context: int = 20
    layers: int = 3
    heads: int = 1
    width: int = 128
    dropout: float = 0.1
    steps: int = 100_000
    batch: int = 64
    lr: float = 1e-4
    warmup: int = 10_000
    weight_decay: float = 1e-4
    clip: float = 0.25
    return_scale: float = 1000.0
    target_return: float | None = None
    """None: the best return of the training episodes."""

    @classmethod
    def paper(cls, task: TaskSpec) -> Config:
        """The paper's settings for MuJoCo or Atari (its tables 8 and 9)."""
        if is_image(task):
            atari = cls(context=30, layers=6, heads=8, batch=128, lr=6e-4, warmup=500, weight_decay=0.1, clip=1.0)
            return replace(atari, return_scale=1.0)
        return cls()

    @classmethod
    def quick(cls, task: TaskSpec) -> Config:
        """About a minute on two cores."""
        if is_image(task):
            return replace(cls.paper(task), context=8, layers=2, heads=4, batch=32, steps=150, lr=1e-3, warmup=20)
        return replace(cls.paper(task), steps=2000, warmup=100, lr=1e-3)


def is_image(task: TaskSpec) -> bool:
    return any(field.kind == "image" for field in task.observation)


class Block(nn.Module):
    """Pre-norm attention and a ReLU feed-forward of four times the width, causal."""

    def __init__(self, config: Config):
        super().__init__()
        W = config.width
        self.heads, self.dropout = config.heads, config.dropout
        self.norm_1, self.norm_2 = nn.LayerNorm(W), nn.LayerNorm(W)
        self.qkv, self.out = nn.Linear(W, 3 * W), nn.Linear(W, W)
        self.up, self.down = nn.Linear(W, 4 * W), nn.Linear(4 * W, W)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        B, T, W = x.shape
        q, k, v = self.qkv(self.norm_1(x)).view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        rate = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=rate).transpose(1, 2).reshape(B, T, W)
        x = x + F.dropout(self.out(y), rate)
        return x + F.dropout(self.down(F.relu(self.up(self.norm_2(x)))), rate)


class DecisionTransformer(nn.Module):
    """(return-to-go, state, action) x K -> the action at each state's place."""

    def __init__(self, config: Config, task: TaskSpec):
        super().__init__()
        assert task.action is not None
        self.config, self.image, W = config, is_image(task), config.width
        self.discrete = task.action.kind == "discrete"
        outputs = task.action.choices if self.discrete else task.action.size
        if self.image:
            self.state = nn.Sequential(
                *(nn.Conv2d(STACK, 32, 8, 4), nn.ReLU(), nn.Conv2d(32, 64, 4, 2), nn.ReLU(), nn.Conv2d(64, 64, 3, 1)),
                *(nn.ReLU(), nn.Flatten(), nn.Linear(64 * 4 * 6, W), nn.Tanh()),
            )
        else:
            self.state = nn.Linear(sum(int(np.prod(f.shape)) for f in task.observation), W)
        self.action: nn.Module = nn.Embedding(outputs, W) if self.discrete else nn.Linear(outputs, W)
        self.reward, self.time = nn.Linear(1, W), nn.Embedding(LARGEST_TIMESTEP, W)
        self.norm_in, self.norm_out, self.head = nn.LayerNorm(W), nn.LayerNorm(W), nn.Linear(W, outputs)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))

    def forward(self, to_go: Tensor, states: Tensor, actions: Tensor, times: Tensor, valid: Tensor) -> Tensor:
        """to_go (B, K), states (B, K, D) or (B, K, 4, H, W) uint8, actions (B, K[, A]), times (B, K),
        valid (B, K) bool -> (B, K, A) actions in [-1, 1], or logits."""
        B, K = to_go.shape
        if self.image:
            embedded = self.state(states.flatten(0, 1).float() / 255.0).view(B, K, -1)
        else:
            embedded = self.state(states)
        time = self.time(times.clamp(max=LARGEST_TIMESTEP - 1))
        parts = (self.reward(to_go[..., None]) + time, embedded + time, self.action(actions) + time)
        x = self.norm_in(torch.stack(parts, dim=2).view(B, 3 * K, -1))
        places = torch.arange(3 * K, device=x.device)
        seen = valid.repeat_interleave(3, dim=1)[:, None, None, :] & (places[:, None] >= places)
        # a padded place attends to itself, so that no row of the softmax is empty
        mask = seen | torch.eye(3 * K, dtype=torch.bool, device=x.device)
        for block in self.blocks:
            x = block(x, mask)
        out = self.head(self.norm_out(x)[:, 1::3])
        return out if self.discrete else out.tanh()


class Windows:
    """Random windows of K timesteps, episodes drawn in proportion to their length."""

    def __init__(self, episodes: Sequence[Trajectory], config: Config, mean: np.ndarray, std: np.ndarray):
        self.episodes, self.config, self.mean, self.std = episodes, config, mean, std
        self.to_go = [np.cumsum(e.reward[::-1], dtype=np.float64)[::-1] / config.return_scale for e in episodes]
        lengths = np.array([len(e.reward) for e in episodes])
        self.odds = lengths / lengths.sum()

    def batch(self, rng: np.random.Generator) -> tuple[Tensor, ...]:
        """(to_go, states, actions, times, valid), windows right-aligned."""
        K, samples = self.config.context, []
        for n in rng.choice(len(self.episodes), self.config.batch, p=self.odds):
            stop = int(rng.integers(1, len(self.episodes[n].reward) + 1))
            samples.append(self.window(int(n), max(0, stop - K), stop))
        return tuple(torch.from_numpy(np.stack(column)) for column in zip(*samples))

    def window(self, n: int, start: int, stop: int) -> tuple[np.ndarray, ...]:
        episode, empty = self.episodes[n], self.config.context - (stop - start)

        def pad(values: np.ndarray) -> np.ndarray:
            return np.concatenate([np.zeros((empty, *values.shape[1:]), values.dtype), values])

        if episode.frames is None:
            assert episode.observation is not None
            states = ((episode.observation[start:stop] - self.mean) / self.std).astype(np.float32)
        else:
            states = stack_frames(episode.frames, start, stop)
        to_go = self.to_go[n][start:stop].astype(np.float32)
        valid = np.arange(self.config.context) >= empty
        return pad(to_go), pad(states), pad(episode.action[start:stop]), pad(np.arange(start, stop)), valid


def stack_frames(frames: np.ndarray, start: int, stop: int) -> np.ndarray:
    """(T, H, W, 1) -> (stop - start, 4, H, W): each frame behind its three predecessors, the first repeated."""
    index = np.maximum(np.arange(start, stop)[:, None] - np.arange(STACK - 1, -1, -1), 0)
    return frames[index, ..., 0]


def train(
    trajectories: Sequence[Trajectory],
    task: TaskSpec,
    config: Config,
    seed: int,
    out: Path,
    progress: Callable[[dict[str, Any]], None] = lambda figures: None,
) -> Path:
    """Train and export to `out`: weights.safetensors, then config.json. A function of its arguments on a CPU."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    observed = [t.observation for t in trajectories if t.observation is not None]
    flat = np.concatenate(observed) if observed else np.zeros((1, 1), np.float32)
    mean, std = flat.mean(axis=0), flat.std(axis=0) + 1e-6
    windows = Windows(trajectories, config, mean, std)
    target = config.target_return
    if target is None:
        target = float(max(t.reward.astype(np.float64).sum() for t in trajectories))
    model = DecisionTransformer(config, task)
    optimiser = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: min(1.0, (step + 1) / config.warmup))
    losses: list[float] = []
    for step in range(config.steps):
        to_go, states, actions, times, valid = windows.batch(rng)
        predicted = model(to_go, states, actions, times, valid)[valid]
        if model.discrete:
            loss = F.cross_entropy(predicted, actions[valid])
        else:
            loss = F.mse_loss(predicted, actions[valid])
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimiser.step()
        schedule.step()
        losses.append(loss.item())
        if step % 20 == 0 or step + 1 == config.steps:
            progress({"step": step + 1, "of": config.steps, "loss": float(np.mean(losses[-20:]))})
    extra = {
        "mean": mean.tolist(),
        "std": std.tolist(),
        "target_return": target,
        "losses": losses[:: max(1, config.steps // 200)],
    }
    return save_folder(out, FORMAT, model, config, task, seed, extra)


class Policy:
    """Acts from the last K timesteps of each environment of a batch."""

    def __init__(self, model: DecisionTransformer, body: dict[str, Any]):
        self.model, self.config = model.eval(), model.config
        self.mean, self.std = np.array(body["extra"]["mean"]), np.array(body["extra"]["std"])
        self.target = body["extra"]["target_return"]

    def reset(self, batch: int) -> None:
        self.batch, self.time = batch, 0
        self.to_go = np.full(batch, self.target / self.config.return_scale)
        self.history: list[tuple[np.ndarray, ...]] = []
        self.frames: list[np.ndarray] = []

    @torch.inference_mode()
    def act(
        self,
        observations: dict[str, np.ndarray],
        previous_reward: np.ndarray,
        active: np.ndarray,
        rng: np.random.Generator,
    ) -> np.ndarray:
        """{key: (B, ...)} -> actions (B, A) float32; or (B,) int64, sampled from the softmax as in the paper."""
        self.to_go = self.to_go - previous_reward / self.config.return_scale
        if self.model.image:
            frame = resize(observations["frame"], (64, 80))[..., 0]
            self.frames = [*(self.frames or [frame] * (STACK - 1)), frame][-STACK:]
            state = np.stack(self.frames, axis=1)
        else:
            flat = [observations[key].reshape(self.batch, -1) for key in sorted(observations)]
            state = ((np.concatenate(flat, axis=1) - self.mean) / self.std).astype(np.float32)
        empty = np.zeros(self.batch, np.int64)
        action = empty if self.model.discrete else np.zeros((self.batch, self.model.head.out_features), np.float32)
        self.history.append((self.to_go.astype(np.float32), state, action, np.full(self.batch, self.time)))
        self.history = self.history[-self.config.context :]
        columns = [torch.from_numpy(np.stack(column, axis=1)) for column in zip(*self.history)]
        out = self.model(*columns, torch.ones(columns[0].shape, dtype=torch.bool))[:, -1]
        if self.model.discrete:
            odds = out.softmax(dim=-1).numpy().astype(np.float64).cumsum(axis=1)
            action = (odds < rng.random((self.batch, 1)) * odds[:, -1:]).sum(axis=1)
        else:
            action = out.numpy()
        self.history[-1] = (*self.history[-1][:2], action, self.history[-1][3])
        self.time += 1
        return action


def load(folder: Path) -> Policy:
    """The policy that `train` exported; ValueError names what is missing or damaged."""
    body, config, task, weights = load_folder(folder, FORMAT, Config)
    model = DecisionTransformer(config, task)
    model.load_state_dict(weights)
    return Policy(model, body)
