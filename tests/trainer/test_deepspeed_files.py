"""A user's DeepSpeed file: "auto" is resolved, offload works as given, what cannot be is one line; and a fuzz of it."""

import json
import os
import random
import socket
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from deepspeed.runtime.config import DeepSpeedConfig

from tests.trainer.launch import errors, losses, train
from trainer import engine
from trainer.deepspeed_file import (
    ReadFields,
    complete_offload,
    cpu_twin,
    precision,
    refused,
    require_precision,
    resolve_auto,
)
from trainer.engine import config_names, read_config, zero_config
from trainer.recipes import RECIPES


def test_auto_is_resolved_and_said():
    body = {
        "bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto", "loss_scale": 0}, "train_batch_size": "auto",
        "zero_optimization": {"stage": 2, "reduce_bucket_size": "auto", "offload_optimizer": {"device": "auto"}},
    }  # fmt: skip
    for cuda in (False, True):
        found, remarks = resolve_auto(body, cuda)
        assert found["bf16"] == {"enabled": cuda} and found["fp16"] == {"enabled": False, "loss_scale": 0}
        assert found["zero_optimization"] == {"stage": 2, "offload_optimizer": {}}
        assert found["train_batch_size"] == "auto"  # the run's own settings fill it in
        assert f"bf16.enabled 'auto': {str(cuda).lower()} on this machine" in remarks and len(remarks) == 4
    assert body["bf16"] == {"enabled": "auto"}


def test_precision_is_named():
    on, autocast = {"enabled": True}, "float32 with autocast to bfloat16"
    for field, name in (("zero", "float32"), ("bf16", "bfloat16"), ("fp16", "float16"), ("torch_autocast", autocast)):
        assert precision({field: on}) == name
    with pytest.raises(ValueError, match="own.json: field 'fp16.enabled': .* GPUs only; remove it, or use bf16"):
        require_precision("own.json", {"fp16": {"enabled": True}}, "cpu")
    half = {"fp16": {"enabled": True}, "zero_optimization": {"stage": 1}}
    require_precision("own.json", half, "cuda")
    for body in ({"fp16": {"enabled": True}}, {"bf16": {"enabled": True}, "zero_optimization": {"stage": 0}}):
        with pytest.raises(ValueError, match="own.json: .* weights need ZeRO here"):
            require_precision("own.json", body, "cuda")


def test_a_recipes_file_has_a_form_for_machines_without_a_gpu():
    names = config_names()
    assert [cpu_twin(name, names, False) for name in ("zero1", "zero3_offload", "zero0_cpu", "x.json")] == [
        "zero1_cpu", "zero3_offload_cpu", "zero0_cpu", "x.json",
    ]  # fmt: skip
    assert cpu_twin("zero1", names, True) == "zero1"


def test_offload_is_completed_unless_the_file_says_otherwise():
    offload = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    assert complete_offload(offload)["zero_force_ds_cpu_optimizer"] is False
    assert complete_offload(offload | {"zero_force_ds_cpu_optimizer": True})["zero_force_ds_cpu_optimizer"] is True
    assert complete_offload({"zero_optimization": {"stage": 2}}) == {"zero_optimization": {"stage": 2}}


@pytest.mark.process
def test_files_that_others_write(hopper, tmp_path):
    files = {
        "auto": {"bf16": {"enabled": "auto"}, "zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}},
        "offload": {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
        "half": {"fp16": {"enabled": True}},
        "stage": {"zero_optimization": {"stage": 7}},
        "list": [],
        "plain": {"bf16": {"enabled": True}},
        "typo": {"zero_optimisation": {"stage": 2}, "flops_profiler": {"enabled": False}},
    }
    done = {}
    for name, body in files.items():
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(body))
        done[name] = train(tmp_path / name, [hopper], "--deepspeed", str(path), steps=2, check=False)
    assert done["auto"].returncode == 0 and "bf16.enabled 'auto': false on this machine" in done["auto"].stdout
    assert f"1 process(es) on cpu, float32, ZeRO 2 ({tmp_path / 'auto.json'})" in done["auto"].stdout
    assert done["offload"].returncode == 0, done["offload"].stderr
    assert losses(tmp_path / "offload") == pytest.approx(losses(tmp_path / "auto"), rel=1e-5)
    assert done["typo"].returncode == 0
    (line,) = [one for one in done["typo"].stdout.splitlines() if "is ignored" in one]
    assert line.startswith(f"warning: {tmp_path / 'typo.json'}: field 'zero_optimisation'"), line
    assert line.endswith("is 'zero_optimization' meant?"), line
    for name, words in (
        ("plain", "weights need ZeRO here"),
        ("half", "field 'fp16.enabled'"),
        ("stage", "stage"),
        ("list", "must be a JSON object"),
    ):
        assert done[name].returncode == 1 and "Traceback" not in done[name].stderr, done[name].stderr
        (line,) = errors(done[name])
        assert f"{name}.json" in line and words in line, line


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            '{"zero_optimization": {"stage": 2}, "zero_optimization": {"stage": 1}}',
            "'zero_optimization' is there twice",
        ),
        ("[" * 100_000, "nested too deeply"),
        ("\udcff", "not JSON"),
        ('{"zero_optimization": {"stage": "2"}}', "'zero_optimization.stage' must be 0, 1, 2 or 3, without quotes"),
        ('{"bf16": {"enabled": "yes"}}', "'bf16.enabled' must be true, false"),
    ],
)
def test_files_that_say_nothing_definite_are_refused(tmp_path, text, words):
    path = tmp_path / "own.json"
    path.write_text(text, "utf-8", "surrogateescape")
    with pytest.raises(ValueError, match=f"own.json: .*{words}"):
        read_config(str(path))


