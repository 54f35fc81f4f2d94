import numpy as np
import pyarrow as pa
import pytest
from scipy import stats

from etl.sources import _catalogue
from eval.scores import (
    ResultError,
    aggregate,
    bootstrap,
    interquartile_mean,
    mean,
    normalised,
    overall,
    scored,
)
from schemas.episode import EnvironmentSpec, ScoreReference, TaskSpec
from schemas.result import RESULT_SCHEMA

HOPPER = ScoreReference("d4rl", -20.272305, 3234.3)


def row(model, value, *, seed=0, episode=0, dataset="hopper-medium-v4", environment="Hopper-v4", **other):
    fields = {
        "schema_version": 1,
        "dataset": dataset,
        "environment": environment,
        "model": model,
        "model_seed": seed,
        "episode": episode,
        "return": value,
        "score": normalised(value, HOPPER) if value is not None else None,
        "score_kind": "d4rl",
        "ending": "truncated",
    }
    return fields | other


def table(rows):
    return pa.Table.from_pylist(rows, schema=RESULT_SCHEMA)


def episodes(model, values, seed=0, **other):
    return [row(model, float(value), seed=seed, episode=index, **other) for index, value in enumerate(values)]


def one(rows, model):
    return next(item for item in aggregate(table(rows)) if item.model == model)


def test_normalised_score_is_0_at_random_100_at_expert_and_linear_between():
    assert normalised(-20.272305, HOPPER) == 0.0
    assert normalised(3234.3, HOPPER) == 100.0
    assert normalised(1607.0138475, HOPPER) == pytest.approx(50.0)
    with pytest.raises(ResultError, match="low and high are both 1"):
        normalised(3.0, ScoreReference("human", 1.0, 1.0))


def test_the_score_of_a_task_is_its_references_or_success():
    """Human-normalised by hand: Pong's random -20.7 and human 14.6 (arXiv 1511.06581)."""

    def task(suite, reference):
        return TaskSpec("task", "", (), None, EnvironmentSpec(suite, "id"), reference)

    pong = _catalogue.game("pong").score
    assert scored(20.0, task("atari", pong)) == (pytest.approx(100 * (20.0 + 20.7) / (14.6 + 20.7)), "human")
    assert scored(3234.3, task("mujoco", HOPPER)) == (100.0, "d4rl")
    assert scored(0.1, task("minigrid", HOPPER)) == (100.0, "success") and scored(0.0, task("minigrid", None))[0] == 0
    score, kind = scored(5.0, task("mujoco", None))
    assert np.isnan(score) and kind == ""


def test_interquartile_mean_by_hand():
    assert interquartile_mean(np.array([100.0, 1, 2, 3, 4, 5, 6, -50])) == pytest.approx((2 + 3 + 4 + 5) / 4)
    assert interquartile_mean(np.array([9.0, 0.0, 3.0])) == pytest.approx(4.0)  # under 4 values nothing is cut


@pytest.mark.parametrize("count", [1, 3, 4, 7, 10, 101])
def test_interquartile_mean_is_rliables(count):
    metrics = pytest.importorskip("rliable.metrics")
    scores = np.random.default_rng(count).normal(size=(count, 3))
    assert interquartile_mean(scores.ravel()) == pytest.approx(metrics.aggregate_iqm(scores), abs=1e-12)


def test_bootstrap_is_deterministic_and_agrees_with_scipy():
    values = np.random.default_rng(0).gamma(2.0, 100.0, size=60)
    ours = bootstrap([values], mean, resamples=5000, seed=3)
    assert ours == bootstrap([values], mean, resamples=5000, seed=3)
    assert ours != bootstrap([values], mean, resamples=5000, seed=4)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=5000, method="percentile", rng=1).confidence_interval
    assert ours == pytest.approx((theirs.low, theirs.high), rel=0.02)


def test_bootstrap_in_blocks_has_the_same_coverage(monkeypatch):
    values = np.random.default_rng(0).normal(size=40)
    whole = bootstrap([values], mean, resamples=4000)
    monkeypatch.setattr("eval.scores.BLOCK", 333)
    assert bootstrap([values], mean, resamples=4000) == pytest.approx(whole, abs=0.05)


def test_strata_are_redrawn_apart():
    """Two constant tasks far apart: no resample mixes them, so the mean cannot move."""
    assert bootstrap([np.full(5, 0.0), np.full(5, 100.0)], mean) == (50.0, 50.0)
    low, high = bootstrap([np.array([0.0] * 5 + [100.0] * 5)], mean)
    assert low < 40 and high > 60


def test_nothing_to_resample_is_unknown_not_certain():
    assert np.isnan(bootstrap([np.array([3.0])], mean)).all()
    lonely = one([row("gato", 5.0)], "gato")
    assert lonely.return_mean == 5.0 and np.isnan(lonely.return_std) and np.isnan(lonely.return_interval).all()


