"""Gato as an agent: prompt, tokenize, decode actions token by token, keep a window (paper §2.4).

observation -> etl.tokenizers -> embedded tokens -> one step of the cache an action token -> action

All environments of a batch play the same task, so their timesteps have K tokens each, and
token n of an episode is in slot n mod W K of the cache: timestep t overwrites timestep t - W
(W: timesteps in the window). A timestep takes as many forward passes as an action has tokens, for the last one
is fed along with the next observation. The rolling mode keeps the cached keys of the
remaining timesteps, which still remember what was dropped; the exact mode computes the
window again at each timestep and is the reference. Episodes that end leave the batch, but for
one that is replayed (see eval/cuda_graph.py).

A model that reads timesteps (`sequence` "timesteps") has a window of a few elements: the prompt's, which stay, and the
last ones, as in training. One forward pass per timestep computes all of them.

Invariants: sampling is restricted to the ids that the action space allows; on one thread an
episode's actions are the same to the bit whatever else is in the batch (see `batch_invariant`).
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from etl.tokenizers.text import TextTokenizer
from etl.tokenizers.timestep import TimestepTokenizer
from eval.cuda_graph import Replay, compiled
from eval.prompts import AgentConfig, Prompt, demonstration, prompted, text_tokenizer
from schemas.episode import TaskSpec
from schemas.layout import SEPARATOR
from schemas.vocabulary import bin_centres
from shards.reader import Dataset
from simulators.policy import EpisodeRng
from trainer.checkpoint import ExportInfo
from trainer.model import Gato
from trainer.model.gato import Blocks
from trainer.model.transformer import Cache

ROWS = 4  # that a CPU's matrix products need to round as they do for more
# by device: the cache has a multiple of so many slots; none attends to those beyond the window
ALIGNMENT = {"cuda": 64}


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
        config.check()
        self.model, self.config, self.prompt = model, config, prompt
        self.tokenizer = TimestepTokenizer(task, info.vocabulary, text)
        self.layout = self.tokenizer.layout
        self.window = info.sequence_length // self.layout.length
        if self.window < 2:
            raise ValueError(f"task '{task.name}': two timesteps do not fit a context of {info.sequence_length} tokens")
        continuous = task.action is not None and task.action.kind == "continuous"
        auto = ("value", "greedy") if model.config.values else ("mean", "sample")
        self.decoding = config.decoding if config.decoding != "auto" else auto[not continuous]
        if self.decoding in ("mean", "value") and not continuous:
            raise ValueError(f"task '{task.name}': the mean of bins has no meaning for discrete actions")
        if self.decoding == "value" and not model.config.values:
            raise ValueError("--agent.decoding value: this model has bins alone; use mean")
        self.ids = self.tokenizer.action_ids
        """Of each of an action's tokens."""
        weight = model.tokens.weight.detach()
        self.device, self.dtype = weight.device, weight.dtype
        self.rows_needed = ROWS if config.batch_invariant and self.device.type == "cpu" else 1
        rolling, self.launch = config.window == "rolling", config.launch
        self.replay: Replay | None = None
        if self.launch == "auto":
            self.launch = "graph" if self.device.type == "cuda" and rolling else "plain"
        first = self.ids[0].start
        self.head = weight[first : max(ids.stop for ids in self.ids)]
        self.slots = self.window * self.layout.length
        if model.by_timesteps and self.launch != "plain":
            if config.launch != "auto":
                raise ValueError(f"--agent.launch {config.launch}: a model that reads timesteps is played plain")
            self.launch = "plain"
        with torch.inference_mode():
            roles, positions = (torch.from_numpy(x) for x in (self.layout.roles, self.layout.local_positions))
            self.roles, self.positions = roles.to(self.device), positions.to(self.device)
            self.local = model.local(self.roles, self.positions)
            if model.by_timesteps:
                self.spread = self._spread(info, task)
            self.asked = self._asked(info, task)
            if self.asked is not None and not model.by_timesteps:
                self.local[self.layout.roles == SEPARATOR] += self.asked
            multiple = ALIGNMENT.get(self.device.type, 1)
            self.slot = torch.arange(-(-self.slots // multiple) * multiple, device=self.device)
            self.centres = torch.from_numpy(bin_centres(len(self.head))).to(self.device)
            self.patch_centres = torch.from_numpy(self.layout.patch_centres).to(self.device)

    def _spread(self, info: ExportInfo, task: TaskSpec) -> Tensor:
        """(K, 2): what standardises values in each column of the task's timestep."""
        scale = info.observation_scale(task)
        if scale is None:
            known = ", ".join(info.observations)
            raise ValueError(
                f"task '{task.name}': this model has no scale of its observations, only those of {known}; train it on "
                "the task"
            )
        spread = self.model.spread_of(scale).to(self.device)
        return spread[self.positions.long().clamp(max=len(spread) - 1)]

    def _asked(self, info: ExportInfo, task: TaskSpec) -> Tensor | None:
        """(W,): what the return that is asked for adds to each timestep; None where the model reads none."""
        scale = info.return_scale(task)
        if self.config.asked_return is not None and (not self.model.config.returns or scale is None):
            raise ValueError(f"--agent.asked-return: this model was not trained with returns of task '{task.name}'")
        if not self.model.config.returns or scale is None:
            return None
        wanted = scale.target if self.config.asked_return is None else self.config.asked_return
        return self.model.asked_for(torch.tensor(scale.scaled(wanted), device=self.device))

    @torch.inference_mode()
    def reset(self, batch: int) -> None:
        """A batch of environments starts; the window holds the prompt alone."""
        self.running, self.time = np.arange(batch), 0
        if self.model.by_timesteps:
            self._reset_timesteps(batch)
            return
        exact, K, A = self.config.window == "exact", self.layout.length, self.layout.action
        self.cache = Cache(self.model.config, 1, len(self.slot), self.device, self.dtype)
        # embedded tokens of the window, by slot
        self.shown = torch.zeros(1, self.slots if exact else 0, self.model.config.width, device=self.device).to(
            self.dtype
        )
        self.last = torch.zeros(1, A, dtype=torch.int64, device=self.device)
        """Tokens of the last action. The rolling mode has yet to feed the last one to the cache, the exact mode all."""
        length = 0 if self.prompt is None else int(self.window * self.config.prompt_share)
        if self.prompt is not None and length:
            length = self.time = min(length, len(self.prompt.tokens))
            shown = slice(length) if self.config.prompt == "start" else slice(-length, None)
            pixels = None if self.prompt.patches is None else np.array(self.prompt.patches[shown])
            x = self._embed(self._ids(self.prompt.tokens[shown]), pixels).view(1, length * K, -1)
            self.last = torch.from_numpy(self.prompt.tokens[shown][-1:, -A:].astype(np.int64)).to(self.device)
            if exact:
                self.shown[:, : length * K] = x
            else:
                numbers = torch.arange(length * K - 1, device=self.device)
                slots, mask, rope = self._places(numbers)
                self.model.step(x[:, :-1], self.cache, slots, mask, rope)
        self._keep(np.zeros(batch, np.int64))

    @torch.inference_mode()
    def act(
        self,
        observations: dict[str, np.ndarray],
        previous_reward: np.ndarray,
        active: np.ndarray,
        rng: EpisodeRng | np.random.Generator,
    ) -> np.ndarray:
        """observations {key: (B, ...)} -> actions (B, A) float32 or (B,) int64, zeros where not `active`. Rewards are
        not shown to Gato."""
        if int(active.sum()) < len(self.running) and self.launch == "plain":
            left = np.flatnonzero(active[self.running])
            self.running = self.running[left]
            self._keep(left)
        n, K, A = len(self.running), self.layout.length, self.layout.action
        encoded = self.tokenizer.encode_observation({key: value[self.running] for key, value in observations.items()})
        if self.model.by_timesteps:
            points = self._points(active, n, A, rng)
            self.last = self._timestep_at_once(self._ids(encoded.tokens), encoded.patches, points)
            return self._actions(active)
        oldest = max(0, self.time - self.window + 1) * K
        first = oldest if self.config.window == "exact" else max(0, self.time * K - 1)
        numbers = torch.arange(first, (self.time + 1) * K - 1, device=self.device)
        points = self._points(active, n, A, rng)
        x = self._embed(self._ids(encoded.tokens), encoded.patches)
        if self.time:
            x = torch.cat(
                [self._embed_actions(self.last, 0)[:, -A if self.config.window == "exact" else -1 :], x], dim=1
            )
        inputs = x, numbers, points
        # an episode's very first timestep has no action before it, and so another shape than all others
        self.last = self._replayed(*inputs) if self.launch != "plain" and self.time else self.timestep(*inputs)
        self.time += 1
        return self._actions(active)

    def _points(self, active: np.ndarray, n: int, A: int, rng: EpisodeRng | np.random.Generator) -> Tensor:
        """(n, A) in [0, 1) for the running rows, zeros where no sample is drawn."""
        points, live = np.zeros((n, A)), active[self.running]
        if self.decoding == "sample":
            points[live] = rng.random((int(live.sum()), A))
        return torch.from_numpy(points).to(self.device)

    def _actions(self, active: np.ndarray) -> np.ndarray:
        """The last tokens as actions of all rows (B, ...), zeros where not `active`."""
        live = active[self.running]
        chosen = self.tokenizer.decode_action(self.last.cpu().numpy())
        actions = np.zeros((len(active), *chosen.shape[1:]), chosen.dtype)
        actions[self.running[live]] = chosen[live]
        return actions

    def _reset_timesteps(self, batch: int) -> None:
        """The window holds the prompt's elements, which stay."""
        self.kept = torch.zeros(1, 0, self.model.config.width, device=self.device, dtype=self.dtype)
        length = 0 if self.prompt is None else min(int(self.window * self.config.prompt_share), len(self.prompt.tokens))
        if self.prompt is not None and length:
            part = slice(length) if self.config.prompt == "start" else slice(-length, None)
            pixels = None if self.prompt.patches is None else np.array(self.prompt.patches[part])
            self.kept = self._elements(self._ids(self.prompt.tokens[part]), pixels)[None]
        self.shown = self.kept[:, :0].expand(batch, -1, -1)

    def _elements(self, ids: Tensor, pixels: np.ndarray | None) -> Tensor:
        """Columns [0, k) of m timesteps (m, k), patches (m, P, 16, 16, C) -> their elements (m, W)."""
        k = ids.shape[1]
        x = self._looked_up(ids, pixels)
        shown = self.roles[:k] != SEPARATOR
        x = self.model.scaled(x, ids, self.positions[:k], shown, self.spread[:k]).sum(dim=1)
        return x if self.asked is None else x + self.asked

    def _timestep_at_once(self, ids: Tensor, pixels: np.ndarray | None, points: Tensor) -> Tensor:
        """Tokens (n, A) of the action, by timesteps."""
        n, A = points.shape
        self.shown = torch.cat([self.shown, self._elements(ids, pixels)[:, None]], dim=1)
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

    def _chosen_values(self, hidden: Tensor, positions: Tensor) -> Tensor:
        """Ids of the bins that hold what hidden states (..., W) decode to at `positions` (...)."""
        ids = self.ids[0]
        place = (self.model.values_at(hidden, positions).double() + 1) * (ids.size / 2)
        return ids.start + place.long().clamp(0, ids.size - 1)

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
        if self.config.window == "exact":
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

    def _ids(self, tokens: np.ndarray) -> Tensor:
        """Stored tokens (m, s), with or without an action's, as whole timesteps' columns (m, k)."""
        layout = self.layout
        ids = np.zeros((len(tokens), layout.length - (layout.stored - tokens.shape[1])), np.int64)
        ids[:, layout.stored_columns[: tokens.shape[1]]] = tokens
        ids[:, layout.length - layout.action - 1] = self.model.vocabulary.separator
        return torch.from_numpy(ids).to(self.device)

    def _embed(self, ids: Tensor, pixels: np.ndarray | None) -> Tensor:
        """Columns [0, k) of m timesteps (m, k), pixels (m, *patch_shape) -> (m, k, W)."""
        return self._looked_up(ids, pixels) + self.local[: ids.shape[1]]

    def _looked_up(self, ids: Tensor, pixels: np.ndarray | None) -> Tensor:
        """`_embed` without positions."""
        x = self.model.tokens(ids)
        if pixels is not None:
            first, count = self.layout.text, self.layout.patches
            flat = torch.from_numpy(self.layout.level_patches(pixels)).to(self.device).flatten(0, 1)
            embedded = self.model.patches(flat, self.patch_centres.repeat(len(pixels), 1))
            x[:, first : first + count] = embedded.view(len(pixels), count, -1).to(x.dtype)
        return x

    def _embed_actions(self, tokens: Tensor, first: int) -> Tensor:
        """Action tokens (n, a), from number `first` of the timestep's on, -> (n, a, W)."""
        column = self.layout.length - self.layout.action + first
        return self.model.tokens(tokens) + self.local[column : column + tokens.shape[1]]

    def _filled(self, x: Tensor) -> Tensor:
        """At least as many rows as matrix products need: x's own, then zeros."""
        short = self.rows_needed - len(x)
        return x if short <= 0 else F.pad(x, (0, 0) * (x.ndim - 1) + (0, short))

    def _keep(self, rows: np.ndarray) -> None:
        chosen = torch.from_numpy(rows).to(self.device)
        if self.model.by_timesteps:
            self.shown = self.shown[chosen]
            return
        self.cache.keep(chosen)
        self.shown, self.last = self.shown[chosen], self.last[chosen]


def agent_for(model: Gato, info: ExportInfo, dataset: Dataset, task: int, config: AgentConfig) -> GatoAgent:
    """The agent of a dataset's task, prompted and with the text tokenizer of its dataset."""
    spec = dataset.manifest.tasks[task].spec
    config = prompted(config, info, spec)
    return GatoAgent(model, info, spec, config, demonstration(dataset, task, config), text_tokenizer(dataset))
