"""Raw episodes and the tasks they belong to, before any token is made.

A source yields `RawEpisode`s of one `TaskSpec`. The task says what the arrays
mean (fields, action space, environment, score references); the episode holds
them. `RawEpisode.check` is the one gate between logs and tokens.

Invariant: an episode that passed `check` has T >= 1 timesteps, arrays of the
task's shapes, and no value that is not finite.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from pydantic import ConfigDict

STRICT = ConfigDict(extra="forbid")
# Policies with unclipped noise overshoot their range; nothing but damage lies this many half-ranges out.
ACTION_REACH = 10.0


class EpisodeError(ValueError):
    """An episode cannot be used. `reason` is a short fixed word, the message says the rest."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class EnvironmentSpec:
    """A simulator: suite ('mujoco', 'atari', 'robotics', ...), gymnasium id with version, make() arguments."""

    __pydantic_config__ = STRICT
    suite: str
    id: str
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class FieldSpec:
    """One observation field. `shape` is that of one timestep in the log: (11,), (84, 84, 1).

    kind 'continuous': any real, mu-law companded. 'discrete': integers in [0, choices).
    'image': uint8 (H, W, C), brought to `resized` (H', W'), multiples of 16, as `fit` says: filtered to that
    size, or padded with zeros at the bottom and the right. 'text': a string a timestep; `shape` is (N,), the
    tokens that it is cut or padded to.
    """

    __pydantic_config__ = STRICT
    key: str
    kind: Literal["continuous", "discrete", "image", "text"]
    shape: tuple[int, ...]
    choices: int = 0
    resized: tuple[int, int] | None = None
    fit: Literal["resize", "pad"] = "resize"


@dataclass(frozen=True)
class ActionSpec:
    """Action space: `size` values a timestep, each continuous in [low, high] or discrete in [0, choices)."""

    __pydantic_config__ = STRICT
    kind: Literal["continuous", "discrete"]
    size: int
    choices: int = 0
    low: float = -1.0
    high: float = 1.0


@dataclass(frozen=True)
class ScoreReference:
    """Raw returns that a normalised score maps to 0 and 100: score = 100 (R - low) / (high - low)."""

    __pydantic_config__ = STRICT
    kind: Literal["d4rl", "human"]
    low: float
    high: float


@dataclass(frozen=True)
class TaskSpec:
    """What one dataset's episodes mean. `name` is the dataset's id, e.g. 'hopper-medium-v2'."""

    __pydantic_config__ = STRICT
    name: str
    source: str
    observation: tuple[FieldSpec, ...]
    action: ActionSpec | None
    environment: EnvironmentSpec | None = None
    score: ScoreReference | None = None
    max_episode_steps: int = 1000


@dataclass
class RawEpisode:
    """One episode of T timesteps: action[t] and reward[t] follow observation[t].

    observation: key -> (T, *shape), strings (T,) for text; action: (T, size) float32 or (T,) integers; reward:
    (T,) float32.
    terminated: the environment ended it; truncated: its time limit did. Neither: `cut` by the log's end.
    `file`, `position` (ordinal in that file) and `row` (first row) say where it came from.
    """

    observation: dict[str, np.ndarray]
    action: np.ndarray
    reward: np.ndarray
    terminated: bool
    truncated: bool
    file: str
    position: int
    row: int = 0

    @property
    def timesteps(self) -> int:
        return len(self.reward)

    @property
    def cut(self) -> bool:
        return not (self.terminated or self.truncated)

    def check(self, task: TaskSpec) -> None:
        """Raise EpisodeError ('empty', 'wrong length', 'wrong shape', 'wrong dtype', 'not finite',
        'out of range') unless this episode can be tokenized under `task`."""
        T = self.timesteps
        if T == 0:
            raise EpisodeError("empty", "no timestep")
        if task.action is None:
            raise EpisodeError("wrong shape", "the task declares no action")
        _check_values("reward", self.reward, (T,), "f")
        for spec in task.observation:
            if spec.key not in self.observation:
                raise EpisodeError("missing key", f"observation '{spec.key}' is absent")
            kind = {"continuous": "f", "discrete": "iu", "image": "u", "text": "U"}[spec.kind]
            values = self.observation[spec.key]
            _check_values(spec.key, values, (T,) if spec.kind == "text" else (T, *spec.shape), kind)
            if spec.kind == "discrete" and (values.min() < 0 or values.max() >= spec.choices):
                raise EpisodeError("out of range", f"'{spec.key}' outside [0, {spec.choices})")
        if task.action.kind == "continuous":
            _check_values("action", self.action, (T, task.action.size), "f")
            middle, half = (task.action.high + task.action.low) / 2, (task.action.high - task.action.low) / 2
            furthest = float(np.abs(self.action - middle).max())
            if furthest > ACTION_REACH * half:
                raise EpisodeError(
                    "out of range",
                    f"an action lies {furthest:g} from the middle of [{task.action.low:g}, {task.action.high:g}]",
                )
            return
        shape = (T,) if task.action.size == 1 else (T, task.action.size)
        _check_values("action", self.action, shape, "iu")
        low, high = int(self.action.min()), int(self.action.max())
        if low < 0 or high >= task.action.choices:
            raise EpisodeError(
                "out of range", f"actions span [{low}, {high}], the environment has {task.action.choices}"
            )


@dataclass(frozen=True)
class Document:
    """One text of a text task. `file`, `position` (ordinal in that file) and `row` (first byte or row) say where
    it came from."""

    text: str
    file: str
    position: int
    row: int = 0

    def check(self, task: TaskSpec) -> None:
        """Raise EpisodeError ('empty') where there is nothing to tokenize."""
        if not self.text.strip():
            raise EpisodeError("empty", "a document without text")


def _check_values(name: str, values: np.ndarray, shape: tuple[int, ...], kinds: str) -> None:
    if values.dtype.kind not in kinds:
        raise EpisodeError("wrong dtype", f"'{name}' is {values.dtype}")
    if len(values) != shape[0]:
        raise EpisodeError("wrong length", f"'{name}' has {len(values)} rows, expected {shape[0]}")
    if values.shape != shape:
        raise EpisodeError("wrong shape", f"'{name}' is {values.shape}, expected {shape}")
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        row = int(np.argwhere(~np.isfinite(values))[0][0])
        raise EpisodeError("not finite", f"'{name}' holds NaN or infinity at timestep {row}")
