"""Result rows in, one aggregate per (dataset, environment, model) out.

    rows -> leave out errors -> units -> mean, std, interquartile mean -> 95 % bootstrap intervals

A unit is what is resampled. With two or more model seeds it is a seed (the mean of
its episodes), because the spread between trainings is what a claim about a method
needs; with one seed it is an episode, and the interval says nothing about retraining.
Intervals are percentile bootstraps stratified over tasks, as in rliable (Agarwal et al.
2021, arXiv 2108.13264): units are redrawn inside each task, then pooled.

Invariant: equal rows give equal numbers, to the last bit, in any order of the rows.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

import simulators
from schemas.episode import ScoreReference, TaskSpec
from schemas.result import MODELS, EpisodeResult, ResultError, from_table
from simulators.registry import all_suites

RESAMPLES = 2000
CONFIDENCE = 0.95
BLOCK = 1 << 22  # values drawn at once, so that a behaviour policy of 10,000 episodes fits in memory

Interval = tuple[float, float]
Statistic = Callable[[np.ndarray], np.ndarray]
UNKNOWN: Interval = (float("nan"), float("nan"))


@dataclass(frozen=True)
class Aggregate:
    """One model on one task. Returns are raw; scores are normalised, NaN where the task has no reference.

    `episodes` were counted, `limited` of them cut by --step-limit, and `errors` left out, the first one because of
    `error`, on one line. `return_std` (n - 1) and the intervals are over `unit`: 'seeds' or 'episodes'. Means are NaN
    without an episode, std and intervals with one unit.
    `..._above_random` are None where no random policy was run, for the random policy itself, and where the mean or the
    interval is NaN.
    """

    dataset: str
    environment: str
    model: str
    episodes: int
    limited: int
    errors: int
    seeds: int
    unit: str
    return_mean: float
    return_std: float
    return_interval: Interval
    iqm: float
    iqm_interval: Interval
    score_mean: float
    score_kind: str
    mean_above_random: bool | None = None  # the mean lies above the upper end of random's interval
    interval_above_random: bool | None = None  # so does the interval's lower end
    zero_shot: bool = False  # a Gato that was not trained on the task
    error: str = ""


@dataclass(frozen=True)
class Overall:
    """One model over all its tasks of one score kind: interquartile mean of normalised scores."""

    model: str
    score_kind: str
    tasks: tuple[str, ...]
    unit: str
    iqm: float
    iqm_interval: Interval


def normalised(value: float, reference: ScoreReference) -> float:
    """100 (R - low) / (high - low) of a raw return R (D4RL, arXiv 2004.07219; human-normalised: Mnih et al. 2015)."""
    span = reference.high - reference.low
    if span == 0:
        raise ResultError(
            f"score reference '{reference.kind}': low and high are both {reference.low}; correct the task"
        )
    return 100.0 * (value - reference.low) / span


def scored(value: float, task: TaskSpec) -> tuple[float, str]:
    """Score and its kind of a raw return: the suite's own, where it has one (a level solved or not); else normalised by
    the task's reference, or by what its suite knows now, if the task was built before; (NaN, '') without one."""
    suite = all_suites().get(task.environment.suite) if task.environment else None
    own = suite.score(value, task.score) if suite else None
    if own is not None:
        return own
    reference = task.score or (simulators.reference(task.environment) if suite and task.environment else None)
    return (normalised(value, reference), reference.kind) if reference else (float("nan"), "")


def mean(values: np.ndarray) -> np.ndarray:
    """Mean over the last axis."""
    return np.mean(values, axis=-1)


def interquartile_mean(values: np.ndarray) -> np.ndarray:
    """Mean over the last axis of what is left after floor(n / 4) values are cut from each end."""
    n = values.shape[-1]
    cut = n // 4
    return np.sort(values, axis=-1)[..., cut : n - cut].mean(axis=-1)


