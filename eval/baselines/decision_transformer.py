"""Decision Transformer (arXiv 2106.01345), its control and Atari forms.

episodes -> windows of K timesteps (return-to-go, state, action) -> GPT -> the action at each state
at play: ask for `target_return`, subtract each reward, act from the last K timesteps

Control: linear state embedding of normalised observations, one learned embedding per timestep, tanh
head, squared error. Atari: the paper's convolutions over four stacked frames, a table of places in
the window and one embedding of the window's first timestep, cross-entropy; frames are the shards',
with zeros at the bottom and the right where they are smaller than the convolutions.

Invariant: padding comes after a window, where no causal attention sees it, so neither it nor the
batch it came in changes a prediction.

Shapes: B batch, K timesteps, D observation, A action, W width.
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

from etl.tokenizers.image import fitted, split_channels
from eval.baselines import Training, complete_episodes, device, load_folder, optimise, save_folder
from schemas.episode import ActionSpec, TaskSpec
from schemas.layout import continuous_values, ordered_fields, picture_size
from shards.views import Trajectory
from simulators.policy import Observations, Rng
from simulators.registry import clips_rewards

FORMAT = "gato.baseline.dt"
STACK = 4
SMALLEST_SIDE = 36  # the least height and width from which the three convolutions leave one place

# the returns that the paper asks for; HalfCheetah is asked for 6000 and for 12000
TARGETS = {"Hopper": 3600, "HalfCheetah": 6000, "Walker2d": 5000}
TARGETS |= {"ALE/Breakout": 90, "ALE/Seaquest": 1150, "ALE/Qbert": 14000, "ALE/Pong": 20}


@dataclass(frozen=True)
class Config(Training):
    """Defaults: the paper's for MuJoCo (its table 9, and its code)."""

    decay_all: bool = True
    context: int = 20
    """K, timesteps that the model sees."""
    layers: int = 3
    heads: int = 1
    width: int = 128
    return_scale: float = 1000.0
    target_return: float | None = None
    """Return to ask for at play. None: the best one of the training episodes."""

    @classmethod
    def paper(cls, task: TaskSpec) -> Config:
        """The paper's settings for MuJoCo (table 9) or Atari (table 8; 5 epochs of 500,000 timesteps)."""
        body = task.environment.id.rsplit("-v", 1)[0] if task.environment else ""
        target = TARGETS.get(body)
        if body == "HalfCheetah" and "expert" in task.name:
            target = 12000
        config = cls(target_return=target)
        if image_shape(task) is None:
            return config
        # the cosine ends after the last step: its code counts three tokens per timestep there and one elsewhere
        schedule = replace(config, steps=19_532, batch=128, lr=6e-4, warmup=3, decay=23_438, clip=1.0)
        decay = replace(schedule, weight_decay=0.1, decay_all=False, beta_2=0.95)
        return replace(decay, context=30, layers=6, heads=8, return_scale=1.0)

    @classmethod
    def quick(cls, task: TaskSpec) -> Config:
        """A smaller model, trained for under a minute on one CPU core."""
        config = replace(cls.paper(task), target_return=None, warmup=50)
        if image_shape(task) is None:
            narrow = replace(config, context=5, width=64, clip=1.0, dropout=0.0)
            return replace(narrow, steps=1200, decay=1200, lr=2e-3)
        return replace(config, context=8, layers=2, heads=4, batch=32, steps=150, decay=150, lr=1e-3)

    @classmethod
    def cpu(cls, task: TaskSpec) -> Config:
        """The quick model, trained for about four minutes on one CPU core."""
        config = cls.quick(task)
        if image_shape(task) is None:
            return replace(config, steps=10_000, decay=10_000, warmup=200)
        return replace(config, steps=1_000, decay=1_000)

    @classmethod
    def long(cls, task: TaskSpec) -> Config:
        """The same for eight times as many steps."""
        config = cls.cpu(task)
        return replace(config, steps=8 * config.steps, decay=8 * config.steps)


def image_shape(task: TaskSpec) -> tuple[int, int, int] | None:
    """Height, width and channels of the task's pictures as one, if it is an image task. ValueError where they differ
    in size."""
    images = [spec for spec in ordered_fields(task) if spec.kind == "image"]
    sizes = {picture_size(spec) for spec in images}
    if len(sizes) > 1:
        names = ", ".join(f"'{spec.key}' {' x '.join(map(str, picture_size(spec)))}" for spec in images)
        raise ValueError(
            f"task '{task.name}': Decision Transformer joins a timestep's pictures, and these differ in size "
            f"({names}); leave 'dt' out of --models, or build them resized to one size"
        )
    return (*sizes.pop(), sum(spec.channels for spec in images)) if sizes else None


