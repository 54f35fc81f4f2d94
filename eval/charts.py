"""Pictures of the report as data URIs: bars with intervals, learning curves, recorded rollouts.

    aggregates, metrics.jsonl, GIF or PNG files -> SVG or the file's bytes -> data:image/...;base64,...

Figures are built on matplotlib's Figure objects, never pyplot's state, and the SVG carries
no date and fixed ids. Invariant: equal inputs give equal bytes. Ink is a CSS variable
inside the SVG, so a figure follows the reader's light or dark scheme.
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from eval.scores import Aggregate, ResultError
from schemas.metrics import NAMED_TASKS

INK, FAINT = "#24292f", "#b7bcc2"
INK_RULE = (
    "<style>svg{--ink:#24292f;--faint:#c9cdd2}"
    "@media(prefers-color-scheme:dark){svg{--ink:#d6dade;--faint:#4a5057}}</style>"
)
COLOURS = {"dt": "#3f72af", "tt": "#2a9d8f", "gato": "#d1603d", "random": "#8d949c", "behaviour": "#b79f5b"}
LINES = ("#d1603d", "#3f72af", "#2a9d8f", "#b79f5b", "#8e6bb0", "#5f9ea0", "#c2698f", "#7a8b3a", "#8d949c", "#a0522d")
LABELS = {"dt": "DT", "tt": "TT", "gato": "Gato", "random": "Random", "behaviour": "Behaviour"}
Curves = dict[str, dict[str, list[tuple[float, float]]]]  # quantity -> line -> [(step, value)]
SPREAD = 30  # losses further apart are drawn on a logarithmic scale
MEDIA = {".gif": "image/gif", ".png": "image/png"}
STYLE: Any = {
    "svg.hashsalt": "gato",
    "svg.fonttype": "path",
    "font.size": 9.0,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": FAINT,
    "grid.linewidth": 0.5,
}


def number(value: float, other: float = 0.0) -> str:
    """A return or score for people: no exponent, and as many decimals as the larger of `value` and
    `other` (its ±, or its mean) deserves."""
    size = max(abs(value), abs(other))
    return f"{value:z.{0 if size >= 100 else 1 if size >= 1 else 2}f}"


def image_uri(path: Path) -> str:
    """A GIF or PNG file as a data URI. ResultError where it is absent or of another kind."""
    path = Path(path)
    if path.suffix.lower() not in MEDIA:
        raise ResultError(f"{path}: a rollout picture must be .gif or .png; convert it")
    if not path.is_file():
        raise ResultError(f"{path}: no such rollout picture; record it again or leave it out of `rollouts`")
    return f"data:{MEDIA[path.suffix.lower()]};base64,{base64.b64encode(path.read_bytes()).decode()}"


def returns_chart(aggregates: Sequence[Aggregate]) -> str:
    """Mean raw returns of one task with 95 % intervals, one bar per model, as an SVG data URI. The dashed
    line is the upper end of the random policy's interval. Models without an episode have no bar."""
    shown = [one for one in aggregates if one.episodes]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.4, 0.62 + 0.36 * max(1, len(shown))), layout="constrained")
        axes = figure.add_subplot()
        for row, one in enumerate(shown):
            axes.barh(row, one.return_mean, height=0.62, color=COLOURS[one.model])
            low, high = one.return_interval
            if not math.isnan(low):
                errors = [[max(0.0, one.return_mean - low)], [max(0.0, high - one.return_mean)]]
                axes.errorbar(one.return_mean, row, xerr=errors, color=INK, capsize=3, elinewidth=1.2)
            axes.text(1.02, row, number(one.return_mean), transform=axes.get_yaxis_transform(), va="center")
        ceilings = [one.return_interval[1] for one in shown if one.model == "random"]
        if ceilings and not math.isnan(ceilings[0]):
            axes.axvline(ceilings[0], color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
        axes.set_yticks(range(len(shown)), [LABELS[one.model] for one in shown])
        axes.set_ylim(max(1, len(shown)) - 0.5, -0.5)
        axes.axvline(0, color=FAINT, linewidth=0.8)
        axes.tick_params(length=0)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("return")
        return _svg_uri(figure)


def describe(aggregates: Sequence[Aggregate]) -> str:
    """The bar chart in words, for readers who do not see it."""
    parts = []
    for one in aggregates:
        if one.episodes:
            low, high = one.return_interval
            between = "" if math.isnan(low) else f" (95 % interval {number(low)} to {number(high)})"
            parts.append(f"{LABELS[one.model]} {number(one.return_mean)}{between}")
    return "Mean returns: " + ", ".join(parts or ["none"]) + "."


def read_metrics(path: Path) -> Curves:
    """A training run's metrics.jsonl, and the returns.jsonl in its folder if it was played.

    'train/loss' is line 'training' of quantity 'loss'; 'held_out/TASK/loss' line TASK, and so are 'returns/TASK/...';
    of many tasks 'domains/DOMAIN/loss' line DOMAIN, and no task of its own.
    A step that was written twice (a resumed run) counts as last written. ResultError for a line that is not JSON,
    unless it is the last one, which a stopped run may have left half written."""
    path = Path(path)
    if not path.is_file():
        raise ResultError(f"{path}: no such metrics file; point at a run's metrics.jsonl or leave the run out")
    by_step: dict[int, dict[str, Any]] = {}
    for record in [*_records(path), *_records(path.with_name("returns.jsonl"))]:
        if "step" in record:
            by_step.setdefault(record["step"], {}).update(record)
    curves: Curves = {}
    tasks = {key.split("/")[1] for record in by_step.values() for key in record if key.startswith("held_out/")}
    held_out = "domains" if len(tasks) > NAMED_TASKS else "held_out"
    for step, record in sorted(by_step.items()):
        for key, value in record.items():
            group, _, rest = key.partition("/")
            line, _, quantity = f"training/{rest}".rpartition("/") if group == "train" else rest.rpartition("/")
            if (
                group in ("train", held_out, "returns")
                and line
                and isinstance(value, int | float)
                and math.isfinite(value)
            ):
                curves.setdefault(quantity, {}).setdefault(line, []).append((step, value))
    return curves


def _records(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text("utf-8").splitlines() if path.is_file() else []
    found = []
    for ordinal, line in enumerate(lines, 1):
        try:
            found.append(json.loads(line) if line.strip() else {})
        except json.JSONDecodeError as error:
            if ordinal < len(lines):
                raise ResultError(f"{path}:{ordinal}: not JSON ({error}); remove the line") from None
    return found


def curves_chart(curves: Curves) -> str:
    """Learning curves, one panel per quantity, as an SVG data URI; '' where there is nothing to draw.
    Of quantities seen only in training, the loss and the throughput are drawn, not every rate and norm."""
    first = [name for name in ("loss", "accuracy") if name in curves]
    held_out = sorted(name for name in curves if set(curves[name]) != {"training"} and name not in first)
    panels = first + held_out + [name for name in ("tokens_per_second",) if name in curves and name not in held_out]
    if not panels:
        return ""
    names = sorted({line for panel in panels for line in curves[panel] if line != "training"})
    colour = {name: LINES[index % len(LINES)] for index, name in enumerate(names)} | {"training": INK}
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    with matplotlib.rc_context(STYLE):
        legend_rows = -(-(len(names) + 1) // columns)
        figure = Figure(figsize=(3.5 * columns, 2.3 * rows + 0.2 * legend_rows), layout="constrained")
        handles: dict[str, Line2D] = {}
        for index, panel in enumerate(panels):
            axes = figure.add_subplot(rows, columns, index + 1)
            for line in sorted(curves[panel], key=lambda name: (name != "training", name)):
                steps, values = zip(*curves[panel][line])
                marker = "o" if len(steps) < 3 else None
                width = 0.8 if line == "training" else 1.4
                (drawn,) = axes.plot(steps, values, color=colour[line], linewidth=width, marker=marker, markersize=3)
                handles.setdefault(line, drawn)
            axes.set_title(panel.replace("_", " "), fontsize=9.5, loc="left")
            axes.set_xlabel("step")
            axes.grid(axis="y")
            axes.tick_params(length=0)
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            heights = [value for line in curves[panel].values() for _, value in line]
            if "loss" in panel and 0 < SPREAD * min(heights) < max(heights):
                axes.set_yscale("log")
            if panel == "tokens_per_second":
                axes.set_ylim(bottom=0)
                axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        figure.legend(list(handles.values()), list(handles), loc="outside lower left", ncols=columns, frameon=False)
        return _svg_uri(figure)


def svg(figure: Figure) -> str:
    """A figure as SVG text whose ink follows the reader's colour scheme."""
    canvas, buffer = FigureCanvasSVG(figure), io.BytesIO()
    figure.patch.set_alpha(0)
    for axes in figure.axes:
        axes.patch.set_alpha(0)
    canvas.print_svg(buffer, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue().decode().replace(INK, "var(--ink)").replace(FAINT, "var(--faint)")
    start = text.index("<defs>")
    return text[:start] + INK_RULE + text[start:]


def _svg_uri(figure: Figure) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg(figure).encode()).decode()
