"""Many tasks at a glance: interquartile mean and number of tasks above shares of the expert, by domain.

    result rows -> score of each task (mean over its episodes) -> DomainResult per domain and model, and one of all

A domain is the suite of a task's simulator. A score is 0 for random play and 100 for the expert, or the share of
solved episodes where a suite rewards nothing else. Thresholds are those of the paper's figure 5.

Invariant: equal rows give equal numbers, in any order of the rows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from eval.charts import LABELS
from eval.report import Comparison, mark
from eval.scores import CONFIDENCE, RESAMPLES, UNKNOWN, Interval, bootstrap, interquartile_mean
from schemas.result import MODELS, EpisodeResult, from_table
from simulators.registry import suite_of_id

THRESHOLDS = (25, 50, 75, 90)
ALL = "all"
SHOWN = 3
PUBLISHED = Path(__file__).with_name("published_domains.json")


@dataclass(frozen=True)
class DomainResult:
    """One model on the tasks of a domain that have a score; `domain` "all": on those of every domain.

    `iqm` is over the episodes of all tasks, with a bootstrap interval that has the tasks as strata. `above`: number of
    tasks whose mean score reaches each of THRESHOLDS. `tasks`: (name, mean score), the best first. `unscored`: tasks
    without a reference or without a finished episode.
    """

    domain: str
    model: str
    tasks: tuple[tuple[str, float], ...]
    unscored: int
    iqm: float
    iqm_interval: Interval
    above: tuple[int, ...]

    @property
    def best(self) -> tuple[tuple[str, float], ...]:
        return self.tasks[:SHOWN]

    @property
    def worst(self) -> tuple[tuple[str, float], ...]:
        """The worst first."""
        return self.tasks[: -SHOWN - 1 : -1]


def by_domain(table: pa.Table, resamples: int = RESAMPLES, seed: int = 0) -> list[DomainResult]:
    """Every model in every domain where a simulator was played, then in all of them, in the order of MODELS."""
    rows = from_table(table)
    domain_of = {row.dataset: suite_of_id(row.environment).name for row in rows if row.environment}
    groups: dict[tuple[str, str], dict[str, list[EpisodeResult]]] = {}
    for row in sorted(rows, key=lambda row: (row.dataset, row.model_seed, row.episode)):
        if row.dataset in domain_of:
            for domain in (domain_of[row.dataset], ALL):
                groups.setdefault((domain, row.model), {}).setdefault(row.dataset, []).append(row)
    if len({domain for domain, _ in groups}) == 2:
        groups = {key: tasks for key, tasks in groups.items() if key[0] != ALL}
    order = sorted(groups, key=lambda key: (key[0] == ALL, key[0], MODELS.index(key[1])))
    return [_result(*key, groups[key], resamples, seed) for key in order]


def _result(domain: str, model: str, tasks: dict[str, list[EpisodeResult]], resamples: int, seed: int) -> DomainResult:
    scores = {name: _scores(rows) for name, rows in tasks.items()}
    scored = {name: values for name, values in scores.items() if len(values)}
    means = sorted(((name, float(values.mean())) for name, values in scored.items()), key=lambda one: (-one[1], one[0]))
    strata = list(scored.values())
    return DomainResult(
        domain=domain,
        model=model,
        tasks=tuple(means),
        unscored=len(tasks) - len(scored),
        iqm=float(interquartile_mean(np.concatenate(strata))) if strata else float("nan"),
        iqm_interval=bootstrap(strata, interquartile_mean, resamples, seed) if strata else UNKNOWN,
        above=tuple(sum(mean >= threshold for _, mean in means) for threshold in THRESHOLDS),
    )


def _scores(rows: list[EpisodeResult]) -> np.ndarray:
    """Scores of the episodes that were finished, where the task has one."""
    return np.array([row.score for row in rows if not row.failed and row.score == row.score], np.float64)


def published() -> list[dict[str, Any]]:
    """Published interquartile means by domain, with their source; other data, simulators and references than ours."""
    return json.loads(PUBLISHED.read_text("utf-8"))


def filmed(results: Sequence[DomainResult], model: str) -> list[str]:
    """Names of a model's worst and best tasks over all domains, for films."""
    found = [one for one in results if one.model == model]
    return list(dict.fromkeys(name for one in found[-1:] for name, _ in (*one.worst, *one.best)))


def domains_table(results: Sequence[DomainResult]) -> Comparison:
    """One row per domain and model; published figures in columns of their own."""
    notes: list[str] = []
    others = [(one, one["label"] + mark(notes, f"Published, not ours: {one['source']}.")) for one in published()]
    header = ("Domain", "Model", "Tasks", "Interquartile mean", *(f"≥ {share} %" for share in THRESHOLDS))
    rows = []
    for one in results:
        low, high = one.iqm_interval
        between = "" if math.isnan(low) else f" ({low:z.1f} to {high:z.1f})"
        iqm = "—" if math.isnan(one.iqm) else f"{one.iqm:z.1f}{between}"
        marks = mark(notes, "Tasks without a score are left out: no reference, or no finished episode.")
        count = f"{len(one.tasks)}" + (f" of {len(one.tasks) + one.unscored}{marks}" if one.unscored else "")
        known = [f"{other['domains'][one.domain]:g}" if one.domain in other["domains"] else "—" for other, _ in others]
        cells = known if one.model == "gato" else ["" for _ in others]
        rows.append((one.domain, LABELS[one.model], count, iqm, *map(str, one.above), *cells))
    caption = (
        f"Score in %: 0 is random play, 100 the task's reference (the recorder's expert, D4RL's expert of a body, or a "
        f"human in a game), or the solved episodes where nothing else is rewarded. Interquartile mean over all "
        f"episodes of a domain's tasks with its {100 * CONFIDENCE:.0f} % bootstrap interval, tasks as strata; then the "
        f"number of tasks whose mean reaches each share."
    )
    return Comparison((*header, *(label for _, label in others)), rows, notes, caption)


def extremes_table(results: Sequence[DomainResult]) -> Comparison:
    """The best and the worst tasks of Gato in each domain."""
    rows = [
        (one.domain, *("; ".join(f"{name} {score:z.1f}" for name, score in part) for part in (one.best, one.worst)))
        for one in results
        if one.model == "gato" and one.tasks
    ]
    return Comparison(("Domain", "Best tasks", "Worst tasks"), rows, [], "Mean score of each task.")
