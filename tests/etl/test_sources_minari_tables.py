"""Minari's Arrow and Parquet files give what its HDF5 file gives, and their damage is named."""

import json
import shutil
from pathlib import Path

import minari
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from gymnasium import spaces

from etl import sources
from etl.sources import Rejection
from tests.etl.logkit import build_here, episodes_of, scans_of
from tests.etl.test_sources_minari import write

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:minari")
PARTS = {"place": spaces.Box(-5, 5, (2, 2), np.float64), "level": spaces.Discrete(5, start=2), "say": spaces.Text(8)}
SPACES = {
    "box": (spaces.Box(-np.inf, np.inf, (3,)), spaces.Box(-1, 1, (2,))),
    "nested": (
        spaces.Dict(PARTS | {"pair": spaces.Tuple((spaces.MultiDiscrete([3, 4]), spaces.MultiBinary(3)))}),
        spaces.MultiDiscrete([3, 2]),
    ),
    "picture": (spaces.Dict({"frame": spaces.Box(0, 255, (32, 32, 3), np.uint8)}), spaces.Discrete(4)),
    "single": (spaces.Box(-1, 1, (1,)), spaces.Box(-1, 1, (1,))),
}


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    return tmp_path / "minari"


def table(kind="box", form="parquet", **about):
    """The folder 'data' of a dataset in that form."""
    return write(*SPACES[kind], dataset=f"own/{kind}-{form}-v0", data_format=form, **about).parent


@pytest.mark.parametrize("jpeg", [False, True])
@pytest.mark.parametrize("form", ["arrow", "parquet"])
@pytest.mark.parametrize("kind", SPACES)
def test_all_forms_give_the_same(kind, form, jpeg):
    reference = write(*SPACES[kind], dataset=f"own/{kind}-v0", jpeg_encoding=jpeg).parent
    wanted, first = episodes_of("minari", reference)
    scan, found = episodes_of("minari", table(kind, form, jpeg_encoding=jpeg))
    assert (scan.task.observation, scan.task.action) == (wanted.task.observation, wanted.task.action)
    assert [ref.total for ref in scan.episodes] == [ref.total for ref in wanted.episodes] and not scan.rejected
    for one, other in zip(found, first, strict=True):
        assert (one.terminated, one.truncated, one.row) == (other.terminated, other.truncated, other.row)
        assert one.observation.keys() == other.observation.keys()
        for key, values in other.observation.items():
            assert np.array_equal(one.observation[key], values) and one.observation[key].dtype == values.dtype
        assert np.array_equal(one.action, other.action) and np.array_equal(one.reward, other.reward)


@pytest.mark.parametrize("form", ["arrow", "parquet"])
def test_build_by_folder_and_by_the_metadata_file(tmp_path, form, place):
    data = table(form=form)
    built = build_here("minari", place, tmp_path / "a")
    assert build_here("minari", data / "metadata.json", tmp_path / "b")["index.arrow"] == built["index.arrow"]
    source = sources.load("minari")
    (scan,) = scans_of("minari", data)
    assert source.parts(scan.episodes[1].file) == [data / "1" / f"part-0.{form}", data / "metadata.json"]
    assert source.recognise(place).certainty == 2


def changed(data, episode, change):
    path = next((data / str(episode)).glob("*.parquet"))
    table = pq.read_table(path)
    pq.write_table(change(table), path)


def without(name):
    return lambda table: table.drop_columns([name])


def with_column(name, values):
    return lambda table: table.set_column(table.column_names.index(name), name, values(table))


DAMAGE = {
    "missing key": without("actions"),
    "wrong dtype": with_column("rewards", lambda table: pa.array(["a"] * len(table))),
    "wrong shape": with_column("observations", lambda t: pa.FixedSizeListArray.from_arrays(np.zeros(2 * len(t)), 2)),
    "wrong length": with_column("rewards", lambda table: pa.array([None] * len(table), pa.float64())),
    "not finite": with_column("rewards", lambda table: pa.array([np.nan] * len(table))),
    "empty": lambda table: table[:1],
}


@pytest.mark.parametrize("reason", DAMAGE)
def test_one_damaged_episode(reason):
    data = table()
    changed(data, 1, DAMAGE[reason])
    (scan,) = scans_of("minari", data)
    found = list(sources.read(sources.load("minari"), scan.task, scan.episodes))
    (line,) = [*scan.rejected, *(one for one in found if isinstance(one, Rejection))]
    assert (line.position, line.reason) == (1, reason)


@pytest.mark.parametrize("form", ["arrow", "parquet"])
def test_truncated_missing_and_shortened(form):
    data = table(form=form, episodes=4)
    path = data / "0" / f"part-0.{form}"
    path.write_bytes(path.read_bytes()[:300])
    shutil.rmtree(data / "1")
    about = data / "2" / "metadata.json"
    about.write_text(json.dumps(json.loads(about.read_text()) | {"total_steps": 99}))
    scan, found = episodes_of("minari", data)
    assert [(line.position, line.reason) for line in scan.rejected] == [
        (0, f"corrupt {form}"), (1, "missing file"), (2, "wrong length")
    ]  # fmt: skip
    assert len(found) == 1 and not isinstance(found[0], Rejection)


def test_damaged_bytes_are_refused_or_read():
    data = table(form="arrow")
    path = Path(data / "1" / "part-0.arrow")
    good = path.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(60):
        bad = bytearray(good)
        for place in rng.integers(0, len(bad), 3):
            bad[place] = rng.integers(0, 256)
        path.write_bytes(bad)
        for scan in scans_of("minari", data):
            if scan.task:
                list(sources.read(sources.load("minari"), scan.task, scan.episodes))


def test_minari_itself_reads_what_the_test_writes(place):
    table()
    assert minari.load_dataset("own/box-parquet-v0").total_episodes == 3
