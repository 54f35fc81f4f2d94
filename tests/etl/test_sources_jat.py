"""JAT's Parquet, as `datasets` wrote it (tests/etl/golden/make_jat.py)."""

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from etl import sources
from etl.sources import Rejection
from shards.reader import Dataset
from tests.etl.golden.make_jat import episodes
from tests.etl.logkit import build_here, episodes_of, reversed_scan, same, scans_of

GOLDEN = Path(__file__).parent / "golden"
KINDS = ("mujoco-hopper", "atari-pong", "babyai-go-to")


def arrays_of(row):
    observation = {}
    if "continuous_observations" in row:
        observation["observation"] = np.float32(row["continuous_observations"])
    if "image_observations" in row:
        observation["frame"] = np.stack(row["image_observations"])[..., -1:]  # the newest of the stack
    if "text_observations" in row:
        observation["text"] = row["text_observations"]
        observation["discrete"] = np.array(row["discrete_observations"])
    return observation, np.array(row.get("continuous_actions", row.get("discrete_actions")))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_episodes(tmp_path, kind):
    shutil.copytree(GOLDEN / kind, tmp_path / kind)
    scan, found = episodes_of("jat", tmp_path)
    assert scan.task.name == kind and not scan.rejected and not scan.warnings
    rows = episodes(kind)
    for episode, row in zip(found, [rows[2], *rows[:2]], strict=True):  # test before train
        same(scan, episode, *arrays_of(row), row["rewards"])
    assert [ref.held_out for ref in scan.episodes] == [True, None, None]
    assert sources.load("jat").recognise(tmp_path).certainty == 2
    if kind == "mujoco-hopper":
        assert scan.task.environment.id == "Hopper-v4" and scan.task.action.low == (-1.0,) * 3
    assert reversed_scan("jat", tmp_path) == [scan]


def test_all_subsets_in_one_build(tmp_path):
    for kind in KINDS:
        shutil.copytree(GOLDEN / kind, tmp_path / "jat" / kind)
    build_here("jat", tmp_path / "jat", tmp_path / "out")
    dataset = Dataset(tmp_path / "out", "full")
    assert [(task.spec.name, task.held_out_episodes) for task in dataset.manifest.tasks] == [
        (kind, 1) for kind in sorted(KINDS)
    ]


def table(tmp_path, **changed):
    """Five episodes in row groups of two, some columns of the second one changed."""
    rng = np.random.default_rng(0)
    rows = [
        {
            "continuous_observations": rng.normal(size=(T, 3)).tolist(),
            "continuous_actions": rng.uniform(-1, 1, (T, 2)).tolist(),
            "rewards": rng.normal(size=T).tolist(),
        }
        for T in (4, 5, 6, 7, 8)
    ]
    rows[1] |= changed
    path = tmp_path / "log" / "train-00000-of-00001.parquet"
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    return path, rows


@pytest.mark.parametrize(
    ("reason", "changed"),
    [
        ("wrong length", {"rewards": [0.0] * 4}),
        ("wrong shape", {"continuous_observations": [[1.0, 2.0, 3.0]] * 4 + [[1.0]]}),
        ("wrong shape", {"continuous_actions": [[0.5]] * 5}),
        ("not finite", {"continuous_observations": [[float("nan")] * 3] * 5}),
        ("wrong dtype", {"rewards": None}),
        ("empty", {"rewards": [], "continuous_actions": [], "continuous_observations": []}),
    ],
)
def test_one_damaged_row(tmp_path, reason, changed):
    _, rows = table(tmp_path, **changed)
    scan, found = episodes_of("jat", tmp_path)
    (line,) = [*scan.rejected, *(one for one in found if isinstance(one, Rejection))]
    assert (line.position, line.reason) == (1, reason)
    good = [one for one in found if not isinstance(one, Rejection)]
    for episode, row in zip(good, [rows[n] for n in (0, 2, 3, 4)], strict=True):
        same(scan, episode, *arrays_of(row), row["rewards"])


def test_damaged_files(tmp_path):
    path, _ = table(tmp_path)
    data = bytearray(path.read_bytes())
    (tmp_path / "log" / "train-00001-of-00002.parquet").write_bytes(data[:500])
    where = pq.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    data[where : where + 40] = bytes(40)
    (tmp_path / "log" / "train-00002-of-00002.parquet").write_bytes(data)
    scan, found = episodes_of("jat", tmp_path)
    assert {(line.file, line.position, line.reason) for line in scan.rejected} == {
        ("train-00001-of-00002.parquet", -1, "corrupt Parquet")
    }
    bad = [(one.file, one.position, one.reason) for one in found if isinstance(one, Rejection)]
    assert bad == [("train-00002-of-00002.parquet", n, "corrupt Parquet") for n in (2, 3)]


def test_a_table_of_something_else(tmp_path):
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "a.parquet")
    (scan,) = scans_of("jat", tmp_path)
    assert scan.rejected[0].reason == "missing key" and "there are text" in scan.rejected[0].detail
    assert sources.load("jat").recognise(tmp_path) is None
