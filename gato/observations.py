"""Observations as an environment returns them, checked and brought into a task's form.

    array, dict or nested dict, single or batched -> {key: (B, *shape)} as simulators.make gives them

Invariant: what passes is what the tokenizer was trained on: keys, shapes, dtypes and ranges of the task.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from schemas.layout import ordered_fields
from schemas.task import FieldSpec, TaskSpec

MISSING = object()


class Observations:
    """Of one task."""

    def __init__(self, task: TaskSpec):
        self.name, self.fields = task.name, ordered_fields(task)

    def check(self, observation: Any, batch: int | None, active: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """The arrays by key, each with a leading dimension of `batch`, or 1 where that is None. Values in rows that
        are not `active` (B,) are ignored. ValueError names the key and the remedy."""
        if observation is None:
            raise ValueError("observation is None; give what env.reset or env.step returned first")
        ours = any(spec.key.startswith("1/") for spec in self.fields)
        if isinstance(observation, tuple) and len(observation) == 2 and isinstance(observation[1], dict) and not ours:
            raise ValueError("this is what env.reset() returned: write `observation, info = env.reset()`")
        if not isinstance(observation, Mapping) and len(self.fields) == 1:
            observation = {self.fields[0].key: observation}
        found = {spec.key: _walk(observation, spec.key.split("/")) for spec in self.fields}
        wanted = ", ".join(f"'{spec.key}' {spec.shape if spec.kind != 'text' else 'text'}" for spec in self.fields)
        if missing := [key for key, value in found.items() if value is MISSING]:
            raise ValueError(f"observation '{missing[0]}' is missing; task '{self.name}' has {wanted}")
        if isinstance(observation, Mapping):
            known = {spec.key for spec in self.fields}
            if unknown := [key for key in _keys(observation) if not _covered(key, known)]:
                raise ValueError(f"unknown observation '{unknown[0]}'; task '{self.name}' has {wanted}")
        return {spec.key: _array(spec, found[spec.key], batch, active) for spec in self.fields}


def _walk(node: Any, path: list[str]) -> Any:
    """The value at a path of nested dicts and tuples; a dict may also have the joined key itself."""
    if not path:
        return node
    if isinstance(node, Mapping):
        if (joined := "/".join(path)) in node:
            return node[joined]
        return _walk(node[path[0]], path[1:]) if path[0] in node else MISSING
    if isinstance(node, tuple | list) and path[0].isdigit() and int(path[0]) < len(node):
        return _walk(node[int(path[0])], path[1:])
    return MISSING


def _keys(node: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from _keys(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}"


def _covered(key: str, known: set[str]) -> bool:
    """A key of the task, or a tuple that holds some."""
    return key in known or any(one.startswith(f"{key}/") for one in known)


def _array(spec: FieldSpec, value: Any, batch: int | None, active: np.ndarray | None) -> np.ndarray:
    where, shape = f"observation '{spec.key}'", () if spec.kind == "text" else spec.shape
    try:
        array = np.asarray(value)
    except ValueError:  # rows of different lengths
        raise ValueError(f"{where} is no array: its rows differ in length; the task has {shape}") from None
    if spec.kind == "image" and spec.shape[2] == 1 and array.ndim == len(shape) - (batch is None):
        array = array[..., None]  # grey pictures without a channel dimension
    _check_dtype(spec, where, array)
    expected = shape if batch is None else (batch, *shape)
    if array.shape != expected:
        if batch is None and array.ndim == len(shape) + 1 and array.shape[1:] == shape:
            remedy = f"it is a batch of {len(array)}; call agent.reset(batch={len(array)}) first"
        elif batch is not None and array.shape == shape:
            remedy = f"it is a single one, after reset(batch={batch}); stack {batch} of them, or call agent.reset()"
        else:
            remedy = f"the task has {expected}"
        raise ValueError(f"{where} has shape {array.shape}: {remedy}")
    if batch is None:
        array = array[None]
    ended = np.zeros(len(array), bool) if active is None else ~active
    if spec.kind == "continuous":
        array = array.astype(np.float32)
        array[ended] = 0.0
        if not np.isfinite(array).all():
            raise ValueError(f"{where} holds NaN or infinity; check the environment, or reset it")
    elif spec.kind == "discrete":
        array = array.astype(np.int64)
        array.reshape(len(array), -1)[ended] = spec.start
        _check_range(spec, where, array)
    return array


def _check_dtype(spec: FieldSpec, where: str, array: np.ndarray) -> None:
    allowed, remedy = {
        "continuous": ("f", "give floats, such as .astype(np.float32)"),
        "discrete": ("iub", "give integers"),
        "image": ("u", "give uint8 from 0 to 255"),
        "text": ("U", "give a string"),
    }[spec.kind]
    if array.dtype.kind not in allowed or (spec.kind == "image" and array.dtype != np.uint8):
        article = "an" if spec.kind == "image" else "a"
        raise ValueError(f"{where} is {array.dtype}, the task has {article} {spec.kind} field: {remedy}")
    if spec.kind == "text":
        try:
            "".join(array.flat).encode()
        except UnicodeEncodeError:
            raise ValueError(f"{where} holds half of a surrogate pair, which is no Unicode; decode it again") from None


def _check_range(spec: FieldSpec, where: str, array: np.ndarray) -> None:
    flat = array.reshape(len(array), -1)
    low, count = np.array(spec.start), np.array(spec.choices)
    if bad := np.argwhere((flat < low) | (flat >= low + count)).tolist():
        row, column = bad[0]
        first, last = (int(np.broadcast_to(x, flat.shape[1:])[column]) for x in (low, low + count - 1))
        raise ValueError(f"{where} is {flat[row, column]}, outside [{first}, {last}]; check the environment")