def bootstrap(
    strata: Sequence[np.ndarray], statistic: Statistic, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """95 % percentile interval of `statistic` over the pooled `strata` (each float64 (n,)), redrawn with
    replacement inside each stratum. `statistic` maps (R, N) to (R,). NaN where every stratum has one value
    or none: nothing was resampled, so the spread is unknown."""
    if not any(len(stratum) > 1 for stratum in strata):
        return UNKNOWN
    generator = np.random.default_rng(seed)
    block = max(1, BLOCK // sum(len(stratum) for stratum in strata))
    drawn = []
    for start in range(0, resamples, block):
        rows = min(block, resamples - start)
        redrawn = [stratum[generator.integers(len(stratum), size=(rows, len(stratum)))] for stratum in strata]
        drawn.append(statistic(np.concatenate(redrawn, axis=1)))
    tail = 50.0 * (1.0 - CONFIDENCE)
    low, high = np.percentile(np.concatenate(drawn), [tail, 100.0 - tail])
    return float(low), float(high)


def aggregate(table: pa.Table, resamples: int = RESAMPLES, seed: int = 0) -> list[Aggregate]:
    """Aggregates of a table in RESULT_SCHEMA, by dataset, environment, then the order of MODELS.

    ResultError for a model that the table has no column for, or a finished episode without a return."""
    found = {key: _aggregate(key, rows, resamples, seed) for key, rows in _groups(table).items()}
    for (dataset, environment, model), one in found.items():
        random = found.get((dataset, environment, "random"))
        if model == "random" or random is None or np.isnan(random.return_interval[1]):
            continue
        ceiling = random.return_interval[1]
        above = {
            "mean_above_random": _above(one.return_mean, ceiling),
            "interval_above_random": _above(one.return_interval[0], ceiling),
        }
        found[dataset, environment, model] = Aggregate(**(vars(one) | above))
    return sorted(found.values(), key=lambda one: (one.dataset, one.environment, MODELS.index(one.model)))


def _above(value: float, ceiling: float) -> bool | None:
    return None if np.isnan(value) else value > ceiling


def overall(table: pa.Table, resamples: int = RESAMPLES, seed: int = 0) -> list[Overall]:
    """Interquartile mean over tasks, one per model and score kind, tasks as strata. Compare models only
    where `tasks` are the same. Seeds are the units if every task of the model has two or more."""
    by_model: dict[tuple[str, str], dict[str, list[EpisodeResult]]] = {}
    for (dataset, environment, model), rows in sorted(_groups(table).items()):
        scored = [row for row in _finished(rows) if row.score_kind and _has_score(row)]
        if scored:
            task = f"{dataset} on {environment}" if environment else dataset
            by_model.setdefault((scored[0].score_kind, model), {})[task] = scored
    results = []
    for (kind, model), tasks in sorted(by_model.items(), key=lambda item: (item[0][0], MODELS.index(item[0][1]))):
        units = [_units(rows, "score") for rows in tasks.values()]
        unit = "seeds" if all(name == "seeds" for name, _ in units) else "episodes"
        strata = [
            values if unit == "seeds" else _column(rows, "score") for (_, values), rows in zip(units, tasks.values())
        ]
        point = float(interquartile_mean(np.concatenate(strata)))
        interval = bootstrap(strata, interquartile_mean, resamples, seed)
        results.append(Overall(model, kind, tuple(tasks), unit, point, interval))
    return results


def _groups(table: pa.Table) -> dict[tuple[str, str, str], list[EpisodeResult]]:
    """Rows by (dataset, environment, model), in an order that does not depend on the table's own."""
    groups: dict[tuple[str, str, str], list[EpisodeResult]] = {}
    for row in from_table(table):
        if row.model not in MODELS:
            raise ResultError(f"model '{row.model}' of dataset '{row.dataset}': known are {', '.join(MODELS)}")
        groups.setdefault((row.dataset, row.environment, row.model), []).append(row)
    for rows in groups.values():
        rows.sort(key=lambda row: (row.model_seed, row.episode, row.episode_return or 0.0))
    return groups


def _finished(rows: Iterable[EpisodeResult]) -> list[EpisodeResult]:
    finished = [row for row in rows if not row.failed]
    for row in finished:
        if row.episode_return is None or not np.isfinite(row.episode_return):
            raise ResultError(
                f"{row.dataset}, {row.model}, seed {row.model_seed}, episode {row.episode}: the return is "
                f"{row.episode_return} though the episode ended as '{row.ending}'; mark it 'error' or play it again"
            )
    return finished


def _zero_shot(row: EpisodeResult) -> bool:
    return bool(json.loads(row.protocol or "{}").get("zero_shot"))


def _has_score(row: EpisodeResult) -> bool:
    return row.score is not None and not np.isnan(row.score)


def _column(rows: list[EpisodeResult], name: str) -> np.ndarray:
    return np.array([getattr(row, name) for row in rows], np.float64)


def _units(rows: list[EpisodeResult], name: str) -> tuple[str, np.ndarray]:
    """The unit of resampling, and its values: ('seeds', one mean per seed) or ('episodes', one value per row)."""
    values, seeds = _column(rows, name), np.array([row.model_seed for row in rows])
    distinct = np.unique(seeds)
    if len(distinct) < 2:
        return "episodes", values
    return "seeds", np.array([values[seeds == one].mean() for one in distinct])


def _aggregate(key: tuple[str, str, str], rows: list[EpisodeResult], resamples: int, seed: int) -> Aggregate:
    finished = _finished(rows)
    unit, values = _units(finished, "episode_return")
    scored = [row for row in finished if _has_score(row)]
    kinds = {row.score_kind for row in scored}
    if len(kinds) > 1:
        raise ResultError(f"{key[0]}, {key[2]}: scores of kinds {', '.join(sorted(kinds))} in one group; keep one")
    nan = float("nan")
    reasons = [row.error or "no message" for row in rows if row.failed]
    return Aggregate(
        *key,
        episodes=len(finished),
        limited=sum(row.ending == "step limit" for row in finished),
        errors=len(rows) - len(finished),
        seeds=len({row.model_seed for row in finished}),
        unit=unit,
        return_mean=float(values.mean()) if len(values) else nan,
        return_std=float(values.std(ddof=1)) if len(values) > 1 else nan,
        return_interval=bootstrap([values], mean, resamples, seed),
        iqm=float(interquartile_mean(values)) if len(values) else nan,
        iqm_interval=bootstrap([values], interquartile_mean, resamples, seed),
        score_mean=float(_units(scored, "score")[1].mean()) if scored else nan,
        score_kind=kinds.pop() if kinds else "",
        zero_shot=any(row.model == "gato" and _zero_shot(row) for row in finished),
        error=" ".join(reasons[0].split()) if reasons else "",
    )