class Block(nn.Module):
    """GPT-2's block: pre-norm attention and feed-forward of four times the width, causal."""

    def __init__(self, config: Config, activation: Callable[[Tensor], Tensor]):
        super().__init__()
        W = config.width
        self.heads, self.dropout, self.activation = config.heads, config.dropout, activation
        self.norm_1, self.norm_2 = nn.LayerNorm(W), nn.LayerNorm(W)
        self.qkv, self.out = nn.Linear(W, 3 * W), nn.Linear(W, W)
        self.up, self.down = nn.Linear(W, 4 * W), nn.Linear(4 * W, W)

    def forward(self, x: Tensor) -> Tensor:
        B, T, W = x.shape
        q, k, v = self.qkv(self.norm_1(x)).view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        rate = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=rate).transpose(1, 2).reshape(B, T, W)
        x = x + F.dropout(self.out(y), rate)
        return x + F.dropout(self.down(self.activation(self.up(self.norm_2(x)))), rate)


class DecisionTransformer(nn.Module):
    """(return-to-go, state, action) x K -> the action at each state's place."""

    def __init__(self, config: Config, task: TaskSpec, timesteps: int):
        """`timesteps`: size of the timestep table, the longest training episode; later ones share its last row."""
        super().__init__()
        assert task.action is not None
        W, image = config.width, image_shape(task)
        self.config, self.image, self.discrete = config, image is not None, task.action.kind == "discrete"
        outputs = task.action.choices[0] if self.discrete else task.action.size
        self.blocks = nn.ModuleList(Block(config, F.gelu if image else F.relu) for _ in range(config.layers))
        self.norm_out = nn.LayerNorm(W)
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, 0.0, 0.02)
                nn.init.zeros_(module.bias)
        self.to_go, self.timestep = nn.Linear(1, W), nn.Embedding(timesteps, W)
        self.action: nn.Module = nn.Embedding(outputs, W) if self.discrete else nn.Linear(outputs, W)
        self.head = nn.Linear(W, outputs, bias=image is None)
        if image is None:
            self.state: nn.Module = nn.Linear(sum(spec.size for spec in task.observation), W)
            self.norm_in = nn.LayerNorm(W)
            return
        height, width, channels = image
        convolutions = [nn.Conv2d(STACK * channels, 32, 8, 4), nn.ReLU(), nn.Conv2d(32, 64, 4, 2), nn.ReLU()]
        self.state = nn.Sequential(*convolutions, nn.Conv2d(64, 64, 3, 1), nn.ReLU(), nn.Flatten())
        features = self.state(padded(torch.zeros(1, STACK * channels, height, width))).shape[1]
        self.state.extend([nn.Linear(features, W), nn.Tanh()])
        self.place = nn.Parameter(torch.zeros(3 * config.context, W))
        for table in (self.timestep, self.action, self.head):
            nn.init.normal_(table.weight, 0.0, 0.02)
        nn.init.zeros_(self.timestep.weight)

    def embed(self, states: Tensor) -> Tensor:
        """States (..., D) float32 or (..., 4 C, H, W) uint8 to (..., W)."""
        if not self.image:
            return self.state(states)
        return self.state(padded(states.flatten(0, -4).float() / 255.0)).view(*states.shape[:-3], -1)

    def forward(self, to_go: Tensor, states: Tensor, actions: Tensor, times: Tensor) -> Tensor:
        """to_go (B, K), states from `embed` (B, K, W), actions (B, K, A) float32 or (B, K) int64, times (B, K)
        int64 -> actions in [-1, 1] (B, K, A), or logits. What is at t sees no later timestep nor its own action."""
        B, K, W = states.shape
        times = times.clamp(max=self.timestep.num_embeddings - 1)
        parts = torch.stack((self.to_go(to_go[..., None]), states, self.action(actions)), dim=2)
        if self.image:
            parts = torch.stack((parts[:, :, 0].tanh(), states, parts[:, :, 2].tanh()), dim=2)
            x = parts.view(B, 3 * K, W) + self.place[: 3 * K] + self.timestep(times[:, :1])
        else:
            x = self.norm_in((parts + self.timestep(times)[:, :, None]).view(B, 3 * K, W))
        x = F.dropout(x, self.config.dropout if self.training else 0.0)
        for block in self.blocks:
            x = block(x)
        out = self.head(self.norm_out(x[:, 1::3]))
        return out if self.discrete else out.tanh()


