"""Inspecting a dataset: what the page says is what the shards hold, and what is wrong in them shows."""

import base64
import io
import json
import re
import shutil
import sys

import h5py
import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from etl import inspect
from etl.inspect import Options
from etl.inspection import decoded
from etl.inspection.decoded import InspectError, TaskView
from shards.reader import Dataset
from tests.conftest import run
from tests.shards.made import sign

ROW = re.compile(r"<tr(?: class=\"(\w+)\")?><td class=\"n\">(\d+)(?:–(\d+))?</td>(.*?)</tr>")
CELL = re.compile(r"<td[^>]*>(.*?)</td>")


def look(folder, output, **options) -> tuple[str, str]:
    """The page (or '' of a picture) and what the terminal shows."""
    terminal = io.StringIO()
    inspect.inspect(Options(folder, output=output, **options), Console(file=terminal, width=200))
    return output.read_text() if output.suffix == ".html" else "", terminal.getvalue()


def tokens(page) -> list[dict]:
    """The rows of the page's first token table."""
    table = page[page.index("<h4>Tokens</h4>") :]
    header = [re.sub("<.*?>", "", cell) for cell in re.findall(r"<th [^>]*>.*?</th>", table[: table.index("</thead>")])]
    table = table[: table.index("</table>")]
    return [
        {"state": state, "column": int(column), "last": int(last or column)}
        | dict(zip(header[1:], (re.sub("<.*?>", "", cell) for cell in CELL.findall(rest))))
        for state, column, last, rest in ROW.findall(table)
    ]


def pixels(uri) -> np.ndarray:
    array = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1]))))
    return array[..., None] if array.ndim == 2 else array


def rows_of(dataset, episode):
    rows = np.flatnonzero(dataset.column("episode") == episode)
    return rows[np.argsort(dataset.column("start")[rows])]


def frame_of(dataset, episode, t):
    """Patches laid side by side one by one, in reading order."""
    layout = dataset.layouts[0]
    patches = np.concatenate([dataset.patches(row) for row in rows_of(dataset, episode)])[t]
    (picture,) = layout.pictures
    bands = [patches[n * picture.columns : (n + 1) * picture.columns] for n in range(picture.rows)]
    return np.concatenate([np.concatenate(list(band), axis=1) for band in bands], axis=0)


def test_decoded_values_lie_beside_the_raw_ones_within_half_a_bin(hopper, tmp_path):
    page, _ = look(hopper, tmp_path / "page.html", episode=2, timestep=5)
    dataset = Dataset(hopper)
    row = rows_of(dataset, 2)[0]
    stored, vocabulary = dataset.tokens(row)[5], dataset.manifest.vocabulary
    raw = np.concatenate([dataset.observation(row)[5], dataset.action(row)[5]])
    shown = tokens(page)
    assert [t["column"] for t in shown] == list(range(dataset.layouts[0].length))
    assert [t["Role"] for t in shown] == ["observation"] * 11 + ["separator"] + ["action"] * 3
    assert int(shown[11]["Id"]) == vocabulary.separator
    values = shown[:11] + shown[12:]
    assert [int(t["Id"]) for t in values] == stored.tolist()
    np.testing.assert_allclose([float(t["Raw"]) for t in values], raw, rtol=1e-5)
    for token, x in zip(values, raw.astype(np.float64)):
        low, high = map(float, token["Bin's interval"].split(" to "))
        slack = 1e-5 * max(abs(low), abs(high))
        assert low - slack <= x <= high + slack and low < float(token["Decoded"]) < high
        assert abs(float(token["Error"])) <= 1.001
        y = x
        if token["Role"] == "observation":
            y = np.sign(x) * np.log(abs(x) * 100 + 1) / np.log(256 * 100 + 1)
        assert float(token["Error"]) == pytest.approx((y - ((int(token["Bin"]) + 0.5) / 512 - 1)) * 1024, abs=2e-3)


def test_the_picture_equals_the_frame_over_piece_borders(pong, tmp_path):
    dataset = Dataset(pong)
    t = int(dataset.column("timesteps")[0])  # first of the second piece
    page, _ = look(pong, tmp_path / "page.html", timestep=t)
    (uri,) = re.findall(r'<image href="(data:image/png;base64,[^"]+)"', page)
    np.testing.assert_array_equal(pixels(uri), frame_of(dataset, 0, t))
    strip = re.findall(r'<img src="(data:[^"]+)" alt="Timestep (\d+): action (\d+), reward', page)
    assert [int(n) for _, n, _ in strip] == list(range(t - 3, t + 5))
    stored = np.concatenate([dataset.tokens(row) for row in rows_of(dataset, 0)])
    for uri, n, action in strip:
        np.testing.assert_array_equal(pixels(uri), frame_of(dataset, 0, int(n)))
        assert int(action) == stored[int(n), -1] - dataset.manifest.vocabulary.action_discrete.start
    shown = tokens(page)
    assert (shown[0]["Role"], shown[0]["column"], shown[0]["last"]) == ("patch", 0, 19)
    assert page.count("<text ") == 20  # every patch has its number


