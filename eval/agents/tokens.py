"""An agent whose model reads tokens: it decodes an action token by token and keeps a window in a cache (paper §2.4).

observation -> embedded tokens -> one step of the cache an action token -> tokens

All environments of a batch play the same task, so their timesteps have K tokens each, and token n of an episode is in
slot n mod W K of the cache: timestep t overwrites timestep t - W (W: timesteps in the window). A timestep takes as many
forward passes as an action has tokens, since the last one is fed with the next observation. The rolling mode keeps the
cached keys of the remaining timesteps, which still remember what was dropped; the exact mode computes the window again
at each timestep and is the reference.

Invariant: a full timestep's tensors have the same shapes, so that it can be replayed (eval/agents/cuda_graph.py).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from etl.tokenizers.timestep import Encoded
from eval.agents.base import GatoAgent
from eval.agents.cuda_graph import Replay, compiled
from eval.agents.prompts import AgentConfig
from schemas.episode import TaskSpec
from schemas.layout import SEPARATOR
from trainer.model import Gato
from trainer.model.export import ExportInfo
from trainer.model.gato import Blocks
from trainer.model.transformer import Cache

# by device: the cache has a multiple of so many slots; none attends to those beyond the window
ALIGNMENT = {"cuda": 64}


class TokenAgent(GatoAgent):
    """The agent of a model whose `sequence` is "tokens"."""

    def __init__(self, model: Gato, info: ExportInfo, task: TaskSpec, config: AgentConfig, *rest: Any):
        super().__init__(model, info, task, config, *rest)
        self.exact = config.window == "exact"
        self.launch = config.launch
        if self.launch == "auto":
            self.launch = "graph" if self.device.type == "cuda" and not self.exact else "plain"
        self.keeps_rows = self.launch != "plain"
        self.replay: Replay | None = None
        self.slots = self.window * self.layout.length
        with torch.inference_mode():
            self.local = model.local(self.roles, self.positions)
            if self.asked is not None:
                self.local[self.layout.roles == SEPARATOR] += self.asked
            multiple = ALIGNMENT.get(self.device.type, 1)
            self.slot = torch.arange(-(-self.slots // multiple) * multiple, device=self.device)

    def start(self, batch: int) -> None:
        self.time, K, A = 0, self.layout.length, self.layout.action
        self.cache = Cache(self.model.config, 1, len(self.slot), self.device, self.dtype)
        slots, width = self.slots if self.exact else 0, self.model.config.width
        self.shown = torch.zeros(1, slots, width, device=self.device).to(self.dtype)
        """Embedded tokens of the window, by slot, in the exact mode."""
        self.last = torch.zeros(1, A, dtype=torch.int64, device=self.device)
        """Tokens of the last action. The rolling mode has yet to feed the last one to the cache, the exact mode all."""
        shown = self._prompt_shown()
        if shown is not None:
            tokens, pixels = shown
            self.time = len(tokens)
            x = self._embed(self._ids(tokens), pixels).view(1, self.time * K, -1)
            self.last = torch.from_numpy(tokens[-1:, -A:].astype(np.int64)).to(self.device)
            if self.exact:
                self.shown[:, : self.time * K] = x
            else:
                numbers = torch.arange(self.time * K - 1, device=self.device)
                places, mask, rope = self._places(numbers)
                self.model.step(x[:, :-1], self.cache, places, mask, rope)
        self.keep(torch.zeros(batch, dtype=torch.int64, device=self.device))

    def next_action(self, encoded: Encoded, points: Tensor) -> Tensor:
        K, A = self.layout.length, self.layout.action
        oldest = max(0, self.time - self.window + 1) * K
        first = oldest if self.exact else max(0, self.time * K - 1)
        numbers = torch.arange(first, (self.time + 1) * K - 1, device=self.device)
        x = self._embed(self._ids(encoded.tokens), encoded.patches)
        if self.time:
            x = torch.cat([self._embed_actions(self.last, 0)[:, -A if self.exact else -1 :], x], dim=1)
        inputs = x, numbers, points
        # an episode's very first timestep has no action before it, and so another shape than all others
        self.last = self._replayed(*inputs) if self.launch != "plain" and self.time else self.timestep(*inputs)
        self.time += 1
        return self.last

    def keep(self, rows: Tensor) -> None:
        self.cache.keep(rows)
        self.shown, self.last = self.shown[rows], self.last[rows]

    def _replayed(self, *inputs: Tensor) -> Tensor:
        """`timestep` by the graph of a batch of this size, captured where the last one's was another."""
        if self.replay is None or not self.replay.fits(inputs):
            self.replay = None  # its memory is free before more is taken
            blocks = compiled(self.model) if self.launch == "compiled" else None
            self.replay = Replay(partial(self.timestep, blocks=blocks), inputs, self.cache)
        if self.cache is not self.replay.cache:
            self.replay.cache.copy_(self.cache)
            self.cache = self.replay.cache
        return self.replay(*inputs)

    def timestep(self, x: Tensor, numbers: Tensor, points: Tensor, blocks: Blocks | None = None) -> Tensor:
        """New embedded tokens (n, T, W) up to the separator, their and the window's token numbers up to the last but
        one of this action, points (n, A) in [0, 1) -> tokens (n, A) of the action. Tensors in, tensors out, their
        shapes the same at each full timestep of the rolling mode: what a compiler or a CUDA graph takes whole.
        `blocks`: the model's in another form."""
        A = self.layout.action
        slots, mask, rope = self._places(numbers)
        if self.exact:
            stop = len(numbers) - (A - 1)
            self.shown.index_copy_(1, slots[stop - x.shape[1] : stop], x)
            x = self.shown[:, slots[:stop]]
        chosen: list[Tensor] = []
        begin, end = 0, x.shape[1]
        for column in range(A):
            part = slice(begin, end)
            angles = None if rope is None else rope[:, part]
            filled = self._filled(x) if len(x) * x.shape[1] < self.rows_needed else x
            hidden = self.model.step(filled, self.cache, slots[part], mask[part], angles, blocks)[: len(x), -1]
            if self.decoding == "value":
                chosen.append(self._chosen_values(hidden, self.positions[column - A]))
            else:
                ids = self.ids[column]
                logits = F.linear(self._filled(hidden), self.head)[: len(x), : ids.size]
                chosen.append(ids.start + self._choose(logits, points[:, column, None]))
            x = self._embed_actions(chosen[-1][:, None], column)
            begin, end = end, end + 1
        return torch.stack(chosen, dim=1)

    def _places(self, numbers: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Slots (T,) of the tokens with these numbers, ascending; what each attends to (T, slots), 0 or -inf: tokens
        of the window up to itself; rotary angles."""
        last = numbers[-1]
        held = last - (last - self.slot) % self.slots  # the number of the token in each slot when all are written
        seen = (held <= numbers[:, None]) & (
            held >= (last // self.layout.length - self.window + 1) * self.layout.length
        )
        mask = torch.zeros(seen.shape, device=self.device, dtype=self.dtype).masked_fill(
            ~(seen & (held >= 0) & (self.slot < self.slots)), -torch.inf
        )
        return numbers % self.slots, mask, self.model.rope(numbers)

    def _embed(self, ids: Tensor, pixels: np.ndarray | None) -> Tensor:
        """Columns [0, k) of m timesteps (m, k), pixels (m, *patch_shape) -> (m, k, W)."""
        return self._looked_up(ids, pixels) + self.local[: ids.shape[1]]

    def _embed_actions(self, tokens: Tensor, first: int) -> Tensor:
        """Action tokens (n, a), from number `first` of the timestep's on, -> (n, a, W)."""
        column = self.layout.length - self.layout.action + first
        return self.model.tokens(tokens) + self.local[column : column + tokens.shape[1]]
