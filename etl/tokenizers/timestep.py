"""One timestep <-> tokens and patches: what the pipeline writes and the agent replays.

observation {key: (T, ...)} -> stored tokens (T, text + tensors) uint16, patches (T, *patch_shape) uint8
action (T, ...)             -> tokens (T, A) uint16

Invariant: encoding has no state and looks at one timestep at a time, so a live observation gives exactly the tokens
that its log would have given.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from etl.tokenizers import continuous, discrete, image
from etl.tokenizers.text import TextTokenizer
from schemas.layout import continuous_values, field_columns, layout_of, ordered_fields
from schemas.task import ActionSpec, TaskSpec
from schemas.vocabulary import IdRange, Vocabulary


@dataclass(frozen=True)
class Encoded:
    """`tokens` (T, n) uint16; `patches` (T, *layout.patch_shape) uint8 or None; `values`, the `continuous_values` that
    tokens were made of; `clipped`, those of them beyond the mu-law's range; `cut`, texts longer than their length."""

    tokens: np.ndarray
    patches: np.ndarray | None
    values: np.ndarray | None
    clipped: int
    cut: int = 0


class TimestepTokenizer:
    """Tokenizer of one task under one vocabulary. ValueError where the vocabulary has too few ids for the task, or a
    text model is missing."""

    def __init__(self, task: TaskSpec, vocabulary: Vocabulary, text: TextTokenizer | None = None):
        self.task, self.vocabulary, self.text = task, vocabulary, text
        self.layout, self.fields, self.columns = layout_of(task), ordered_fields(task), field_columns(task)
        action = task.action
        spaces = [("action", action.choices, "action")] if action else []
        spaces += [(f"observation '{spec.key}'", spec.choices, "observation") for spec in self.fields]
        for name, choices, role in spaces:
            room = vocabulary.range(role, "discrete").size
            if max(choices, default=0) > room:
                raise ValueError(f"task '{task.name}': {name} has {max(choices)} choices, there are ids for {room}")
        if self.layout.text and text is None:
            raise ValueError(f"task '{task.name}' holds text: give its tokenizer the dataset's text.model")

    def encode(self, observation: Mapping[str, np.ndarray], action: np.ndarray) -> tuple[Encoded, int]:
        """Tokens of whole timesteps, (T, n + A), and the number of actions outside their bounds; of a caption, which
        has no action, (T, n) and 0. ValueError as of `encode_observation` and `encode_action`."""
        if self.task.action is None:
            return self.encode_observation(observation), 0
        tokens, outside = self.encode_action(action)
        return self._encoded(observation, [tokens]), outside

    def encode_observation(self, observation: Mapping[str, np.ndarray]) -> Encoded:
        """Tokens of text and tensor fields in layout order, and the pictures' patches.

        observation: key -> (T, *shape) as in the log, strings (T,) for text. ValueError for a discrete value outside
        its space."""
        return self._encoded(observation, [])

    def _encoded(self, observation: Mapping[str, np.ndarray], after: list[np.ndarray]) -> Encoded:
        """`after`: columns of tokens that follow the observation's."""
        columns: list[np.ndarray] = []
        pictures: list[np.ndarray] = []
        clipped = cut = at = 0
        values = continuous_values(self.task, observation)
        if values is not None:  # of all fields in one call
            real, clipped = continuous.encode_observation(values, self.vocabulary)
        for kind, group in groupby(self.fields, key=lambda spec: spec.kind):
            if kind == "continuous":
                columns.append(real[:, at : (at := at + sum(spec.size for spec in group))])
                continue
            for spec in group:
                given = np.asarray(observation[spec.key])
                if kind == "image":
                    pictures += image.encode(given, spec)
                    continue
                flat = given.reshape(len(given), -1)
                if kind == "discrete":
                    tokens = discrete.encode(flat, self.vocabulary.observation_discrete, spec.start, spec.choices)
                else:
                    assert self.text is not None
                    tokens, short = self.text.encode_lines(flat[:, 0], spec.shape[0], end=self.layout.captioned)
                    cut += short
                columns.append(tokens)
        columns += after
        T = len(next(iter(observation.values())))
        joined = np.concatenate(columns, axis=1) if columns else np.empty((T, 0), np.uint16)
        return Encoded(joined, self.layout.join_patches(pictures) if pictures else None, values, clipped, cut)

    def decode_observation(self, tokens: np.ndarray) -> dict[str, np.ndarray]:
        """Stored tokens (T, n), as encode_observation gives them, to {key: (T, *shape)} of every field but images:
        float64 bin centres, int64, or strings (T,)."""
        found: dict[str, np.ndarray] = {}
        for at in self.columns:
            spec, own = at.spec, tokens[:, at.tokens]
            if spec.kind == "text":
                assert self.text is not None
                found[spec.key] = np.array([self.text.decode(row) for row in own])
            elif spec.kind == "continuous":
                found[spec.key] = continuous.decode_observation(own, self.vocabulary).reshape(-1, *spec.shape)
            elif spec.kind == "discrete":
                values = discrete.decode(own, self.vocabulary.observation_discrete, spec.start)
                found[spec.key] = values.reshape(-1, *spec.shape)
        return found

    def encode_action(self, action: np.ndarray) -> tuple[np.ndarray, int]:
        """Actions (T, A), or (T,) where A = 1, to tokens (T, A) uint16 and the number of values outside their
        dimension's bounds. ValueError for a discrete value outside its space."""
        spec = self._action
        flat = np.asarray(action).reshape(len(action), spec.size)
        if spec.kind == "continuous":
            return continuous.encode_action(flat, spec.low, spec.high, self.vocabulary)
        return discrete.encode(flat, self.vocabulary.action_discrete, spec.start, spec.choices), 0

    def decode_action(self, tokens: np.ndarray) -> np.ndarray:
        """(..., A) tokens to what the environment takes: float32 (..., A), or int64 (..., A), (...,) where A = 1."""
        spec = self._action
        if spec.kind == "continuous":
            return continuous.decode_action(tokens, spec.low, spec.high, self.vocabulary).astype(np.float32)
        values = discrete.decode(tokens, self.vocabulary.action_discrete, spec.start)
        return values[..., 0] if spec.size == 1 else values

    @property
    def action_ids(self) -> list[IdRange]:
        """The ids that each of an action's tokens may take: all that sampling is restricted to."""
        spec = self._action
        ids = self.vocabulary.range("action", spec.kind)
        return [IdRange(ids.start, count) for count in spec.choices or (ids.size,) * spec.size]

    @property
    def _action(self) -> ActionSpec:
        if self.task.action is None:
            raise ValueError(f"task '{self.task.name}' has no action")
        return self.task.action
