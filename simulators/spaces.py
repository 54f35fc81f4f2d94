"""From gymnasium's spaces to the fields and actions of a task, and from observations to arrays.

    space -> leaves: one array each, with key and path -> FieldSpec, ActionSpec
    observation (nested dicts and tuples) -> {key: array of one timestep}

A plain observation is called "observation"; what is nested has keys such as "arm/angle" and "camera/0". Logs of
Minari name their arrays by the same leaves, so that a field means the same in a log and in its simulator.

Invariant: a field is a function of its key and its space alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from schemas.episode import ActionSpec, FieldSpec
from schemas.layout import PATCH_SIZE
from simulators.picture_layout import PictureLayout, picture_layout

CHOICES = 1024  # ids of a discrete value
LEAVES = (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary, spaces.Text)


class SpaceError(ValueError):
    """A space has no counterpart in a task; the message names the key, the space and a remedy. `reason`: in a word."""

    def __init__(self, detail: str, reason: str = "unsupported space"):
        super().__init__(detail)
        self.reason = reason


@dataclass(frozen=True)
class Leaf:
    """One array of a nested space: the field's key, the path to it (dict keys, places in tuples), its own space."""

    key: str
    path: tuple[str | int, ...]
    space: spaces.Space


def leaves(space: spaces.Space) -> list[Leaf]:
    """The arrays of an observation space, in the order of their paths. SpaceError for a space that is no array."""
    found = sorted(_leaves(space, ()), key=lambda leaf: leaf.key.split("/"))
    for leaf in found:
        if not isinstance(leaf.space, LEAVES):
            known = "Box, Discrete, MultiDiscrete, MultiBinary, Text, and Dict and Tuple of these"
            raise SpaceError(
                f"'{leaf.key}' is a {type(leaf.space).__name__}; {known} can be read: wrap the environment"
            )
    if len({leaf.key for leaf in found}) < len(found):
        raise SpaceError("two observations have one key; rename the one that holds '/'")
    return found


def _leaves(space: spaces.Space, path: tuple[str | int, ...]) -> Iterator[Leaf]:
    if isinstance(space, spaces.Dict):
        for key, part in space.spaces.items():
            yield from _leaves(part, (*path, key))
    elif isinstance(space, spaces.Tuple):
        for index, part in enumerate(space.spaces):
            yield from _leaves(part, (*path, index))
    else:
        yield Leaf("/".join(map(str, path)) or "observation", path, space)


def shape_of(space: spaces.Space) -> tuple[int, ...]:
    """Of one timestep; () for a string."""
    return tuple(space.shape or ())


def is_real(space: spaces.Space) -> bool:
    """Real-valued: a Box of floats."""
    return isinstance(space, spaces.Box) and space.dtype.kind == "f"


def picture_of(space: spaces.Space) -> PictureLayout | None:
    """How an array of this space is a picture: bytes (H, W, C), (C, H, W) or grey (H, W), or floats in [0, 1]; None
    where it is certainly no picture, or not certainly one."""
    if not isinstance(space, spaces.Box):
        return None
    return picture_layout(space.shape, space.dtype, space.low, space.high)


def is_picture(space: spaces.Space) -> bool:
    """True if an array of this space is a picture."""
    return picture_of(space) is not None


def field(key: str, space: spaces.Space) -> FieldSpec:
    """The field that one array becomes; the length of a text is the task's: 0 here. SpaceError where none fits."""
    shape = shape_of(space)
    if isinstance(space, spaces.Text):
        return FieldSpec(key, "text", (0,))
    if layout := picture_of(space):
        height, width = map(_nearest_size, layout.shape[:2])
        return FieldSpec(key, "image", layout.shape, resized=(height, width))
    if len(shape) == 4 and getattr(space, "dtype", None) == np.uint8:
        raise SpaceError(f"'{key}' is {shape}: stacked pictures of colours; record the newest one, (H, W, C)")
    if is_real(space):
        return FieldSpec(key, "continuous", shape)
    return FieldSpec(key, "discrete", shape, *_choices(key, space))


def fields(space: spaces.Space) -> tuple[FieldSpec, ...]:
    """All fields of an observation space, by the order of their paths."""
    return tuple(field(leaf.key, leaf.space) for leaf in leaves(space))


def action(space: spaces.Space) -> ActionSpec:
    """The action space in a task's terms. SpaceError for one without bounds, or of several arrays."""
    if not isinstance(space, LEAVES) or isinstance(space, spaces.Text):
        known = "one Box, Discrete, MultiDiscrete or MultiBinary can be learned"
        raise SpaceError(f"actions are a {type(space).__name__}; {known}: wrap the environment")
    size = math.prod(shape_of(space))
    if size == 0:
        raise SpaceError("an action has 0 values; record one of at least one")
    if not is_real(space):
        return ActionSpec.discrete(*_choices("action", space, size))
    assert isinstance(space, spaces.Box)
    low, high = (tuple(map(float, np.ravel(bound))) for bound in (space.low, space.high))
    if not all(-math.inf < a < b < math.inf for a, b in zip(low, high)):
        span = f"the action space spans [{min(low):g}, {max(high):g}]"
        raise SpaceError(f"{span}; record it with gymnasium's RescaleAction or bounded", "unbounded action")
    return ActionSpec.continuous(low, high)


