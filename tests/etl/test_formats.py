"""What etl.record --suite wrote becomes one dataset per format by one command."""

from __future__ import annotations

import json
import shutil
from dataclasses import fields

import pytest

from etl.building.formats import TABLE, Row, formats_of, recorded
from schemas.dataset import load_manifest
from schemas.files import sha256_of
from shards.stream import Stream, StreamConfig, find_datasets
from tests.commands import run


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("suite") / "logs"
    run("etl.record", "--suite", "classic", "--episodes", "2", "-o", folder)
    return folder


@pytest.fixture(scope="module")
def shards(logs):
    done = run("etl.build", "-i", logs, "-o", logs.parent / "shards")
    assert done.stderr.count(" shards, ") == 2
    return logs.parent / "shards"


def test_each_format_is_a_dataset_and_all_of_them_a_root_to_train_on(shards):
    assert [place.rsplit("/", 1)[1] for place in find_datasets(shards)] == ["d4rl", "minari"]
    stream = Stream(find_datasets(shards), StreamConfig(sequence_length=64, domains={"classic": 1.0}), 0)
    assert len(stream.tasks) == 9 and {timeline.spec.domain for timeline in stream.timelines} == {"classic"}


def test_a_dataset_has_the_bytes_that_its_own_folder_gives(logs, shards, tmp_path):
    run("etl.build", "-i", logs / "minari", "-o", tmp_path / "minari")
    for name in ("index.arrow", "shards.arrow"):
        assert sha256_of(tmp_path / "minari" / name) == sha256_of(shards / "minari" / name)
    assert load_manifest(tmp_path / "minari").fingerprint == load_manifest(shards / "minari").fingerprint


def test_one_that_fails_leaves_the_others_and_the_same_command_builds_it(logs, shards, tmp_path):
    copy, output = shutil.copytree(logs, tmp_path / "logs"), tmp_path / "shards"
    for path in (copy / "d4rl").iterdir():
        path.write_bytes(b"no log")
    done = run("etl.build", "-i", copy, "-o", output, check=False)
    assert done.returncode == 1 and "error: " in done.stderr
    assert [place.rsplit("/", 1)[1] for place in find_datasets(output)] == ["minari"]
    shutil.copytree(logs / "d4rl", copy / "d4rl", dirs_exist_ok=True)
    assert "already built" in run("etl.build", "-i", copy, "-o", output).stderr
    assert len(find_datasets(output)) == 2


@pytest.mark.parametrize("change", [{"path": ".."}, {"path": "/d4rl/a.hdf5"}, {"path": ""}, {"path": 1}, {"odd": 1}])
def test_a_table_is_checked_alike_by_who_records_and_by_who_builds(tmp_path, change):
    row = dict.fromkeys((one.name for one in fields(Row)), 1) | {"path": "d4rl/a.hdf5"}
    (tmp_path / "d4rl").mkdir()
    (tmp_path / TABLE).write_text(json.dumps({"a": row}))
    assert formats_of(None, str(tmp_path)) == [tmp_path / "d4rl"]
    (tmp_path / TABLE).write_text(json.dumps({"a": row | change}))
    for read in (lambda: formats_of(None, str(tmp_path)), lambda: recorded(tmp_path, "give another --output")):
        with pytest.raises(ValueError, match="not a table of recorded logs .*; (record again|give another)"):
            read()


def test_a_damaged_table_is_refused_and_a_named_source_reads_the_folder_as_it_is(logs, tmp_path):
    copy = shutil.copytree(logs, tmp_path / "logs")
    (copy / "recorded.json").write_text("[1]")
    done = run("etl.build", "-i", copy, "-o", tmp_path / "shards", check=False)
    assert done.returncode == 1 and "recorded.json: not a table of recorded logs" in done.stderr
    run("etl.build", "--source", "minari", "-i", copy, "-o", tmp_path / "own")
    assert len(load_manifest(tmp_path / "own").tasks) == 7
