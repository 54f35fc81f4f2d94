"""Training as `benchmarks.gpu` measures it, each part in a process of its own: arguments in, figures out.

shards -> Stream, Loader -> trainer.engine (DeepSpeed) | a bare loop | Hugging Face's GPT-2 under DeepSpeed -> rates

A step is eight micro-batches. Rates are of the median step; the device is waited for at the end of each, as the trainer
does. Sides that are compared have the same tokens, targets, micro-batches and accumulation. Models are built on the
device. Without an accelerator all runs on the CPU, which tests these lines and measures nothing of interest.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.flops import by_convention, executed, head_ids
from benchmarks.gpu_timing import DEVICE, GPU, Figures, forget_peak, join_alone, keep, peaks, rates, timed
from shards.batch import Batch
from shards.loader import Loader
from shards.stream import Stream
from trainer import engine
from trainer.config import TrainConfig
from trainer.dry_run import estimate
from trainer.loss import Objective, targets_of
from trainer.model import Gato, segments
from trainer.optimiser import make_optimiser
from trainer.recipes import RECIPES

MICRO = {"tiny": 2, "79m": 32, "364m": 16, "1.18b": 8}
"""Sequences per micro-batch; the recipes' own where a size has one GPU of 80 GB."""
ACCUMULATION = 8
WARM = 2 if GPU else 1
SECONDS, LEAST, MOST = 12.0, 4, 16  # of a measurement, and its steps


def configured(size: str, shards: list[str], micro: int = 0) -> TrainConfig:
    recipe, micro = RECIPES[size], micro or MICRO[size]
    data = replace(recipe.data, folders=tuple(shards), micro_batch=micro, global_batch=ACCUMULATION * micro)
    return replace(recipe, data=data)


def steps_of(stream: Stream, config: TrainConfig, count: int = 2) -> list[list[Batch]]:
    """Some steps' micro-batches as numpy arrays, read before anything is timed."""
    micro = config.data.micro_batch
    return [[stream.batch((ACCUMULATION * n + m) * micro, micro) for m in range(ACCUMULATION)] for n in range(count)]


def counted(config: TrainConfig, stream: Stream, steps: list[list[Batch]], seconds: list[float]) -> Figures:
    """Rates of a Gato, or of a peer on the same tokens."""
    length = config.data.stream.sequence_length
    batches = [batch for step in steps for batch in step]
    ids = head_ids(config.loss, stream.vocabulary, targets_of(stream).text)
    flops = by_convention(config.model, stream.vocabulary, length), executed(config.model, ids, batches)
    share = sum(len(batch.predict_index) for batch in batches) / sum(batch.tokens.size for batch in batches)
    found = rates(config.data.global_batch * length, *flops, seconds)
    return found | {"micro_batch": config.data.micro_batch, "supervised_share": share}


def train(
    size: str, shards: list[str], stage: str, micro: int = 0, compiled: bool = False, checkpointed: bool = False,
    kernels: bool = False,
) -> Figures:  # fmt: skip
    """The trainer's own engine and loader, without evaluation and saves; with `kernels` a step's kernels too."""
    device, config = join_alone(), configured(size, shards, micro)
    zero = f"zero{stage}" + ("" if GPU else "_cpu")
    config = replace(config, deepspeed=zero, compile=compiled and GPU, activation_checkpointing=checkpointed)
    stream, data = Stream(shards, config.data.stream, config.seed), config.data
    with device:
        gato = Gato(config.model, stream.vocabulary).initialise(config.seed)
    run = engine.Engine(gato, config, device, targets_of(stream))
    loader, losses = Loader(stream, 0, data.global_batch, data.micro_batch, pinned=GPU), []

    def step(n: int) -> None:
        losses.append(run.train_step(n, next(loader), False).loss)

    warm = timed(step, 0.0, WARM, WARM)
    forget_peak()
    loader.metrics()
    seconds = timed(step, SECONDS, LEAST, MOST, WARM)
    waited, memory = loader.metrics()["data/wait_share"], peaks()
    named = {"3_offload": "3 + offload"}.get(stage, stage)
    sample = steps_of(stream, config, 1)
    pictures = sum(len(batch.patches) for batch in sample[0]) / (data.global_batch * data.stream.sequence_length)
    expected = estimate(config, stream.vocabulary, 1, pictures=pictures).memory[named]
    found = keep(
        counted(config, stream, sample, seconds)
        | {"wait_share": waited, "losses": [round(loss, 4) for loss in losses], "warm_up_seconds": sum(warm)}
        | {"form": "compiled" if compiled else "checkpointed" if checkpointed else "plain"}
        | {"attention": segments.in_use()}
        | ({} if checkpointed else {"expected_gigabytes": expected.device / 1e9})
        | memory
    )
    if kernels:
        found |= top_kernels(partial(step, len(losses)))
    loader.close()
    return found


def top_kernels(step: Callable[[], object], count: int = 14) -> Figures:
    """The kernels that take most of a step: name, share of the device's time, calls; and the device's share of it."""
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if GPU else [])]
    with profile(activities=kinds) as found:
        seconds = timed(lambda n: step(), 0.0, 1, 1)
    kind = "self_device_time_total" if GPU else "self_cpu_time_total"
    events = sorted(found.key_averages(), key=lambda event: -getattr(event, kind))
    total = sum(getattr(event, kind) for event in events)
    top = [(event.key[:90], round(getattr(event, kind) / total, 4), event.count) for event in events[:count]]
    return {"kernels": top, "milliseconds": total / 1e3, "profiled_step_ms": 1e3 * seconds[0]}


