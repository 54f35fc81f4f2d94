"""The picture of an inspection: facts, one timestep, distributions and returns on one sheet.

TaskView, Timestep, facts -> matplotlib Figure
"""

from __future__ import annotations

import textwrap
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from etl.inspection.canvas import patch_corners
from etl.inspection.decoded import TaskView, Timestep, Token
from etl.inspection.facts import Facts
from etl.inspection.page import ACCENT, WIDTH, heat, top_pieces
from schemas.layout import PATCH_SIZE

INK, SOFT, WARN, GRID = "#24292f", "#59636e", "#c0392b", "#e0a030"


def figure(view: TaskView, step: Timestep, words: Facts, name: str) -> Figure:
    """The same essentials as one picture: facts, the timestep, distributions, returns."""
    canvas = Figure(figsize=(16, 10.5), dpi=100, layout="constrained")
    FigureCanvasAgg(canvas)
    good, verdict = view.verdict
    title = f"{name}: {view.task.name}, episode {step.episode}, timestep {step.number}"
    canvas.suptitle(title, fontsize=16, parse_math=False)
    halves: Any = canvas.subfigures(1, 2, width_ratios=(1, 1.15))
    (margin, returns), (upper, lower) = (half.subplots(2, 1, height_ratios=(1.5, 1)) for half in halves)
    lines = [(line, INK) for what, value in words + step.about for line in _wrapped(f"{what}: {value}", "    ")]
    colour = ACCENT if good else WARN
    _write(margin, [*((line, colour) for line in _wrapped(f"{'✓' if good else '✗'} {verdict}")), ("", INK), *lines])
    if len(view.returns):
        returns.hist(view.returns, min(30, len(view.returns)), color=ACCENT)
        returns.set(title="returns of whole episodes", xlabel="return", ylabel="episodes")
    else:
        returns.axis("off")
    if step.picture is not None:
        _draw_picture(upper, view, step)
    elif step.text:
        text = [(line, INK) for paragraph in step.text.splitlines() for line in _wrapped(paragraph)]
        _write(upper, [("text around this token:", SOFT), *text])
    else:
        _write(upper, _token_lines(step.tokens))
    _draw_bins(lower, view)
    return canvas


def _wrapped(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(text, 76, subsequent_indent=indent)


def _write(axes: Axes, lines: list[tuple[str, str]], most: int = 30) -> None:
    """Lines and their colours, as many as fit."""
    axes.axis("off")
    if len(lines) > most:
        lines = [*lines[: most - 1], (f"and {len(lines) - most + 1} lines more", SOFT)]
    for n, (line, colour) in enumerate(lines):
        axes.text(0.01, 1 - n / most, line, color=colour, fontsize=10.5, family="monospace", va="top",
                  transform=axes.transAxes, parse_math=False)  # fmt: skip


def _draw_picture(axes: Axes, view: TaskView, step: Timestep) -> None:
    """The chosen frame with its patches, and under it the strip."""
    assert step.picture is not None
    height, width, channels = step.picture.shape
    axes.axis("off")
    main = axes.inset_axes((0, 0.3, 1, 0.7))
    if step.text:
        main.set_title(textwrap.shorten(step.text, 90), fontsize=11, parse_math=False)
    main.imshow(step.picture[..., 0] if channels == 1 else step.picture, cmap="gray", vmin=0, vmax=255)
    main.set_xticks([])
    main.set_yticks([])
    label = {"facecolor": "black", "alpha": 0.6, "linewidth": 0, "pad": 1}
    for n, (left, top) in enumerate(patch_corners(view.layout)):
        main.add_patch(Rectangle((left - 0.5, top - 0.5), PATCH_SIZE, PATCH_SIZE, fill=False, color=GRID, lw=0.8))
        main.text(left + 0.6, top + 3, str(n), color=GRID, fontsize=9, bbox=label)
    film = axes.inset_axes((0, 0, 1, 0.26))
    gap = np.full((height, 3, channels), 255, np.uint8)
    frames = [part for _, _, frame in step.strip for part in (frame, gap)]
    joined = np.concatenate(frames, axis=1)
    film.imshow(joined[..., 0] if channels == 1 else joined, cmap="gray", vmin=0, vmax=255)
    film.set_xticks([width / 2 + n * (width + 3) for n in range(len(step.strip))], [str(t) for t, _, _ in step.strip])
    film.set_yticks([])
    film.tick_params(length=0)
    film.spines[:].set_visible(False)
    film.set_xlabel("consecutive timesteps")


def _token_lines(tokens: list[Token]) -> list[tuple[str, str]]:
    lines = [(f"{'col':>3}  {'what':<18} {'id':>6} {'bin':>5} {'decoded':>12} {'raw':>12} {'half-bins':>9}", SOFT)]
    for token in tokens:
        raw = "" if token.raw is None else f"{token.raw:.6g}"
        error = "" if token.error is None else f"{token.error:+.3f}"
        bin, id = ("" if value is None else str(value) for value in (token.bin, token.id))
        line = f"{token.column:>3}  {(token.name or token.role)[:18]:<18} {id:>6} {bin:>5} {token.decoded:>12}"
        lines.append((f"{line} {raw:>12} {error:>9} {token.state}", WARN if token.state == "wrong" else INK))
    return lines


def _draw_bins(axes: Axes, view: TaskView) -> None:
    dimensions = view.dimensions
    if not dimensions:
        pieces = top_pieces(view)
        axes.bar(range(len(pieces)), [count for _, count in pieces], color=ACCENT)
        axes.set_xticks(range(len(pieces)), [repr(piece)[1:-1] for piece, _ in pieces], rotation=60, parse_math=False)
        axes.set(title="most frequent text pieces", ylabel="tokens")
    elif len(dimensions) == 1:
        axes.bar(range(len(dimensions[0].counts)), dimensions[0].counts, color=ACCENT)
        axes.set(title=f"distribution of '{dimensions[0].name}'", xlabel="choice", ylabel="timesteps")
    else:
        axes.imshow(heat(dimensions), aspect="auto", cmap="Blues", interpolation="nearest", vmin=0, vmax=1)
        step = -(-len(dimensions) // 24)
        names = [d.name for d in dimensions[::step]]
        axes.set_yticks(range(0, len(dimensions), step), names, fontsize=8, parse_math=False)
        axes.set_xticks([0, WIDTH // 2, WIDTH - 1], ["first bin", "middle", "last bin"])
        axes.set_title("bins of each dimension (shade: square root of the share of its fullest)", fontsize=10)
