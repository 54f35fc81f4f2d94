"""Fields and actions of a task from a LeRobot dataset's features, and the options that choose among them.

features, statistics, options -> FieldSpecs ('state', 'images/front', 'task'), ActionSpec, notes

All features called observation.*, all cameras and 'state' are observed. The action is 'action' (or 'actions'), else all
action.* by name. Its range is that of the options, else of the statistics, else of the data itself.

Invariant: a field is a function of its own feature and its statistics.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gymnasium import spaces

from etl.sources import _ranges
from etl.sources._arrays import ArrayOptions
from etl.sources.lerobot import metadata, table
from etl.sources.lerobot.metadata import AGAIN, INFO, Dataset, Feature
from etl.sources.lerobot.video import require_av
from schemas.episode import ActionSpec, EpisodeError, FieldSpec
from simulators import spaces as rules
from simulators.picture_layout import SMALLEST_PICTURE

INSTRUCTION = "task"  # key of the text field
MOST_VALUES = 65_536  # of a timestep, pictures apart
NUMBER = re.compile(r"u?int\d+|float\d+")


@dataclass(frozen=True)
class Options(ArrayOptions):
    """Options for reading LeRobot datasets. Observation keys are features (observation.state); by default
    all that are called observation.*, and all cameras."""

    task_per_instruction: bool = False
    """Make a task of each instruction; otherwise the dataset is one task."""


def observable(feature: Feature) -> bool:
    return feature.name not in metadata.BOOKKEEPING and not feature.name.startswith(("next.", "action"))


def fields_of(dataset: Dataset, options: Options) -> tuple[tuple[FieldSpec, ...], tuple[str, ...]]:
    """The observation's fields, and what the user should know of them."""
    named = {name: one for name, one in dataset.features.items() if observable(one)}
    unknown = set(options.observation_keys) - set(named)
    if unknown:
        known = ", ".join(sorted(named)) or "none"
        raise EpisodeError("missing key", f"no feature '{min(unknown)}' to observe; there are {known}")
    if options.observation_keys:
        chosen = {name: named[name] for name in options.observation_keys}
    else:
        chosen = {n: f for n, f in named.items() if n.startswith("observation.") or f.picture or n == "state"}
        chosen = {n: f for n, f in chosen.items() if not f.depth and f.dtype not in ("string", "language")}
    fields, notes = [], []
    for feature in chosen.values():
        fields.append(_field(dataset, feature))
        if feature.dtype == "video":
            require_av()
    if "task_index" in dataset.features and dataset.instructions:
        fields.append(FieldSpec(INSTRUCTION, "text", (options.text_tokens,)))
    width = sum(math.prod(spec.shape) for spec in fields if spec.kind != "image")
    if not chosen or width > MOST_VALUES:
        detail = f"{len(chosen)} features of {width} values per timestep; 1 to {MOST_VALUES} values can be read"
        raise EpisodeError("unsupported space", f"{detail}: name some with --observation-keys")
    keys = [spec.key for spec in fields]
    if len(set(keys)) < len(keys):
        raise EpisodeError("unsupported space", "two features have one key; name one with --observation-keys")
    if left := sorted(set(named) - set(chosen)):
        notes.append(f"not read: {', '.join(left)}; --observation-keys names what to read")
    return tuple(fields), tuple(notes)


def _field(dataset: Dataset, feature: Feature) -> FieldSpec:
    key, shape = feature.key, feature.shape
    if feature.picture:
        if len(shape) != 3 or shape[2] > 4 or (feature.dtype == "video" and shape[2] not in (1, 3)):
            raise EpisodeError(
                "unsupported space", f"'{feature.name}' is a picture of {shape}; 1 or 3 channels are read"
            )
        if min(shape[:2]) < SMALLEST_PICTURE or math.prod(shape) > 2**26:
            raise EpisodeError("unsupported space", f"'{feature.name}' is a picture of {shape}")
        return rules.field(key, spaces.Box(0, 255, shape, np.uint8))
    if feature.dtype == "bool":
        return FieldSpec(key, "discrete", shape, (2,))
    if not NUMBER.fullmatch(feature.dtype):
        detail = f"'{feature.name}' is {feature.dtype}; numbers, image and video are read"
        raise EpisodeError("unsupported space", f"{detail}: name others with --observation-keys")
    if "int" in feature.dtype and (bounds := dataset.span([feature.name])) is not None:
        low, high = bounds
        if low.min() >= 0 and high.max() < rules.CHOICES:
            return FieldSpec(key, "discrete", shape, (int(high.max()) + 1,))
    return FieldSpec(key, "continuous", shape)


def action_features(dataset: Dataset) -> list[Feature]:
    """The features that make up an action: 'action' (or 'actions'), else all action.*, by name."""
    for name in ("action", "actions"):
        if name in dataset.features:
            return [dataset.features[name]]
    found = [one for name, one in sorted(dataset.features.items()) if name.startswith("action.")]
    if not found:
        raise EpisodeError("missing key", f"{INFO} has no feature 'action'; {AGAIN}")
    return found


def action_space(dataset: Dataset, paths: list[Path], options: Options) -> tuple[ActionSpec, tuple[str, ...]]:
    """Bounds of the command line, of the statistics, or of the data itself."""
    features = action_features(dataset)
    size, discrete = sum(math.prod(one.shape) for one in features), all("int" in one.dtype for one in features)
    if any(not NUMBER.fullmatch(one.dtype) for one in features) or size > MOST_VALUES:
        raise EpisodeError("unsupported space", f"actions are {[one.dtype for one in features]} of {size} values")
    if given := _ranges.given_bounds(options, size):
        return ActionSpec.continuous(*given, size), ()
    bounds, notes = dataset.span([one.name for one in features]), []
    if bounds is None or options.action_bounds == "log":
        bounds = table.span(paths, features)
        if options.action_bounds != "log":
            notes.append("no statistics of actions: their ranges are those of the data")
    low, high = bounds
    if discrete:
        start = np.minimum(low, 0).astype(np.int64)
        choices = high.astype(np.int64) - start + 1
        if choices.max() > rules.CHOICES:
            remedy = "give --action-low and --action-high to read them as real numbers"
            raise EpisodeError("too many choices", f"integer actions span [{low.min():g}, {high.max():g}]: {remedy}")
        return ActionSpec.discrete(tuple(map(int, choices)), tuple(map(int, start)), size), tuple(notes)
    still = np.flatnonzero(low == high)
    if len(still):
        notes.append(f"dimensions {', '.join(map(str, still[:8]))} of the action never change")
        reach = np.maximum(np.abs(low), 1.0) * 1e-3
        low, high = np.where(low == high, low - reach, low), np.where(low == high, high + reach, high)
    return ActionSpec.continuous(low.tolist(), high.tolist(), size), tuple(notes)
