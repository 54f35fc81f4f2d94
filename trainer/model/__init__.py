"""Gato as plain nn.Modules: presets, embedding, transformer with key/value cache, and their sum."""

from trainer.model.gato import Gato
from trainer.model.presets import PRESETS, ModelConfig

__all__ = ["PRESETS", "Gato", "ModelConfig"]
