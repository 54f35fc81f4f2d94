"""Needs of a run: parameters, memory per device, FLOPs, days, data. Arithmetic only; nothing is run.

    TrainConfig, vocabulary, world size -> shapes on the `meta` device -> bytes and FLOPs (Estimate) -> tables

The formulas describe the tensors of a real engine between a step's last backward and its update; they are verified by
`tests/trainer/test_dry_run.py` (within 3 %; activations within 15 %). Left out is what lives shorter: buckets of the
reduction (up to `reduce_bucket_size` elements, 500 million by DeepSpeed's default), the float32 copy of a rank's
gradients during the update, the allocator's fragments.

Invariant: `estimate` is a pure function.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from schemas.dataset import DatasetError
from schemas.vocabulary import Vocabulary
from shards.reader import Store
from shards.stream import Stream
from trainer.config import TrainConfig, remarks
from trainer.engine import zero_config
from trainer.inputs import find_folders, longest_timestep
from trainer.loss import LossConfig, action_ids
from trainer.model import Gato, ModelConfig

STAGES = ("0", "1", "2", "3", "3 + offload")
PERSISTENT = 100_000  # DeepSpeed's stage3_param_persistence_threshold: every rank keeps smaller parameters complete
STEPS, DAYS = 1_000_000, 4.0  # the paper's run, §2.3
DAY = 86_400.0
ATARI_PATCHES = (
    20 / 22
)  # share of a sequence's tokens that are patches, in a task of 80x64 frames: the largest of our tasks


@dataclass(frozen=True)
class Memory:
    """Bytes on the device of the rank that needs most. `optimiser`: both moments and the float32 masters; `head`:
    gradient of the head and its buffer of logits; `host`: bytes in host memory."""

    parameters: int
    gradients: int
    optimiser: int
    activations: int
    head: int
    host: int = 0

    @property
    def device(self) -> int:
        return self.parameters + self.gradients + self.optimiser + self.activations + self.head


@dataclass(frozen=True)
class Estimate:
    """Needs of a configuration at a world size. `memory`: by the names of STAGES; rates: tokens/s of all devices."""

    world: int
    bytes_per_number: int
    counts: dict[str, int]
    memory: dict[str, Memory]
    flops_per_token: float
    tokens_per_step: int
    steps: int
    supervised_share: float

    def required_rate(self, steps: int = STEPS, days: float = DAYS) -> float:
        """Tokens/s needed for `steps` steps in `days` days."""
        return steps * self.tokens_per_step / (days * DAY)

    def days(self, rate: float) -> float:
        """Days of the recipe's steps at a rate in tokens/s."""
        return self.steps * self.tokens_per_step / rate / DAY

    def rate(self, mfu: float, tflops: float) -> float:
        """Tokens/s of all devices at a share `mfu` of the peak of `tflops` TFLOP/s per device."""
        return mfu * tflops * 1e12 * self.world / self.flops_per_token


def estimate(
    config: TrainConfig, vocabulary: Vocabulary, world: int, supervised: float = 0.25, pictures: float = ATARI_PATCHES
) -> Estimate:
    """Needs of a run on `world` devices. `supervised`, `pictures`: shares of the tokens that carry loss, and that are
    patches. Activation checkpointing is not counted."""
    with torch.device("meta"):
        model = Gato(config.model, vocabulary)
    length, micro = config.data.stream.sequence_length, config.data.micro_batch
    e = 2 if lower_precision(zero_config(config, world)) else 4
    tokens = micro * length
    masked = e == 4  # in two bytes, on a GPU, attention takes segments instead of a mask
    live = activations(config.model, micro, length, int(tokens * pictures), int(tokens * supervised), e, masked)
    head = head_bytes(config.loss, vocabulary, config.model.width, int(tokens * supervised), e, text=True)
    memory = {stage: states(model, stage, world, e) for stage in STAGES}
    return Estimate(
        world=world,
        bytes_per_number=e,
        counts=model.parameter_counts(),
        memory={stage: Memory(**part, activations=live, head=head) for stage, part in memory.items()},
        flops_per_token=model.flops_per_token(length),
        tokens_per_step=config.data.global_batch * length,
        steps=config.steps,
        supervised_share=supervised,
    )


