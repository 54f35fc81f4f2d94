"""`python -m etl.inspect DATASET`: what a dataset holds, and one timestep of it decoded back.

shards.reader.Dataset -> TaskView: facts, survey (bins of all columns), one timestep -> terminal | HTML page | PNG

The survey takes at most 200,000 timesteps a task, every n-th of all its episodes. Where the shards keep the raw
float32 beside the tokens, every sampled value is compared with its bin, in the companded space where bins are uniform.

Invariant: all that is shown was read from the shards and decoded as the agent decodes it; nothing is written but the
output. Equal datasets give equal pages.
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
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import jinja2
import numpy as np
import tyro
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console
from rich.table import Table
from rich.text import Text

from etl.tokenizers import continuous, image
from etl.tokenizers.text import TextTokenizer
from etl.tokenizers.timestep import TimestepTokenizer
from schemas.dataset import REJECTED_NAME, TEXT_MODEL_NAME
from schemas.episode import FieldSpec
from schemas.files import atomic_write
from schemas.layout import PATCH, PATCH_SIZE, ROLE_NAMES, TEXT
from schemas.vocabulary import Vocabulary, bin_centres
from shards.reader import Dataset

TEMPLATE = Path(__file__).with_name("inspect.html")
SAMPLE = 200_000  # timesteps a task that the survey looks at
BLOCK = 1 << 14  # of them at a time
SLACK = 1e-3  # half-bins: a log may be float64, what is kept beside the tokens is float32
WIDTH = 128  # columns of a drawn distribution
STRIP = 8  # consecutive frames
PANELS = 60  # dimensions drawn one by one; more of them become a heat map
SHOWN_TASKS = 12  # on one page, where no task is named
FIRST_LINES = 5  # of rejected.jsonl
AROUND = 120  # text tokens on either side of the chosen one
TOP_PIECES = 20
INK, SOFT, ACCENT, WARN, GRID = "#24292f", "#59636e", "#3f72af", "#c0392b", "#e0a030"


class InspectError(ValueError):
    """What was asked for is not in the dataset, or cannot be written; the message says what would do."""


@dataclass(frozen=True)
class Options:
    """Show what a dataset of shards holds, and decode one timestep of it back."""

    dataset: tyro.conf.Positional[Path]
    """Dataset folder, with a dataset.json."""
    task: Annotated[str | None, tyro.conf.arg(aliases=["-t"])] = None
    """Task to look into; every task of the dataset where not given."""
    episode: int | None = None
    """Episode of the task, counted from 0; its first one where not given."""
    timestep: int | None = None
    """Timestep of the episode, counted from 0; the middle one where not given."""
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """FILE.html or FILE.png to write; results/inspect-NAME.html where not given."""


@dataclass
class Dimension:
    """One stored column that is no text: ids [start, start + len(counts)), and what the survey counts of them.

    `raw`: its column in the member of raw values, if it has one. `wrong`: values that do not lie in the bin that their
    token names; `worst`: largest error of values that are not clipped, in half-bins."""

    name: str
    role: str
    kind: str
    column: int
    start: int
    counts: np.ndarray
    raw: int | None = None
    low: float = -1.0
    high: float = 1.0
    clipped: int = 0
    wrong: int = 0
    worst: float = 0.0

    def position(self, value: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
        """Values to where they lie among the bins: [-1, 1], or beyond it where they are clipped."""
        if self.role == "observation":
            return continuous.compand(value, vocabulary)
        return 2.0 * (np.asarray(value, np.float64) - self.low) / (self.high - self.low) - 1.0

    def value(self, position: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
        """Inverse of `position`."""
        if self.role == "observation":
            return continuous.expand(position, vocabulary)
        return self.low + (np.asarray(position, np.float64) + 1.0) * (self.high - self.low) / 2.0

    def compare(self, bins: np.ndarray, raw: np.ndarray, vocabulary: Vocabulary) -> tuple[np.ndarray, np.ndarray]:
        """Distance of raw values from their bin's centre in half-bins, and which lie beyond the range. Those count
        as lying on its edge, so that a clipped value is right in the outermost bin only."""
        y = self.position(raw, vocabulary)
        error = (np.clip(y, -1.0, 1.0) - bin_centres(vocabulary.bins)[bins]) * vocabulary.bins
        return error, np.abs(y) > 1.0

    @property
    def total(self) -> int:
        return int(self.counts.sum())

    @property
    def ends(self) -> tuple[float, float]:
        """Shares of the first and of the last bin."""
        return float(self.counts[0] / max(1, self.total)), float(self.counts[-1] / max(1, self.total))

    @property
    def edge(self) -> bool:
        """Whether any value lies in the first or the last bin."""
        return bool(self.counts[0] or self.counts[-1])

    @property
    def heights(self) -> np.ndarray:
        """The distribution merged to at most WIDTH columns, as square roots of the share of the fullest."""
        size = len(self.counts)
        merged = self.counts if size <= WIDTH else np.add.reduceat(self.counts, np.arange(WIDTH) * size // WIDTH)
        return np.sqrt(merged / max(1, merged.max()))

    def span(self, vocabulary: Vocabulary) -> tuple[float, float]:
        """Lowest and highest value seen, as edges of their bins or as choices."""
        seen = np.flatnonzero(self.counts)
        low, high = (float(seen[0]), float(seen[-1])) if len(seen) else (0.0, 0.0)
        if self.kind == "discrete":
            return low, high
        edges = np.array([low, high + 1]) * (2.0 / len(self.counts)) - 1.0
        return tuple(float(v) for v in self.value(edges, vocabulary))  # type: ignore[return-value]


@dataclass(frozen=True)
class Token:
    """One token of the timestep, or a run of patches up to column `last`. `state`: '', 'clipped' or 'wrong'."""

    column: int
    role: str
    name: str
    id: int | None = None
    last: int | None = None
    bin: int | None = None
    decoded: str = ""
    interval: tuple[float, float] | None = None
    raw: float | None = None
    error: float | None = None
    state: str = ""


@dataclass(frozen=True)
class Timestep:
    """One timestep decoded. `pieces`: its text, or that around it, as (piece, '' | 'padding' | 'here'); `strip`:
    consecutive frames with their number and what was done there."""

    episode: int
    number: int
    about: list[tuple[str, str]]
    tokens: list[Token]
    pieces: list[tuple[str, str]]
    text: str
    picture: np.ndarray | None
    strip: list[tuple[int, str, np.ndarray]]

    @property
    def wrong(self) -> int:
        return sum(token.state == "wrong" for token in self.tokens)


class TaskView:
    """Everything about one task that the outputs show: made from the manifest, then `survey` and `timestep`."""

    def __init__(self, dataset: Dataset, number: int, text: TextTokenizer | None):
        self.dataset, self.number, self.text = dataset, number, text
        self.summary, self.layout = dataset.manifest.tasks[number], dataset.layouts[number]
        self.task, self.vocabulary = self.summary.spec, dataset.manifest.vocabulary
        self.tokenizer = TimestepTokenizer(self.task, self.vocabulary, text)
        rows = np.flatnonzero(dataset.column("task") == number)
        self.rows = rows[np.lexsort((dataset.column("start")[rows], dataset.column("episode")[rows]))]
        self.dimensions = self._dimensions()
        ids = [(self.vocabulary.text.start, text.pieces if text else 0)] * self.layout.text
        ids += [(d.start, len(d.counts)) for d in self.dimensions]
        self.lowest, self.sizes = np.array(ids, np.int64).reshape(-1, 2).T  # of each stored column's ids
        self.pieces = np.zeros(text.pieces if text else 0, np.int64)  # how often each text piece was seen
        self.sampled = self.outside = 0  # timesteps the survey saw; their tokens that are not their column's ids

    def _dimensions(self) -> list[Dimension]:
        found: list[Dimension] = []
        raw = 0
        for spec in self.tokenizer.fields:
            if spec.kind in ("text", "image"):
                continue
            ids = self.vocabulary.range("observation", spec.kind)
            size = ids.size if spec.kind == "continuous" else spec.choices or ids.size
            for index in np.ndindex(*spec.shape):
                name = spec.key if spec.shape in ((), (1,)) else f"{spec.key}[{', '.join(map(str, index))}]"
                place = raw if spec.kind == "continuous" else None
                column, raw = self.layout.text + len(found), raw + (spec.kind == "continuous")
                found.append(Dimension(name, "observation", spec.kind, column, ids.start, np.zeros(size, int), place))
        if action := self.task.action:
            ids, first = self.tokenizer.action_ids, self.layout.text + len(found)
            for n in range(action.size):
                name = "action" if action.size == 1 else f"action[{n}]"
                place = n if action.kind == "continuous" else None
                about = (action.kind, first + n, ids.start, np.zeros(ids.size, int), place, action.low, action.high)
                found.append(Dimension(name, "action", *about))
        return found

    @cached_property
    def returns(self) -> np.ndarray:
        """Raw returns of whole episodes."""
        column, rows = self.dataset.column, self.rows
        whole = (column("start")[rows] == 0) & (column("terminated")[rows] | column("truncated")[rows])
        return column("episode_return")[rows[whole]] if self.task.action else np.empty(0)

    def facts(self, rejected: Counter[str]) -> list[tuple[str, str]]:
        """What the manifest says of the task, as (what, in words)."""
        s, layout, action, environment = self.summary, self.layout, self.task.action, self.task.environment
        whole = f"{s.episodes - s.cut_episodes:,} whole, {s.cut_episodes:,} cut by their log's end"
        counts = (layout.text, layout.patches, layout.observation, int(layout.action > 0), layout.action)
        parts = [f"{count} {role}" for role, count in zip(ROLE_NAMES[1:], counts) if count]
        fields = [f"{f.key}: {f.kind} {'x'.join(map(str, f.shape)) or 1}{_fitted(f)}" for f in self.tokenizer.fields]
        values = s.timesteps * sum(d.kind == "continuous" and d.role == "observation" for d in self.dimensions)
        actions = s.timesteps * (layout.action if action and action.kind == "continuous" else 0)
        reasons = ", ".join(f"{count} {reason}" for reason, count in rejected.most_common())
        found = [
            ("episodes", f"{s.episodes:,}: {whole}; {s.held_out_episodes:,} held out of training"),
            ("left out", f"{s.rejected_episodes:,} rejected{f' ({reasons})' if reasons else ''}, "
                         f"{s.filtered_episodes:,} filtered"),
            ("size", f"{s.timesteps:,} timesteps, {s.tokens:,} tokens, {s.bytes:,} bytes ({s.bytes / 2**20:.1f} MiB)"),
            ("returns", _quantiles(s.returns)),
            ("a timestep", f"{' + '.join(parts)}" + (f" = {layout.length} tokens" if layout.length > 1 else " token")),
            ("observation", "; ".join(fields)),
            ("action space", "none" if action is None else f"{action.size} discrete, {action.choices} choices"
             if action.kind == "discrete" else f"{action.size} continuous in [{action.low:g}, {action.high:g}]"),
            ("environment", f"{environment.id} ({environment.suite})" if environment else "none"),
            ("clipped", "; ".join(
                f"{_share(count, total)} {what}" for what, count, total in (
                    ("observation values beyond the mu-law", s.clipped_observations, values),
                    ("action values out of range", s.out_of_range_actions, actions),
                ) if total) or "no continuous values"),
            ("vocabulary", f"{self.vocabulary.name}, fingerprint {self.vocabulary.fingerprint[:16]}"),
        ]  # fmt: skip
        return found + ([("texts cut", f"{s.cut_texts:,} at {layout.text} tokens")] if s.cut_texts else [])

    def survey(self) -> None:
        """Count bins, and compare raw values, over every n-th timestep of all episodes."""
        every = -(-self.summary.timesteps // SAMPLE)
        parts: list[list[np.ndarray]] = []
        seen = 0
        for row in self.rows:
            members = (self.dataset.tokens(row), self.dataset.observation(row), self.dataset.action(row))
            took = slice(-seen % every, None, every)
            parts.append([np.empty((0, 0)) if one is None else one[took] for one in members])
            seen += len(members[0])
            if sum(len(part[0]) for part in parts) >= BLOCK or row == self.rows[-1]:
                self._count(*(np.concatenate(arrays) for arrays in zip(*parts)))
                parts = []

    def _count(self, tokens: np.ndarray, observation: np.ndarray, action: np.ndarray) -> None:
        ordinals = tokens.astype(np.int64) - self.lowest
        inside = (ordinals >= 0) & (ordinals < self.sizes)
        self.sampled += len(tokens)
        self.outside += int(np.count_nonzero(~inside))
        text = slice(0, self.layout.text)
        self.pieces += np.bincount(ordinals[:, text][inside[:, text]], minlength=len(self.pieces))
        for d in self.dimensions:
            rows = inside[:, d.column]
            bins = ordinals[rows, d.column]
            d.counts += np.bincount(bins, minlength=len(d.counts))
            if d.raw is not None:
                raw = (observation if d.role == "observation" else action)[rows, d.raw]
                error, clipped = d.compare(bins, raw, self.vocabulary)
                d.clipped += int(np.count_nonzero(clipped))
                d.wrong += int(np.count_nonzero(np.abs(error) > 1 + SLACK))
                d.worst = max(d.worst, float(np.abs(error[~clipped]).max(initial=0.0)))

    @property
    def verdict(self) -> tuple[bool, str]:
        """Whether the sampled tokens say what they should, in one sentence."""
        held = [d for d in self.dimensions if d.raw is not None]
        values, clipped = sum(d.total for d in held), sum(d.clipped for d in held)
        wrong = sum(d.wrong for d in held)
        if self.outside:
            return False, f"{self.outside:,} tokens of {self.sampled:,} timesteps lie outside the ids of their column"
        if wrong:
            return False, f"{wrong:,} of {values:,} values do not lie in the bin that their token names"
        if not held:
            return True, f"all tokens of {self.sampled:,} timesteps are ids of their column"
        worst = f"largest error {max(d.worst for d in held):.3f} half-bins; {_share(clipped, values)} clipped"
        return True, f"all {values:,} values of {self.sampled:,} timesteps lie in the bin their token names ({worst})"

    def timestep(self, episode: int | None, number: int | None) -> Timestep:
        """One timestep decoded. InspectError says which ones there are."""
        data, column = self.dataset, self.dataset.column
        known = np.unique(column("episode")[self.rows])
        chosen = int(known[0]) if episode is None else episode
        if chosen not in known:
            gone = "; that one was rejected" if known[0] < chosen < known[-1] else ""
            raise InspectError(
                f"--episode {chosen}: task '{self.task.name}' has episodes {known[0]} to {known[-1]}{gone}"
            )
        rows = self.rows[column("episode")[self.rows] == chosen]
        T = int(column("episode_timesteps")[rows[0]])
        t = T // 2 if number is None else number
        if not 0 <= t < T:
            raise InspectError(
                f"--timestep {t}: episode {chosen} of task '{self.task.name}' has timesteps 0 to {T - 1}"
            )

        def read(member: Callable, first: int, stop: int) -> np.ndarray:
            """Timesteps [first, stop) of the episode, over its pieces."""
            starts, lengths = column("start")[rows], column("timesteps")[rows]
            touched = [n for n in range(len(rows)) if starts[n] < stop and first < starts[n] + lengths[n]]
            return np.concatenate([member(rows[n])[max(0, first - starts[n]) : stop - starts[n]] for n in touched])

        row = rows[0]
        ending = next((e for e in ("terminated", "truncated") if column(e)[row]), "cut by the log's end")
        about = [
            ("source", f"{column('file')[row]}, number {column('position')[row]}, from row {column('row')[row]}"),
            ("split", "held out" if column("held_out")[row] else "training"),
        ]
        if self.task.action:
            about.append(("episode", f"{T:,} timesteps, return {column('episode_return')[row]:.6g}, {ending}"))
            about.append(("reward", f"{read(data.reward, t, t + 1)[0]:.6g}"))
            about.append(("action", self._action(read(data.tokens, t, t + 1)[0])))
        picture, strip = None, []
        if self.layout.patches:
            first = max(0, min(t - STRIP // 2 + 1, T - STRIP))
            span, sizes = (first, min(first + STRIP, T)), (self.layout.patch_rows, self.layout.patch_columns)
            frames = image.from_patches(read(data.patches, *span), *sizes)
            stored, rewards = read(data.tokens, *span), read(data.reward, *span)
            for n, frame in enumerate(frames):
                strip.append((first + n, f"action {self._action(stored[n])}, reward {rewards[n]:.3g}", frame))
            picture = frames[t - first]
        tokens = read(data.tokens, t, t + 1)[0]
        raws = {
            role: read(member, t, t + 1)[0]
            for role, member in (("observation", data.observation), ("action", data.action))
            if member(row) is not None
        }
        around = tokens[: self.layout.text] if self.task.action else read(data.tokens, max(0, t - AROUND), t + AROUND)
        here = None if self.task.action else min(t, AROUND)
        return Timestep(
            chosen, t, about, self._tokens(tokens, raws), *self._text(np.ravel(around), here), picture, strip
        )  # fmt: skip

    def _legal(self, stored: np.ndarray) -> np.ndarray:
        """Stored tokens moved into their columns' ids, so that those which are none can be shown, not decoded."""
        return np.clip(stored, self.lowest, self.lowest + self.sizes - 1)

    def _action(self, stored: np.ndarray) -> str:
        values = np.ravel(self.tokenizer.decode_action(self._legal(stored)[-self.layout.action :]))
        return ", ".join(f"{v:.4g}" for v in values[:8]) + (", …" if len(values) > 8 else "")

    def _text(self, ids: np.ndarray, here: int | None) -> tuple[list[tuple[str, str]], str]:
        if self.text is None or not self.layout.text:
            return [], ""
        ids = np.clip(ids, self.lowest[0], self.lowest[0] + self.sizes[0] - 1)
        padding = self.text.padding if self.task.action else -1
        states = ["padding" if i == padding else "here" if n == here else "" for n, i in enumerate(ids)]
        return [(self._piece(int(i)), state) for i, state in zip(ids, states)], self.text.decode(ids)

    def _piece(self, id: int) -> str:
        assert self.text is not None
        return self.text.processor.id_to_piece(id - self.vocabulary.text.start)

    def _tokens(self, stored: np.ndarray, raws: dict[str, np.ndarray]) -> list[Token]:
        roles, legal, found = self.layout.roles, self._legal(stored), []
        observation = self.tokenizer.decode_observation(legal[None, : self.layout.text + self.layout.observation])
        decoded = [np.ravel(observation[f.key]) for f in self.tokenizer.fields if f.kind in ("continuous", "discrete")]
        if self.task.action:
            decoded.append(np.ravel(self.tokenizer.decode_action(legal[-self.layout.action :])))
        values = [v for array in decoded for v in array]  # integers stay integers
        place = dict(zip(self.layout.stored_columns.tolist(), range(self.layout.stored)))
        for column in range(self.layout.length):
            role = ROLE_NAMES[roles[column]]
            if roles[column] == PATCH:
                if column == self.layout.patch_slots[0]:
                    size = f"{PATCH_SIZE}x{PATCH_SIZE}x{self.layout.channels} pixels each"
                    found.append(Token(column, role, size, last=int(self.layout.patch_slots[-1])))
            elif column not in place:
                found.append(Token(column, role, "", self.vocabulary.separator))
            elif roles[column] == TEXT:
                key = next(f.key for f in self.tokenizer.fields if f.kind == "text")
                own, good = int(stored[place[column]]), int(legal[place[column]])
                state = "" if own == good else "wrong"
                found.append(Token(column, role, key, own, decoded="" if state else self._piece(own), state=state))
            else:
                n = place[column] - self.layout.text
                found.append(self._value(self.dimensions[n], column, int(stored[place[column]]), values[n], raws))
        return found

    def _value(self, d: Dimension, column: int, id: int, decoded: float, raws: dict[str, np.ndarray]) -> Token:
        bin = id - d.start
        if not 0 <= bin < len(d.counts):
            return Token(column, d.role, d.name, id, state="wrong")
        if d.raw is None:
            return Token(column, d.role, d.name, id, bin=bin, decoded=str(decoded))
        raw = raws[d.role][d.raw]
        error, clipped = (array[0] for array in d.compare(np.array([bin]), np.array([raw]), self.vocabulary))
        low, high = d.value(np.array([bin, bin + 1]) * (2.0 / self.vocabulary.bins) - 1.0, self.vocabulary)
        state = "wrong" if abs(error) > 1 + SLACK else "clipped" if clipped else ""
        numbers = {"interval": (float(low), float(high)), "raw": float(raw), "error": float(error), "state": state}
        return Token(column, d.role, d.name, id, bin=bin, decoded=f"{decoded:.6g}", **numbers)  # type: ignore[arg-type]