def test_a_file_with_a_byte_order_mark_is_read(tmp_path):
    (tmp_path / "own.json").write_text("\ufeff{}", "utf-8")
    assert read_config(str(tmp_path / "own.json")) == {}


def test_deepspeeds_own_fields_are_known():
    names = ("activation_checkpointing", "aio", "autotuning", "comms_logger", "data_efficiency", "data_types",
             "flops_profiler", "tensorboard", "torch_autocast", "wandb")  # fmt: skip
    fields = ReadFields({"train_batch_size": 8} | {name: {} for name in names} | {"train_batchsize": 8})
    DeepSpeedConfig(fields)
    assert fields.remarks() == [
        "field 'train_batchsize' is ignored, DeepSpeed does not know it; is 'train_batch_size' meant?"
    ]


VALUES = [None, True, False, -1, 0, 1, 2, 3, 7, 1e9, -0.5, float("inf"), "auto", "", "cpu", "nvme", "true", [], {}, [1],
          {"enabled": "auto"}, {"device": "cpu"}, {"enabled": True}, {"stage": 3}]  # fmt: skip
KEYS = ["bf16.enabled", "fp16.enabled", "fp16.loss_scale", "fp16", "bf16", "torch_autocast.enabled", "torch_autocast",
        "zero_optimization", "zero_optimization.stage", "zero_optimization.offload_optimizer",
        "zero_optimization.offload_optimizer.device", "zero_optimization.offload_param.device", "optimizer",
        "zero_optimization.reduce_bucket_size", "zero_optimization.overlap_comm", "scheduler",
        "zero_optimization.contiguous_gradients",
        "gradient_clipping", "train_batch_size", "steps_per_print", "wall_clock_breakdown", "communication_data_type",
        "activation_checkpointing", "flops_profiler.enabled", "gradient_accumulation_steps", "prescale_gradients",
        "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "data_types.grad_accum_dtype", "unknown", "amp",
        "comms_logger.enabled", "sparse_gradients", "checkpoint.load_universal", "tensorboard.enabled"]  # fmt: skip
LEFT_OUT = {"amp"}  # needs Apex, and says so


def random_body(chance):
    body: dict = {"zero_optimization": {"stage": chance.randrange(4)}} if chance.random() < 0.8 else {}
    for _ in range(chance.randrange(1, 4)):
        branch = body
        *parents, last = chance.choice(KEYS).split(".")
        for name in parents:
            branch = branch.setdefault(name, {})
            if not isinstance(branch, dict):
                break
        else:
            branch[last] = chance.choice(VALUES)
    return body


def tried(path, body):
    """'' for an engine that was made, else the line for the user; other exceptions are faults of ours."""
    path.write_text(json.dumps(body))
    config = replace(RECIPES["tiny-tokens"], deepspeed=str(path))
    try:
        completed = zero_config(config, 1)
        require_precision(config.deepspeed, completed, "cpu")
        module = torch.nn.Linear(4, 4)
        try:
            engine.wrap(module, torch.optim.AdamW(module.parameters()), completed)
        except engine.REFUSALS as error:
            raise refused(config.deepspeed, error) from error
        return ""
    except ValueError as error:
        assert str(path) in str(error) or str(error).startswith("--"), (body, error)
        assert len(str(error).splitlines()) == 1, (body, error)
        return str(error)


@pytest.fixture
def one_rank(monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    usual = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in usual.items():
        monkeypatch.setenv(name, value)
    engine.start(0, 1.0)
    yield
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.timeout(4000)
def test_fuzz(one_rank, tmp_path, capfd):
    """GATO_FUZZ_SECONDS: how long; GATO_FUZZ_SEED."""
    seconds, chance = float(os.environ.get("GATO_FUZZ_SECONDS", "60")), random.Random(os.environ.get("GATO_FUZZ_SEED"))
    deadline, made, said = time.monotonic() + seconds, 0, 0
    while time.monotonic() < deadline:
        body = random_body(chance)
        if LEFT_OUT & set(body):
            continue
        outcome = tried(Path(tmp_path / "fuzz.json"), body)
        made, said = made + (not outcome), said + bool(outcome)
    with capfd.disabled():
        print(f"{made} engines, {said} refusals", end=" ")
    assert made and said
