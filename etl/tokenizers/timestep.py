"""One timestep <-> tokens and patches: what the pipeline writes and the agent replays.

observation {key: (T, ...)} -> stored tokens (T, text + tensors) uint16, patches (T, P, 16, 16, C) uint8
action (T, ...)             -> tokens (T, A) uint16

Invariant: encoding has no state and looks at one timestep at a time, so a live
observation gives exactly the tokens that its log would have given.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from etl.tokenizers import continuous, discrete, image
from etl.tokenizers.text import TextTokenizer
from schemas.episode import TaskSpec
from schemas.layout import layout_of
from schemas.vocabulary import IdRange, Vocabulary


@dataclass(frozen=True)
class Encoded:
    """`tokens` (T, n) uint16, `patches` (T, P, 16, 16, C) uint8 or None, `clipped` values beyond the range, texts
    `cut` at their length."""

    tokens: np.ndarray
    patches: np.ndarray | None
    clipped: int
    cut: int = 0


class TimestepTokenizer:
    """Tokenizer of one task under one vocabulary."""

    def __init__(self, task: TaskSpec, vocabulary: Vocabulary, text: TextTokenizer | None = None):
        self.task, self.vocabulary, self.text = task, vocabulary, text
        self.layout = layout_of(task)
        order = {"text": 0, "image": 1, "continuous": 2, "discrete": 2}
        self.fields = sorted(task.observation, key=lambda spec: (order[spec.kind], spec.key.split("/")))
        if task.action and task.action.kind == "discrete" and task.action.choices > vocabulary.action_discrete.size:
            raise ValueError(f"task '{task.name}': {task.action.choices} actions, room for 1024")
        if self.layout.text and text is None:
            raise ValueError(f"task '{task.name}' holds text: give its tokenizer the dataset's text.model")

    def encode_observation(self, observation: dict[str, np.ndarray]) -> Encoded:
        """Tokens of text and tensor fields in layout order, and the image's patches."""
        columns: list[np.ndarray] = []
        patches, clipped, cut = None, 0, 0
        for spec in self.fields:
            values = np.asarray(observation[spec.key])
            if spec.kind == "image":
                patches = image.encode(values, spec.resized or (spec.shape[0], spec.shape[1]), spec.fit)
                continue
            flat = values.reshape(len(values), -1)
            if spec.kind == "continuous":
                tokens, beyond = continuous.encode_observation(flat, self.vocabulary)
                clipped += beyond
            elif spec.kind == "discrete":
                tokens = discrete.encode(flat, self.vocabulary.observation_discrete)
            else:
                assert self.text is not None
                tokens, short = self.text.encode_lines(flat[:, 0], spec.shape[0])
                cut += short
            columns.append(tokens)
        T = len(next(iter(observation.values())))
        tokens = np.concatenate(columns, axis=1) if columns else np.empty((T, 0), np.uint16)
        return Encoded(tokens, patches, clipped, cut)

    def decode_observation(self, tokens: np.ndarray) -> dict[str, np.ndarray]:
        """Stored tokens (T, n), as encode_observation gives them, to {key: (T, *shape)} of every field but images:
        float64 bin centres, int64, or strings (T,)."""
        found: dict[str, np.ndarray] = {}
        column = 0
        for spec in self.fields:
            if spec.kind == "image":
                continue
            size = int(np.prod(spec.shape, dtype=np.int64))
            own = tokens[:, column : column + size]
            column += size
            if spec.kind == "text":
                assert self.text is not None
                found[spec.key] = np.array([self.text.decode(row) for row in own])
            elif spec.kind == "continuous":
                found[spec.key] = continuous.decode_observation(own, self.vocabulary).reshape(-1, *spec.shape)
            else:
                found[spec.key] = discrete.decode(own, self.vocabulary.observation_discrete).reshape(-1, *spec.shape)
        return found

    def encode_action(self, action: np.ndarray) -> tuple[np.ndarray, int]:
        """Tokens (T, A) uint16 and the number of values outside the declared range."""
        spec = self._action()
        flat = np.asarray(action).reshape(len(action), spec.size)
        if spec.kind == "continuous":
            return continuous.encode_action(flat, spec.low, spec.high, self.vocabulary)
        return discrete.encode(flat, self.action_ids), 0

    def decode_action(self, tokens: np.ndarray) -> np.ndarray:
        """(..., A) tokens to what the environment takes: float32 (..., A), or int64 (...,) where A = 1."""
        spec = self._action()
        if spec.kind == "continuous":
            return continuous.decode_action(tokens, spec.low, spec.high, self.vocabulary).astype(np.float32)
        values = discrete.decode(tokens, self.action_ids)
        return values[..., 0] if spec.size == 1 else values

    @property
    def action_ids(self) -> IdRange:
        """The ids that an action token may take: all that sampling is restricted to."""
        spec = self._action()
        ids = self.vocabulary.range("action", spec.kind)
        return ids if spec.kind == "continuous" else IdRange(ids.start, spec.choices)

    def _action(self):
        if self.task.action is None:
            raise ValueError(f"task '{self.task.name}' has no action")
        return self.task.action
