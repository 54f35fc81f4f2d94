"""Inputs of a run: its streams, and the exported model that it fine-tunes.

TrainConfig -> find_folders -> open_streams: training and held-out Stream
TrainConfig -> load_initial_model: shape and weights of an export
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from schemas.dataset import DatasetError, load_manifest
from shards.cache import Cache
from shards.folder import is_url
from shards.reader import Store
from shards.stream import Stream, find_datasets
from trainer.checkpoint import CheckpointError
from trainer.config import DataConfig, TrainConfig
from trainer.deepspeed_file import config_names, cpu_twin
from trainer.loss import LossConfig
from trainer.model import Gato, ModelConfig
from trainer.model.export import ExportInfo, download_export, load_export
from trainer.recipes import RECIPES


def recipe_of(name: str) -> TrainConfig:
    """The configuration of a recipe; of a name that is none, the defaults."""
    return RECIPES.get(name, TrainConfig())


def for_this_machine(recipe: str, config: TrainConfig) -> TrainConfig:
    """On a machine without a GPU, the CPU form of the recipe's own DeepSpeed configuration, which computes in float32;
    one that was given by name stays."""
    if config.deepspeed != recipe_of(recipe).deepspeed:
        return config
    return replace(config, deepspeed=cpu_twin(config.deepspeed, config_names(), torch.cuda.is_available()))


def load_initial_model(recipe: str, config: TrainConfig) -> tuple[TrainConfig, tuple[Gato, ExportInfo] | None]:
    """For a run that starts from an export: the configuration with the export's model shape, sequence length and loss,
    and the export. Else the configuration as it is, and None.

    Raises:
        CheckpointError: there is no intact export. DatasetError: the store of its URL does not answer.
        ValueError: a setting of the model contradicts it.
    """
    if not config.run.start_from:
        return config, None
    place = config.run.start_from
    folder = download_export(place, Cache(config.data.cache)) if is_url(place) else Path(place)
    initial = load_export(folder)
    return adopt(config, recipe_of(recipe), initial[1]), initial


def adopt(config: TrainConfig, usual: TrainConfig, exported: ExportInfo) -> TrainConfig:
    """A configuration with what an export was trained with, wherever it has the `usual` value of its recipe: the
    model's shape, the sequence length and the loss. ValueError for a model's setting that contradicts the export."""
    stream, loss = config.data.stream, config.loss
    if stream.sequence_length == usual.data.stream.sequence_length:
        stream = replace(stream, sequence_length=exported.sequence_length)
    if loss == usual.loss and (trained := loss_of(exported)) is not None:
        loss = replace(trained, chunk=loss.chunk)  # which is about memory
    model = shape_of(exported.model, config, usual.model)
    return replace(config, model=model, loss=loss, data=replace(config.data, stream=stream))


def loss_of(exported: ExportInfo) -> LossConfig | None:
    """The loss that an export was trained with; that of its recipe in an older export. None if neither is known."""
    known, recipe = exported.training.loss, RECIPES.get(exported.training.recipe)
    if known is None:
        return recipe.loss if recipe else None
    try:
        return LossConfig(**known)
    except TypeError:
        raise CheckpointError(
            "the export's loss has settings that this package does not know; install the version that wrote it"
        ) from None


def adopted(config: TrainConfig) -> dict[str, Any]:
    """Settings that `adopt` may change, by name."""
    loss = {f"loss.{name}": value for name, value in asdict(config.loss).items()}
    return asdict(config.model) | {"sequence_length": config.data.stream.sequence_length} | loss


def shape_of(exported: ModelConfig, config: TrainConfig, usual: ModelConfig) -> ModelConfig:
    """The model of a run that starts from an export: the export's, with the run's own dropout and stochastic depth.
    ValueError names a setting of the command line that the export contradicts."""
    own = config.model
    model = replace(exported, dropout=own.dropout, stochastic_depth=own.stochastic_depth)
    for name, value in asdict(own).items():
        if value not in (getattr(usual, name), getattr(model, name)):
            raise ValueError(
                f"--model.{name.replace('_', '-')} {value}: the export {config.run.start_from} has "
                f"{getattr(model, name)}; leave it out, or train from the start"
            )
    return model


def find_folders(data: DataConfig) -> list[str]:
    """The dataset folders or URLs of a run. DatasetError where there are none."""
    folders = list(data.folders) or find_datasets(data.root)
    if not folders:
        raise DatasetError(
            f"{data.root}: no finished dataset there; build one with python -m etl.build, or name --data.folders"
        )
    return folders


def require_datasets(data: DataConfig) -> None:
    """DatasetError names a dataset on this machine that is missing or not finished; URLs are not looked at."""
    if data.folders or not is_url(data.root):
        for folder in find_folders(data):
            if not is_url(folder):
                load_manifest(Path(folder))


def longest_timestep(config: TrainConfig) -> int:
    """Tokens that a timestep may have at most."""
    return min(config.data.stream.sequence_length, config.model.local_positions)


def open_streams(config: TrainConfig) -> tuple[Stream, Stream | None]:
    """The training stream, and the held-out stream if there are held-out episodes to be evaluated. DatasetError says
    what is wrong."""
    data = config.data
    folders = find_folders(data)
    store = Store(data.cache)
    stream = Stream(folders, data.stream, config.seed, False, data.verify, data.on_bad_shard, store)
    for name, timeline in zip(stream.tasks, stream.timelines):
        if timeline.layout.length > longest_timestep(config):
            raise DatasetError(
                f"task '{name}': a timestep has {timeline.layout.length} tokens, more than the sequence length "
                f"{data.stream.sequence_length} or the {config.model.local_positions} local positions; raise "
                "--data.stream.sequence-length or --model.local-positions"
            )
    known = any(t.dataset.manifest.tasks[t.task].held_out_episodes for t in stream.timelines)
    if not known or not config.run.evaluate_sequences:
        return stream, None
    return stream, Stream(folders, data.stream, config.seed, True, "size", data.on_bad_shard, store)


def text_model_of(stream: Stream) -> bytes | None:
    """The text model of the tasks that are trained on; None where none of them holds text. DatasetError where it is
    missing or damaged."""
    with_text = (timeline.dataset for timeline in stream.timelines if timeline.layout.text)
    return next((dataset.text_model() for dataset in with_text), None)
