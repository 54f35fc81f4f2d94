"""An agent whose model reads timesteps: one forward pass per timestep computes all tokens of an action.

prompt's elements, which stay + elements of the last timesteps -> blocks -> hidden state of the last -> tokens

Invariant: a window holds as many timesteps as a training sequence, and scores an action as training does.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from etl.tokenizers.timestep import Encoded
from eval.agents.base import GatoAgent
from eval.agents.prompts import AgentConfig
from schemas.episode import TaskSpec
from schemas.layout import PATCH, SEPARATOR, TEXT
from trainer.model import Gato
from trainer.model.export import ExportInfo


class TimestepAgent(GatoAgent):
    """The agent of a model whose `sequence` is "timesteps"."""

    def __init__(self, model: Gato, info: ExportInfo, task: TaskSpec, config: AgentConfig, *rest: Any):
        super().__init__(model, info, task, config, *rest)
        if config.launch in ("graph", "compiled"):
            raise ValueError(f"--agent.launch {config.launch}: not for models of --model.sequence timesteps; use plain")
        scale = info.observation_scale(task)
        if scale is None:
            raise ValueError(
                f"task '{task.name}': this model has no scale of its observations, since it was trained on no task "
                "of this environment; train it on the task"
            )
        spread = model.spread_of(scale).to(self.device)
        self.spread = spread[self.positions.long().clamp(max=len(spread) - 1)]
        """(K, 2): what standardises values in each column of the task's timestep."""

    def start(self, batch: int) -> None:
        shown = self._prompt_shown()
        self.kept = torch.zeros(1, 0, self.model.config.width, device=self.device, dtype=self.dtype)
        if shown is not None:
            tokens, pixels = shown
            self.kept = self._elements(self._ids(tokens), pixels)[None]
        self.shown = self.kept[:, :0].expand(batch, -1, -1)

    def next_action(self, encoded: Encoded, points: Tensor) -> Tensor:
        n, A = points.shape
        self.shown = torch.cat([self.shown, self._elements(self._ids(encoded.tokens), encoded.patches)[:, None]], dim=1)
        self.shown = self.shown[:, -(self.window - self.kept.shape[1]) :]
        x = self._filled(torch.cat([self.kept.expand(n, -1, -1), self.shown], dim=1))
        hidden = self.model.through(x)[:, -1:] * self.model.scales_at(self.positions[-A:])
        if self.decoding == "value":
            return self._chosen_values(hidden, self.positions[-A:])[:n]
        logits = F.linear(hidden.flatten(0, 1), self.head)[: n * A].view(n, A, -1)
        chosen = [
            ids.start + self._choose(logits[:, column, : ids.size], points[:, column, None])
            for column, ids in enumerate(self.ids)
        ]
        return torch.stack(chosen, dim=1)

    def keep(self, rows: Tensor) -> None:
        self.shown = self.shown[rows]

    def _elements(self, ids: Tensor, pixels: np.ndarray | None) -> Tensor:
        """Columns [0, k) of m timesteps (m, k), patches (m, P, 16, 16, C) -> their elements (m, W)."""
        k = ids.shape[1]
        x = self._looked_up(ids, pixels)
        shown = self.roles[:k] != SEPARATOR
        if self.model.config.text_gates and pixels is not None:
            text, patches = self.roles[:k] == TEXT, self.roles[:k] == PATCH
            texts = self.model.scaled(x, ids, self.positions[:k], text, self.spread[:k]).sum(dim=1, keepdim=True)
            x[:, patches] = self.model.gated(x[:, patches], texts)
        x = self.model.scaled(x, ids, self.positions[:k], shown, self.spread[:k]).sum(dim=1)
        return x if self.asked is None else x + self.asked
