"""Fine-tuning from an export: its weights, some tasks, few demonstrations, dropout, the constant rate."""

import hashlib
import json
import shutil
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from eval.exports import find_export
from schemas.dataset import DatasetError
from schemas.vocabulary import DISJOINT
from shards.cache import CacheConfig
from shards.stream import Stream, StreamConfig
from tests.trainer.launch import errors, finish, launcher, losses, train
from trainer.checkpoint import CheckpointError
from trainer.config import resume_critical
from trainer.engine import branch_scales, learning_rate
from trainer.inputs import load_initial_model
from trainer.model import Gato, ModelConfig
from trainer.model.export import load_export, save_export
from trainer.recipes import RECIPES

TASK = "hopper-random-v4"
TUNE = (
    "--recipe finetune --deepspeed zero0_cpu --optimiser.peak-lr 1e-3 --model.dropout 0.2 "
    f"--data.stream.tasks {TASK} --data.stream.demonstrations 5 --run.start-from"
)


@pytest.fixture(scope="module")
def exported(hopper, pong, tmp_path_factory):
    """Trained on both tasks for a little."""
    output = tmp_path_factory.mktemp("trained")
    how = "--optimiser.peak-lr 1e-2 --optimiser.warmup-steps 5 --loss.softmax vocabulary --run.save-every 100"
    train(output, [hopper, pong], *how.split(), steps=50)
    return output / "export"


def tune(output, data, start, *extra, **options):
    """The recipe's run, its batches as small as the others'; the shape is the export's."""
    return train(output, data, *TUNE.split(), str(start), *extra, **options)


@pytest.mark.process
def test_it_starts_from_the_exports_weights_and_goes_on_bit_for_bit(exported, hopper, pong, tmp_path):
    data = [hopper, pong]
    tune(tmp_path / "whole", data, exported, steps=6)
    tune(tmp_path / "parts", data, exported, steps=4)
    resumed = tune(tmp_path / "parts", data, exported, steps=6)
    assert "resuming at step 4" in resumed.stdout
    fresh = tmp_path / "fresh"
    train(fresh, data, *TUNE.split()[:-1], "--model.patch-groups", "8", steps=1)
    assert losses(tmp_path / "whole")[0] < losses(fresh)[0] - 2
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    whole, parts = (load_file(tmp_path / name / "export" / "weights.safetensors") for name in ("whole", "parts"))
    assert all(np.array_equal(whole[name], parts[name]) for name in whole)
    model, info = load_export(tmp_path / "whole" / "export")
    assert [task.name for task in info.tasks] == [TASK] and info.model.dropout == 0.2
    assert info.training.start_from == load_export(exported)[1].weights_sha256


@pytest.mark.process
def test_a_run_says_where_its_held_out_loss_was_lowest(exported, hopper, tmp_path):
    few = ("--data.stream.demonstrations", "1", "--optimiser.start-lr", "1e-2", "--run.evaluate-every", "10")
    done = tune(tmp_path / "few", [hopper], exported, *few, "--optimiser.peak-lr", "1e-2", steps=60)
    best, last = (load_export(tmp_path / "few" / name)[1] for name in ("best", "export"))
    assert best.step < last.step and best.training.held_out_loss == min(held_out(tmp_path / "few")[1:])
    assert f"held-out loss rose from {best.training.held_out_loss:.4f}" in done.stdout
    done = tune(
        tmp_path / "falls", [hopper], exported, "--optimiser.peak-lr", "1e-5", "--run.evaluate-every", "1", steps=2
    )
    assert "finished" in done.stdout and "rose from" not in done.stdout


def held_out(run):
    """The held-out losses of a run, in the order in which they were measured."""
    rows = map(json.loads, (run / "metrics.jsonl").read_text("utf-8").splitlines())
    return [row["held_out/loss"] for row in rows if "held_out/loss" in row]


@pytest.mark.process
def test_what_does_not_fit_is_refused_in_one_line(exported, hopper, pong, tmp_path):
    model, info = load_export(exported)
    other = replace(info.vocabulary, mu=info.vocabulary.mu * 2)
    save_export(
        tmp_path / "other",
        model.state_dict(),
        replace(info, vocabulary=other, vocabulary_fingerprint=other.fingerprint),
    )
    cases = [
        (tune(tmp_path / "a", [hopper], tmp_path / "other", check=False), "vocabulary"),
        (tune(tmp_path / "b", [hopper], exported, "--model.heads", "8", check=False), "--model.heads 8: the export"),
        (tune(tmp_path / "c", [hopper], tmp_path / "none", check=False), "no export"),
        (tune(tmp_path / "e", [hopper], exported.parent, check=False), f"no export; give {exported}"),
        (tune(tmp_path / "d", [hopper], exported, "--data.stream.tasks", "chess", check=False), "unknown task 'chess'"),
    ]
    for done, words in cases:
        assert done.returncode and len(errors(done)) == 1 and words in errors(done)[0], done.stderr


