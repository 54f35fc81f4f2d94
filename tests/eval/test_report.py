import base64
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from rich.console import Console

from eval.charts import curves_chart, image_uri, number, read_metrics
from eval.report import comparison, console, markdown, published, write_report
from eval.rows import load_rows, save_rows
from eval.scores import aggregate, normalised
from schemas.dataset import FileDigest, Manifest, TaskSummary
from schemas.episode import ActionSpec, EnvironmentSpec, FieldSpec, ScoreReference, TaskSpec
from schemas.result import RESULT_SCHEMA, EpisodeResult, ResultError, from_table, to_table
from schemas.vocabulary import DISJOINT

HEADER = "| Dataset | Environment | DT | TT | Gato | Random | Behaviour |"
HOPPER = TaskSpec(
    "hopper-medium-v4",
    "d4rl",
    (FieldSpec("observation", "continuous", (11,)),),
    ActionSpec.continuous(-1.0, 1.0, 3),
    EnvironmentSpec("mujoco", "Hopper-v4"),
    ScoreReference("d4rl", -20.272305, 3234.3),
)
PONG = TaskSpec(
    "Pong",
    "dqn_replay",
    (FieldSpec("image", "image", (84, 84, 1), resized=(80, 64)),),
    ActionSpec.discrete(6),
    EnvironmentSpec("atari", "ALE/Pong-v5"),
    ScoreReference("human", -20.7, 14.6),
)


def episodes(task, model, values, seed=0):
    assert task.environment and task.score
    for index, value in enumerate(values):
        failed = value is None
        yield EpisodeResult(
            dataset=task.name,
            dataset_fingerprint="f" * 64,
            environment="" if model == "behaviour" else task.environment.id,
            model=model,
            model_seed=seed,
            model_sha256="" if model in ("random", "behaviour") else f"{seed}" * 64,
            protocol=json.dumps({"decoding": "greedy"}),
            episode=index,
            episode_seed=index,
            episode_return=float("nan") if failed else float(value),
            score=float("nan") if failed else normalised(value, task.score),
            score_kind=task.score.kind,
            timesteps=1000,
            ending="error" if failed else "truncated",
            error="simulator diverged <at 12>" if failed else "",
            seconds=1.0,
            commit="0123abc",
            versions=json.dumps({"torch": "2.13.0"}),
            hardware="one core",
        )


def rows():
    return [
        *episodes(HOPPER, "random", [10, 12, 14, 16]),
        *episodes(HOPPER, "behaviour", [1200, 1240]),
        *episodes(HOPPER, "dt", [1300, 1320], seed=0),
        *episodes(HOPPER, "dt", [1400, 1420], seed=1),
        *episodes(HOPPER, "gato", [1000, 1200, None]),
        *episodes(PONG, "random", [-21, -20]),
        *episodes(PONG, "gato", [None, None]),
    ]


def manifest():
    tasks = tuple(
        TaskSummary(
            task, 101, 1, 5, 2, 0, 40234, 2000, 0, 101, 5, 602010, 1, 1220.0, 359.0, (1.0, 2.0, 3.0, 4.0, 5.0), 0, 0, 0
        )
        for task in (HOPPER, PONG)
    )
    digest = FileDigest("index.arrow", 1, "a" * 64, 2)
    return Manifest("gato.dataset", 1, "two-tasks", DISJOINT, DISJOINT.fingerprint, None, tasks, digest, digest, digest)


TASKS = {task.name: task for task in (HOPPER, PONG)}


@pytest.fixture
def table(tmp_path) -> pa.Table:
    save_rows(tmp_path / "rows.parquet", rows())
    return load_rows(tmp_path / "rows.parquet")


def cells(text: str, dataset: str) -> dict[str, str]:
    line = next(line for line in text.splitlines() if line.startswith(f"| {dataset} |"))
    names = [name.strip() for name in HEADER.strip("|").split("|")]
    return dict(zip(names, (cell.strip() for cell in line.strip("|").split("|"))))


def note(text: str, cell: str) -> str:
    mark = re.sub(r"[^⁰¹²³⁴-⁹]", "", cell)
    return next(line for line in text.splitlines() if line.startswith(f"{mark[-1]} "))


def test_rows_survive_the_file(tmp_path, table):
    assert table.schema.equals(RESULT_SCHEMA)
    assert table.num_rows == len(rows())
    assert set(table["schema_version"].to_pylist()) == {1}
    assert [path.name for path in tmp_path.iterdir()] == ["rows.parquet"]


def test_the_columns_are_those_of_earlier_files(table):
    """A results file of any earlier version is read, so names, types and order are fixed."""
    columns = "schema_version dataset dataset_fingerprint environment model model_seed model_sha256 protocol episode "
    columns += "episode_seed return score score_kind timesteps ending error seconds commit versions hardware"
    assert RESULT_SCHEMA.names == columns.split()
    assert repr(from_table(table)) == repr(rows())  # NaN is not equal to itself
    with pytest.raises(TypeError, match="seconds"):
        EpisodeResult(dataset="hopper-medium-v4")


