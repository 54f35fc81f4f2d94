"""Reading what older versions wrote: the JSON of datasets, exports and baselines, brought to the present form.

JSON of an older schema -> manifest | task -> JSON of the present schema -> pydantic

    schema 3: one `low`, `high` and number of `choices` for all dimensions of an action; one `choices` for a field

Invariant: what is of the present form already is returned unchanged. Values that are damaged stay so: the check that
follows names them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

IDS = 2**16  # more than a vocabulary has
OLDEST_SCHEMA = 3  # that datasets are read from
MOST_VALUES = 2**16  # of an action; more are damage


def manifest(raw: dict[str, Any], version: int) -> dict[str, Any]:
    """A dataset.json of schema 3 as one of schema `version`."""
    try:
        old = [about["spec"] for about in raw["tasks"]]
        tasks = [about | {"spec": task(about["spec"])} for about in raw["tasks"]]
        config = dict(raw["config"])
        if config.get("tasks") == digest_of_tasks(old):
            config["tasks"] = digest_of_tasks(about["spec"] for about in tasks)
        if config.get("vocabulary") == "seed":
            config["vocabulary"] = "disjoint"
    except (KeyError, TypeError, ValueError):
        return raw | {"schema_version": version}
    return raw | {"schema_version": version, "tasks": tasks, "config": config}


def tasks(raw: Any) -> Any:
    """JSON with a list of tasks in 'tasks'."""
    if not isinstance(raw, dict) or not isinstance(raw.get("tasks"), list):
        return raw
    return raw | {"tasks": [task(one) for one in raw["tasks"]]}


def export(raw: Any) -> Any:
    """An export's model.json: its tasks, and the rows of its embedding table, which were all from `first_id` on."""
    raw = tasks(raw)
    if not isinstance(raw, dict) or not isinstance(first := raw.get("first_id"), int):
        return raw
    others = {name: value for name, value in raw.items() if name != "first_id"}
    return others | {"kept": [[first, IDS]] if first else []}


def task(raw: Any) -> Any:
    """The JSON of a TaskSpec."""
    if not isinstance(raw, dict) or not isinstance(raw.get("observation"), list | tuple):
        return raw
    return raw | {"observation": [_field(one) for one in raw["observation"]], "action": _action(raw.get("action"))}


def digest_of_tasks(tasks: Iterable[dict[str, Any]]) -> str:
    """sha256 of the JSON of tasks, in whatever order they come."""
    lines = sorted({json.dumps(one, sort_keys=True) for one in tasks})
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _field(raw: Any) -> Any:
    if not isinstance(raw, dict) or not isinstance(raw.get("choices"), int):
        return raw
    discrete = raw.get("kind") == "discrete"
    return raw | {"choices": [raw["choices"]] if discrete else [], "start": [0] if discrete else [], "stack": 1}


def _action(raw: Any) -> Any:
    if not isinstance(raw, dict) or not isinstance(raw.get("choices"), int):
        return raw
    size = raw.get("size")
    if not isinstance(size, int) or not 0 < size < MOST_VALUES:
        return raw
    if raw.get("kind") == "discrete":
        return raw | {"low": [], "high": [], "choices": [raw["choices"]] * size, "start": [0] * size}
    bounds = {"low": [raw.get("low", -1.0)] * size, "high": [raw.get("high", 1.0)] * size}
    return raw | bounds | {"choices": [], "start": []}
