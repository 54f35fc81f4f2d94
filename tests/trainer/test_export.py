"""Exports of weights that cannot be used are not made."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from schemas.dataset import DatasetError
from schemas.episode import ActionSpec, FieldSpec, TaskSpec
from schemas.vocabulary import PAPER
from trainer.model import Gato, ModelConfig
from trainer.model.export import ExportInfo, TrainingInfo, load_export, save_export

SMALL = ModelConfig(blocks=1, heads=2, width=32, feed_forward=64, head_size=16, patch_channels=16)


def test_one_value_that_is_not_finite_stops_an_export(tmp_path):
    weights = dict(Gato(SMALL, PAPER).initialise(0).state_dict())
    info = ExportInfo("gato.model", 1, SMALL, PAPER, PAPER.fingerprint, 120, 0, (), {}, TrainingInfo())
    save_export(tmp_path / "sound", weights, info)
    assert load_export(tmp_path / "sound")[1].weights_sha256
    name = list(weights)[3]
    weights[name] = weights[name].clone()
    weights[name].view(-1)[-1] = float("nan")
    with pytest.raises(ValueError, match=f"'{name}' holds values that are not finite"):
        save_export(tmp_path / "broken", weights, info)
    assert not (tmp_path / "broken").exists()


ARM = TaskSpec(
    "arm",
    "d4rl",
    (
        FieldSpec("dial", "discrete", (2,), (5,)),
        FieldSpec("eye", "image", (20, 20, 1)),
        FieldSpec("x", "continuous", (3,)),
    ),
    ActionSpec.continuous(-0.4, 0.4, 2),
)


def require(data, export=ARM):
    """What `export` says of a dataset that holds `data`."""
    info = ExportInfo("gato.model", 3, SMALL, PAPER, PAPER.fingerprint, 120, 0, (export,), {}, TrainingInfo())
    manifest = SimpleNamespace(
        vocabulary_fingerprint=PAPER.fingerprint, tasks=[SimpleNamespace(spec=data)], text_model=None
    )
    info.require_data(manifest, data, "shards/arm", "run/export")


def test_a_dataset_that_was_rebuilt_with_other_bounds_or_fields_is_refused():
    dial, eye, x = ARM.observation
    for change, words in (
        ({"action": ActionSpec.continuous(-2, 2, 2)}, r"action has high \(2.0, 2.0\), in the export \(0.4"),
        ({"action": ActionSpec.discrete(3, size=2)}, "action has "),
        ({"observation": (dial, eye, replace(x, shape=(4,)))}, r"field 'x' has shape \(4,\), in the export \(3,\)"),
        ({"observation": (dial, eye, replace(x, key="y"))}, "field 'x' is in the export alone"),
        ({"observation": (replace(dial, choices=(6,)), eye, x)}, r"field 'dial' has choices \(6,\), in the export"),
        ({"observation": (dial, replace(eye, resized=(48, 32)), x)}, "field 'eye' has fit resize, in the export pad"),
    ):
        with pytest.raises(
            DatasetError, match=f"shards/arm: task 'arm' is not what run/export was trained on: {words}"
        ):
            require(replace(ARM, **change))
    require(replace(ARM, name="unseen", action=ActionSpec.continuous(-2, 2, 2)))


def test_one_task_in_other_words_is_the_exports():
    dial, eye, x = ARM.observation
    words = replace(dial, choices=(5, 5), start=(0, 0)), replace(eye, resized=(32, 32), fit="pad"), x
    bounds = float(np.float32(-0.4)), float(np.float32(0.4))
    require(replace(ARM, observation=words[::-1], action=ActionSpec.continuous(*bounds, 2), max_episode_steps=9))
