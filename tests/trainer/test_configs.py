"""Every DeepSpeed configuration parses; offload saves and resumes; every recipe is a run that can be made."""

import json
from dataclasses import fields, is_dataclass, replace

import numpy as np
import pytest
from deepspeed.launcher.runner import fetch_hostfile
from deepspeed.runtime.config import DeepSpeedConfig
from safetensors.numpy import load_file

from tests.trainer.launch import losses, train
from trainer.config import RANGES, check, differences, from_dict, to_dict
from trainer.engine import CONFIGS, config_names, read_config, zero_config
from trainer.recipes import RECIPES

NAMES = config_names()


def numbers(config, prefix=""):
    """Dotted names of all settings that are numbers."""
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            yield from numbers(value, f"{prefix}{field.name}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield prefix + field.name


def test_every_number_has_a_range():
    """Those of the stream and the cache are checked where they are used."""
    found = {name for name in numbers(RECIPES["tiny"]) if not name.startswith(("data.stream.", "data.cache."))}
    assert found <= {name for name, _, _ in RANGES}, found - {name for name, _, _ in RANGES}
    for name in ("patch_groups", "local_positions", "patch_channels"):
        for wrong in (0, 10**30):
            config = replace(RECIPES["tiny"], model=replace(RECIPES["tiny"].model, **{name: wrong}))
            with pytest.raises(ValueError, match=f"--model.{name.replace('_', '-')} {wrong}: must be"):
                check(config, 1)


@pytest.mark.parametrize("name", NAMES)
def test_every_configuration_parses_and_is_listed(name):
    batch = {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 8}
    parsed = DeepSpeedConfig(read_config(name) | batch)
    assert parsed.zero_optimization_stage == int(name[4])
    lower = parsed.bfloat16_config.enabled or parsed.torch_autocast_enabled
    assert lower != name.endswith("_cpu")
    assert (parsed.zero_config.offload_optimizer is not None) == ("offload" in name)
    assert f"`{name}`" in (CONFIGS / "README.md").read_text()


def test_the_hostfile_is_one():
    assert fetch_hostfile(str(CONFIGS / "hostfile.example")) == {f"node-{n}": 8 for n in range(1, 5)}


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_survives_json_is_in_range_and_fits_its_configuration(name):
    config = RECIPES[name]
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config
    processes = {"1.18b-8gpu": 8, "1.18b-nodes": 32}.get(name, 1)
    check(config, processes)
    assert config.deepspeed in NAMES and zero_config(config, processes)


@pytest.mark.parametrize(
    ("part", "field", "value", "world"),
    [
        ("optimiser", "peak_lr", float("nan"), 1),
        ("optimiser", "peak_lr", -1.0, 1),
        ("optimiser", "beta_1", 1.5, 1),
        ("model", "dropout", 1.0, 1),
        ("model", "blocks", 0, 1),
        ("model", "text_gates", True, 1),
        ("loss", "soft_bins", -3.0, 1),
        ("run", "log_every", 0, 1),
        ("data", "global_batch", 17, 1),
        ("data", "micro_batch", 16, 3),
    ],
)
def test_settings_that_make_no_sense_are_named(part, field, value, world):
    tiny = RECIPES["tiny-tokens"]
    config = replace(tiny, **{part: replace(getattr(tiny, part), **{field: value})})
    with pytest.raises(ValueError, match=f"--{part}.{field.replace('_', '-')}|--data.global-batch"):
        check(config, world)


def test_a_batch_that_does_not_divide_is_refused_with_a_size_that_does():
    tiny = RECIPES["tiny"]
    with pytest.raises(ValueError, match="384: must be a multiple .* 2 x 100; give --data.micro-batch 96$"):
        check(replace(tiny, data=replace(tiny.data, micro_batch=100)), 2)
    check(replace(tiny, data=replace(tiny.data, micro_batch=96)), 2)
    with pytest.raises(ValueError, match="5 x 96; choose another batch or number of processes"):
        check(tiny, 5)
    with pytest.raises(ValueError, match="--processes 0: must be from 1"):
        check(tiny, 0)


def test_differences_name_setting_and_both_values():
    ours = {"config": {"optimiser": {"peak_lr": 1.0}, "seed": 1}, "stream": "a"}
    theirs = {"config": {"optimiser": {"peak_lr": 2.0}, "seed": 1}, "stream": "a", "start_from": "b"}
    assert differences(ours, theirs) == ["optimiser.peak_lr 1.0, there 2.0", "start_from None, there b"]


@pytest.mark.process
def test_offload_saves_resumes_bit_for_bit_and_learns_the_same(hopper, pong, tmp_path):
    data, how = [hopper, pong], ("--deepspeed", "zero3_offload_cpu")
    train(tmp_path / "whole", data, *how, processes=2)
    train(tmp_path / "parts", data, *how, processes=2, steps=4)
    assert "resuming at step 4" in train(tmp_path / "parts", data, *how, processes=2).stdout
    train(tmp_path / "plain", data, "--deepspeed", "zero0_cpu")
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    assert losses(tmp_path / "whole") == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)
    whole, parts = (load_file(tmp_path / name / "export" / "weights.safetensors") for name in ("whole", "parts"))
    assert all(np.array_equal(whole[name], parts[name]) for name in whole)


@pytest.mark.parametrize(
    ("field", "value", "setting"),
    [
        ("train_micro_batch_size_per_gpu", 3, "--data.micro-batch"),
        ("gradient_clipping", 5.0, "--optimiser.gradient-clip"),
        ("scheduler", {"type": "WarmupLR"}, "--optimiser"),
    ],
)
def test_a_file_of_ones_own_does_not_say_what_the_run_says(field, value, setting, tmp_path):
    path = tmp_path / "own.json"
    own = replace(RECIPES["tiny-tokens"], deepspeed=str(path))
    path.write_text(json.dumps({"zero_optimization": {"stage": 1}, "train_batch_size": "auto"}))
    assert zero_config(own, 1)["train_batch_size"] == own.data.global_batch
    path.write_text(json.dumps({"zero_optimization": {"stage": 1}, field: value}))
    with pytest.raises(ValueError, match=f"own.json: field '{field}' is set by {setting}"):
        zero_config(own, 1)
