"""Shipped weights of tasks with instructions: they play without their data as with it, and say what they lack."""

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest

import gato
import simulators
from eval.ship import kept_rows
from schemas.dataset import DatasetError
from schemas.vocabulary import DISJOINT, PAPER
from shards.reader import Dataset
from shards.stream import Stream, StreamConfig
from tests.conftest import run
from tests.eval.test_compare import SMALL, arguments, rows
from trainer.checkpoint import CheckpointError
from trainer.inputs import text_model_of
from trainer.model import Gato
from trainer.model.export import ExportInfo, TrainingInfo, load_export, save_export

LEVEL = "BabyAI-GoToLocal-v0"


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("level")
    run("etl.record", "--environment", LEVEL, "--steps", "150", "--output", folder)
    run("etl.build", "--input", folder, "--output", folder / "shards")
    return folder / "shards"


@pytest.fixture(scope="module")
def export(built, tmp_path_factory):
    dataset, folder = Dataset(built), tmp_path_factory.mktemp("run") / "export"
    vocabulary, tasks = dataset.manifest.vocabulary, tuple(task.spec for task in dataset.manifest.tasks)
    info = ExportInfo("gato.model", 3, SMALL, vocabulary, vocabulary.fingerprint, 528, 0, tasks, {}, TrainingInfo())
    save_export(folder, dict(Gato(SMALL, vocabulary).initialise(3).state_dict()), info, dataset.text_model())
    return folder


@pytest.fixture(scope="module")
def shipped(export, built, tmp_path_factory):
    folders = [tmp_path_factory.mktemp("shipped") / name for name in ("whole", "light")]
    for folder, extra in zip(folders, ([], ["--no-picture-prompts"])):
        run("eval.ship", export, folder, "--datasets", built, *extra)
    return folders


def actions(agent):
    """The first 40, in episodes of one seed."""
    env, chosen = simulators.make(agent.task.environment), []
    observation, _ = env.reset(seed=7)
    agent.reset(seed=7)
    for _ in range(40):
        chosen.append(int(agent.act(observation)))
        observation, _, terminated, truncated, _ = env.step(chosen[-1])
        if terminated or truncated:
            observation, _ = env.reset()
    return chosen


@pytest.mark.parametrize("prompt", ["none", "start", "end"])
def test_instructions_are_read_without_data_as_with_it(export, built, shipped, prompt):
    how = {"prompt": prompt, "decoding": "sample"}
    found = [actions(gato.load(export).agent(dataset=built, **how)), actions(gato.load(shipped[0]).agent(**how))]
    assert found[0] == found[1] and len(set(found[0])) > 2
    if prompt == "none":
        assert actions(gato.load(export).agent(**how)) == found[0]


def test_the_comparison_needs_no_data_for_instructions(shipped, tmp_path):
    command = arguments(tmp_path / "out", [shipped[1]], [], "--root", tmp_path / "nothing", "--processes", "1")
    command.remove("--datasets")
    run(*command)
    assert [row["episode"] for row in rows(tmp_path / "out") if row["model"] == "gato"] == [0, 1]
    done = run(*command, "--agent.prompt", "start", check=False)
    assert "needs a prompt, and none was shipped" in done.stderr


def test_rows_of_words_in_the_logs_are_kept_and_the_others_zero(export, built, shipped):
    dataset = Dataset(built)
    words = {int(token) for row in range(dataset.index.num_rows) for token in np.unique(dataset.tokens(row)[:, :16])}
    (whole, _), (small, info) = load_export(export), load_export(shipped[1])
    table, kept = (model.tokens.weight.detach().numpy() for model in (whole, small))
    text = np.arange(info.vocabulary.text.start, info.vocabulary.text.stop)
    other = np.setdiff1d(np.arange(len(table)), text)
    assert 5 < len(words) < 100 and words <= set(text.tolist())
    np.testing.assert_array_equal(kept[[*words, *other]], table[[*words, *other]])
    assert not kept[np.setdiff1d(text, list(words))].any()
    sizes = [sum(path.stat().st_size for path in folder.iterdir()) for folder in (export, *shipped)]
    assert sizes[2] < sizes[1] and sizes[2] < sizes[0] / 2


def test_runs_of_rows_cover_what_is_wanted(export):
    _, info = load_export(export)
    for texts, runs in (([3, 4, 9, 31999], ((3, 5), (9, 10), (31999, 34176))), ([], ((32000, 34176),))):
        assert kept_rows(replace(info, vocabulary=DISJOINT), np.array(texts, np.uint16)) == runs
    assert kept_rows(replace(info, vocabulary=PAPER), np.array([3], np.uint16)) == ()


def test_what_was_not_shipped_is_named(export, built, shipped, tmp_path):
    model = gato.load(shipped[1])
    assert model.agent().act is not None
    with pytest.raises(ValueError, match="needs a prompt, and none was shipped"):
        model.agent(prompt="end")
    model.agent(prompt="end", dataset=built)
    folder = tmp_path / "older"
    for path in export.iterdir():
        (folder / path.name).parent.mkdir(exist_ok=True)
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "text.model").write_bytes(b"other")
    with pytest.raises(CheckpointError, match="text.model: missing or damaged"):
        gato.load(folder).agent()
    body = json.loads((folder / "model.json").read_text())
    del body["text_sha256"]
    (folder / "model.json").write_text(json.dumps(body))
    with pytest.raises(ValueError, match="reads text, and the tokenizer is not with these weights"):
        gato.load(folder).agent()
    gato.load(folder).agent(dataset=built)


