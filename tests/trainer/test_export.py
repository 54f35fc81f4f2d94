"""Exports of weights that cannot be used are not made."""

import pytest

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
