"""Oddities of a dataset, one per line: for the build's summary, and beside the manifest for etl.inspect.

scans, ShardRecords' Columns, TaskSummary -> `task_oddities` -> oddities.json

Nothing here is wrong for certain; what certainly is becomes a rejection. The lines carry numbers, and a remedy where
there is one.

Invariant: a function of the logs and the options. Only people read oddities.json: a dataset is whole without it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from operator import gt, lt

import numpy as np
from pydantic import TypeAdapter, ValidationError

from etl.building.filters import DUPLICATE
from etl.sources import Rejection, TaskScan
from etl.tokenizers.continuous import compand
from schemas.dataset import TaskSummary
from schemas.layout import TimestepLayout, layout_of, ordered_fields, picture_size
from schemas.task import STRICT, TaskSpec
from schemas.vocabulary import Vocabulary
from shards.folder import Folder

NAME = "oddities.json"
CONTEXT = 1024  # tokens: the paper's and the recipes'
USED = 0.25  # share of an action's range, below which its bins are wasted
CLIPPED = 0.001  # share of values beyond their range
COARSE = 4  # bins: an observation whose values all lie in fewer is odd
LISTED = 4


@dataclass(frozen=True)
class Columns:
    """Lowest and highest value of each column of a shard's continuous observations and actions, and how many values of
    each action column lay beyond its range. All empty for a shard without an episode."""

    __pydantic_config__ = STRICT
    observation_low: tuple[float, ...] = ()
    observation_high: tuple[float, ...] = ()
    action_low: tuple[float, ...] = ()
    action_high: tuple[float, ...] = ()
    action_clipped: tuple[int, ...] = ()

    @staticmethod
    def of(observation: np.ndarray | None, action: np.ndarray, task: TaskSpec) -> Columns:
        """Columns of one episode: observation (T, D) continuous values or None, action (T, A) or (T,)."""
        if observation is None and action.size == 0:  # a caption
            return Columns()
        flat = action.reshape(len(action), -1)
        ranges = [_range(values) for values in (observation, flat)]
        clipped = (0,) * flat.shape[1]
        if task.action and task.action.kind == "continuous":
            low, high = task.action.low, task.action.high
            if any(map(lt, ranges[1][0], low)) or any(map(gt, ranges[1][1], high)):
                clipped = tuple(((flat < np.array(low)) | (flat > np.array(high))).sum(axis=0).tolist())
        return Columns(*ranges[0], *ranges[1], clipped)

    @staticmethod
    def joined(parts: Iterable[Columns]) -> Columns:
        """Columns of several episodes or shards of one task."""
        found = [part for part in parts if part.action_low]
        if not found:
            return Columns()
        return Columns(
            tuple(map(min, zip(*(part.observation_low for part in found)))),
            tuple(map(max, zip(*(part.observation_high for part in found)))),
            tuple(map(min, zip(*(part.action_low for part in found)))),
            tuple(map(max, zip(*(part.action_high for part in found)))),
            tuple(map(sum, zip(*(part.action_clipped for part in found)))),
        )


@dataclass(frozen=True)
class TaskOddities:
    """`lengths`: (least, median, most) timesteps of an episode. `warnings`, `notes`: the source's; `found`: what showed
    in the values that were written."""

    __pydantic_config__ = STRICT
    lengths: tuple[float, float, float]
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    found: tuple[str, ...] = ()


_FILE: TypeAdapter[dict[str, TaskOddities]] = TypeAdapter(dict[str, TaskOddities])


def task_oddities(
    summary: TaskSummary,
    lengths: Sequence[int],
    columns: Columns,
    scan: TaskScan,
    rejected: Sequence[Rejection],
    held_out_share: float,
    vocabulary: Vocabulary,
) -> TaskOddities:
    """Oddities of one task. `lengths`: timesteps of each episode; `rejected`: all of the dataset's;
    `vocabulary`: whose bins its values have."""
    task, own = summary.spec, [one for one in rejected if one.task == summary.spec.name]
    found = [*_of_episodes(summary, lengths, own, held_out_share), *_of_columns(summary, columns, vocabulary)]
    warnings, notes = (tuple(ln.removeprefix(f"{task.name}: ") for ln in own) for own in (scan.warnings, scan.notes))
    least, middle, most = min(lengths), float(np.median(lengths)), max(lengths)
    return TaskOddities((float(least), middle, float(most)), warnings, notes, tuple(found))


def write(folder: Folder, found: dict[str, TaskOddities]) -> None:
    """Write the oddities beside the manifest, in the order of the tasks' names."""
    body = {name: asdict(one) for name, one in sorted(found.items())}
    folder.write(NAME, (json.dumps(body, indent=1) + "\n").encode())


def load(folder: Folder) -> dict[str, TaskOddities]:
    """Oddities beside a dataset's manifest, by task; empty where an older build, or damage, left none."""
    data = folder.read(NAME)
    try:
        return _FILE.validate_json(data) if data is not None else {}
    except ValidationError:
        return {}


