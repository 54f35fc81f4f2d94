"""The first part of `benchmarks.gpu`: whether the device computes what the plain forms do, and its ceilings.

attention by segments | as a mask in float32 -> differences of values and gradients, for each kernel that torch has
the head in bfloat16 | in float32 -> difference of the loss
a timestep replayed | launched kernel by kernel -> the same actions

It takes seconds, needs shards for the agent alone, and no simulator. A check that fails is a figure, not an error: the
parts after it run, and the tables name it.
"""

from __future__ import annotations

import statistics

import torch

from benchmarks.gpu_control import graph_as_plain, task_of
from benchmarks.gpu_timing import DEVICE, GPU, Figures, keep, timed
from shards.reader import Dataset
from trainer.loss import FusedCrossEntropy, cross_entropy
from trainer.model import PRESETS, Gato, segments

HEADS = ((16, 128), (24, 32))  # number and size: of 1.18b, of 79m


def checks(size: str, shards: list[str]) -> Figures:
    """All of them; `size` is that of the agent's model."""
    found = ceilings() | versions()
    keep(found)
    found["head: difference of the loss"] = head_difference()
    keep(found)
    for folder in shards:
        dataset = Dataset(folder)
        with DEVICE:
            model = Gato(PRESETS["tiny"], dataset.manifest.vocabulary).initialise(0).eval()
        task = task_of(dataset)
        name = dataset.manifest.tasks[task].spec.name
        found[f"{name}: graph as plain"] = graph_as_plain("tiny", dataset, task, model, 40)
        keep(found)
    for heads, head_size in HEADS:  # last: a kernel that fails may leave the process without its device
        found[f"attention, {heads} heads of {head_size}"] = attention(heads, head_size)
        found["failed"] = failed(found)
        keep(found)
    return found


def failed(found: Figures) -> list[str]:
    """Names of the checks that did not hold."""
    bad = [name for name, value in found.items() if name.endswith("as plain") and not value]
    bad += [n for n, v in found.items() if n.startswith("attention") and GPU and not v["flash"]["right"]]
    return bad + [n for n, v in found.items() if n.startswith("head") and not v < segments.TOLERANCE]


def versions() -> Figures:
    cuda, cudnn = torch.version.cuda or "", torch.backends.cudnn.version() if GPU else 0
    return {"cuda": cuda, "cudnn": cudnn, "attention_kernels": segments.candidates()}


def ceilings() -> Figures:
    """What the device does at its best here: TFLOP/s of a bfloat16 product, TB/s of a copy, read and written."""
    n = 8192 if GPU else 256
    a, b = (torch.randn(n, n, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    source = torch.randint(0, 256, (2**31 if GPU else 2**20,), dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    product = statistics.median(timed(lambda n: a @ b, 0.5, 20, 60)[5 if GPU else 0 :])
    copy = statistics.median(timed(lambda n: target.copy_(source), 0.5, 20, 60)[5 if GPU else 0 :])
    return {"best_tflops": 2e-12 * n**3 / product, "terabytes_per_second": 2e-12 * len(source) / copy}


def attention(heads: int, head_size: int, length: int = 1024, sequences: int = 8) -> Figures:
    """Milliseconds of each kernel, forward and backward; whether it is right; the one that is chosen."""
    if not GPU:
        length, sequences = 64, 2
    took = segments.decide(DEVICE, heads, head_size, length, sequences, compiled=GPU)
    found: Figures = {n: {"milliseconds": ms, "right": ms < float("inf")} for n, ms in took.items()}
    for one in found.values():
        if not one["right"]:
            one["milliseconds"] = None  # JSON has no infinity
    return found | {"chosen": segments.in_use()}


def head_difference(rows: int = 512, width: int = 768, size: int = 34_049) -> float:
    """Of the fused loss in bfloat16 from the plain one in float32, relative."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    hidden = torch.randn(rows, width, generator=generator, device=DEVICE)
    weight = 0.02 * torch.randn(size + 63 - (size - 1) % 64, width, generator=generator, device=DEVICE)
    targets = torch.randint(0, size, (rows, 1), generator=generator, device=DEVICE)
    ones = torch.ones(rows, 1, device=DEVICE)
    plain = float(cross_entropy(hidden @ weight[:size].T, targets, ones).sum())
    half = (hidden.bfloat16(), weight.bfloat16())
    return abs(float(FusedCrossEntropy.apply(*half, targets, ones, size, 4096)) - plain) / plain