def lower_precision(body: dict[str, Any]) -> bool:
    """True if a DeepSpeed configuration keeps its weights in two bytes."""
    return bool(body.get("bf16", {}).get("enabled"))


def states(model: Gato, stage: str, world: int, e: int) -> dict[str, int]:
    """Bytes of parameters, gradients and optimiser states of the rank that needs most, `e` bytes per number.

    ZeRO 0: everything complete; in float32 the masters are the parameters. 1, 2: gradients are freed as they are
    reduced, except those of parameters that the rank's slice touches. 3: slices, and small parameters complete.
    Offload: only parameters in use (the head and two blocks) are on the device; the rest is in host memory."""
    sizes = [p.numel() for p in model.parameters()]
    N, slice_ = sum(sizes), -(-sum(sizes) // world)
    small = sum(size for size in sizes if size < PERSISTENT)
    if stage == "0":
        return {"parameters": N * e, "gradients": N * e, "optimiser": N * (8 if e == 4 else 12)}
    if stage in ("1", "2"):
        return {"parameters": N * e, "gradients": touched(model, world) * e, "optimiser": 12 * slice_}
    part = {"parameters": (slice_ + small) * e, "gradients": slice_ * e, "optimiser": 12 * slice_}
    if stage == "3":
        return part
    block = sum(p.numel() for p in model.blocks[0].parameters())
    in_use = (model.tokens.weight.numel() + 2 * block + small) * e
    return {"parameters": in_use, "gradients": block * e, "optimiser": 0, "host": slice_ * (2 * e + 12)}


def touched(model: Gato, world: int) -> int:
    """Elements of all parameters that a rank's slices of the two flat groups touch: the largest count of any rank."""
    most = [0] * world
    for matrices in (True, False):
        sizes = [p.numel() for p in model.parameters() if (p.ndim >= 2) == matrices]
        width, first = -(-sum(sizes) // world), 0
        for size in sizes:
            for rank in range(first // width, min(world - 1, (first + size - 1) // width) + 1):
                most[rank] += size
            first += size
    return max(most)


def activations(
    config: ModelConfig, sequences: int, length: int, patches: int, supervised: int, e: int, masked: bool
) -> int:
    """Bytes that a micro-batch's graph keeps for the backward pass, `e` bytes per number. `masked`: some sequence has
    two segments, so attention keeps a mask of numbers in each block."""
    W, F, H = config.width, config.feed_forward, config.heads
    inner, tokens = H * config.head_size, sequences * length
    forward = (2 if config.feed_forward_form == "gelu" else 4) * F
    attention = (4 + 2 * (config.rotary != "none") + 2 * config.qk_norm) * inner
    per_token = 4 * W + attention + forward
    block = tokens * (per_token * e + 4 * (4 + H)) + (sequences * length * length * e if masked else 0)
    patch = patches * (256 * config.patch_channels + 768) * e
    return config.blocks * block + patch + (2 * tokens + supervised) * W * e + 25 * tokens


def head_bytes(config: LossConfig, vocabulary: Vocabulary, width: int, supervised: int, e: int, text: bool) -> int:
    """Bytes of the gradient of the head's rows and of the logits in memory at a time."""
    ids = vocabulary.size if text or config.softmax == "vocabulary" else action_ids(vocabulary).size
    rows = min(config.chunk, supervised) if config.chunk else 2 * supervised
    return ids * (rows + (width if config.chunk else 0)) * e


def checkpoint_bytes(config: TrainConfig, parameters: int) -> tuple[int, int]:
    """Bytes of a checkpoint (weights and both moments in float32), and of all that a run keeps, one being written
    included."""
    one = 12 * parameters
    return one, one * (config.run.keep_last + config.run.keep_best + 1)


def show_data(config: TrainConfig, console: Console) -> None:
    """Print what the run would read: each task's timestep and epochs, and bytes in host memory. DatasetError where a
    dataset cannot be opened."""
    data, longest = config.data, longest_timestep(config)
    stream = Stream(find_folders(data), data.stream, config.seed, False, "size", data.on_bad_shard, Store(data.cache))
    table = Table(title=f"data: epochs in {config.steps:,} steps of {data.global_batch} sequences")
    for column in ("task", "tokens per timestep", "fits", "timesteps", "epochs"):
        table.add_column(column, justify="left" if column == "task" else "right")
    seen = stream.sampler.seen(config.steps * data.global_batch).tolist()
    for name, timeline, count in zip(stream.tasks, stream.timelines, seen):
        fits = "yes" if timeline.layout.length <= longest else f"no, at most {longest}"
        row = (f"{timeline.layout.length:,}", fits, f"{timeline.total:,}", f"{count / timeline.windows:,.2f}")
        table.add_row(name, *row)
    console.print(table)
    mapped = sum(task.bytes for dataset in stream.datasets for task in dataset.manifest.tasks)
    index = sum(dataset.index.nbytes for dataset in stream.datasets)
    console.print(
        f"host memory: {index / 1e6:,.1f} MB of index per process; {mapped / 1e6:,.1f} MB of shards are mapped, which "
        "the processes of a machine share and the system takes back when memory is short"
    )


def show(name: str, config: TrainConfig, vocabulary: Vocabulary, world: int, tflops: float) -> None:
    """Print tables of the estimate. `tflops`: peak TFLOP/s of one device in bfloat16."""
    found, console = estimate(config, vocabulary, world), Console()
    counts = ", ".join(f"{kind} {count:,}" for kind, count in found.counts.items())
    console.print(f"recipe {name}, {world} device(s), ZeRO configuration {config.deepspeed}")
    console.print("arithmetic, not measured on any device")
    console.print(f"parameters: {counts}")
    table = Table(
        title=f"GB per device, {found.bytes_per_number} bytes per number, micro-batch {config.data.micro_batch}"
    )
    columns = ("ZeRO", "parameters", "gradients", "optimiser", "activations", "head", "device", "host")
    for column in columns:
        table.add_column(column, justify="right")
    for stage, memory in found.memory.items():
        values = [getattr(memory, column) for column in columns[1:]]
        table.add_row(stage, *(f"{value / 1e9:.2f}" for value in values))
    console.print(table)
    times = Table(
        title=f"time; {found.flops_per_token / 1e9:.2f} GFLOP per token, {found.tokens_per_step:,} tokens per step"
    )
    for column in ("at", "tokens/s", f"days for {found.steps:,} steps"):
        times.add_column(column, justify="right")
    rates = {"100,000 tokens/s": 1e5} | {
        f"MFU {share:.0%} of {tflops:g} TFLOP/s per device": found.rate(share, tflops) for share in (0.3, 0.4, 0.5)
    }
    for label, rate in rates.items():
        times.add_row(label, f"{rate:,.0f}", f"{found.days(rate):,.2f}")
    required = found.required_rate()
    times.add_row(f"{STEPS:,} steps in {DAYS:g} days", f"{required:,.0f}", f"{found.days(required):,.2f}")
    console.print(times)
    one, kept = checkpoint_bytes(config, found.counts["total"])
    console.print(f"checkpoint: {one / 1e6:,.1f} MB; up to {kept / 1e6:,.1f} MB of disk with those that are kept")
    console.print(
        f"activations: a micro-batch of 80x64 frames, loss on {found.supervised_share:.0%} of the tokens, in float32 a "
        "mask in every block. Not counted: what activation checkpointing saves, buckets of the reduction (500 million "
        "numbers by default), the float32 gradients of an update, fragments, the CUDA context"
    )
    for line in remarks(config):
        console.print(f"warning: {line}", soft_wrap=True, highlight=False)
    try:
        show_data(config, console)
    except DatasetError as error:
        if config.data.folders:
            raise
        console.print(f"data: not shown: {error}", soft_wrap=True, highlight=False)