def test_a_task_without_actions_is_not_shipped(export, built, tmp_path):
    model, info = load_export(export)
    silent = replace(info, tasks=(replace(info.tasks[0], action=None),), text_sha256="", weights_sha256="")
    save_export(tmp_path / "silent", dict(model.state_dict()), silent)
    done = run("eval.ship", tmp_path / "silent", tmp_path / "out", "--datasets", built, check=False)
    assert done.returncode == 1 and "has no actions" in done.stderr and not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def others(built, tmp_path_factory):
    """Words under a text model of their own, and the level built with it."""
    folder = tmp_path_factory.mktemp("others")
    words = "go to the red green blue ball box key open pick up a door wind rain sea ship".split()  # noqa: SIM905
    lines = [" ".join(words[(n * m) % 18] for m in range(1, 25)) for n in range(400)]
    (folder / "words.txt").write_text("\n".join(lines))
    text = ("--train-tokenizer", "--tokenizer-pieces", "290")
    run("etl.build", "--source", "text", "--input", folder / "words.txt", *text, "--output", folder / "a-words")
    model = folder / "a-words" / "text.model"
    run("etl.build", "--input", built.parent, "--text-model", model, "--output", folder / "level")
    return folder


def test_the_text_model_is_the_exports_own(export, built, others, tmp_path):
    data = ("--datasets", others / "a-words", built)
    run("eval.ship", export, tmp_path / "out", *data)
    assert (tmp_path / "out/text.model").read_bytes() == (export / "text.model").read_bytes()
    model, info = load_export(export)
    save_export(tmp_path / "older", dict(model.state_dict()), replace(info, text_sha256=""))
    run("eval.ship", tmp_path / "older", tmp_path / "again", *data)
    assert (tmp_path / "again/text.model").read_bytes() == (export / "text.model").read_bytes()
    assert load_export(tmp_path / "again")[1].kept == load_export(tmp_path / "out")[1].kept


def test_data_under_another_text_model_or_vocabulary_is_refused(export, built, others, tmp_path):
    words = "the texts of task 'babyai-gotolocal-expert-v0' were made with another text model"
    done = run("eval.ship", export, tmp_path / "out", "--datasets", others / "level", check=False)
    assert done.returncode == 1 and words in done.stderr and not (tmp_path / "out").exists()
    with pytest.raises(DatasetError, match=words):
        gato.load(export).agent(dataset=others / "level")
    done = run(*arguments(tmp_path / "table", [export], [others / "level"], "--processes", "1"), check=False)
    assert words in done.stdout + done.stderr
    paper = tmp_path / "paper"
    run("etl.build", "--input", built.parent, "--vocabulary", "paper", "--output", paper)
    done = run("eval.ship", export, tmp_path / "out", "--datasets", paper, check=False)
    assert f"{paper}: made under another vocabulary" in done.stderr and "--vocabulary disjoint" in done.stderr
    done = run("eval.ship", export, tmp_path / "out", "--datasets", built, paper, check=False)
    assert "is in more than one dataset folder" in done.stderr and not (tmp_path / "out").exists()


def test_a_task_of_other_fields_is_neither_shipped_nor_played_as_the_exports(export, built, tmp_path):
    run("etl.build", "--input", built.parent, "--text-tokens", "8", "--output", tmp_path / "short")
    done = run("eval.ship", export, tmp_path / "out", "--datasets", tmp_path / "short", check=False)
    words = "is not what .* was trained on: field 'mission' has shape"
    assert done.returncode == 1 and re.search(words, done.stderr)
    with pytest.raises(DatasetError, match=words):
        gato.load(export).agent(dataset=tmp_path / "short")


def test_a_damaged_text_model_of_a_dataset_is_named(export, built, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(built, folder)
    body = bytearray((folder / "text.model").read_bytes())
    body[1000] ^= 1
    (folder / "text.model").write_bytes(body)
    with pytest.raises(DatasetError, match="text.model: sha256 differs from the manifest"):
        gato.load(export).agent(dataset=folder)


def test_training_exports_the_text_model_only_where_a_task_that_it_trains_on_has_text(built, hopper):
    for excluded, found in (((), True), (("babyai-gotolocal-expert-v0",), False)):
        config = StreamConfig(sequence_length=528, excluded_tasks=excluded)
        assert (text_model_of(Stream([built, hopper], config, 0)) is not None) == found


@pytest.mark.parametrize("kept", [[[0, 10]], [[10, 5]], [[-9, 3]], [[0, 2**62]], [[5, 6], [1, 2]], []])
def test_rows_that_the_weights_do_not_hold_are_damage(shipped, tmp_path, kept):
    shutil.copytree(shipped[1], tmp_path / "damaged")
    path = tmp_path / "damaged/model.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"kept": kept}))
    with pytest.raises(CheckpointError, match="model.json: its weights are of another shape"):
        gato.load(path.parent)


def test_a_word_that_is_no_unicode_is_refused(shipped):
    agent = gato.load(shipped[1]).agent()
    observation, _ = simulators.make(agent.task.environment).reset(seed=1)
    for word in ("", "\u732b \x00", "go " * 500):
        agent.reset(seed=1)
        assert 0 <= agent.act(observation | {"mission": word}) < 7
    agent.reset(seed=1)
    with pytest.raises(ValueError, match="'mission' holds half of a surrogate pair"):
        agent.act(observation | {"mission": "go \ud800"})
