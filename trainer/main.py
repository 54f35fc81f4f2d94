"""`deepspeed trainer/main.py`: train Gato on every dataset that was built.

recipe + command line -> configuration -> process group -> trainer.loop: steps -> checkpoints, metrics, export

The command can be killed and run again: it goes on from its last checkpoint, at the
next sequence. SIGTERM and SIGINT end it behind a saved checkpoint.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import sys
from pathlib import Path

if __package__ in (None, ""):
    # Run as a file by the launcher: imports start at the root of the checkout, not at trainer/.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

# Threads that spin while they wait lose most of a core to any other busy process. Read when torch loads OpenMP.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.distributed as dist
import tyro

from schemas.dataset import DatasetError
from schemas.ranges import require
from schemas.vocabulary import SEED, VocabularyMismatch
from trainer import dry_run, engine
from trainer.config import TrainConfig, check
from trainer.lifecycle import Stop
from trainer.loop import started, train
from trainer.metrics import PEAK_TFLOPS
from trainer.recipes import RECIPES


def parse(arguments: list[str]) -> tuple[argparse.Namespace, TrainConfig]:
    """What is no setting of a recipe (recipe, local_rank, dry_run, world, tflops), and the configuration."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--recipe", choices=sorted(RECIPES), default="79m" if torch.cuda.is_available() else "tiny")
    first.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)
    first.add_argument("--dry-run", action="store_true")
    first.add_argument("--world", type=int, default=1)
    first.add_argument("--tflops", type=float, default=PEAK_TFLOPS["H100"])
    known, rest = first.parse_known_args(arguments)
    text = f"Train Gato. --recipe {{{','.join(RECIPES)}}} sets the defaults below; now: {known.recipe}."
    text += " --dry-run [--world DEVICES] [--tflops PEAK] shows what the run needs and starts nothing."
    config = tyro.cli(
        TrainConfig, default=RECIPES[known.recipe], args=rest, prog="deepspeed trainer/main.py", description=text
    )
    return known, config


def main() -> int:
    """The command; its exit status."""
    faulthandler.enable()  # a mapped shard that is cut while it is read ends the process: say where
    asked, config = parse(sys.argv[1:])
    stop = Stop()
    try:
        if asked.dry_run:
            require("world", asked.world, 1, 2**20)
            require("tflops", asked.tflops, 1e-3, 1e9)
        check(config, asked.world if asked.dry_run else int(os.environ.get("WORLD_SIZE", "1")))
        if asked.dry_run:
            dry_run.show(asked.recipe, started(asked.recipe, config)[0], SEED, asked.world, asked.tflops)
            return 0
        device = engine.start(asked.local_rank, config.run.patience_minutes)
        train(asked.recipe, config, device, stop)
    except (DatasetError, VocabularyMismatch, ValueError, OSError) as error:
        rank = dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))
        print(f"rank {rank}: {error}" if rank else f"error: {error}", file=sys.stderr)
        return 1
    except dist.DistError as error:
        remedy = "a rank was lost, and the same command goes on from the last checkpoint"
        if isinstance(error, dist.DistNetworkError):
            remedy = "another training may hold the port: give deepspeed --master_port another number"
        print(f"error: {str(error).splitlines()[0]}; {remedy}", file=sys.stderr)
        return 1
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # All is written and closed. What follows are destructors of communication threads, which now and then abort the
    # process, and the launcher takes that for a lost rank.
    os._exit(status)