def padded(pictures: Tensor) -> Tensor:
    """Pictures (N, C, H, W), each side filled up with zeros to `SMALLEST_SIDE`; larger ones as they are."""
    height, width = pictures.shape[2:]
    return F.pad(pictures, (0, max(0, SMALLEST_SIDE - width), 0, max(0, SMALLEST_SIDE - height)))


class Windows:
    """Random windows of K timesteps: an episode in proportion to its length, then its first timestep, uniformly."""

    def __init__(self, episodes: Sequence[Trajectory], config: Config, scaling: Scaling):
        self.episodes, self.config = episodes, config
        self.to_go = [e.returns_to_go / config.return_scale for e in episodes]
        self.frames = [e.frames for e in episodes]
        if self.frames[0] is None:
            self.states = [scaling.state(e.observation) for e in episodes if e.observation is not None]
        self.actions = [scaling.action(e.action) for e in episodes]
        lengths = np.array([len(e.reward) for e in episodes])
        self.odds = lengths / lengths.sum()

    def batch(self, rng: np.random.Generator) -> list[Tensor]:
        """to_go (B, K), states (B, K, ...), actions (B, K[, A]), times (B, K), valid (B, K) bool."""
        chosen = rng.choice(len(self.episodes), self.config.batch, p=self.odds)
        samples = [self.window(n, int(rng.integers(len(self.to_go[n])))) for n in map(int, chosen)]
        return [torch.from_numpy(np.stack(column)) for column in zip(*samples)]

    def window(self, n: int, start: int) -> tuple[np.ndarray, ...]:
        """One row of `batch`: K timesteps of episode n; after its end the last one is repeated and is not valid."""
        times = np.arange(start, start + self.config.context)
        index = np.minimum(times, len(self.to_go[n]) - 1)
        frames = self.frames[n]
        states = self.states[n][index] if frames is None else stack_frames(frames, index)
        return self.to_go[n][index].astype(np.float32), states, self.actions[n][index], times, times == index


def stack_frames(frames: np.ndarray, index: np.ndarray) -> np.ndarray:
    """(T, H, W, C) uint8 at timesteps (K,) to (K, 4 C, H, W): each after its three predecessors."""
    stacked = frames[np.maximum(index[:, None] - np.arange(STACK - 1, -1, -1), 0)]
    return stacked.transpose(0, 1, 4, 2, 3).reshape(len(index), -1, *frames.shape[1:3])


@dataclass(frozen=True)
class Scaling:
    """Observations to mean 0 and deviation 1; real actions from each dimension's range to [-1, 1] and back, a discrete
    one to its ordinal and back."""

    mean: np.ndarray
    std: np.ndarray
    space: ActionSpec

    def state(self, values: np.ndarray) -> np.ndarray:
        return ((values - self.mean) / self.std).astype(np.float32)

    def action(self, values: np.ndarray) -> np.ndarray:
        if self.space.kind == "discrete":
            return values - self.space.start[0]
        low, high = np.array(self.space.low), np.array(self.space.high)
        return (values - low.astype(np.float32)) * (2 / (high - low)).astype(np.float32) - 1

    def undo_action(self, values: np.ndarray) -> np.ndarray:
        if self.space.kind == "discrete":
            return values + self.space.start[0]
        low, high = np.array(self.space.low), np.array(self.space.high)
        return low.astype(np.float32) + (values + 1) * ((high - low) / 2).astype(np.float32)