@pytest.mark.parametrize("sample", [200_000, 100])
def test_counts_sum_up_and_equal_the_shards(hopper, sample, monkeypatch):
    monkeypatch.setattr(decoded, "SAMPLE", sample)
    monkeypatch.setattr(decoded, "BLOCK", 64)
    dataset = Dataset(hopper)
    view = TaskView(dataset, 0, None)
    view.survey()
    stored = np.concatenate([dataset.tokens(row) for row in view.rows])
    stored = stored[:: -(-len(stored) // sample)]
    assert view.sampled == len(stored) and view.verdict[0]
    for d in view.dimensions:
        assert d.total == len(stored)
        np.testing.assert_array_equal(d.counts, np.bincount(stored[:, d.column].astype(int) - d.start, minlength=1024))
        assert sum(d.ends) == pytest.approx(np.isin(stored[:, d.column] - d.start, (0, 1023)).mean())


def test_the_drawn_bars_are_the_counts(pong, tmp_path):
    page, _ = look(pong, tmp_path / "page.html")
    dataset = Dataset(pong)
    actions = np.concatenate([dataset.tokens(row) for row in range(len(dataset.index))])[:, -1].astype(int)
    counts = np.bincount(actions - dataset.manifest.vocabulary.action_discrete.start)
    (path,) = re.findall(r'<path class="action" [^>]*d="([^"]+)"', page)
    drawn = {int(x): (100 - float(y)) / 100 for x, y in re.findall(r"M(\d+) 100V([\d.]+)h1V100Z", path)}
    assert sorted(drawn) == np.flatnonzero(counts).tolist()
    for choice, height in drawn.items():
        assert height == pytest.approx(np.sqrt(counts[choice] / counts.max()), abs=6e-4)


def test_every_table_agrees_with_the_manifest(hopper, pong, tmp_path):
    for folder in (hopper, pong):
        page, terminal = look(folder, tmp_path / "page.html")
        (task,) = Dataset(folder).manifest.tasks
        for text in (page, terminal):
            for number in (task.timesteps, task.tokens, task.bytes):
                assert f"{number:,}" in text
            assert task.spec.environment.id in text
            assert Dataset(folder).manifest.vocabulary.fingerprint[:16] in text
            assert f"{task.episodes - task.cut_episodes} whole, {task.cut_episodes} cut" in text.replace("&#39;", "'")


def test_pages_load_nothing_and_repeat_to_the_byte(hopper, pong, tmp_path):
    for folder in (hopper, pong):
        first, _ = look(folder, tmp_path / "a.html")
        assert first == look(folder, tmp_path / "b.html")[0]
        assert "prefers-color-scheme: dark" in first
        links = re.findall(r'(?:src|href)="([^"]*)"', first)
        assert all(link.startswith(("data:", "#")) for link in links) and "url(" not in first and "<script" not in first


def test_pictures_are_drawn_for_values_and_frames(hopper, pong, tmp_path):
    for folder in (hopper, pong):
        look(folder, tmp_path / "x.png")
        picture = np.asarray(Image.open(tmp_path / "x.png").convert("L"))
        assert picture.shape == (1050, 1600) and (picture < 128).mean() > 0.01


@pytest.mark.process
def test_the_page_has_a_default_name(hopper, tmp_path):
    done = run("etl.inspect", hopper, cwd=tmp_path, env={"PYTHONPATH": ":".join(sys.path)}, cold=True)
    assert done.stdout.splitlines()[-1] == "results/inspect-hopper.html"
    assert (tmp_path / "results/inspect-hopper.html").stat().st_size > 10_000
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["inspect-hopper.html"]


def damaged(folder, copy, value):
    """A copy whose first token of episode 0, timestep 0 is `value`, with hashes that agree."""
    shutil.copytree(folder, copy)
    dataset = Dataset(copy)
    row = rows_of(dataset, 0)[0]
    shard = copy / dataset.shard(dataset.column("shard")[row]).name
    with open(shard, "r+b") as file:
        file.seek(int(dataset.column("tokens_offset")[row]))
        file.write(np.uint16(value).tobytes())
    sign(copy)
    return copy


@pytest.mark.parametrize("value, says", [(32_000, "1 of "), (65_535, "outside the ids"), (33_500, "outside the ids")])
def test_a_wrong_token_is_red(hopper, tmp_path, value, says):
    copy = damaged(hopper, tmp_path / "copy", value)
    page, terminal = look(copy, tmp_path / "page.html", timestep=0)
    assert 'class="verdict bad"' in page and says in terminal
    assert [t["column"] for t in tokens(page) if t["state"] == "wrong"] == [0]
    look(copy, tmp_path / "x.png", timestep=0)
    assert not [t for t in tokens(look(copy, tmp_path / "page.html", timestep=1)[0]) if t["state"]]


def test_an_action_that_is_none_is_not_decoded(pong, tmp_path):
    page, _ = look(damaged(pong, tmp_path / "copy", 40), tmp_path / "page.html", timestep=0)
    none = "none: its tokens are no ids of actions"
    assert f"<dt>action</dt><dd>{none}</dd>" in page and f'alt="Timestep 0: action {none}, reward' in page
    assert page.count(none) == 3 and [t["Role"] for t in tokens(page) if t["state"] == "wrong"] == ["action"]


def test_clipped_values_are_marked_and_counted(tmp_path):
    rows = 60
    observations = np.ones((rows, 11), np.float32)
    observations[:, 3], observations[::2, 4] = 1000, -1000
    actions = np.zeros((rows, 3), np.float32)
    actions[30] = (1.5, -1.5, 1.0)
    with h5py.File(tmp_path / "hopper-medium-v4.hdf5", "w") as file:
        file["observations"], file["actions"] = observations, actions
        file["rewards"] = np.ones(rows, np.float32)
        file["terminals"], file["timeouts"] = np.arange(rows) % 60 == 59, np.zeros(rows, bool)
        file.attrs["env_id"] = "Hopper-v4"
    run("etl.build", "--input", tmp_path / "hopper-medium-v4.hdf5", "--output", tmp_path / "d")
    page, terminal = look(tmp_path / "d", tmp_path / "page.html", timestep=30)
    assert [t["column"] for t in tokens(page) if t["state"] == "clipped"] == [3, 4, 12, 13]
    assert not [t for t in tokens(page) if t["state"] == "wrong"]
    assert "90 of 660 (13.6 %) observation values" in terminal and "2 of 180 (1.11 %) action values" in terminal
    view = TaskView(Dataset(tmp_path / "d"), 0, None)
    view.survey()
    assert [d.clipped for d in view.dimensions] == [0, 0, 0, 60, 30] + [0] * 6 + [1, 1, 0]
    assert view.dimensions[3].ends == (0, 1) and view.dimensions[4].ends == (0.5, 0)


def test_instructions_are_decoded_beside_their_picture(tmp_path):
    run("etl.record", "--environment", "BabyAI-GoToLocal-v0", "--steps", "60", "--output", tmp_path / "log")
    run("etl.build", "--source", "babyai", "--input", tmp_path / "log", "--output", tmp_path / "d")
    page, _ = look(tmp_path / "d", tmp_path / "page.html", episode=1, timestep=0)
    with h5py.File(next((tmp_path / "log").rglob("main_data.hdf5"))) as file:
        mission = file["episode_1/observations/mission"][0].decode()
    assert f"<blockquote>{mission}</blockquote>" in page
    shown = tokens(page)
    assert "".join(t["Decoded"] for t in shown[:16]).replace("&lt;unk&gt;", "").replace("▁", " ").strip() == mission
    (uri,) = re.findall(r'<image href="([^"]+)"', page)
    np.testing.assert_array_equal(pixels(uri), frame_of(Dataset(tmp_path / "d"), 1, 0))
    look(tmp_path / "d", tmp_path / "x.png")


def test_documents_are_decoded_and_rejections_listed(tmp_path):
    texts = ["Call me Ishmael. <b>Some</b> years ago.", " ", "Äpfel & Birnen kosten $5 oder $6."]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    arguments = ("--input", tmp_path / "a.jsonl", "--output", tmp_path / "d", "--max-rejected-share", "0.5")
    run("etl.build", "--source", "text", *arguments)
    page, terminal = look(tmp_path / "d", tmp_path / "page.html")
    assert "<blockquote>Call me Ishmael. &lt;b&gt;Some&lt;/b&gt; years ago.</blockquote>" in page
    assert len(tokens(page)) == 1
    assert "1 rejected (1 empty)" in terminal and "a.jsonl, 1: empty" in terminal
    with pytest.raises(InspectError, match="episodes 0 to 2; that one was rejected"):
        look(tmp_path / "d", tmp_path / "page.html", episode=1)
    look(tmp_path / "d", tmp_path / "x.png", episode=2, timestep=3)


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["{none}"], "no dataset.json"),
        (["{data}", "--task", "hoper-random"], "give --task hopper-random-v4"),
        (["{data}", "--episode", "100000"], "has episodes 0 to"),
        (["{data}", "--timestep", "5000"], "has timesteps 0 to"),
        (["{data}", "--timestep", "-1"], "has timesteps 0 to"),
        (["{data}", "--output", "{tmp}/x.pdf"], "neither .html nor .png"),
        (["{data}", "--output", "{tmp}/file/x.html"], "give another --output"),
        (["{data}", "--output", "{tmp}/folder.png"], "give another --output"),
    ],
)
def test_mistakes_are_named_in_one_line(hopper, tmp_path, arguments, says, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.png").mkdir()
    places = {"none": tmp_path / "none", "data": hopper, "tmp": tmp_path}
    monkeypatch.setattr(sys, "argv", ["inspect", *(argument.format(**places) for argument in arguments)])
    monkeypatch.chdir(tmp_path)
    assert inspect.main() == 1
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1 and errors[0].startswith("error: ") and says in errors[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.png"]
