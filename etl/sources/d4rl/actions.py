"""The range of actions in D4RL's layout, which its files do not state.

option, else attributes of the file, else the environment -> what is declared -> etl.sources._ranges -> ActionSpec

Discrete actions are integers (N,) or (N, 1), or floats of an environment that takes integers. Their number of choices
is the environment's, or what the log shows.

Invariant: actions are clipped to a range only where the range is known; see etl/sources/_ranges.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import numpy as np

import simulators
from etl.sources import ActionOptions
from etl.sources._hdf5 import AGAIN, DAMAGE, Rows
from etl.sources._ranges import Seen, action_spec, seen, unlike
from schemas.episode import ActionSpec, EnvironmentSpec, EpisodeError
from simulators.spaces import CHOICES

PIECE = 2**16  # rows at a time


def action_space(
    actions: Rows,
    attributes: Mapping[str, Any],
    environment: EnvironmentSpec | None,
    options: ActionOptions,
    published: bool = False,
) -> tuple[ActionSpec, tuple[str, ...]]:
    """The action space of a log and warnings. `published`: one of D4RL's own, whose range is [-1, 1]. EpisodeError
    where options do not fit the log."""
    size = actions.shape[1] if len(actions.shape) > 1 else 1
    own = _environments(environment, size) if environment else None
    kind = "discrete" if actions.dtype.kind in "iu" else "continuous"
    other: tuple[str, ...] = ()
    if own is not None and (own.size != size or (own.kind, kind) == ("continuous", "discrete")):
        other, own = unlike(kind, size, own, environment.id if environment else ""), None
    if kind == "discrete":
        return _discrete(actions, size, own), other
    if own is not None and own.kind == "discrete":
        found = seen(_pieces(actions), size)
        if found is not None and found.whole and _holds(own, found):
            return own, ()
        raise EpisodeError("wrong dtype", f"'actions' are fractions, {environment.id if environment else ''} takes "
                           f"{own.choices} choices; give the --environment that was logged")  # fmt: skip
    declared = _attributes(attributes, size)
    if declared is None:
        declared = ActionSpec.continuous(-1.0, 1.0, size) if published else own
    spec, warnings = action_spec(size, options, declared, _pieces(actions))
    return spec, (*other, *warnings)


def _holds(space: ActionSpec, found: Seen) -> bool:
    low, high = np.array(space.start), np.array(space.start) + np.array(space.choices) - 1
    return bool((found.low >= low).all() and (found.high <= high).all())


def _discrete(actions: Rows, size: int, own: ActionSpec | None) -> ActionSpec:
    if own is not None and own.kind == "discrete" and own.size == size:
        return own
    pieces = [piece.reshape(len(piece), -1) for piece in _pieces(actions)]
    if not pieces:
        raise EpisodeError("corrupt HDF5", f"no row of 'actions' can be read; {AGAIN}")
    low, high = np.min([piece.min(axis=0) for piece in pieces], axis=0), np.max([p.max(axis=0) for p in pieces], axis=0)
    start = np.minimum(low.astype(np.int64), 0)
    choices = high.astype(np.int64) - start + 1
    if choices.max() > CHOICES:
        remedy = f"there are ids for {CHOICES}; record real-valued actions as float32"
        raise EpisodeError("too many choices", f"'actions' span [{low.min()}, {high.max()}]: {remedy}")
    return ActionSpec.discrete(tuple(map(int, choices)), tuple(map(int, start)), size)


def _attributes(attributes: Mapping[str, Any], size: int) -> ActionSpec | None:
    """Notes of etl.record; nothing where they make no sense."""
    try:
        low, high = (np.ravel(attributes[key]).astype(float) for key in ("action_low", "action_high"))
    except (KeyError, ValueError, TypeError, OSError):
        return None
    fits = low.shape == high.shape == (size,) and np.isfinite([low, high]).all() and (low < high).all()
    return ActionSpec.continuous(low.tolist(), high.tolist()) if fits else None


def _environments(environment: EnvironmentSpec, size: int) -> ActionSpec | None:
    bounds = simulators.suite_named(environment.suite).action_range(environment.id)
    if bounds:
        return ActionSpec.continuous(*bounds, size)
    return _of(environment.suite, environment.id, json.dumps(environment.kwargs))


@cache
def _of(suite: str, id: str, kwargs: str) -> ActionSpec | None:
    """The environment's own action space; None where it cannot be made here."""
    try:
        env = simulators.make(EnvironmentSpec(suite, id, json.loads(kwargs)))
    except simulators.SimulatorError:
        return None
    try:
        return simulators.action_spec(env)
    except simulators.SimulatorError:
        return None
    finally:
        env.close()


def _pieces(actions: Rows) -> Iterator[np.ndarray]:
    """All rows but damaged ones, which become rejections when their episodes are read."""
    for start in range(0, len(actions), PIECE):
        try:
            yield actions[start : start + PIECE]
        except DAMAGE:
            continue