def train(
    trajectories: Sequence[Trajectory],
    task: TaskSpec,
    config: Config,
    seed: int,
    out: Path,
    progress: Callable[[dict[str, Any]], None] | None = None,
) -> Path:
    """Train and export to `out`: weights.safetensors, then config.json. On a CPU a function of its arguments.
    ValueError for a task without episodes, or with several discrete actions per timestep."""
    if task.action is None or (task.action.kind == "discrete" and task.action.size != 1):
        raise ValueError(
            f"task '{task.name}': Decision Transformer plays vectors of real actions or one discrete action; leave "
            "'dt' out of --models"
        )
    if image_shape(task) is None and any(spec.kind != "continuous" for spec in task.observation):
        raise ValueError(
            f"task '{task.name}': Decision Transformer plays pictures or vectors of real observations, not text or "
            "discrete values; leave 'dt' out of --models"
        )
    episodes = complete_episodes(trajectories, task)
    observed = np.concatenate([e.observation for e in episodes if e.observation is not None] or [np.zeros((1, 0))])
    mean, std = observed.mean(axis=0, dtype=np.float64), observed.std(axis=0, dtype=np.float64) + 1e-6
    target = config.target_return
    if target is None:
        target = float(max(e.reward.sum(dtype=np.float64) for e in episodes))
    timesteps, where, rng = max(len(e.reward) for e in episodes), device(), np.random.default_rng(seed)
    windows = Windows(episodes, config, Scaling(mean, std, task.action))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = DecisionTransformer(config, task, timesteps).to(where)

        def loss() -> Tensor:
            to_go, states, actions, times, valid = (column.to(where) for column in windows.batch(rng))
            predicted = model(to_go, model.embed(states), actions, times)[valid]
            return (F.cross_entropy if model.discrete else F.mse_loss)(predicted, actions[valid])

        curve = optimise(model, config, loss, progress)
    extra = {"mean": mean.tolist(), "std": std.tolist(), "target_return": target, "timesteps": timesteps}
    return save_folder(out, FORMAT, model, config, task, seed, extra | {"losses": curve})


class Policy:
    """Acts from the last K timesteps of each environment of a batch."""

    def __init__(self, model: DecisionTransformer, task: TaskSpec, extra: dict[str, Any]):
        assert task.action is not None
        self.model, self.config, self.task = model.eval().to(device()), model.config, task
        self.scaling = Scaling(np.array(extra["mean"]), np.array(extra["std"]), task.action)
        self.target, self.actions = float(extra["target_return"]), task.action.size
        self.clipped = clips_rewards(task.environment, task.source)  # and so are returns-to-go

    def reset(self, batch: int) -> None:
        """A batch of environments starts."""
        self.batch, self.time = batch, 0
        self.to_go = np.full(batch, self.target)
        self.history: list[tuple[Tensor, ...]] = []
        self.frames: list[np.ndarray] = []

    @torch.inference_mode()
    def act(self, observations: Observations, previous_reward: np.ndarray, active: np.ndarray, rng: Rng) -> np.ndarray:
        """{key: (B, ...)} -> actions (B, A) float32; or (B,) int64, drawn from the softmax as in the paper."""
        where = device()
        self.to_go = self.to_go - (np.clip(previous_reward, -1, 1) if self.clipped else previous_reward)
        state = torch.from_numpy(self._state(observations)).to(where)
        blank = torch.zeros(self.batch, dtype=torch.int64, device=where)
        action = blank if self.model.discrete else torch.zeros(self.batch, self.actions, device=where)
        to_go = torch.from_numpy((self.to_go / self.config.return_scale).astype(np.float32)).to(where)
        now = (to_go, self.model.embed(state), action, blank + self.time)
        self.history = [*self.history, now][-self.config.context :]
        self.time += 1
        out = self.model(*(torch.stack(column, dim=1) for column in zip(*self.history)))[:, -1]
        if not self.model.discrete:
            action.copy_(out)
            return self.scaling.undo_action(out.cpu().numpy())
        odds = out.double().softmax(dim=1).cumsum(dim=1).cpu().numpy()
        choice = np.zeros(self.batch, np.int64)
        choice[active] = (odds[active, :-1] < rng.random((int(active.sum()), 1))).sum(axis=1)
        action.copy_(torch.from_numpy(choice))
        return self.scaling.undo_action(choice)

    def _state(self, observations: Observations) -> np.ndarray:
        if not self.model.image:
            values = continuous_values(self.task, observations)
            assert values is not None
            return self.scaling.state(values)
        images = [spec for spec in ordered_fields(self.task) if spec.kind == "image"]
        pictures = [fitted(p, spec) for spec in images for p in split_channels(observations[spec.key], spec)]
        frames = pictures[0] if len(pictures) == 1 else np.concatenate(pictures, axis=3)
        self.frames = [*(self.frames or [frames] * (STACK - 1)), frames][-STACK:]
        return np.concatenate(self.frames, axis=3).transpose(0, 3, 1, 2)


def load(folder: Path) -> Policy:
    """The policy that `train` exported to `folder`; ValueError names what is missing or damaged."""
    config, task, extra, weights = load_folder(folder, FORMAT, Config)
    model = DecisionTransformer(config, task, extra["timesteps"])
    model.load_state_dict(weights)
    return Policy(model, task, extra)
