"""A task's manifest in words.

Manifest, TaskSpec, rejected.jsonl -> (what, in words) lines for the terminal, the page and the picture
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from textwrap import shorten

from etl.building.oddities import TaskOddities
from etl.inspection.decoded import TaskView, share
from etl.sources import Rejection
from schemas.layout import ROLE_NAMES, picture_size, pictures_of
from schemas.task import ActionSpec, FieldSpec

Facts = list[tuple[str, str]]  # what, in words
LISTED, SHOWN = 4, 60  # instructions, and characters of each


def facts(view: TaskView, rejected: Sequence[Rejection]) -> Facts:
    """Facts of the manifest on the task, as (what, in words). `rejected`: all lines of rejected.jsonl."""
    s, layout, action, environment = view.summary, view.layout, view.task.action, view.task.environment
    whole = f"{s.episodes - s.cut_episodes:,} whole, {s.cut_episodes:,} cut by their log's end"
    counts = (layout.text, layout.patches, layout.observation, int(layout.action > 0), layout.action)
    parts = [f"{count} {role}" for role, count in zip(ROLE_NAMES[1:], counts) if count]
    fields = [
        f"{f.key}: {f.kind} {'x'.join(map(str, f.shape)) or 1}{_fitted(f)}"
        for f in view.tokenizer.fields
        if f.kind != "image"
    ]
    cameras = [_camera(f) for f in view.tokenizer.fields if f.kind == "image"]
    values = s.timesteps * sum(d.kind == "continuous" and d.role == "observation" for d in view.dimensions)
    actions = s.timesteps * (layout.action if action and action.kind == "continuous" else 0)
    reasons = reasons_of([line for line in rejected if line.task == view.task.name])
    found = [
        ("episodes", f"{s.episodes:,}: {whole}; {s.held_out_episodes:,} held out of training"),
        ("left out", f"{s.rejected_episodes:,} rejected{f' ({reasons})' if reasons else ''}, "
                     f"{s.filtered_episodes:,} filtered"),
        ("size", f"{s.timesteps:,} timesteps, {s.tokens:,} tokens, {s.bytes:,} bytes ({s.bytes / 2**20:.1f} MiB)"),
        ("returns", _quantiles(s.returns)),
        ("a timestep", f"{' + '.join(parts)}" + (f" = {layout.length} tokens" if layout.length > 1 else " token")),
        *([("cameras", "; ".join(cameras))] if cameras else []),
        *([("observation", "; ".join(fields))] if fields else []),
        ("action space", "none" if action is None else _space(action)),
        ("environment", f"{environment.id} ({environment.suite})" if environment else "none"),
        ("clipped", "; ".join(
            f"{share(count, total)} {what}" for what, count, total in (
                ("observation values beyond the mu-law", s.clipped_observations, values),
                ("action values out of range", s.out_of_range_actions, actions),
            ) if total) or "no continuous values"),
        ("vocabulary", f"{view.vocabulary.name}, fingerprint {view.vocabulary.fingerprint[:16]}"),
    ]  # fmt: skip
    more = [("texts cut", f"{s.cut_texts:,} at {layout.text} tokens")] if s.cut_texts else []
    if texts := view.instructions:
        listed = ", ".join(f"'{shorten(text, SHOWN)}' ({count:,})" for text, count in texts.most_common(LISTED))
        rest = f" and {len(texts) - LISTED:,} more" if len(texts) > LISTED else ""
        more.append(("instructions", f"{listed}{rest}; at the first timestep of {sum(texts.values()):,} episodes"))
    return found + more + _odd(view.oddities)


def _odd(oddities: TaskOddities | None) -> Facts:
    """Oddities that the build found, one per line."""
    if oddities is None:
        return []
    least, middle, most = (f"{n:,.0f}" if n == int(n) else f"{n:,.1f}" for n in oddities.lengths)
    lines: Facts = [("lengths", f"min {least}, median {middle}, max {most} timesteps")]
    return lines + [("odd", line) for line in (*oddities.warnings, *oddities.notes, *oddities.found)]


def reasons_of(rejected: Sequence[Rejection]) -> str:
    return ", ".join(f"{n} {reason}" for reason, n in Counter(line.reason for line in rejected).most_common())


def _camera(field: FieldSpec) -> str:
    """One camera: its size in the log, what becomes of it, and its patches."""
    patches = sum(picture.patches for picture in pictures_of(field))
    size = "x".join(map(str, field.shape))
    return f"{field.key}: image {size}{_fitted(field)}, {patches} patches"


def _fitted(field: FieldSpec) -> str:
    if field.kind != "image":
        return ""
    (height, width), stack = picture_size(field), f", the newest of {field.stack} frames" if field.stack > 1 else ""
    fit = field.fit if field.resized else "pad"
    return f" brought to {height}x{width} pixels ({fit}){stack}" if (height, width) != field.shape[:2] else stack


def _space(action: ActionSpec) -> str:
    """An action space in words: one range for all dimensions, or each dimension's."""
    if action.kind == "discrete":
        choices = sorted(set(action.choices))
        starts = "" if not any(action.start) else f" from {', '.join(map(str, action.start))}"
        listed = ", ".join(map(str, choices if len(choices) == 1 else action.choices))
        return f"{action.size} discrete, {listed} choices{starts}"
    ranges = [f"[{low:g}, {high:g}]" for low, high in zip(action.low, action.high)]
    return f"{action.size} continuous in {ranges[0] if len(set(ranges)) == 1 else ', '.join(ranges)}"


def _quantiles(returns: tuple[float, ...] | None) -> str:
    if returns is None:
        return "none"
    names = ("min", "25 %", "median", "75 %", "max")
    return ", ".join(f"{name} {short(value)}" for name, value in zip(names, returns))


def short(value: float) -> str:
    return f"{value:,.1f}" if abs(value) >= 10 else f"{value:.3g}"
