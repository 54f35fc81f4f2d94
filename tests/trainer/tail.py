"""Run by the launcher: steps that end by trainer/tail.py equal those that end as DeepSpeed ends them, and the end of a
step asks no tensor for its value."""

import os
import sys
from dataclasses import replace
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from shards.loader import Loader
from shards.stream import Stream, StreamConfig
from trainer import engine, tail
from trainer.loss import Targets
from trainer.model import Gato, ModelConfig
from trainer.recipes import RECIPES

SMALL = ModelConfig(blocks=1, heads=2, width=32, feed_forward=64, head_size=16, patch_channels=16)


class NoValues(TorchDispatchMode):
    """Refuses what makes a GPU's host wait."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function is not torch.ops.aten._local_scalar_dense.default, "a tensor's value was asked for"
        return function(*args, **(kwargs or {}))


class Theirs:
    """DeepSpeed's own end of a step."""

    def __init__(self, zero, limit, all_gather):
        zero.check_grad_overflow = True


def align(ours: engine.Engine, theirs: engine.Engine) -> None:
    """Give theirs our weights: a last digit of float32 may round to another bfloat16, whose gradients differ more."""
    for slices in ("single_partition_of_fp32_groups", "bit16_groups_flat"):
        for mine, other in zip(getattr(ours.optimiser, slices), getattr(theirs.optimiser, slices)):
            other.data.copy_(mine.data)


def main(folder: str, deepspeed: str) -> None:
    device = engine.start(0, 1.0)
    stream = Stream([folder], StreamConfig(sequence_length=120, mixture_block=8), seed=0)
    tiny = RECIPES["tiny-tokens"]
    data = replace(tiny.data, global_batch=8, micro_batch=1)
    optimiser = replace(tiny.optimiser, gradient_clip=0.3, warmup_steps=2)
    config = replace(tiny, model=SMALL, deepspeed=deepspeed, data=data, optimiser=optimiser)
    runs = []
    for form in (tail.Tail, Theirs):
        engine.Tail = form
        gato = Gato(SMALL, stream.vocabulary).initialise(0)
        runs.append(engine.Engine(gato, config, device, Targets((True,), text=False, text_shown=False)))
    ours, theirs = runs
    usual = ours.optimiser.step

    def watched() -> None:
        with NoValues():
            usual()

    ours.optimiser.step = watched
    batches = Loader(stream, 0, 8, 1, ours.rank, ours.world, threads=0)
    clipped = 0
    for step in range(4):
        batch = next(batches)
        mine, other = (run.train_step(step, batch, False) for run in runs)
        assert mine.applied and abs(mine.gradient_norm / other.gradient_norm - 1) < 1e-5
        assert abs(mine.loss / other.loss - 1) < 1e-5
        clipped += mine.gradient_norm > 0.3
        mine, other = ours.tensors(), theirs.tensors()
        for name in mine:
            assert torch.allclose(mine[name], other[name], rtol=1e-3, atol=1e-5), name
        align(ours, theirs)
    assert clipped
    print("the same end of a step", flush=True)
    torch.distributed.barrier()
    os._exit(0)


main(*sys.argv[-2:])