def test_other_files_are_refused(tmp_path, table):
    path = tmp_path / "old.parquet"
    later = table.set_column(0, "schema_version", pa.array([2] * table.num_rows, pa.int32()))
    pq.write_table(later, path)
    with pytest.raises(ResultError, match="field 'schema_version' is 2, this package reads 1"):
        load_rows(path)
    pq.write_table(table.drop_columns(["seconds"]), path)
    with pytest.raises(ResultError, match="results file's columns \\(seconds\\)"):
        load_rows(path)
    path.write_bytes(b"not parquet")
    with pytest.raises(ResultError, match="not a Parquet file"):
        load_rows(path)
    with pytest.raises(ResultError, match="no such results file"):
        load_rows(tmp_path / "none.parquet")


def test_markdown_header_and_cells(table):
    text = markdown(aggregate(table), TASKS)
    assert text.splitlines()[0] == HEADER
    hopper = cells(text, "hopper-medium-v4")
    assert hopper["Environment"] == "Hopper-v4"
    assert hopper["DT"] == "1360 ± 71 (42.4)"  # seed means 1310 and 1410
    assert hopper["Random"] == "13.0 ± 2.6 (1.0)"
    assert hopper["Behaviour"] == "1220 ± 28 (38.1)"


def test_footnotes_say_why_a_cell_is_empty_or_partial(table):
    text = markdown(aggregate(table), TASKS)
    hopper, pong = cells(text, "hopper-medium-v4"), cells(text, "Pong")
    assert hopper["TT"].startswith("—") and "Not run" in note(text, hopper["TT"])
    assert pong["TT"].startswith("—") and "not defined on images" in note(text, pong["TT"])
    assert pong["DT"].startswith("—") and "Not run" in note(text, pong["DT"])
    assert hopper["Gato"].startswith("1100 ± 141 (34.4)")
    reason = r"simulator diverged \<at 12>"  # GitHub would take it for a tag
    assert note(text, hopper["Gato"]).endswith(f"1 of 3 episodes ended in an error and were left out: {reason}")
    assert pong["Gato"].startswith("—")
    assert note(text, pong["Gato"]).endswith(f"Gato failed, and no episode was finished: {reason}")
    assert "One model seed" in text


def test_the_reason_of_a_failure_is_one_line_and_no_markup():
    failed = next(episodes(PONG, "gato", [None]))
    table = to_table([replace(failed, error="size: (2 x 4)\nkernel [red]3 x 3[/red]")])
    reason = "no episode was finished: size: (2 x 4) kernel [red]3 x 3[/red]"
    assert reason in markdown(aggregate(table), TASKS)
    terminal = Console(width=200, record=True, file=io.StringIO())
    terminal.print(console(aggregate(table), TASKS))
    assert "3[/red]" in terminal.export_text()


def test_without_tasks_atari_ids_still_mean_images(table):
    text = markdown(aggregate(table))
    assert "not defined on images" in note(text, cells(text, "Pong")["TT"])


def test_published_figures_stand_apart_and_are_labelled(table):
    text = markdown(aggregate(table), TASKS)
    main, _, other = text.partition("Published figures, not ours")
    assert "67.6" not in main and "67.6 ± 1.0" in other and "69.42 ± 3.64" in other
    assert "2106.01345" in other and "± over 3 seeds" in other
    assert "ours is another recording on another simulator version" in other
    assert published([one for one in aggregate(table) if one.dataset == "Pong"]) is None


def test_published_file_covers_nine_datasets_and_every_column():
    import eval.report

    figures = json.loads(eval.report.PUBLISHED.read_text())
    keys = {column["key"] for column in figures["columns"]}
    assert len(figures["scores"]) == 9
    assert all(set(scores) == keys for scores in figures["scores"].values())
    assert all(re.search(r"arXiv \d{4}\.\d{5}", column["source"]) for column in figures["columns"])


def test_behaviour_stands_beside_each_environment_version(table):
    later = [replace(row, environment="Hopper-v5") for row in rows() if row.model == "dt"]
    both = pa.concat_tables([table, to_table(later)])
    body = comparison(aggregate(both), TASKS)
    hopper = [row for row in body.rows if row[0] == "hopper-medium-v4"]
    assert [row[1] for row in hopper] == ["Hopper-v4", "Hopper-v5"]
    assert hopper[0][-1] == hopper[1][-1] == "1220 ± 28 (38.1)"


def test_console_table_says_the_same(table):
    terminal = Console(width=200, record=True, file=io.StringIO())
    terminal.print(console(aggregate(table), TASKS))
    text = terminal.export_text()
    assert "1360 ± 71 (42.4)" in text and "not defined on images" in text


class Loads(HTMLParser):
    """Everything a browser would fetch, and the pictures."""

    def __init__(self, text):
        super().__init__()
        self.fetched, self.images, self.tags = [], [], set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.tags.add(tag)
        self.fetched += [values[name] for name in ("src", "srcset", "data", "poster") if name in values]
        self.fetched += [values["href"]] if tag == "link" else []
        self.images += [values] if tag == "img" else []


