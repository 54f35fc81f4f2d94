"""Shipped weights of tasks with instructions: they play without their data as with it, and say what they lack."""

import json
from dataclasses import replace

import numpy as np
import pytest

import gato
import simulators
from eval.ship import kept_rows
from schemas.vocabulary import DISJOINT, PAPER
from shards.reader import Dataset
from tests.conftest import run
from tests.eval.test_compare import SMALL, arguments, rows
from trainer.checkpoint import CheckpointError
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
