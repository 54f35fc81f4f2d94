"""The comparison of many tasks: numbers by domain, and where they are shown."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from eval import report
from eval.domains import ALL, by_domain, domains_table, extremes_table, filmed
from eval.rows import load_rows, save_rows
from schemas.result import RESULT_SCHEMA, from_table
from simulators.registry import all_suites
from tests.conftest import run
from tests.eval.test_compare import arguments, exports  # noqa: F401  exports is a fixture
from tests.eval.test_scores import row

ARMS = {f"arm-{n}": (f"Meta-World/reach{n}-v3", float(score)) for n, score in enumerate((0, 20, 50, 95))}
LEVELS = {"level-0": ("BabyAI-GoTo-v0", 100.0), "level-1": ("BabyAI-Pickup-v0", 30.0)}


def rows(model="gato", tasks=ARMS | LEVELS, spread=0.0):
    return [
        row(model, score, dataset=name, environment=id, episode=n, score=score + spread * n, score_kind="expert")
        for name, (id, score) in tasks.items()
        for n in range(3)
    ]


def results(found, **kwargs):
    return by_domain(pa.Table.from_pylist(found, schema=RESULT_SCHEMA), resamples=100, **kwargs)


def test_each_domain_and_all_of_them_have_a_row_per_model():
    found = results(rows() + rows("random", ARMS))
    assert [(one.domain, one.model) for one in found] == [
        ("metaworld", "random"),
        ("metaworld", "gato"),
        ("minigrid", "gato"),
        (ALL, "random"),
        (ALL, "gato"),
    ]
    assert [one.above for one in found] == [(2, 2, 1, 1), (2, 2, 1, 1), (2, 1, 1, 1), (2, 2, 1, 1), (4, 3, 2, 2)]


def test_the_interquartile_mean_is_over_episodes_with_tasks_as_strata():
    arms = results(rows(tasks=ARMS, spread=1.0))[0]
    values = np.sort(np.concatenate([[s, s + 1, s + 2] for _, s in ARMS.values()]))
    assert arms.iqm == pytest.approx(values[3:9].mean())
    assert arms.iqm_interval[0] <= arms.iqm <= arms.iqm_interval[1]
    assert [one.domain for one in results(rows(tasks=ARMS))] == ["metaworld"], "one domain alone has no sum"


def test_tasks_without_a_score_are_counted_apart_and_order_does_not_matter():
    nan = float("nan")
    lost = row("gato", 5.0, dataset="lost", environment="Meta-World/soccer-v3", score=nan, score_kind="")
    failed = row(
        "gato", nan, dataset="failed", environment="Meta-World/hammer-v3", score=nan, ending="error", error="x"
    )
    found = rows(tasks=ARMS) + [lost, failed]
    assert results(found) == results(found[::-1])
    arms = results(found)[0]
    assert (len(arms.tasks), arms.unscored) == (4, 2)
    assert "4 of 6" in report.markdown([], None, [domains_table([arms])])


def test_best_worst_and_films_are_of_the_right_tasks():
    found = results(rows())
    assert found[0].best == (("arm-3", 95.0), ("arm-2", 50.0), ("arm-1", 20.0))
    assert found[0].worst == (("arm-0", 0.0), ("arm-1", 20.0), ("arm-2", 50.0))
    assert filmed(found, "gato") == ["arm-0", "arm-1", "level-1", "level-0", "arm-3", "arm-2"]
    assert extremes_table(found).rows[0] == (
        "metaworld",
        "arm-3 95.0; arm-2 50.0; arm-1 20.0",
        "arm-0 0.0; arm-1 20.0; arm-2 50.0",
    )


def test_published_figures_are_of_domains_that_there_are_and_beside_gato_alone():
    from eval.domains import published

    for other in published():
        assert other["source"] and set(other["domains"]) <= set(all_suites())
    body = domains_table(results(rows() + rows("random")))
    jat = next(n for n, name in enumerate(body.header) if name.startswith("JAT"))
    assert {(line[0], line[1]): line[jat] for line in body.rows} == {
        ("metaworld", "Random"): "", ("metaworld", "Gato"): "65",
        ("minigrid", "Random"): "", ("minigrid", "Gato"): "99",
        (ALL, "Random"): "", (ALL, "Gato"): "—",
    }  # fmt: skip


def test_the_page_of_many_tasks_has_the_domains_and_no_chart_per_task():
    table = pa.Table.from_pylist(rows(), schema=RESULT_SCHEMA)
    page = report.html(table, [], {}, {}, "t", [domains_table(by_domain(table, 100))])
    assert "By domain" in page and "data:image/svg" not in page and "arm-3" in page
    assert "By domain" not in report.html(table, [], {}, {}, "t")


def test_a_comparison_of_many_tasks_begins_with_domains_and_films_the_worst_and_the_best(
    exports,  # noqa: F811
    hopper,
    pong,
    tmp_path,
    monkeypatch,
):
    monkeypatch.setattr("eval.runner.NAMED_TASKS", 1)
    how = ["--film-seconds", 1, "--processes", 1]
    done = run(*arguments(tmp_path / "out", exports[:1], [hopper, pong], *how))
    assert done.stdout.startswith("| Domain | Model | Tasks |") and "| mujoco | Gato | 1 |" in done.stdout
    assert "not ours" in done.stderr and "| hopper-random-v4 | Hopper-v4 |" in done.stdout
    films = {path.name for path in (tmp_path / "out" / "rollouts").iterdir()}
    assert "hopper-random-v4-gato.gif" in films and all("gato" in name for name in films)
    before = load_rows(tmp_path / "out" / "rows.parquet")
    run(*arguments(tmp_path / "out", exports[:1], [hopper, pong], *how))
    assert load_rows(tmp_path / "out" / "rows.parquet").equals(before)
    film = tmp_path / "out" / "rollouts" / "hopper-random-v4-gato.gif"
    earlier = film.read_bytes()
    run(*arguments(tmp_path / "out", exports[1:], [hopper, pong], *how))
    assert film.read_bytes() != earlier


def test_kept_rows_are_scored_by_todays_reference(exports, hopper, tmp_path):  # noqa: F811
    how = ["--processes", 1]
    run(*arguments(tmp_path / "out", exports[:1], [hopper], *how))
    before = load_rows(tmp_path / "out" / "rows.parquet")
    part = next((tmp_path / "out" / "parts").glob("hopper-random-v4-gato-3-*"))
    save_rows(part, [replace(row, score=float("nan"), score_kind="") for row in from_table(load_rows(part))])
    run(*arguments(tmp_path / "out", exports[:1], [hopper], *how))
    assert load_rows(tmp_path / "out" / "rows.parquet").equals(before)