def test_one_seed_is_over_episodes_and_several_over_seeds():
    single = one(episodes("dt", [1, 2, 3, 6]), "dt")
    assert (single.unit, single.seeds, single.episodes) == ("episodes", 1, 4)
    assert single.return_mean == 3.0
    assert single.return_std == pytest.approx(np.sqrt(14 / 3))
    assert single.iqm == 2.5

    several = one(episodes("dt", [0, 2], seed=0) + episodes("dt", [4, 6], seed=1) + episodes("dt", [9], seed=2), "dt")
    assert (several.unit, several.seeds, several.episodes) == ("seeds", 3, 5)
    assert several.return_mean == pytest.approx((1 + 5 + 9) / 3)  # a seed counts once, however often it played
    assert several.return_std == pytest.approx(4.0)
    assert several.score_mean == pytest.approx(normalised(5.0, HOPPER))


def test_order_of_rows_changes_nothing():
    rows = episodes("gato", np.random.default_rng(0).normal(size=30)) + episodes("random", range(10))
    shuffled = [rows[index] for index in np.random.default_rng(1).permutation(len(rows))]
    assert [repr(item) for item in aggregate(table(rows))] == [repr(item) for item in aggregate(table(shuffled))]


def test_errors_are_counted_and_left_out():
    rows = episodes("gato", [10, 20]) + [row("gato", None, episode=2, ending="error", error="boom")]
    rows += [row("gato", 1e9, episode=3, ending="error", error="late")]
    gato = one(rows, "gato")
    assert (gato.episodes, gato.errors, gato.return_mean) == (2, 2, 15.0)
    failed = one([row("tt", None, ending="error")], "tt")
    assert (failed.episodes, failed.errors) == (0, 1) and np.isnan(failed.return_mean)


def test_above_random_by_the_mean_and_by_the_interval():
    random = episodes("random", [0, 1, 2, 3, 4] * 4)
    sure = one(random + episodes("gato", [100, 101, 102, 103]), "gato")
    assert sure.mean_above_random and sure.interval_above_random
    torn = one(random + episodes("gato", [-50, -50, 80, 80]), "gato")
    assert torn.mean_above_random and not torn.interval_above_random
    assert not one(random + episodes("gato", [2, 2, 2]), "gato").mean_above_random
    assert one(random, "random").mean_above_random is None
    assert one(episodes("gato", [100, 101]), "gato").mean_above_random is None
    unfinished = one([*random, row("gato", None, ending="error")], "gato")
    assert unfinished.mean_above_random is None and unfinished.interval_above_random is None
    lone = one([*random, row("gato", 100.0)], "gato")
    assert lone.mean_above_random and lone.interval_above_random is None


def test_environment_versions_are_not_mixed():
    rows = episodes("dt", [1, 3]) + episodes("dt", [100, 300], environment="Hopper-v5")
    assert [(item.environment, item.return_mean) for item in aggregate(table(rows))] == [
        ("Hopper-v4", 2.0),
        ("Hopper-v5", 200.0),
    ]


def test_task_without_reference_has_no_score():
    rows = [row("dt", 4.0, episode=index, score=float("nan"), score_kind="") for index in range(2)]
    found = one(rows, "dt")
    assert found.return_mean == 4.0 and np.isnan(found.score_mean) and found.score_kind == ""
    assert overall(table(rows)) == []


def test_overall_pools_tasks_as_strata_and_keeps_score_kinds_apart():
    rows = []
    for name, level in (("a", 0.0), ("b", 100.0)):
        for seed in range(4):
            rows.append(row("dt", 0.0, dataset=name, seed=seed, score=level + seed))
    rows.append(row("dt", 0.0, dataset="pong", score=7.0, score_kind="human"))
    d4rl, human = overall(table(rows))
    assert (d4rl.score_kind, d4rl.unit, d4rl.tasks) == ("d4rl", "seeds", ("a on Hopper-v4", "b on Hopper-v4"))
    assert d4rl.iqm == pytest.approx((2 + 3 + 100 + 101) / 4)
    assert d4rl.iqm_interval[0] <= d4rl.iqm <= d4rl.iqm_interval[1]
    assert (human.score_kind, human.iqm, human.unit) == ("human", 7.0, "episodes")


def test_unusable_rows_are_refused_by_name():
    with pytest.raises(ResultError, match="model 'gpt' of dataset 'hopper-medium-v4'"):
        aggregate(table([row("gpt", 1.0)]))
    with pytest.raises(ResultError, match="seed 3, episode 7: the return is nan"):
        aggregate(table([row("dt", float("nan"), seed=3, episode=7)]))
