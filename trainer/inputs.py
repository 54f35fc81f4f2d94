"""What a run starts from: its streams, and the exported model that it fine-tunes.

TrainConfig -> find_folders -> open_streams: training and held-out Stream
TrainConfig -> load_initial_model: shape and weights of an export
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

from schemas.dataset import DatasetError, load_manifest
from shards.folder import is_url
from shards.reader import Store
from shards.stream import Stream, find_datasets
from trainer import checkpoint
from trainer.config import DataConfig, TrainConfig
from trainer.model import Gato, ModelConfig
from trainer.recipes import RECIPES


def recipe_model(recipe: str) -> ModelConfig:
    """The model of a recipe; of a name that is none, the defaults."""
    return RECIPES[recipe].model if recipe in RECIPES else ModelConfig()


def load_initial_model(
    recipe: str, config: TrainConfig
) -> tuple[TrainConfig, tuple[Gato, checkpoint.ExportInfo] | None]:
    """For a run that starts from an export: the configuration with the export's model shape, and the export. Else the
    configuration as it is, and None.

    Raises:
        CheckpointError: there is no intact export.
        ValueError: a setting of the model contradicts it.
    """
    if not config.run.start_from:
        return config, None
    initial = checkpoint.load_export(Path(config.run.start_from))
    return replace(config, model=shape_of(initial[1].model, config, recipe)), initial


def shape_of(exported: ModelConfig, config: TrainConfig, recipe: str) -> ModelConfig:
    """The model of a run that starts from an export: the export's, with the run's own dropout and stochastic depth.
    ValueError names a setting of the command line that the export contradicts."""
    own, usual = config.model, recipe_model(recipe)
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


def open_streams(config: TrainConfig) -> tuple[Stream, Stream | None]:
    """The training stream, and the held-out stream if there are held-out episodes. DatasetError says what is wrong."""
    data = config.data
    folders = find_folders(data)
    store = Store(data.cache)
    stream = Stream(folders, data.stream, config.seed, False, data.verify, data.on_bad_shard, store)
    longest = min(data.stream.sequence_length, config.model.local_positions)
    for name, timeline in zip(stream.tasks, stream.timelines):
        if timeline.layout.length > longest:
            raise DatasetError(
                f"task '{name}': a timestep has {timeline.layout.length} tokens, more than the sequence length "
                f"{data.stream.sequence_length} or the {config.model.local_positions} local positions; raise "
                "--data.stream.sequence-length or --model.local-positions"
            )
    if not any(t.dataset.manifest.tasks[t.task].held_out_episodes for t in stream.timelines):
        return stream, None
    return stream, Stream(folders, data.stream, config.seed, True, "size", data.on_bad_shard, store)