def bounds(space: spaces.Space) -> tuple[np.ndarray, np.ndarray]:
    """Lowest value and number of values of each element of an integer space; they broadcast to its shape."""
    if isinstance(space, spaces.Box):
        low, high = space.low.astype(np.int64), space.high.astype(np.int64)
        return low, high - low + 1
    if isinstance(space, spaces.Discrete | spaces.MultiDiscrete):
        count = space.n if isinstance(space, spaces.Discrete) else space.nvec
        return np.asarray(space.start, np.int64), np.asarray(count, np.int64)
    return np.asarray(0), np.asarray(2)


def _choices(key: str, space: spaces.Space, size: int | None = None) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(choices, start) of an integer space: one number for all elements where they agree, unless `size` is given."""
    low, count = bounds(space)
    if _most(space) > CHOICES:
        remedy = f"there are ids for {CHOICES}; make it a Box of floats, or leave it out"
        raise SpaceError(f"'{key}' takes {_most(space):g} values, {remedy}", "too many choices")
    pair = []
    for values in (count, low):
        flat = np.ravel(np.broadcast_to(values, (size,) if size and not shape_of(space) else shape_of(space)))
        same = len(np.unique(flat)) == 1
        pair.append((int(flat[0]),) * (size or 1) if same else tuple(map(int, flat)))
    return pair[0], pair[1]


def flatten(found: list[Leaf], observation: Any) -> dict[str, np.ndarray]:
    """{key: array of one timestep} of an observation: float32, int64, uint8 pictures (H, W, C), strings."""
    return {leaf.key: _array(leaf.space, _at(observation, leaf.path)) for leaf in found}


def _at(observation: Any, path: tuple[str | int, ...]) -> Any:
    for step in path:
        observation = observation[step]
    return observation


def _array(space: spaces.Space, value: Any) -> np.ndarray:
    if isinstance(space, spaces.Text):
        return np.asarray(str(value))
    if layout := picture_of(space):
        pixels = layout.pixels(np.asarray(value)[None])[0]
        return np.array(pixels)  # a copy: an environment may return the same buffer at every step
    return np.array(value, np.float32 if is_real(space) else np.int64).reshape(shape_of(space))


def flat_space(found: list[Leaf]) -> spaces.Dict:
    """The space of what `flatten` returns."""
    return spaces.Dict({leaf.key: _flat(leaf.space) for leaf in found})


def _flat(space: spaces.Space) -> spaces.Space:
    if layout := picture_of(space):
        return space if layout.is_plain else spaces.Box(0, 255, layout.shape, np.uint8)
    return spaces.Box(-np.inf, np.inf, shape_of(space), np.float32) if is_real(space) else space


def native_action(space: spaces.Space, value: Any) -> Any:
    """An action as a policy gives it, (size,) or (), as the environment takes it."""
    if isinstance(space, spaces.Discrete):
        return np.int64(np.reshape(value, ()))
    return np.reshape(value, shape_of(space))


class Fields(gymnasium.Wrapper):
    """Observations as {key: array}, whatever the environment gives; actions in the space's own shape."""

    def __init__(self, env: gymnasium.Env):
        super().__init__(env)
        try:
            self.found = leaves(env.observation_space)
            for leaf in self.found:
                field(leaf.key, leaf.space)
        except SpaceError as error:
            raise SpaceError(f"{id_of(env)}: {error}") from None
        self.observation_space = flat_space(self.found)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        observation, info = self.env.reset(seed=seed, options=options)
        return flatten(self.found, observation), info

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self.env.step(native_action(self.action_space, action))
        return flatten(self.found, observation), float(reward), bool(terminated), bool(truncated), info


def id_of(env: gymnasium.Env) -> str:
    """The id of a simulator, for messages."""
    return env.spec.id if env.spec else type(env.unwrapped).__name__


def _most(space: spaces.Space) -> float:
    """Most values that an element takes; in float64, since the span of an int64 is no int64."""
    if isinstance(space, spaces.Box):
        return float((space.high.astype(np.float64) - space.low.astype(np.float64) + 1).max())
    return float(bounds(space)[1].max())


def _nearest_size(pixels: int) -> int:
    return max(1, (pixels + PATCH_SIZE // 2) // PATCH_SIZE) * PATCH_SIZE
