"""The command line of a training: what the trainer reads, and what `gato-train` checks before it starts a launcher.

    arguments -> parse: what is no setting, and TrainConfig

Invariant: nothing here imports DeepSpeed, so a mistake is shown before the seconds that a launcher takes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import tyro

from schemas.terminal import home_paths
from trainer.config import TrainConfig, load_config
from trainer.metrics import PEAK_TFLOPS
from trainer.recipes import RECIPES


def parse(arguments: list[str]) -> tuple[argparse.Namespace, TrainConfig]:
    """Arguments that are no settings (recipe, config, local_rank, dry_run, world, tflops), and the configuration.

    Raises:
        ValueError: --config names a file that is no configuration.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--recipe", choices=sorted(RECIPES), default="79m" if torch.cuda.is_available() else "tiny")
    first.add_argument("--config", type=Path)
    first.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)
    first.add_argument("--dry-run", action="store_true")
    first.add_argument("--world", type=int, default=1)
    first.add_argument("--tflops", type=float, default=PEAK_TFLOPS["H100"])
    known, rest = first.parse_known_args(home_paths(arguments))
    if known.config is None:
        default = RECIPES[known.recipe]
    else:
        known.recipe, default = load_config(known.config)
    text = f"Train Gato. --recipe {{{','.join(RECIPES)}}} sets the defaults below; now: {known.recipe}. "
    text += "--config RUN/config.json sets those of an earlier run instead. "
    text += "--dry-run [--world DEVICES] [--tflops PEAK] shows what the run needs and starts nothing."
    config = tyro.cli(TrainConfig, default=default, args=rest, prog="deepspeed trainer/main.py", description=text)
    return known, config
