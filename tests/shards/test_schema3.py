"""Datasets of schema 3, one per source, that version 0.1 wrote: still read, verified, streamed and built again."""

import hashlib
import json
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from etl.build import Options, beam_flags, build
from etl.building.plan import BuildConfig
from schemas import upgrade
from schemas.dataset import MANIFEST_NAME, SCHEMA_VERSION, load_manifest
from schemas.task import ActionSpec
from schemas.vocabulary import DISJOINT, by_name
from shards.folder import Folder
from shards.stream import Stream, StreamConfig
from shards.verify import verify
from shards.writer import write_manifest
from tests.shards.slow import check_batch

ARCHIVE = Path(__file__).parents[1] / "fixtures" / "schema3.tar.xz"
NAMES = ("text", "d4rl", "d4rl-goal", "d4rl-paper", "minari", "minari-nested", "minari-discrete", "atari", "babyai")
ARRAYS = "tokens", "roles", "positions", "segments", "supervised", "patches", "patch_index", "patch_positions"


@pytest.fixture(scope="module")
def schema3(tmp_path_factory):
    """Folders of datasets, expected.json of what they hold, and the logs that three of them were built from."""
    folder = tmp_path_factory.mktemp("fixtures")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder / "schema3"


@pytest.mark.parametrize("name", NAMES)
def test_old_datasets_hold_what_they_held(schema3, name):
    expected = json.loads((schema3 / "expected.json").read_text())[name]
    dataset = verify(schema3 / name, full=True)
    # runs and tables name the fingerprint that it had
    assert dataset.manifest.fingerprint == expected["fingerprint"]
    assert dataset.manifest.vocabulary.name == ("paper" if name == "d4rl-paper" else "disjoint")
    order = np.lexsort((dataset.column("tokens_offset"), dataset.column("shard")))
    stored = b"".join(dataset.tokens(int(row)).tobytes() for row in order)
    assert (len(order), hashlib.sha256(stored).hexdigest()) == (expected["rows"], expected["tokens"])
    for sample in expected["samples"]:
        row = sample["row"]
        assert dataset.tokens(row)[:3].tolist() == sample["tokens"]
        if "reward" in sample:
            assert dataset.reward(row)[:3].tolist() == sample["reward"]
            for member in ("observation", "action"):
                values = getattr(dataset, member)(row)
                assert (None if values is None else values[:1].tolist()) == sample[member]
        if "patches_sha256" in sample:
            assert hashlib.sha256(dataset.patches(row).tobytes()).hexdigest() == sample["patches_sha256"]


@pytest.mark.parametrize("name", NAMES)
def test_old_datasets_stream_as_those_of_the_present_schema(schema3, name, tmp_path):
    new = tmp_path / "new"
    shutil.copytree(schema3 / name, new)
    write_manifest(Folder(new), load_manifest(new))
    assert json.loads((new / MANIFEST_NAME).read_text())["schema_version"] == SCHEMA_VERSION
    assert json.loads((schema3 / name / MANIFEST_NAME).read_text())["schema_version"] == 3
    old, present = (Stream(place, StreamConfig(sequence_length=200), seed=1) for place in (schema3 / name, new))
    assert old.fingerprint != present.fingerprint
    one, other = old.batch(0, 6), present.batch(0, 6)
    for array in ARRAYS:
        assert np.array_equal(getattr(one, array), getattr(other, array)), array
    if name != "d4rl-paper":  # the slow reference knows one vocabulary
        check_batch(old, one)


BUILDS = {
    "d4rl-goal": {"source": "d4rl", "input": "logs/d4rl-goal"},
    "minari-discrete": {"source": "minari", "input": "logs/minari-discrete"},
    "minari-nested": {"source": "minari", "input": "logs/minari-nested", "text_model": "small.model"},
}


@pytest.mark.parametrize("name", BUILDS)
def test_the_same_logs_still_give_the_same_bytes(schema3, name, tmp_path):
    options = {what: str(schema3 / value) if what == "input" else value for what, value in BUILDS[name].items()}
    if "text_model" in options:
        options["text_model"] = schema3 / options["text_model"]
    console = Console(quiet=True)
    manifest = build(Options(**options, output=str(tmp_path / name)), beam_flags([], 1), console)
    for file in ("shards.arrow", "index.arrow", "rejected.jsonl"):
        assert (tmp_path / name / file).read_bytes() == (schema3 / name / file).read_bytes(), file
    assert manifest.config["vocabulary"] == "disjoint"


def test_a_command_finds_the_old_dataset_already_built(schema3, tmp_path):
    folder = tmp_path / "d4rl-goal"
    shutil.copytree(schema3 / "d4rl-goal", folder)
    before = (folder / MANIFEST_NAME).read_bytes()
    options = Options(source="d4rl", input=str(schema3 / "logs/d4rl-goal"), output=str(folder))
    manifest = build(options, beam_flags([], 1), Console(quiet=True))
    assert (folder / MANIFEST_NAME).read_bytes() == before
    assert manifest == load_manifest(folder)


def test_tokens_of_old_and_new_datasets_go_together(schema3, tmp_path):
    """The vocabulary of an old dataset, then called seed, is the one now called disjoint."""
    options = Options(source="minari", input=str(schema3 / "logs/minari-discrete"), output=str(tmp_path / "new"))
    build(options, beam_flags([], 1), Console(quiet=True))
    folders = [schema3 / "d4rl-goal", tmp_path / "new"]
    stream = Stream(folders, StreamConfig(sequence_length=64), seed=0)
    assert stream.vocabulary == DISJOINT
    check_batch(stream, stream.batch(0, 8))


def test_the_disjoint_vocabulary_keeps_its_former_name_and_fingerprint():
    assert by_name("seed") is by_name("disjoint") is DISJOINT
    assert DISJOINT.fingerprint == "28e7cae1ff0fdfad67412defdb1d3ec7f21ad22813aaf610e15e480016f695c2"
    assert replace(DISJOINT, name="seed") == DISJOINT
    assert BuildConfig(vocabulary="seed") == BuildConfig(), "the same dataset, whichever name is given"


def test_scalars_become_one_number_per_dimension():
    old = {"kind": "continuous", "size": 2, "choices": 0, "low": -2.0, "high": 2.0}
    fields = [
        {"key": "x", "kind": "continuous", "shape": [3], "choices": 0, "resized": None, "fit": "resize"},
        {"key": "k", "kind": "discrete", "shape": [2], "choices": 5, "resized": None, "fit": "resize"},
    ]
    task = upgrade.task({"name": "t", "observation": fields, "action": old})
    assert ActionSpec(**task["action"]) == ActionSpec("continuous", 2, [-2.0] * 2, [2.0] * 2, [], [])
    assert [(field["choices"], field["start"], field["stack"]) for field in task["observation"]] == [
        ([], [], 1),
        ([5], [0], 1),
    ]
    assert upgrade.task(task) == task, "what is of the present form stays"
    discrete = upgrade.task({"observation": [], "action": old | {"kind": "discrete", "choices": 4}})["action"]
    assert ActionSpec(**discrete) == ActionSpec("discrete", 2, [], [], [4, 4], [0, 0])


@pytest.mark.parametrize("damage", [None, [], {"observation": 3}, {"observation": [7], "action": {"choices": 2}}])
def test_damaged_tasks_are_left_to_the_check_that_follows(damage):
    assert upgrade.task(damage) == damage or upgrade.task(damage)["action"] == damage["action"]
