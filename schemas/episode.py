"""Raw episodes, before any token is made.

log -> source -> RawEpisode of a TaskSpec -> check, the one gate between logs and tokens -> etl.tokenizers

Invariant: an episode that passed `check` has T >= 1 timesteps, arrays of the task's shapes, and no value that is
not finite or outside its space.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from schemas.task import STRICT, ActionSpec, EnvironmentSpec, FieldSpec, ScoreReference, TaskSpec

__all__ = [
    "ACTION_REACH",
    "STRICT",
    "ActionSpec",
    "Document",
    "EnvironmentSpec",
    "EpisodeError",
    "FieldSpec",
    "RawEpisode",
    "ScoreReference",
    "TaskSpec",
]

# Policies overshoot their range (Meta-World's experts by 25 times), and environments clip; damaged values lie beyond.
ACTION_REACH = 100.0


class EpisodeError(ValueError):
    """An episode cannot be used. `reason` is a short fixed word, the message says the rest."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


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
        _check_values("reward", self.reward, (T,), "f")
        for spec in task.observation:
            if spec.key not in self.observation:
                raise EpisodeError("missing key", f"observation '{spec.key}' is absent")
            kind = {"continuous": "f", "discrete": "iu", "image": "u", "text": "U"}[spec.kind]
            values = self.observation[spec.key]
            _check_values(spec.key, values, (T,) if spec.kind == "text" else (T, *spec.shape), kind)
            if spec.kind == "discrete":
                _check_choices(f"'{spec.key}'", values.reshape(T, -1), spec.start, spec.choices)
        action = task.action
        if action is None:  # a caption's
            return
        if action.kind == "continuous":
            _check_values("action", self.action, (T, action.size), "f")
            least, most = _reach(action.low, action.high)
            if float(self.action.min(initial=np.inf)) >= least and float(self.action.max(initial=-np.inf)) <= most:
                return
            low, high = np.array(action.low), np.array(action.high)
            middle, reach = (high + low) / 2, ACTION_REACH * (high - low) / 2
            distance = np.abs(self.action - middle)
            if (distance > reach).any():
                d = int((distance / (high - low)).max(axis=0).argmax())
                raise EpisodeError(
                    "out of range",
                    f"an action lies {distance[:, d].max():g} from the middle of [{low[d]:g}, {high[d]:g}]"
                    + (f" in dimension {d}" if action.size > 1 else "")
                    + "; is that the range? --action-low and --action-high give another",
                )
            return
        _check_values("action", self.action, (T,) if action.size == 1 else (T, action.size), "iu")
        _check_choices("actions", self.action.reshape(T, -1), action.start, action.choices)


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


@lru_cache(maxsize=64)
def _reach(low: tuple[float, ...], high: tuple[float, ...]) -> tuple[float, float]:
    """Between these an action is within reach in every dimension."""
    pairs = [((b + a) / 2, ACTION_REACH * (b - a) / 2) for a, b in zip(low, high)]
    return max(middle - reach for middle, reach in pairs), min(middle + reach for middle, reach in pairs)


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


def _check_choices(name: str, values: np.ndarray, start: tuple[int, ...], choices: tuple[int, ...]) -> None:
    """values (T, N) integers against N starts and numbers of choices, or one for all."""
    lowest, highest = values.min(axis=0), values.max(axis=0)
    least = np.broadcast_to(start, lowest.shape)
    most = least + np.broadcast_to(choices, lowest.shape) - 1
    wrong = (lowest < least) | (highest > most)
    if wrong.any():
        d = int(wrong.argmax())
        where = f" in dimension {d}" if len(wrong) > 1 else ""
        spans = f"[{lowest[d]}, {highest[d]}]{where}, allowed are [{least[d]}, {most[d]}]"
        raise EpisodeError("out of range", f"{name} span {spans}")
