"""Result rows in, the comparison out: a Markdown table, a console table, one HTML file.

    rows -> scores.aggregate -> comparison (cells and footnotes, once) -> markdown | console | html

A cell is text, its footnotes are numbers into one list, so all three forms say the same.
Published scores are in a table of their own: they were measured on other simulators with
other kinds of ±. Invariant: nothing here depends on the clock or the network; the HTML file
holds its pictures as data URIs and loads nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import pyarrow as pa
from rich.markup import escape
from rich.table import Table as RichTable

from eval.charts import LABELS, Curves, curves_chart, describe, image_uri, number, returns_chart
from eval.scores import CONFIDENCE, RESAMPLES, Aggregate, aggregate, overall
from schemas.dataset import Manifest
from schemas.episode import TaskSpec
from schemas.files import atomic_write
from schemas.result import EpisodeResult, from_table
from simulators.registry import suite_of_id

TEMPLATE = Path(__file__).with_name("report.html")
PUBLISHED = Path(__file__).with_name("published.json")
COLUMNS = ("dt", "tt", "gato", "random", "behaviour")
HEADER = ("Dataset", "Environment", *(LABELS[model] for model in COLUMNS))
SUPERSCRIPTS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
SCORES = {
    "d4rl": "D4RL-normalised",
    "human": "human-normalised",
    "expert": "expert-normalised",
    "success": "success rate in %",
}


@dataclass(frozen=True)
class Comparison:
    """A header, rows of as many cells, numbered footnotes (the first is 1), and a caption."""

    header: tuple[str, ...]
    rows: list[tuple[str, ...]]
    notes: list[str]
    caption: str


def comparison(aggregates: Sequence[Aggregate], tasks: Mapping[str, TaskSpec] | None = None) -> Comparison:
    """The main table: one row per (dataset, environment); each shows its dataset's behaviour. `tasks` (by dataset name)
    tell a model that cannot play a task from one that was not run."""
    found = {(one.dataset, one.environment, one.model): one for one in aggregates}
    trained = {one.unit for one in aggregates if one.model in ("dt", "tt", "gato") and one.episodes}
    notes: list[str] = []

    def cell(dataset: str, environment: str, model: str) -> str:
        one = found.get((dataset, "" if model == "behaviour" else environment, model))
        one = one or found.get((dataset, environment, model))
        if one is None:
            if model == "tt" and _has_images(dataset, environment, tasks or {}):
                return "—" + mark(notes, "TT is not defined on images: it models each observation value as a token.")
            return "—" + mark(notes, "Not run.")
        marks = []
        if one.unit == "episodes" and len(trained) > 1 and model in ("dt", "tt", "gato"):
            marks.append(mark(notes, "One model seed: ± is over its episodes."))
        if one.zero_shot:
            marks.append(mark(notes, "Zero-shot: not among the tasks that this Gato was trained on."))
        if one.errors and one.episodes:
            share = f"{one.errors} of {one.errors + one.episodes} episodes ended in an error and were left out"
            marks.append(mark(notes, f"{share}: {one.error}"))
        elif one.errors:
            marks.append(mark(notes, f"{LABELS[model]} failed, and no episode was finished: {one.error}"))
        if one.limited:
            marks.append(mark(notes, "Episodes were cut by --step-limit; the behaviour's were not."))
        return (_numbers(one) if one.episodes else "—") + "\u202f".join(marks)

    played: dict[str, set[str]] = {}
    for one in aggregates:
        played.setdefault(one.dataset, set()).update({one.environment} - {""})
    rows = [
        (dataset, environment or "—", *(cell(dataset, environment, model) for model in COLUMNS))
        for dataset, environments in sorted(played.items())
        for environment in sorted(environments or {""})
    ]
    return Comparison(HEADER, rows, notes, _caption(aggregates, trained))


def published(aggregates: Sequence[Aggregate]) -> Comparison | None:
    """Published D4RL-normalised scores for the datasets of the same body and level; None where there are
    none. They are of the v2 datasets on the simulators of their time, as a footnote says."""
    scores = json.loads(PUBLISHED.read_text("utf-8"))
    columns, version = scores["columns"], scores["version"]
    notes: list[str] = []
    labels = [column["label"] + mark(notes, f"{column['source']}; {column['plus_minus']}.") for column in columns]
    rows = []
    for dataset in sorted({one.dataset for one in aggregates}):
        level, _, ours = dataset.rpartition("-")
        if level not in scores["scores"]:
            continue
        if ours == version:
            note = "Same dataset; played on the simulator versions of the time, which score differently from ours."
        else:
            note = (
                f"Published on {version}; ours is another recording on another simulator version: for orientation, "
                "not for comparison."
            )
        cells = (scores["scores"][level][column["key"]] for column in columns)
        rows.append((dataset, f"{level}-{version}{mark(notes, note)}", *cells))
    header = ("Dataset", f"Published on {version} as", *labels)
    return Comparison(header, rows, notes, scores["unit"] + ".") if rows else None


def markdown(
    aggregates: Sequence[Aggregate], tasks: Mapping[str, TaskSpec] | None = None, by_domain: Sequence[Comparison] = ()
) -> str:
    """All tables as GitHub Markdown: those by domain, if any, the main one, published figures."""
    parts = [markdown_table(body) for body in (*by_domain, comparison(aggregates, tasks))]
    if scores := published(aggregates):
        parts += ["**Published figures, not ours**\n", markdown_table(scores)]
    return "\n".join(parts)


def console(aggregates: Sequence[Aggregate], tasks: Mapping[str, TaskSpec] | None = None) -> RichTable:
    """The main table for a terminal."""
    return rich_table(comparison(aggregates, tasks))


def rich_table(body: Comparison, left: int = 2) -> RichTable:
    """A table for a terminal, its first `left` columns words."""
    notes = [f"{_superscript(ordinal)} {escape(note)}" for ordinal, note in enumerate(body.notes, 1)]
    table = RichTable(caption="\n".join([body.caption, *notes]), caption_justify="left")
    for n, name in enumerate(body.header):
        table.add_column(name, justify="left" if n < left else "right", overflow="fold")
    for row in body.rows:
        table.add_row(*row)
    return table


def html(
    table: pa.Table,
    manifests: Sequence[Manifest],
    learning: Mapping[str, Curves],
    rollouts: Mapping[tuple[str, str], Path],
    title: str,
    by_domain: Sequence[Comparison] = (),
) -> str:
    """The whole report as one HTML document without external resources. With tables `by_domain` there are no charts of
    single tasks: they are too many."""
    aggregates, rows = aggregate(table), from_table(table)
    tasks = {task.spec.name: task.spec for manifest in manifests for task in manifest.tasks}
    behaviour = {one.dataset: one for one in aggregates if one.model == "behaviour"}
    groups: dict[tuple[str, str], list[Aggregate]] = {}
    for one in aggregates:
        if one.environment or not any(other.environment for other in aggregates if other.dataset == one.dataset):
            groups.setdefault((one.dataset, one.environment), []).append(one)
    charts = []
    for (dataset, environment), members in sorted(groups.items()) if not by_domain else ():
        logged = [behaviour[dataset]] if environment and dataset in behaviour else []
        heading = f"{dataset} on {environment}" if environment else dataset
        charts.append({"title": heading, "uri": returns_chart(members + logged), "alt": describe(members + logged)})
    curves = [{"title": run, "uri": curves_chart(found)} for run, found in sorted(learning.items())]
    pictures = []
    for (dataset, model), path in sorted(rollouts.items()):
        played = [one for one in aggregates if (one.dataset, one.model) == (dataset, model) and one.episodes]
        returns = "; ".join(f"mean return {number(one.return_mean)} over {one.episodes} episodes" for one in played)
        label = LABELS.get(model, model)
        pictures.append({"dataset": dataset, "model": label, "returns": returns, "uri": image_uri(path)})
    templates = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    templates.filters.update(number=number, superscript=_superscript)
    return templates.from_string(TEMPLATE.read_text("utf-8")).render(
        title=title,
        comparison=comparison(aggregates, tasks),
        by_domain=by_domain,
        published=published(aggregates),
        aggregates=aggregates,
        overall=overall(table),
        labels=LABELS,
        score_names=SCORES,
        charts=charts,
        curves=[curve for curve in curves if curve["uri"]],
        pictures=pictures,
        errors=_errors(rows),
        manifests=manifests,
        run=_run(rows),
        resamples=RESAMPLES,
        confidence=f"{100 * CONFIDENCE:.0f} %",
    )


def write_report(
    out: Path,
    table: pa.Table,
    manifests: list[Manifest],
    learning: dict[str, Curves],
    rollouts: dict[tuple[str, str], Path],
    title: str,
    by_domain: Sequence[Comparison] = (),
) -> Path:
    """Write `out`/table.md and `out`/report.html and return the latter's path. `learning`: title ->
    curves; `rollouts`: (dataset, model) -> GIF or PNG; `by_domain`: tables that come first."""
    tasks = {task.spec.name: task.spec for manifest in manifests for task in manifest.tasks}
    page = html(table, manifests, learning, rollouts, title, by_domain)
    with atomic_write(Path(out) / "table.md") as file:
        # names of files may be no Unicode
        file.write(markdown(aggregate(table), tasks, by_domain).encode("utf-8", "replace"))
    with atomic_write(Path(out) / "report.html") as file:
        file.write(page.encode("utf-8", "replace"))
    return Path(out) / "report.html"


def _has_images(dataset: str, environment: str, tasks: Mapping[str, TaskSpec]) -> bool:
    if dataset in tasks:
        return any(field.kind == "image" for field in tasks[dataset].observation)
    return bool(environment) and suite_of_id(environment).sees_screen


def _caption(aggregates: Sequence[Aggregate], trained: set[str]) -> str:
    kinds = {one.score_kind for one in aggregates} - {""}
    means = {
        "d4rl": "0: random, 100: expert",
        "human": "0: random, 100: human",
        "expert": "0: random, 100: expert",
        "success": "100: all solved",
    }
    each = [f"{SCORES.get(kind, kind)} ({means.get(kind, '100: reference')})" for kind in sorted(kinds)]
    score = f", score in brackets: {' or '.join(each)}" if kinds else ""
    over = "model seeds" if "seeds" in trained else "episodes of one model seed"
    return (
        f"Raw return, mean ± standard deviation{score}. DT, TT and Gato: ± over {over}; random and behaviour: over "
        "episodes. Behaviour: the returns of the logs themselves."
    )


def _numbers(one: Aggregate) -> str:
    """'1220 ± 359 (38.1)': mean, deviation and score, each where it is known."""
    if math.isnan(one.return_std):
        raw = number(one.return_mean)
    else:
        raw = f"{number(one.return_mean, one.return_std)} ± {number(one.return_std, one.return_mean)}"
    return raw if math.isnan(one.score_mean) else f"{raw} ({one.score_mean:z.1f})"


def mark(notes: list[str], note: str) -> str:
    """The superscript of `note`, which joins `notes` if it is new."""
    if note not in notes:
        notes.append(note)
    return _superscript(notes.index(note) + 1)


def _superscript(ordinal: int) -> str:
    return str(ordinal).translate(SUPERSCRIPTS)


def markdown_table(body: Comparison) -> str:
    lines = ["| " + " | ".join(body.header) + " |", "|" + "|".join("---" for _ in body.header) + "|"]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in body.rows]
    lines += ["", body.caption, ""]
    for ordinal, note in enumerate(body.notes, 1):
        lines += [f"{_superscript(ordinal)} {note}".replace("<", "\\<"), ""]
    return "\n".join(lines)


def _errors(rows: Iterable[EpisodeResult]) -> list[dict[str, Any]]:
    """One entry per (dataset, environment, model, message), with the episodes that failed so."""
    grouped: dict[tuple[str, ...], list[str]] = {}
    for row in rows:
        if row.failed:
            key = (row.dataset, row.environment, row.model, row.error or "no message")
            grouped.setdefault(key, []).append(f"{row.model_seed}/{row.episode}")
    names = ("dataset", "environment", "model", "message")
    return [dict(zip(names, key)) | {"episodes": met} for key, met in sorted(grouped.items())]


def _run(rows: Iterable[EpisodeResult]) -> dict[str, Any]:
    """The provenance of the rows: distinct commits, hardware, versions, data, protocols and weights."""
    distinct: dict[str, set[str]] = {name: set() for name in ("commit", "hardware", "versions")}
    data: dict[str, set[str]] = {}
    protocols: dict[tuple[str, str], set[str]] = {}
    weights: dict[tuple[str, int, str], set[str]] = {}
    for row in rows:
        for name, values in distinct.items():
            values.update({getattr(row, name)} - {None, ""})
        data.setdefault(row.dataset, set()).add(row.dataset_fingerprint or "")
        protocols.setdefault((row.model, row.protocol or "{}"), set()).add(row.dataset)
        if row.model_sha256:
            weights.setdefault((row.model, row.model_seed, row.model_sha256), set()).add(row.dataset)
    return {
        "commits": sorted(distinct["commit"]),
        "hardware": sorted(distinct["hardware"]),
        "versions": [_pairs(text) for text in sorted(distinct["versions"])],
        "data": sorted((name, sorted(prints)) for name, prints in data.items()),
        "protocols": [(model, _pairs(text), sorted(names)) for (model, text), names in sorted(protocols.items())],
        "weights": [(*key, sorted(names)) for key, names in sorted(weights.items())],
    }


def _pairs(text: str) -> list[tuple[str, str]]:
    """A JSON object as sorted (key, value) text; anything else as one unnamed pair."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return [("", text)]
    if not isinstance(value, dict):
        return [("", text)]
    return sorted((key, one if isinstance(one, str) else json.dumps(one)) for key, one in value.items())
