"""`python -m etl.inspect DATASET`: what a dataset holds, and one timestep of it decoded back.

dataset.json -> facts, rejected.jsonl -> terminal; etl.inspection.decoded.TaskView (survey, timestep) -> HTML page | PNG

A page shows the facts of all tasks and decodes up to 12 of them; a picture shows the first. --task names another.

Invariant: the output is the only file written. A page loads nothing, and equal datasets give equal pages.
"""

from __future__ import annotations

import base64
import difflib
import io
import json
import sys
import textwrap
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jinja2
import numpy as np
import tyro
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from rich.console import Console
from rich.table import Table
from rich.text import Text

from etl.inspection.canvas import patch_corners
from etl.inspection.decoded import Dimension, InspectError, TaskView, Timestep, Token, share
from etl.tokenizers.text import TextTokenizer
from schemas.dataset import REJECTED_NAME
from schemas.episode import ActionSpec, FieldSpec
from schemas.files import atomic_write
from schemas.layout import PATCH_SIZE, ROLE_NAMES, picture_size
from shards.reader import Dataset

TEMPLATE = Path(__file__).parent / "inspection" / "inspect.html"
WIDTH = 128  # columns of a drawn distribution
PANELS = 60  # dimensions drawn one by one; more of them become a heat map
SHOWN_TASKS = 12  # on one page, where no task is named
FIRST_LINES = 5  # of rejected.jsonl
TOP_PIECES = 20
INK, SOFT, ACCENT, WARN, GRID = "#24292f", "#59636e", "#3f72af", "#c0392b", "#e0a030"
Facts = list[tuple[str, str]]  # what, in words


@dataclass(frozen=True)
class Options:
    """Show what a dataset of shards holds, and decode one timestep of it back."""

    dataset: tyro.conf.Positional[str]
    """Dataset folder or URL, with a dataset.json."""
    task: Annotated[str | None, tyro.conf.arg(aliases=["-t"])] = None
    """Task to look into; every task of the dataset where not given."""
    episode: int | None = None
    """Episode of the task, counted from 0; its first one where not given."""
    timestep: int | None = None
    """Timestep of the episode, counted from 0; the middle one where not given."""
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """FILE.html or FILE.png to write; results/inspect-NAME.html where not given."""


def facts(view: TaskView, rejected: list[dict]) -> Facts:
    """What the manifest says of the task, as (what, in words). `rejected`: all lines of rejected.jsonl."""
    s, layout, action, environment = view.summary, view.layout, view.task.action, view.task.environment
    whole = f"{s.episodes - s.cut_episodes:,} whole, {s.cut_episodes:,} cut by their log's end"
    counts = (layout.text, layout.patches, layout.observation, int(layout.action > 0), layout.action)
    parts = [f"{count} {role}" for role, count in zip(ROLE_NAMES[1:], counts) if count]
    fields = [f"{f.key}: {f.kind} {'x'.join(map(str, f.shape)) or 1}{_fitted(f)}" for f in view.tokenizer.fields]
    values = s.timesteps * sum(d.kind == "continuous" and d.role == "observation" for d in view.dimensions)
    actions = s.timesteps * (layout.action if action and action.kind == "continuous" else 0)
    reasons = _reasons([line for line in rejected if line["task"] == view.task.name])
    found = [
        ("episodes", f"{s.episodes:,}: {whole}; {s.held_out_episodes:,} held out of training"),
        ("left out", f"{s.rejected_episodes:,} rejected{f' ({reasons})' if reasons else ''}, "
                     f"{s.filtered_episodes:,} filtered"),
        ("size", f"{s.timesteps:,} timesteps, {s.tokens:,} tokens, {s.bytes:,} bytes ({s.bytes / 2**20:.1f} MiB)"),
        ("returns", _quantiles(s.returns)),
        ("a timestep", f"{' + '.join(parts)}" + (f" = {layout.length} tokens" if layout.length > 1 else " token")),
        ("observation", "; ".join(fields)),
        ("action space", "none" if action is None else _space(action)),
        ("environment", f"{environment.id} ({environment.suite})" if environment else "none"),
        ("clipped", "; ".join(
            f"{share(count, total)} {what}" for what, count, total in (
                ("observation values beyond the mu-law", s.clipped_observations, values),
                ("action values out of range", s.out_of_range_actions, actions),
            ) if total) or "no continuous values"),
        ("vocabulary", f"{view.vocabulary.name}, fingerprint {view.vocabulary.fingerprint[:16]}"),
    ]  # fmt: skip
    return found + ([("texts cut", f"{s.cut_texts:,} at {layout.text} tokens")] if s.cut_texts else [])


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