@pytest.fixture
def report(tmp_path, table) -> Path:
    frames = [Image.new("P", (8, 8), shade) for shade in range(3)]
    frames[0].save(tmp_path / "hopper-medium-v4-gato.gif", save_all=True, append_images=frames[1:])
    Image.new("RGB", (8, 8)).save(tmp_path / "Pong-dt.png")
    lines = [{"step": step, "train/loss": 5.0 / (step + 1), "held_out/Pong/loss": 4.0} for step in range(0, 40, 10)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    rollouts = {
        ("hopper-medium-v4", "gato"): tmp_path / "hopper-medium-v4-gato.gif",
        ("Pong", "dt"): tmp_path / "Pong-dt.png",
    }
    metrics = {"gato tiny": read_metrics(tmp_path / "metrics.jsonl")}
    return write_report(tmp_path / "out", table, [manifest()], metrics, rollouts, "Two tasks & one <agent>")


def test_report_is_one_file_with_every_picture(report):
    text = report.read_text()
    loads = Loads(text)
    assert loads.fetched and all(source.startswith("data:image/") for source in loads.fetched)
    assert not loads.tags & {"script", "iframe", "object", "embed", "link"}
    assert "url(" not in text and "@import" not in text
    assert all(image["alt"] for image in loads.images)
    kinds = [image["src"].split(";")[0] for image in loads.images]
    assert kinds.count("data:image/svg+xml") == 3  # two bar charts, one run's curves
    assert kinds.count("data:image/gif") == 1 and kinds.count("data:image/png") == 1
    for image in loads.images:
        body = base64.b64decode(image["src"].partition("base64,")[2], validate=True)
        if image["src"].startswith("data:image/svg"):
            assert not re.search(rb"(href|src)=\"https?:|url\(http", body)


def test_report_holds_table_failures_data_and_making(report):
    text = report.read_text()
    assert "<title>Two tasks &amp; one &lt;agent&gt;</title>" in text
    assert "1360 ± 71" in text and "mean return 1100 over 2 episodes" in text
    failed = text[text.index("What failed") : text.index("<h2>Data</h2>")]
    assert "simulator diverged &lt;at 12&gt;" in failed and "0/2" in failed
    assert "40,234" in text and "1220 ± 359" in text
    assert all(word in text for word in ("0123abc", "2.13.0", "one core", "greedy"))
    assert (report.parent / "table.md").read_text().splitlines()[0] == HEADER
    assert sorted(path.name for path in report.parent.iterdir()) == ["report.html", "table.md"]


def test_report_is_deterministic(report, table, tmp_path):
    again = write_report(tmp_path / "again", table, [manifest()], {}, {}, "t").read_bytes()
    assert again == write_report(tmp_path / "more", table, [manifest()], {}, {}, "t").read_bytes()
    curves = {"loss": {"training": [(0, 2.0), (1, 1.0)], "Pong": [(1, 3.0)]}}
    assert curves_chart(curves) == curves_chart(curves) != ""


def test_report_without_extras_says_so(tmp_path):
    save_rows(tmp_path / "rows.parquet", list(episodes(HOPPER, "dt", [5])))
    text = write_report(tmp_path, load_rows(tmp_path / "rows.parquet"), [], {}, {}, "t").read_text()
    assert "No episode ended in an error." in text and "No dataset manifest was given." in text
    assert "nan" not in re.sub(r"base64,[^\"]*", "", text)


def test_metrics_of_a_resumed_and_stopped_run(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 0, "train/loss": 9}\n{"step": 10, "train/loss": 8}\n{"step": 10, "train/loss": 7}\n'
        '{"step": 20, "train/loss": NaN, "held_out/ALE/Pong/accuracy": 0.5}\n{"step": 30, "tra'
    )
    assert read_metrics(path) == {
        "loss": {"training": [(0, 9), (10, 7)]},
        "accuracy": {"ALE/Pong": [(20, 0.5)]},
    }
    path.write_text('{"step": 0}\n{"st\n{"step": 10}\n')
    with pytest.raises(ResultError, match="metrics.jsonl:2: not JSON"):
        read_metrics(path)
    assert curves_chart({}) == ""


def test_pictures_that_are_not_there_are_named(tmp_path):
    with pytest.raises(ResultError, match="must be .gif or .png"):
        image_uri(tmp_path / "a.mp4")
    with pytest.raises(ResultError, match="no such rollout picture"):
        image_uri(tmp_path / "a.gif")


@pytest.mark.parametrize(
    "value, text", [(12083.4, "12083"), (359.4, "359"), (16.44, "16.4"), (0.256, "0.26"), (-0.001, "0.00")]
)
def test_numbers_for_people(value, text):
    assert number(value) == text
    assert number(np.float64(value), other=1000.0) == f"{value:z.0f}"