def too_long(task: TaskSpec) -> str | None:
    """A line where a timestep is longer than a usual context, with what would shorten it."""
    layout = layout_of(task)
    if layout.length <= CONTEXT:
        return None
    remedy = "leave out fields, or train with a longer --data.stream.sequence-length"
    if layout.patches > CONTEXT // 2:
        pictures = [spec for spec in ordered_fields(task) if spec.kind == "image"]
        sizes = ", ".join(f"'{spec.key}' of {'x'.join(map(str, picture_size(spec)))}" for spec in pictures[:LISTED])
        remedy = f"its pictures ({sizes}) are {layout.patches:,} of them; give --image-size, such as 64 80"
    return f"a timestep has {layout.length:,} tokens ({_parts(layout)}), a usual context {CONTEXT:,}: {remedy}"


def clipped_share(summary: TaskSummary) -> float:
    """Share of the real-valued actions that lay beyond their range."""
    action = summary.spec.action
    values = summary.timesteps * action.size if action and action.kind == "continuous" else 0
    return summary.out_of_range_actions / values if values else 0.0


def _of_episodes(
    summary: TaskSummary, lengths: Sequence[int], rejected: list[Rejection], held_out_share: float
) -> list[str]:
    lines = []
    if held_out_share > 0 and not summary.held_out_episodes:
        lines.append("nothing is held out: it has one episode, so nothing shows whether the model learns by heart")
    if copies := sum(one.reason == DUPLICATE for one in rejected):
        lines.append(f"{copies:,} exact copies of episodes are left out; --keep-duplicates keeps them")
    if summary.spec.action is None:
        return lines
    if single := sum(n == 1 for n in lengths):
        lines.append(f"{single:,} of {len(lengths):,} episodes have a single timestep")
    if summary.returns is None and len(lengths) > 1:
        lines.append("no episode ended by itself or by its limit: there are no returns to compare with")
    elif summary.returns is not None and not any(summary.returns):
        lines.append("all returns are 0")
    return lines


def _of_columns(summary: TaskSummary, columns: Columns, vocabulary: Vocabulary) -> list[str]:
    task, action, lines = summary.spec, summary.spec.action, []
    if not columns.action_low or action is None:
        return []
    names = [name for spec in ordered_fields(task) if spec.kind == "continuous" for name in _names(spec.key, spec.size)]
    still = [n for n, a, b in zip(names, columns.observation_low, columns.observation_high) if a == b]
    if still and summary.timesteps > 1:
        lines.append(f"{_listed(still)} never change{'s' if len(still) == 1 else ''}: constant in all timesteps")
    ranges = [(n, a, b) for n, a, b in zip(names, columns.observation_low, columns.observation_high) if a < b]
    limit, bins = vocabulary.scale, vocabulary.bins
    if far := [f"{n} goes from {a:g} to {b:g}" for n, a, b in ranges if a < -limit or b > limit]:
        lines.append(f"{_listed(far)}: what is beyond {limit:g} or -{limit:g} is clipped; divide it in the log")
    spans = [(np.diff(compand(np.array([a, b]), vocabulary))[0] * bins / 2, n, a, b) for n, a, b in ranges]
    if coarse := [f"{n} goes from {a:g} to {b:g}" for span, n, a, b in spans if span < COARSE]:
        lines.append(f"{_listed(coarse)}, less than {COARSE} of {bins:,} bins: centre and multiply it in the "
                     "log if such small differences matter")  # fmt: skip
    moved = list(zip(_names("action", action.size), columns.action_low, columns.action_high))
    if same := [f"{name} is always {low:g}" for name, low, high in moved if low == high and summary.timesteps > 1]:
        lines.append(_listed(same))
    if action.kind == "discrete":
        return lines
    share = clipped_share(summary)
    if share > CLIPPED:
        most = max(zip(columns.action_clipped, _names("action", action.size)))
        reach = max(columns.action_high), min(columns.action_low)
        lines.append(f"{share:.1%} of its action values lie beyond their range and are clipped (of {most[1]} "
                     f"{most[0] / summary.timesteps:.1%}; values from {reach[1]:g} to {reach[0]:g})")  # fmt: skip
    wasted = []
    for (name, low, high), least, top in zip(moved, action.low, action.high):
        used = (min(high, top) - max(low, least)) / (top - least)
        if low < high and 0 <= used < USED:
            wasted.append((used, f"{name} uses {used:.1%} of its range [{least:g}, {top:g}]"))
    if wasted:
        remedy = "one range for all dimensions wastes bins: --action-bounds log gives each its own"
        lines.append(f"{_listed([words for _, words in sorted(wasted)])}; {remedy}")
    return lines


def _range(values: np.ndarray | None) -> tuple[tuple[float, ...], tuple[float, ...]]:
    if values is None:
        return (), ()
    columns = np.ascontiguousarray(values.T)  # numpy is six times slower along short rows
    low, high = columns.min(axis=1), columns.max(axis=1)
    return tuple(low.astype(float).tolist()), tuple(high.astype(float).tolist())


def _names(key: str, size: int) -> list[str]:
    return [key] if size == 1 else [f"{key}[{n}]" for n in range(size)]


def _listed(words: list[str]) -> str:
    more = f" and {len(words) - LISTED} more" if len(words) > LISTED else ""
    return f"{', '.join(words[:LISTED])}{more}"


def _parts(layout: TimestepLayout) -> str:
    counts = {"text": layout.text, "patches": layout.patches, "numbers": layout.observation, "actions": layout.action}
    return ", ".join(f"{count:,} {what}" for what, count in counts.items() if count)
