"""Run by the launcher: a step whose gradients are not finite leaves weights and optimiser states as they are, and the
steps after it equal those of a run without it."""

import math
import os
import sys
from dataclasses import replace
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)

import torch

from shards.loader import Loader
from shards.stream import Stream, StreamConfig
from trainer import engine
from trainer.loss import Targets
from trainer.model import Gato, ModelConfig
from trainer.recipes import RECIPES

SMALL = ModelConfig(blocks=1, heads=2, width=32, feed_forward=64, head_size=16, patch_channels=16)


def main(folder: str, deepspeed: str) -> None:
    device = engine.start(0, 1.0)
    stream = Stream([folder], StreamConfig(sequence_length=120, mixture_block=8), seed=0)
    tiny = RECIPES["tiny-tokens"]
    data = replace(tiny.data, global_batch=4, micro_batch=1)
    config = replace(tiny, model=SMALL, deepspeed=deepspeed, data=data)
    runs = [
        engine.Engine(
            Gato(SMALL, stream.vocabulary).initialise(0), config, device, Targets((True,), text=False, text_shown=False)
        )
        for _ in range(2)
    ]
    plain, disturbed = runs
    batches = Loader(stream, 0, 4, 1, plain.rank, plain.world, threads=0)
    usual = disturbed.loss
    for step in range(4):
        batch = next(batches)
        if step in (0, 2):
            before = {name: tensor.clone() for name, tensor in disturbed.tensors().items()}
            disturbed.loss = lambda batch: usual(batch) * (math.nan if int(batch.sequence[0]) % 4 == 1 else 1.0)
            result = disturbed.train_step(step, batch, False)
            assert not result.applied and not math.isfinite(result.gradient_norm)
            disturbed.loss = usual
            after = disturbed.tensors()
            assert before and all(torch.equal(before[name], after[name]) for name in before)
        ours, theirs = (run.train_step(step, batch, False) for run in (disturbed, plain))
        assert ours == theirs and ours.applied
    assert disturbed.applied == plain.applied == 4
    print("a skipped step changed nothing", flush=True)
    torch.distributed.barrier()  # a rank that is gone may not be missed
    os._exit(0)  # as trainer/main.py ends: threads of gloo may abort an interpreter that goes down beside them


main(*sys.argv[-2:])