def heat(dimensions: list[Dimension]) -> np.ndarray:
    """A row a dimension, WIDTH columns over its bins or choices, in [0, 1]."""
    places = np.arange(WIDTH)
    return np.stack([h[places * len(h) // WIDTH] for h in (d.heights for d in dimensions)])


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


def page(views: list[TaskView], steps: list[Timestep], about: list[dict], rejected: list[dict]) -> str:
    """The HTML page, which loads nothing. `about`: name, summary and facts of every task."""
    templates = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    templates.filters.update(uri=picture_uri, bars=bars, heat=heat_picture, figure=_figure)
    shown = [
        {"view": view, "step": step, "facts": next(a["facts"] for a in about if a["name"] == view.task.name),
         "histogram": np.histogram(view.returns, min(30, max(1, len(view.returns)))) if len(view.returns) else None,
         "pieces": _top_pieces(view)}
        for view, step in zip(views, steps)
    ]  # fmt: skip
    return templates.from_string(TEMPLATE.read_text("utf-8")).render(
        manifest=views[0].dataset.manifest, shown=shown, about=about, rejected=rejected, first=FIRST_LINES,
        reasons=Counter(line["reason"] for line in rejected).most_common(), panels=PANELS, width=WIDTH,
        patch=PATCH_SIZE,
    )  # fmt: skip


def _top_pieces(view: TaskView) -> list[tuple[str, int]]:
    order = np.argsort(-view.pieces, kind="stable")[:TOP_PIECES]
    return [(view._piece(int(i) + view.vocabulary.text.start), int(view.pieces[i])) for i in order if view.pieces[i]]


def figure(view: TaskView, step: Timestep, facts: list[tuple[str, str]], name: str) -> Figure:
    """The same essentials as one picture: facts, the timestep, distributions, returns."""
    canvas = Figure(figsize=(16, 10.5), dpi=100, layout="constrained")
    FigureCanvasAgg(canvas)
    good, verdict = view.verdict
    title = f"{name}: {view.task.name}, episode {step.episode}, timestep {step.number}"
    canvas.suptitle(title, fontsize=16, parse_math=False)
    halves: Any = canvas.subfigures(1, 2, width_ratios=(1, 1.15))
    (words, returns), (upper, lower) = (half.subplots(2, 1, height_ratios=(1.5, 1)) for half in halves)
    lines = [(line, INK) for what, value in facts + step.about for line in _wrapped(f"{what}: {value}", "    ")]
    colour = ACCENT if good else WARN
    _write(words, [*((line, colour) for line in _wrapped(f"{'✓' if good else '✗'} {verdict}")), ("", INK), *lines])
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
    main.set_xticks(np.arange(0, width + 1, PATCH_SIZE) - 0.5, [])
    main.set_yticks(np.arange(0, height + 1, PATCH_SIZE) - 0.5, [])
    main.grid(color=GRID, linewidth=0.8)
    main.tick_params(length=0)
    label = {"facecolor": "black", "alpha": 0.6, "linewidth": 0, "pad": 1}
    for n in range(view.layout.patches):
        row, column = divmod(n, view.layout.patch_columns)
        main.text(column * PATCH_SIZE + 0.6, row * PATCH_SIZE + 3, str(n), color=GRID, fontsize=9, bbox=label)
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
        axes.set_yticks(range(0, len(dimensions), step), [d.name for d in dimensions[::step]], fontsize=8)
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
    text = TextTokenizer(dataset.folder / TEXT_MODEL_NAME, manifest.vocabulary) if manifest.text_model else None
    views = [TaskView(dataset, number, text) for number in _chosen(options, [t.spec.name for t in manifest.tasks])]
    looked = views[: 1 if output.suffix.lower() == ".png" else SHOWN_TASKS]
    steps = [view.timestep(options.episode, options.timestep) for view in looked]
    rejected = [json.loads(line) for line in (dataset.folder / REJECTED_NAME).read_text("utf-8").splitlines()]
    about: list[dict[str, Any]] = []
    for view in views:
        own = Counter(line["reason"] for line in rejected if line["task"] == view.task.name)
        about.append({"name": view.task.name, "summary": view.summary, "facts": view.facts(own)})
    for one in about:
        console.print(_table(one["name"], one["facts"]))
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
                    figure(looked[0], steps[0], about[0]["facts"], manifest.name).savefig(file, format="png")
            else:
                file.write(page(looked, steps, about, rejected).encode())
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


def _table(name: str, facts: list[tuple[str, str]]) -> Table:
    table = Table(title=Text(name, "bold"), title_justify="left", show_header=False)
    for what, value in facts:
        table.add_row(Text(what, "cyan"), Text(value))
    return table


def _print_rejected(rejected: list[dict], console: Console) -> None:
    if rejected:
        reasons = ", ".join(f"{n} {reason}" for reason, n in Counter(r["reason"] for r in rejected).most_common())
        console.print(Text(f"{REJECTED_NAME}: {reasons}; first of {len(rejected)}:"), soft_wrap=True)
        for line in rejected[:FIRST_LINES]:
            console.print(
                Text(f"  {line['file']}, {line['position']}: {line['reason']}: {line['detail']}"), soft_wrap=True
            )


def _fitted(field: FieldSpec) -> str:
    return f" brought to {field.resized[0]}x{field.resized[1]} pixels ({field.fit})" if field.resized else ""


def _quantiles(returns: tuple[float, ...] | None) -> str:
    if returns is None:
        return "none"
    names = ("min", "25 %", "median", "75 %", "max")
    return ", ".join(f"{name} {_figure(value)}" for name, value in zip(names, returns))


def _figure(value: float) -> str:
    return f"{value:,.1f}" if abs(value) >= 10 else f"{value:.3g}"


def _share(count: int, of: int) -> str:
    return f"{count:,} of {of:,} ({100 * count / max(1, of):.3g} %)"


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
