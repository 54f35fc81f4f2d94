"""Named recipes: one configuration for one size and hardware, each with a header.

    deepspeed trainer/main.py --recipe NAME [--optimiser.peak-lr 3e-4 ...]

A figure is measured where docs/log.md or docs/results/ has it, and "not yet" otherwise.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from shards.stream import StreamConfig
from trainer.config import DataConfig, OptimiserConfig, RunConfig, TrainConfig
from trainer.loss import LossConfig
from trainer.model.presets import PRESETS

# tiny
# command   deepspeed trainer/main.py --recipe tiny
# hardware  2 CPU cores, no GPU
# hours     see docs/log.md for the measured steps a minute
# expected  see docs/log.md
TINY = TrainConfig(
    steps=20_000,
    model=PRESETS["tiny"],
    loss=LossConfig(soft_bins=24.0, softmax="targets"),
    optimiser=OptimiserConfig(peak_lr=2e-3, warmup_steps=400, decay_steps=20_000),
    data=DataConfig(global_batch=16, micro_batch=16, stream=StreamConfig(sequence_length=256)),
    run=RunConfig(output=Path("runs/tiny")),
)

# quickstart: `tiny`, shortened to fit `make quickstart`
# command   make quickstart
# hardware  2 CPU cores, no GPU
# hours     about 0.1
# expected  see docs/log.md
QUICKSTART = replace(
    TINY,
    steps=500,
    optimiser=replace(TINY.optimiser, decay_steps=500, warmup_steps=50),
    data=replace(
        TINY.data,
        root="data/quickstart/shards",
        global_batch=16,
        stream=replace(TINY.data.stream, weights={"hopper-expert-v4": 3.0, "freeway-run1": 1.0}),
    ),
    run=RunConfig(output=Path("runs/quickstart"), evaluate_every=100, save_every=200),
)


def _paper(name: str, deepspeed: str, micro_batch: int) -> TrainConfig:
    return TrainConfig(
        model=PRESETS[name],
        deepspeed=deepspeed,
        data=DataConfig(micro_batch=micro_batch),
        run=RunConfig(output=Path(f"runs/{name}"), evaluate_every=1000, save_every=1000),
    )


# 79m, 364m, 1.18b: the paper's shapes and schedule (batch 512 x 1024 tokens, 1M steps)
# command   deepspeed trainer/main.py --recipe 79m
# hardware  one GPU of 80 GB
# hours     not yet
# expected  not yet
RECIPES = {
    "tiny": TINY,
    "quickstart": QUICKSTART,
    "79m": _paper("79m", "zero1", 32),
    "364m": _paper("364m", "zero1", 16),
    "1.18b": _paper("1.18b", "zero1", 8),
}