def bare(size: str, shards: list[str]) -> Figures:
    """A loop without a framework: float32 weights, bfloat16 products, fused AdamW, blocks compiled."""
    config = configured(size, shards)
    stream = Stream(shards, config.data.stream, config.seed)
    steps = steps_of(stream, config)
    step = bare_step(config, stream, steps)
    timed(step, 0.0, WARM, WARM)
    forget_peak()
    seconds = timed(step, SECONDS, LEAST, MOST)
    return counted(config, stream, steps, seconds) | {"form": "compiled" if GPU else "plain"} | peaks()


def bare_step(config: TrainConfig, stream: Stream, steps: list[list[Batch]]) -> Callable[[int], object]:
    with DEVICE:
        gato = Gato(config.model, stream.vocabulary).initialise(0).train()
    objective = Objective(gato, config.loss, targets_of(stream)).to(DEVICE)
    engine.prepare_blocks(gato, GPU, False)
    segments.use(segments.named(config.model.head_size) or "flash")
    optimiser = make_optimiser(gato, config.optimiser)

    def step(n: int) -> None:
        batches = steps[n % len(steps)]
        supervised = sum(len(batch.predict_index) for batch in batches)
        for batch in batches:
            scale = engine.branch_scales(batch.sequence, config.model, 0)
            with torch.autocast(DEVICE.type, torch.bfloat16, enabled=GPU):
                loss = objective(batch.to(DEVICE), None if scale is None else scale.to(DEVICE))
            (loss / supervised).backward()
        torch.nn.utils.clip_grad_norm_(gato.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    return step


def gpt2(size: str, shards: list[str]) -> Figures:
    """Hugging Face's GPT-2 of the same shape under DeepSpeed at ZeRO 1, the same tokens and targets: eager, then with
    its blocks compiled. Its GELU is the fused tanh form, not the default's eight kernels."""
    from transformers import GPT2LMHeadModel

    device, config = join_alone(), configured(size, shards)
    stream = Stream(shards, config.data.stream, config.seed)
    steps = steps_of(stream, config)
    with device:
        peer = GPT2LMHeadModel(gpt2_config(config, stream.vocabulary.padded_size)).train()
    body = engine.zero_config(replace(config, deepspeed="zero1" if GPU else "zero1_cpu"), 1)
    wrapped, _ = engine.wrap(peer, torch.optim.AdamW(peer.parameters(), lr=1e-4, fused=True), body)
    pairs = []
    for batches in steps:
        tokens = [torch.from_numpy(batch.tokens).long().to(device) for batch in batches]
        labels = [t.masked_fill(~torch.from_numpy(b.supervised).to(device), -100) for t, b in zip(tokens, batches)]
        pairs.append(list(zip(tokens, labels)))

    def step(n: int) -> None:
        for tokens, labels in pairs[n % len(pairs)]:
            wrapped.backward(wrapped(input_ids=tokens, labels=labels).loss)
            wrapped.step()

    timed(step, 0.0, 1, 1)
    eager = counted(config, stream, steps, timed(step, 2.0, 2, 4))
    found = keep(eager | {"form": "eager"})
    if GPU:
        torch._dynamo.config.recompile_limit = 64  # beyond it blocks would run eagerly without a word
        for block in peer.transformer.h:
            block.compile(dynamic=False)
        timed(step, 0.0, 1, 1)
        forget_peak()
        seconds = timed(step, 8.0, 3, MOST)
        found = counted(config, stream, steps, seconds) | {"form": "compiled"} | peaks()
        found["eager_tokens_per_second"] = eager["tokens_per_second"]
    return found


def gpt2_config(config: TrainConfig, vocabulary: int):
    """GPT-2 of a recipe's shape."""
    from transformers import GPT2Config

    model = config.model
    shape = {"n_embd": model.width, "n_layer": model.blocks, "n_head": model.heads, "n_inner": model.feed_forward}
    off = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0) | {"use_cache": False}
    off |= dict.fromkeys(("bos_token_id", "eos_token_id"), None)
    shape |= {"vocab_size": vocabulary, "n_positions": config.data.stream.sequence_length}
    return GPT2Config(**shape, **off, activation_function="gelu_pytorch_tanh", attn_implementation="sdpa")


def patches(size: str, shards: list[str]) -> Figures:
    """The patch embedder alone, forward and backward, of a micro-batch, and its share of the bare loop's."""
    config = configured(size, shards)
    stream = Stream(shards, config.data.stream, config.seed)
    step = bare_step(config, stream, steps_of(stream, config))
    timed(step, 0.0, WARM, WARM)
    whole = statistics.median(timed(step, 6.0, LEAST, MOST)) / ACCUMULATION
    batch = stream.batch(0, config.data.micro_batch).to(DEVICE)
    with DEVICE:
        embedder = Gato(replace(config.model, blocks=1), stream.vocabulary).patches

    def alone(n: int) -> None:
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=GPU):
            embedded = embedder(batch.patches, batch.patch_positions)
        embedded.float().sum().backward()

    timed(alone, 0.0, WARM, WARM)
    part = statistics.median(timed(alone, 2.0, LEAST, 50))
    found = {"patches": len(batch.patches), "embedder_ms": 1e3 * part, "micro_batch_ms": 1e3 * whole}
    return found | {"share": part / whole}