@pytest.mark.process
def test_a_dry_run_is_of_the_exports_shape(exported, tmp_path):
    command = [sys.executable, "trainer/main.py", "--dry-run", "--recipe", "finetune", "--run.start-from"]
    transformer = load_export(exported)[0].parameter_counts()["transformer"]
    assert transformer != Gato(RECIPES["finetune"].model, DISJOINT).parameter_counts()["transformer"]
    for start, status, words in ((exported, 0, f"transformer {transformer:,}"), (tmp_path / "none", 1, "no export")):
        done = finish([*command, str(start)])
        assert done.returncode == status and words in done.stdout + done.stderr


def shown(stream: Stream, count: int) -> set[tuple[int, ...]]:
    """All timesteps, prompts too, of the first sequences."""
    K = stream.timelines[0].layout.length
    rows = stream.batch(0, count).to("cpu").tokens.numpy()
    return {tuple(step) for row in rows for step in row[: len(row) // K * K].reshape(-1, K).tolist()}


def test_excluded_tasks_are_never_drawn(hopper, pong):
    config = StreamConfig(sequence_length=120)
    stream = Stream([hopper, pong], replace(config, excluded_tasks=(TASK,)), 0)
    assert stream.tasks == Stream([pong], config, 0).tasks
    assert (stream.batch(0, 8).tokens == Stream([pong], config, 0).batch(0, 8).tokens).all()
    assert stream.fingerprint != Stream([hopper, pong], config, 0).fingerprint
    with pytest.raises(DatasetError, match="excluded-tasks: unknown task 'chess'; tasks: hopper-random-v4"):
        Stream([hopper, pong], StreamConfig(excluded_tasks=("chess",)), 0)


@pytest.mark.parametrize("episodes", [1, 3, 10_000])
def test_only_the_first_episodes_of_the_tasks_are_seen(hopper, pong, episodes):
    config = StreamConfig(sequence_length=120, mixture_block=1, tasks=(TASK,), demonstrations=episodes)
    stream, whole = Stream([pong, hopper], config, 0), Stream([hopper], StreamConfig(sequence_length=120), 0)
    assert stream.tasks == [TASK]
    few, all_ = stream.timelines[0], whole.timelines[0]
    wanted = min(episodes, all_.count)
    assert few.count == wanted and few.total == int(
        all_.column("timesteps")[all_.column("split_episode") < wanted].sum()
    )
    K, plain = all_.layout.length, replace(config, prompt_probability=0.0)
    assert 120 % K == 0
    rows = whole.evaluation_batch(0, np.arange(all_.windows)).to("cpu").tokens.reshape(-1, K)
    first = {tuple(step) for step in rows[: few.total].tolist()}
    assert shown(Stream([hopper], plain, 0), few.windows) == first  # an epoch
    assert shown(stream, 4 * few.windows) <= first  # and with prompts
    held_out = Stream([hopper], config, 0, held_out=True)
    assert held_out.timelines[0].total == Stream([hopper], StreamConfig(), 0, held_out=True).timelines[0].total


def test_an_unknown_task_is_named(hopper):
    with pytest.raises(DatasetError, match="unknown task 'chess'; tasks: hopper-random-v4"):
        Stream([hopper], StreamConfig(tasks=("chess",)), 0)


def test_dropout_is_a_function_of_seed_and_sequence():
    model = ModelConfig(blocks=2, width=512, dropout=0.25)
    together = branch_scales([5, 9], model, 0)
    assert together.shape == (2, 2, 2, 512) and set(together.unique().tolist()) == {0.0, np.float32(1 / 0.75)}
    assert torch.equal(together[1:], branch_scales([9], model, 0)) and not torch.equal(*together)
    assert not torch.equal(together, branch_scales([5, 9], model, 1))
    assert abs(float((together == 0).float().mean()) - 0.25) < 0.03 and abs(float(together.mean()) - 1) < 0.04
    assert branch_scales([5], ModelConfig(), 0) is None
    depth = branch_scales([5, 9], ModelConfig(blocks=2, stochastic_depth=0.5), 0)
    assert depth.shape == (2, 2, 2, 1) and set(depth.unique().tolist()) <= {0.0, 2.0}


@torch.no_grad()
def test_scales_keep_the_models_number_format(hopper):
    batch = Stream([hopper], StreamConfig(sequence_length=120), 0).batch(0, 2).to("cpu")
    config = ModelConfig(blocks=1, width=32, feed_forward=64, patch_channels=16, stochastic_depth=0.1, dropout=0.1)
    model = Gato(config, DISJOINT).initialise(0).bfloat16()
    assert model(batch, branch_scales(batch.sequence, config, 0)).dtype == torch.bfloat16


def test_what_was_added_leaves_older_checkpoints_as_they_were(hopper):
    raw = resume_critical(RECIPES["tiny-tokens"])
    assert "dropout" not in raw["model"] and "schedule" not in raw["optimiser"]
    tuned = resume_critical(RECIPES["finetune"])
    assert (tuned["model"]["dropout"], tuned["optimiser"]["schedule"]) == (0.1, "constant")
    stream = Stream([hopper], StreamConfig(), 0)
    later = ("tasks", "excluded_tasks", "demonstrations", "prompt_start_share", "domains", "text_loss")
    plain = {k: v for k, v in asdict(StreamConfig()).items() if k not in later}
    body = [[stream.datasets[0].manifest.fingerprint], plain, 0, False]
    assert stream.fingerprint == hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    prints = {
        Stream([hopper], StreamConfig(demonstrations=n, tasks=t), 0).fingerprint for n in (0, 2) for t in ((), (TASK,))
    }
    assert len(prints) == 4


def test_the_recipe_is_the_papers():
    config = RECIPES["finetune"]
    assert {learning_rate(step, config.optimiser) for step in (0, 1, 1000, 10**6)} == {1e-5}
    assert (config.data.global_batch, config.model.dropout) == (64, 0.1)


@pytest.mark.process
def test_sequence_length_loss_and_precision_come_from_the_export_and_the_machine(hopper, tmp_path):
    """The shipped export, as a user without a GPU gives it; what the command line says otherwise counts."""
    start = find_export("tiny")
    words = ("--recipe", "finetune", "--data.folders", str(hopper), "--steps", "1", "--data.global-batch", "2",
             "--data.micro-batch", "2", "--run.start-from", str(start), "--run.evaluate-sequences", "2")  # fmt: skip
    done = finish([*launcher(), "trainer/main.py", *words, "--run.output", str(tmp_path / "a")])
    assert done.returncode == 0, done.stderr
    first = next(line for line in done.stdout.splitlines() if "process(es)" in line)
    assert first == "1 process(es) on cpu, float32, ZeRO 1 (zero1_cpu)"
    shipped, info = load_export(start)[1], load_export(tmp_path / "a" / "export")[1]
    assert info.sequence_length == shipped.sequence_length and info.training.loss and shipped.training.loss
    assert {**info.training.loss, "chunk": 0} == {**shipped.training.loss, "chunk": 0}
    # values reach its weights as they were scaled for them
    assert info.observations[TASK] == shipped.observation_scale(info.tasks[0]) is not None
    assert "sequence_length 264 (recipe 1024)" in done.stdout and "loss.soft_bins 24.0 (recipe 0.0)" in done.stdout
    own = ("--data.stream.sequence-length", "120", "--loss.soft-bins", "8", "--deepspeed", "zero0_cpu")
    done = finish([*launcher(), "trainer/main.py", *words, *own, "--run.output", str(tmp_path / "b")])
    info = load_export(tmp_path / "b" / "export")[1]
    assert info.sequence_length == 120 and info.training.loss["soft_bins"] == 8 and "ZeRO 0" in done.stdout


@pytest.mark.process
def test_an_export_behind_a_url_is_verified(exported, tmp_path):
    config = RECIPES["finetune"]
    cache = replace(config.data, cache=CacheConfig(folder=tmp_path / "cache" / "shards"))
    config = replace(config, data=cache, run=replace(config.run, start_from=f"file://{exported}/model.json"))
    _, initial = load_initial_model("finetune", config)
    assert initial is not None and initial[1].weights_sha256 == load_export(exported)[1].weights_sha256
    copy = shutil.copytree(exported, tmp_path / "copy")
    (copy / "weights.safetensors").write_bytes((copy / "weights.safetensors").read_bytes()[:-1] + b"x")
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(CheckpointError, match="weights.safetensors: has another sha256 than model.json names"):
        load_initial_model("finetune", replace(config, run=replace(config.run, start_from=f"file://{copy}")))