def page(views: list[TaskView], steps: list[Timestep], words: list[Facts], rejected: list[dict]) -> str:
    """The HTML page, which loads nothing. `words`: facts of every view; `steps`: of the first ones, shown in full."""
    templates = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    templates.filters.update(uri=picture_uri, bars=bars, heights=heights, heat=heat_picture, short=_short)
    shown = [
        {"view": view, "step": step, "facts": own, "pieces": _top_pieces(view),
         "histogram": np.histogram(view.returns, min(30, len(view.returns))) if len(view.returns) else None}
        for view, step, own in zip(views, steps, words)
    ]  # fmt: skip
    return templates.from_string(TEMPLATE.read_text("utf-8")).render(
        manifest=views[0].dataset.manifest, views=views, shown=shown, rejected=rejected, first=FIRST_LINES,
        reasons=_reasons(rejected), panels=PANELS, patch=PATCH_SIZE, corners=patch_corners,
    )  # fmt: skip


def _top_pieces(view: TaskView) -> list[tuple[str, int]]:
    order = np.argsort(-view.pieces, kind="stable")[:TOP_PIECES]
    return [(view.piece(int(i) + view.vocabulary.text.start), int(view.pieces[i])) for i in order if view.pieces[i]]


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
        pieces = _top_pieces(view)
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


def inspect(options: Options, console: Console) -> Path:
    """Print the tables and write the output; returns its path. InspectError, DatasetError or OSError say what is
    wrong."""
    if options.output is not None and options.output.suffix.lower() not in (".html", ".png"):
        raise InspectError(f"--output {options.output}: neither .html nor .png; give it one of these endings")
    dataset = Dataset(options.dataset)
    manifest = dataset.manifest
    output = options.output or Path("results") / f"inspect-{manifest.name}.html"
    model = manifest.text_model
    text = TextTokenizer(dataset.local(model.file), manifest.vocabulary) if model else None
    views = [TaskView(dataset, number, text) for number in _chosen(options, [t.spec.name for t in manifest.tasks])]
    looked = views[: 1 if output.suffix.lower() == ".png" else SHOWN_TASKS]
    steps = [view.timestep(options.episode, options.timestep) for view in looked]
    rejected = [json.loads(line) for line in dataset.local(manifest.rejected).read_text("utf-8").splitlines()]
    words = [facts(view, rejected) for view in views]
    for view, own in zip(views, words):
        console.print(_table(view.task.name, own))
    _print_rejected(rejected, console)
    for view in looked:
        view.survey()
        good, verdict = view.verdict
        console.print(Text(f"{view.task.name}: {verdict}", "green" if good else "bold red"), soft_wrap=True)
    try:
        with atomic_write(output) as file:
            if output.suffix.lower() == ".png":
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", "Glyph")  # texts hold letters that no installed font has
                    figure(views[0], steps[0], words[0], manifest.name).savefig(file, format="png")
            else:
                file.write(page(views, steps, words, rejected).encode())
    except OSError as error:
        raise InspectError(f"{output}: cannot be written ({error.strerror}); give another --output") from None
    if len(looked) < len(views):
        console.print(f"{output} shows {len(looked)} of {len(views)} tasks; give --task for another", soft_wrap=True)
    return output


def _chosen(options: Options, names: list[str]) -> list[int]:
    """Ordinals of the tasks to show."""
    if options.task is None:
        return list(range(len(names)))
    if options.task not in names:
        near = difflib.get_close_matches(options.task, names, n=3, cutoff=0.5) or names[:8]
        raise InspectError(f"{options.dataset}: no task '{options.task}'; give --task {' or '.join(near)}")
    return [names.index(options.task)]


def _table(name: str, words: Facts) -> Table:
    table = Table(title=Text(name, "bold"), title_justify="left", show_header=False)
    for what, value in words:
        table.add_row(Text(what, "cyan"), Text(value))
    return table


def _print_rejected(rejected: list[dict], console: Console) -> None:
    if rejected:
        first = f"{REJECTED_NAME}: {_reasons(rejected)}; first of {len(rejected)}:"
        lines = [f"  {r['file']}, {r['position']}: {r['reason']}: {r['detail']}" for r in rejected[:FIRST_LINES]]
        console.print(Text("\n".join([first, *lines])), soft_wrap=True)


def _reasons(rejected: list[dict]) -> str:
    return ", ".join(f"{n} {reason}" for reason, n in Counter(line["reason"] for line in rejected).most_common())


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
    return ", ".join(f"{name} {_short(value)}" for name, value in zip(names, returns))


def _short(value: float) -> str:
    return f"{value:,.1f}" if abs(value) >= 10 else f"{value:.3g}"


def main() -> int:
    options = tyro.cli(Options, prog="python -m etl.inspect")
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 110)
    try:
        output = inspect(options, console)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    console.print(Text(str(output)), soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
