"""Gato as an agent: what its two forms share: tokens of an observation in, tokens of an action out, and their choice.

observation -> etl.tokenizers -> stored tokens, patches -> a form's next_action -> tokens of an action -> action

A form says what a model reads: tokens one by one (eval/agents/tokens.py) or whole timesteps (eval/agents/timesteps.py).

Invariants: sampling is restricted to the ids that the action space allows; on one thread an
episode's actions are the same to the bit whatever else is in the batch (see `batch_invariant`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from etl.tokenizers.text import TextTokenizer
from etl.tokenizers.timestep import Encoded, TimestepTokenizer
from eval.agents.prompts import AgentConfig, Prompt
from schemas.episode import TaskSpec
from schemas.vocabulary import bin_centres
from simulators.policy import Observations, Rng
from trainer.model import Gato
from trainer.model.export import ExportInfo

ROWS = 4  # that a CPU's matrix products need to round as they do for more


class GatoAgent(ABC):
    """Plays one task in a batch of environments. `act` is called once a timestep."""

    keeps_rows = False
    """Episodes that end leave the batch, but where its shape is fixed."""

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
            raise ValueError(
                f"task '{task.name}': two timesteps of {self.layout.length} tokens do not fit the model's context of "
                f"{info.sequence_length}; train with a longer --data.stream.sequence-length"
            )
        continuous = task.action is not None and task.action.kind == "continuous"
        auto = ("value", "greedy") if model.config.values else ("mean", "sample")
        self.decoding = config.decoding if config.decoding != "auto" else auto[not continuous]
        if self.decoding in ("mean", "value") and not continuous:
            raise ValueError(
                f"--agent.decoding {self.decoding}: actions of '{task.name}' are discrete; use sample or greedy"
            )
        if self.decoding == "value" and not model.config.values:
            raise ValueError("--agent.decoding value: this model was trained without --model.values; use mean")
        self.ids = self.tokenizer.action_ids
        """Of each of an action's tokens."""
        weight = model.tokens.weight.detach()
        self.device, self.dtype = weight.device, weight.dtype
        self.rows_needed = ROWS if config.batch_invariant and self.device.type == "cpu" else 1
        self.head = weight[self.ids[0].start : max(ids.stop for ids in self.ids)]
        with torch.inference_mode():
            roles, positions = (torch.from_numpy(x) for x in (self.layout.roles, self.layout.local_positions))
            self.roles, self.positions = roles.to(self.device), positions.to(self.device)
            self.asked = self._asked(info, task)
            self.centres = torch.from_numpy(bin_centres(len(self.head))).to(self.device)
            self.patch_centres = torch.from_numpy(self.layout.patch_centres).to(self.device)

    def _asked(self, info: ExportInfo, task: TaskSpec) -> Tensor | None:
        """(W,): what the return that is asked for adds to each timestep; None where the model reads none."""
        scale = info.return_scale(task)
        if self.config.asked_return is not None and (not self.model.config.returns or scale is None):
            raise ValueError(
                f"--agent.asked-return: this model was not trained with returns of task '{task.name}'; leave it out"
            )
        if not self.model.config.returns or scale is None:
            return None
        wanted = scale.target if self.config.asked_return is None else self.config.asked_return
        return self.model.asked_for(torch.tensor(scale.scaled(wanted), device=self.device))

    @torch.inference_mode()
    def reset(self, batch: int) -> None:
        """A batch of environments starts; the window holds the prompt alone."""
        self.running = np.arange(batch)
        self.start(batch)

    @torch.inference_mode()
    def act(self, observations: Observations, previous_reward: np.ndarray, active: np.ndarray, rng: Rng) -> np.ndarray:
        """observations {key: (B, ...)} -> actions (B, A) float32 or (B,) int64, zeros where not `active`. Rewards are
        not shown to Gato."""
        if int(active.sum()) < len(self.running) and not self.keeps_rows:
            left = np.flatnonzero(active[self.running])
            self.running = self.running[left]
            self.keep(torch.from_numpy(left).to(self.device))
        encoded = self.tokenizer.encode_observation({key: value[self.running] for key, value in observations.items()})
        live = active[self.running]
        points = np.zeros((len(self.running), self.layout.action))
        if self.decoding == "sample":
            points[live] = rng.random((int(live.sum()), self.layout.action))
        tokens = self.next_action(encoded, torch.from_numpy(points).to(self.device))
        chosen = self.tokenizer.decode_action(tokens.cpu().numpy())
        actions = np.zeros((len(active), *chosen.shape[1:]), chosen.dtype)
        actions[self.running[live]] = chosen[live]
        return actions

    @abstractmethod
    def start(self, batch: int) -> None:
        """Fill the windows of `batch` environments with the prompt."""

    @abstractmethod
    def next_action(self, encoded: Encoded, points: Tensor) -> Tensor:
        """The observation of the n running environments and points (n, A) in [0, 1) to draw by -> tokens (n, A) of the
        action, which are in the windows from now on."""

    @abstractmethod
    def keep(self, rows: Tensor) -> None:
        """Of the running environments, only these go on."""

    def _prompt_shown(self) -> tuple[np.ndarray, np.ndarray | None] | None:
        """Tokens (m, stored) and patches of the prompt's timesteps that fit its share of the window; None without."""
        length = min(int(self.window * self.config.prompt_share), self.window - 1)  # the present timestep is in it too
        if self.prompt is None or not length:
            return None
        shown = slice(length) if self.config.prompt == "start" else slice(-length, None)
        patches = self.prompt.patches
        return self.prompt.tokens[shown], None if patches is None else np.array(patches[shown])

    def _choose(self, logits: Tensor, points: Tensor) -> Tensor:
        """Restricted logits (n, ids) and points (n, 1) in [0, 1) to choices (n,) in [0, ids)."""
        count = logits.shape[1]
        if self.decoding == "greedy":
            return logits.argmax(dim=1)
        odds = (logits.double() / self.config.temperature).softmax(dim=1)
        if self.decoding == "mean":
            place = ((odds * self.centres).sum(dim=1) + 1) * (count / 2)
        else:
            place = (odds.cumsum(dim=1) < points).sum(dim=1)
        return place.long().clamp(max=count - 1)

    def _chosen_values(self, hidden: Tensor, positions: Tensor) -> Tensor:
        """Ids of the bins that hold what hidden states (..., W) decode to at `positions` (...)."""
        ids = self.ids[0]
        place = (self.model.values_at(hidden, positions).double() + 1) * (ids.size / 2)
        return ids.start + place.long().clamp(0, ids.size - 1)

    def _ids(self, tokens: np.ndarray) -> Tensor:
        """Stored tokens (m, s), with or without an action's, as whole timesteps' columns (m, k)."""
        layout = self.layout
        ids = np.zeros((len(tokens), layout.length - (layout.stored - tokens.shape[1])), np.int64)
        ids[:, layout.stored_columns[: tokens.shape[1]]] = tokens
        ids[:, layout.length - layout.action - 1] = self.model.vocabulary.separator
        return torch.from_numpy(ids).to(self.device)

    def _looked_up(self, ids: Tensor, pixels: np.ndarray | None) -> Tensor:
        """Columns [0, k) of m timesteps (m, k), pixels (m, *patch_shape) -> (m, k, W), without positions."""
        x = self.model.tokens(ids)
        if pixels is not None:
            first, count = self.layout.text, self.layout.patches
            flat = torch.from_numpy(self.layout.level_patches(pixels)).to(self.device).flatten(0, 1)
            embedded = self.model.patches(flat, self.patch_centres.repeat(len(pixels), 1))
            x[:, first : first + count] = embedded.view(len(pixels), count, -1).to(x.dtype)
        return x

    def _filled(self, x: Tensor) -> Tensor:
        """At least as many rows as matrix products need: x's own, then zeros."""
        short = self.rows_needed - len(x)
        return x if short <= 0 else F.pad(x, (0, 0) * (x.ndim - 1) + (0, short))
