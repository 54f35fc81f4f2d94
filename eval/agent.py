"""Gato as an agent: prompt, tokenize, decode actions token by token, keep a window (paper §2.4).

observation -> etl.tokenizers -> tokens -> one forward -> action tokens, one forward each -> action

All environments of a batch play the same task, so their timesteps lie on one grid of
K columns and share cache slots; timestep t lives in slots (t mod W) K ... and drops the
whole timestep t - W when it comes. The rolling mode keeps the cached keys of the
remaining timesteps, which still remember what was dropped; the exact mode recomputes
the window and is the reference.

Invariant: sampling is restricted to the ids that the action space allows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from etl.tokenizers.text import TextTokenizer
from etl.tokenizers.timestep import TimestepTokenizer
from schemas.episode import TaskSpec
from schemas.layout import PATCH_SIZE, SEPARATOR
from schemas.vocabulary import bin_centres
from shards.batch import Batch
from shards.reader import Dataset
from trainer.checkpoint import ExportInfo
from trainer.model import Gato
from trainer.model.transformer import Cache


@dataclass(frozen=True)
class AgentConfig:
    """How actions are decoded."""

    decoding: Literal["auto", "sample", "greedy", "mean"] = "auto"
    """sample from the restricted softmax; greedy; mean of bins (continuous actions only); auto: mean for
    continuous actions, sample for discrete ones."""
    temperature: float = 1.0
    prompt: Literal["end", "start", "none"] = "end"
    """A demonstration's last timesteps, as half of the prompts in training; its first, as the paper has it (§2.4); or
    none. docs/ablations.md has what each gives."""
    prompt_share: float = 0.5
    """Share of the window that starts out filled with the prompt."""
    window: Literal["rolling", "exact"] = "rolling"


@dataclass(frozen=True)
class Prompt:
    """Timesteps of a demonstration: tokens (T, stored) uint16, patches (T, P, 16, 16, C) or None."""

    tokens: np.ndarray
    patches: np.ndarray | None


def text_tokenizer(dataset: Dataset) -> TextTokenizer | None:
    """The tokenizer of the dataset's own text model; None where it holds no text."""
    if dataset.manifest.text_model is None:
        return None
    return TextTokenizer(dataset.local(dataset.manifest.text_model.file), dataset.manifest.vocabulary)


def best_demonstration(dataset: Dataset, task: int, prompt: Literal["end", "start"]) -> Prompt:
    """The last or first stored piece of the training episode with the highest return."""
    rows = dataset.rows(task, held_out=False)
    start, steps, whole = (dataset.column(name)[rows] for name in ("start", "timesteps", "episode_timesteps"))
    rows = rows[start == 0 if prompt == "start" else start + steps == whole]
    row = int(rows[np.argmax(dataset.column("episode_return")[rows])])
    return Prompt(dataset.tokens(row), dataset.patches(row) if dataset.layouts[task].patches else None)


def demonstration(dataset: Dataset, task: int, config: AgentConfig) -> Prompt | None:
    """What an agent of this configuration is prompted with."""
    return None if config.prompt == "none" else best_demonstration(dataset, task, config.prompt)


