"""Tasks: what the arrays of an episode mean, from observation fields and action space to simulator and score.

FieldSpec, ActionSpec (one number per dimension) -> TaskSpec -> schemas.layout, etl.tokenizers, simulators

Invariant: a spec that can be made can be tokenized: its numbers fit its shape, its bounds are finite and ordered.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import ConfigDict

STRICT = ConfigDict(extra="forbid")


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

    kind 'continuous': any real number, mu-law companded.
    kind 'discrete': integers in [start, start + choices). Both hold one number per element in row-major order, or a
    single one for all elements; () is filled in as a start of 0.
    kind 'image': uint8 (H, W, C), C channels of `stack` frames, the oldest first; the newest frame becomes patches.
    Its size becomes `resized` (H', W'), multiples of 16, or without it the next multiples of 16 (padded). `fit`:
    filter to `resized`, or pad with zeros at the bottom and the right.
    kind 'text': one string per timestep; `shape` is (N,), the tokens that it is cut or padded to.

    ValueError names a number that does not fit the others.
    """

    __pydantic_config__ = STRICT
    key: str
    kind: Literal["continuous", "discrete", "image", "text"]
    shape: tuple[int, ...]
    choices: tuple[int, ...] = ()
    start: tuple[int, ...] = ()
    resized: tuple[int, int] | None = None
    fit: Literal["resize", "pad"] = "resize"
    stack: int = 1

    def __post_init__(self) -> None:
        where = f"observation '{self.key}'"
        if self.kind == "discrete":
            if not self.start:
                object.__setattr__(self, "start", (0,))
            _check_choices(where, self.size, self.choices, self.start)
        elif self.choices or self.start:
            raise ValueError(f"{where}: choices and start belong to discrete fields, this one is {self.kind}")
        if self.kind != "image":
            if self.resized or self.stack != 1:
                raise ValueError(f"{where}: resized and stack belong to images, this one is {self.kind}")
        elif len(self.shape) != 3 or min(self.shape) < 1:
            raise ValueError(f"{where}: an image of shape {self.shape}; (height, width, channels) are needed")
        elif (
            self.resized and self.fit == "pad" and (self.resized[0] < self.shape[0] or self.resized[1] < self.shape[1])
        ):
            raise ValueError(f"{where}: {self.shape[:2]} pixels cannot be padded to {self.resized}; use fit='resize'")
        elif self.stack < 1 or self.shape[2] % self.stack:
            raise ValueError(f"{where}: {self.shape[2]} channels cannot be {self.stack} stacked frames")

    @property
    def size(self) -> int:
        """Values per timestep."""
        return math.prod(self.shape)

    @property
    def channels(self) -> int:
        """Channels of an image's newest frame."""
        return self.shape[2] // self.stack


@dataclass(frozen=True)
class ActionSpec:
    """Action space: `size` values per timestep.

    Continuous: dimension d lies in [low[d], high[d]]. Discrete: in [start[d], start[d] + choices[d]). The tuples of
    the other kind are empty. `continuous` and `discrete` also take one number for all dimensions.

    ValueError names bounds or choices that make no sense.
    """

    __pydantic_config__ = STRICT
    kind: Literal["continuous", "discrete"]
    size: int
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    choices: tuple[int, ...] = ()
    start: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"an action of {self.size} values; it needs one at least")
        if self.kind == "discrete":
            if not self.start:
                object.__setattr__(self, "start", (0,) * self.size)
            _check_choices("action", self.size, self.choices, self.start)
        bounds, choices = (self.low, self.high), (self.choices, self.start)
        used, other = (bounds, choices) if self.kind == "continuous" else (choices, bounds)
        if any(other) or any(len(numbers) != self.size for numbers in used):
            raise ValueError(f"action: {self.size} {self.kind} dimensions do not go with {self}")
        for d, (low, high) in enumerate(zip(self.low, self.high)):
            if not -math.inf < low < high < math.inf:
                raise ValueError(f"action: dimension {d} spans [{low:g}, {high:g}]; finite low < high are needed")

    @classmethod
    def continuous(
        cls, low: float | Sequence[float], high: float | Sequence[float], size: int | None = None
    ) -> ActionSpec:
        """Bounds per dimension, or one for all `size` of them (1 where nothing says how many)."""
        size = _size(size, low, high)
        return cls("continuous", size, low=_per_dimension(low, size, float), high=_per_dimension(high, size, float))

    @classmethod
    def discrete(
        cls, choices: int | Sequence[int], start: int | Sequence[int] = 0, size: int | None = None
    ) -> ActionSpec:
        """Numbers of choices per dimension, or one for all `size` of them (1 where nothing says how many)."""
        size = _size(size, choices, start)
        return cls("discrete", size, choices=_per_dimension(choices, size, int), start=_per_dimension(start, size, int))


@dataclass(frozen=True)
class ScoreReference:
    """Raw returns that a normalised score maps to 0 and 100: score = 100 (R - low) / (high - low)."""

    __pydantic_config__ = STRICT
    kind: Literal["d4rl", "human", "expert"]
    low: float
    high: float


@dataclass(frozen=True)
class TaskSpec:
    """A task: the meaning of one dataset's episodes. `name` is the dataset's id, e.g. 'hopper-medium-v2'."""

    __pydantic_config__ = STRICT
    name: str
    source: str
    observation: tuple[FieldSpec, ...]
    action: ActionSpec | None
    environment: EnvironmentSpec | None = None
    score: ScoreReference | None = None
    max_episode_steps: int = 1000

    @property
    def domain(self) -> str:
        """Group of the task, where tasks are many: the suite of its simulator, or the log format where it has none."""
        return self.environment.suite if self.environment else self.source


def _check_choices(where: str, size: int, choices: tuple[int, ...], start: tuple[int, ...]) -> None:
    for name, numbers in (("choices", choices), ("start", start)):
        if len(numbers) not in (1, size):
            raise ValueError(
                f"{where}: {len(numbers)} numbers in '{name}' for {size} values; give one each, or one for all"
            )
    if min(choices) < 1:
        raise ValueError(f"{where}: {min(choices)} choices; every value needs one at least")


def _size(size: int | None, *numbers: float | Sequence[float]) -> int:
    if size is not None:
        return size
    return next((len(one) for one in numbers if not isinstance(one, int | float)), 1)


def _per_dimension(numbers: Any, size: int, kind: type) -> tuple:
    given = (numbers,) if isinstance(numbers, int | float) else tuple(numbers)
    return tuple(map(kind, given * size if len(given) == 1 else given))
