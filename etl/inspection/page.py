"""The HTML page of an inspection, which loads nothing.

TaskViews, Timesteps, facts -> inspect.html (Jinja) -> one file with its pictures inside
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path

import jinja2
import numpy as np
from PIL import Image

from etl.inspection.canvas import patch_corners
from etl.inspection.decoded import TaskView, Timestep
from etl.inspection.dimension import Dimension
from etl.inspection.facts import Facts, reasons_of, short
from etl.sources import Rejection
from schemas.layout import PATCH_SIZE

TEMPLATE = Path(__file__).parent / "inspect.html"
ACCENT = "#3f72af"
WIDTH = 128  # columns of a drawn distribution
PANELS = 60  # dimensions drawn one by one; more of them become a heat map
FIRST_LINES = 5  # of rejected.jsonl
TOP_PIECES = 20


def page(views: list[TaskView], steps: list[Timestep], words: list[Facts], rejected: Sequence[Rejection]) -> str:
    """The HTML page, which loads nothing. `words`: facts of every view; `steps`: of the first ones, shown in full."""
    templates = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    templates.filters.update(uri=picture_uri, bars=bars, heights=heights, heat=heat_picture, short=short)
    shown = [
        {"view": view, "step": step, "facts": own, "pieces": top_pieces(view),
         "histogram": np.histogram(view.returns, min(30, len(view.returns))) if len(view.returns) else None}
        for view, step, own in zip(views, steps, words)
    ]  # fmt: skip
    return templates.from_string(TEMPLATE.read_text("utf-8")).render(
        manifest=views[0].dataset.manifest, views=views, shown=shown, rejected=rejected, first=FIRST_LINES,
        reasons=reasons_of(rejected), panels=PANELS, patch=PATCH_SIZE, corners=patch_corners,
    )  # fmt: skip


def heights(d: Dimension) -> np.ndarray:
    """The distribution merged to at most WIDTH columns, as square roots of the share of the fullest."""
    size = len(d.counts)
    merged = d.counts if size <= WIDTH else np.add.reduceat(d.counts, np.arange(WIDTH) * size // WIDTH)
    return np.sqrt(merged / max(1, merged.max()))


def heat(dimensions: list[Dimension]) -> np.ndarray:
    """A row a dimension, WIDTH columns over its bins or choices, in [0, 1]."""
    places = np.arange(WIDTH)
    return np.stack([h[places * len(h) // WIDTH] for h in map(heights, dimensions)])


def heat_picture(dimensions: list[Dimension]) -> np.ndarray:
    """The same as a picture for light and dark paper, uint8 RGBA."""
    shade = heat(dimensions)
    colour = np.array([int(ACCENT[n : n + 2], 16) for n in (1, 3, 5)])
    return np.dstack([np.broadcast_to(colour, (*shade.shape, 3)), 255 * shade]).astype(np.uint8)


def picture_uri(pixels: np.ndarray) -> str:
    """uint8 (H, W, 1, 3 or 4) as a PNG data URI."""
    buffer = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def bars(heights: np.ndarray) -> str:
    """SVG path of bars in [0, 1], each 1 wide, in a box 100 high."""
    return "".join(f"M{x} 100V{100 - 100 * h:.1f}h1V100Z" for x, h in enumerate(heights) if h > 0)


def top_pieces(view: TaskView) -> list[tuple[str, int]]:
    order = np.argsort(-view.pieces, kind="stable")[:TOP_PIECES]
    return [(view.piece(int(i) + view.vocabulary.text.start), int(view.pieces[i])) for i in order if view.pieces[i]]