class GatoAgent:
    """Plays one task in a batch of environments. `act` is called once a timestep."""

    def __init__(
        self,
        model: Gato,
        info: ExportInfo,
        task: TaskSpec,
        config: AgentConfig,
        prompt: Prompt | None = None,
        text: TextTokenizer | None = None,
    ):
        self.model, self.config, self.prompt = model, config, prompt
        self.tokenizer = TimestepTokenizer(task, info.vocabulary, text)
        self.layout = self.tokenizer.layout
        self.window = info.sequence_length // self.layout.length
        if self.window < 2:
            raise ValueError(f"task '{task.name}': two timesteps do not fit a context of {info.sequence_length} tokens")
        continuous = task.action is not None and task.action.kind == "continuous"
        self.decoding = config.decoding if config.decoding != "auto" else ("mean" if continuous else "sample")
        if self.decoding == "mean" and not continuous:
            raise ValueError(f"task '{task.name}': the mean of bins has no meaning for discrete actions")
        self.ids = self.tokenizer.action_ids
        self.device = next(model.parameters()).device
        self.batch = 0

    def reset(self, batch: int) -> None:
        """A batch of environments starts anew; the window holds the prompt alone."""
        self.batch, self.time = batch, 0
        self.tokens = np.zeros((batch, self.window, self.layout.stored), np.uint16)
        size = (batch, self.window, self.layout.patches, PATCH_SIZE, PATCH_SIZE, max(1, self.layout.channels))
        self.patches = np.zeros(size, np.uint8)
        slots = self.window * self.layout.length
        dtype = next(self.model.parameters()).dtype
        self.cache = Cache(self.model.config, batch, slots, self.device, dtype)
        self.valid = torch.zeros(batch, slots, dtype=torch.bool, device=self.device)
        length = 0 if self.prompt is None else int(self.window * self.config.prompt_share)
        if self.prompt is None or length == 0:
            return
        length = min(length, len(self.prompt.tokens))
        shown = slice(-length, None) if self.config.prompt == "end" else slice(length)
        self.tokens[:, :length] = self.prompt.tokens[shown]
        if self.prompt.patches is not None:
            self.patches[:, :length] = self.prompt.patches[shown]
        if self.config.window == "rolling":
            for t in range(length):
                self._forward(t, 0, self.layout.length)
        self.time = length

    @torch.inference_mode()
    def act(
        self,
        observations: dict[str, np.ndarray],
        previous_reward: np.ndarray,
        active: np.ndarray,
        rng: np.random.Generator,
    ) -> np.ndarray:
        """observations {key: (B, ...)} -> actions (B, A) float32 or (B,) int64. Rewards are not shown to Gato."""
        t, A = self.time, self.layout.action
        encoded = self.tokenizer.encode_observation(observations)
        place = t % self.window
        self.tokens[:, place] = 0
        self.tokens[:, place, : self.layout.stored - A] = encoded.tokens
        if encoded.patches is not None:
            self.patches[:, place] = encoded.patches
        first = place * self.layout.length
        self.valid[:, first : first + self.layout.length] = False
        start = 0
        for column in range(A):
            stop = self.layout.length - A + column
            hidden = self._forward(t, start, stop) if self.config.window == "rolling" else self._recompute(t, stop)
            weight = self.model.tokens.weight[self.ids.start : self.ids.stop]
            logits = (hidden @ weight.T).float().cpu().numpy().astype(np.float64)
            self.tokens[:, place, self.layout.stored - A + column] = self.ids.start + self._choose(logits, rng)
            start = stop
        if self.config.window == "rolling":
            self._forward(t, start, self.layout.length)
        self.time += 1
        return self.tokenizer.decode_action(self.tokens[:, place, self.layout.stored - A :])

    def _choose(self, logits: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Restricted logits (B, n) float64 to choices (B,) in [0, n)."""
        if self.decoding == "greedy":
            return logits.argmax(axis=1)
        odds = np.exp((logits - logits.max(axis=1, keepdims=True)) / self.config.temperature)
        odds /= odds.sum(axis=1, keepdims=True)
        if self.decoding == "mean":
            return np.abs(bin_centres(self.ids.size) - (odds @ bin_centres(self.ids.size))[:, None]).argmin(axis=1)
        return np.minimum((odds.cumsum(axis=1) < rng.random((len(odds), 1))).sum(axis=1), odds.shape[1] - 1)

    def _columns(self, places: np.ndarray, start: int, stop: int) -> Batch:
        """Columns [start, stop) of the timesteps at window `places`, as a batch (B, timesteps * columns)."""
        layout, B, T = self.layout, self.batch, len(places)
        grid = np.zeros((B, T, layout.length), np.int32)
        grid[:, :, layout.stored_columns] = self.tokens[:, places]
        grid[:, :, layout.roles == SEPARATOR] = self.model.vocabulary.separator
        columns = np.arange(start, stop)
        slots = np.intersect1d(layout.patch_slots, columns)
        width = T * len(columns)
        index = np.arange(B)[:, None, None] * width + np.arange(T)[:, None] * len(columns) + (slots - start)
        pixels = self.patches[:, places][:, :, : len(slots)]
        return Batch(
            tokens=grid[:, :, columns].reshape(B, width),
            roles=np.tile(layout.roles[columns], (B, T)),
            positions=np.tile(layout.local_positions[columns], (B, T)),
            segments=np.zeros((B, width), np.int16),
            supervised=np.zeros((B, width), bool),
            patches=pixels.reshape(-1, *self.patches.shape[3:]),
            patch_index=index.reshape(-1).astype(np.int64),
            patch_positions=np.tile(layout.patch_centres[: len(slots)], (B * T, 1)),
            tasks=np.zeros(B, np.int64),
            sequence=np.zeros(B, np.int64),
        ).to(self.device)

    @torch.inference_mode()
    def _forward(self, t: int, start: int, stop: int) -> torch.Tensor:
        """Feed columns [start, stop) of timestep t to the cache; hidden state of the last one (B, W)."""
        place = t % self.window
        first = place * self.layout.length
        slots = torch.arange(first + start, first + stop, device=self.device)
        hidden = self.model.step(self._columns(np.array([place]), start, stop), self.cache, slots, self.valid)
        self.valid[:, slots] = True
        return hidden[:, -1]

    @torch.inference_mode()
    def _recompute(self, t: int, stop: int) -> torch.Tensor:
        """The whole window up to column `stop` of timestep t, from scratch; hidden state of the last token (B, W)."""
        first = max(0, t - self.window + 1)
        batch = self._columns(np.arange(first, t + 1) % self.window, 0, self.layout.length)
        cut = (t - first) * self.layout.length + stop
        return self.model(batch)[:, cut - 1]
