"""What `benchmarks.gpu` measures, each in a process of its own: one argument list in, one dictionary of figures out.

    shards -> Stream, Loader -> trainer.engine (DeepSpeed) | a bare loop | Hugging Face's GPT-2 under DeepSpeed -> rates
    shards, random weights -> eval.agent, plain | replayed | compiled -> timesteps/s, latencies

A step is two micro-batches. Rates are of the median step; the device is waited for at the end of each, as the trainer
does. Sides that are compared have the same tokens, targets, micro-batches and accumulation. Without an accelerator
all runs on the CPU, which tests these lines and measures nothing of interest.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.control import act, player
from benchmarks.trainer import started
from eval.agent import AgentConfig, GatoAgent
from shards.batch import Batch
from shards.loader import Loader
from shards.reader import Dataset
from shards.stream import Stream
from trainer import engine
from trainer.config import TrainConfig
from trainer.dry_run import estimate
from trainer.loss import Objective, targets_of
from trainer.model import PRESETS, Gato
from trainer.optimiser import make_optimiser
from trainer.recipes import RECIPES

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
MICRO = {"tiny": 4, "79m": 32, "364m": 16, "1.18b": 8}
"""Sequences a micro-batch; the recipes' own where a size has one GPU of 80 GB."""
WARM, STEPS = (8, 16) if GPU else (1, 2)
TURNS = 60 if GPU else 3
ENVIRONMENTS = (1, 4, 16, 64, 256) if GPU else (1, 2)

Figures = dict[str, Any]


def ceilings() -> Figures:
    """What the device does at its best here: TFLOP/s of a bfloat16 product, TB/s of a copy, read and written."""
    n = 8192 if GPU else 256
    a, b = (torch.randn(n, n, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    source = torch.empty(2**31 if GPU else 2**20, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    product = statistics.median(elapsed(lambda n: a @ b, 20)[5:])
    copy = statistics.median(elapsed(lambda n: target.copy_(source), 20)[5:])
    return {"tflops": 2e-12 * n**3 / product, "terabytes_per_second": 2e-12 * len(source) / copy}


def train(
    size: str, shards: list[str], stage: str, micro: int = 0, compiled: bool = False, checkpointed: bool = False
) -> Figures:
    """The trainer's own engine and loader, without evaluation and saves."""
    device, config = started(5.0), configured(size, shards, micro)
    zero = f"zero{stage}" + ("" if GPU else "_cpu")
    config = replace(config, deepspeed=zero, compile=compiled, activation_checkpointing=checkpointed)
    stream, data = Stream(shards, config.data.stream, config.seed), config.data
    gato = Gato(config.model, stream.vocabulary).initialise(config.seed)
    flops = gato.flops_per_token(data.stream.sequence_length)
    run = engine.Engine(gato, config, device, *targets_of(stream))
    loader, losses = Loader(stream, 0, data.global_batch, data.micro_batch, pinned=GPU), []

    def step(n: int) -> None:
        losses.append(run.train_step(n, next(loader), False).loss)

    elapsed(step, WARM)
    forget_peak()
    loader.metrics()
    seconds = elapsed(step, STEPS, WARM)
    waited = loader.metrics()["data/wait_share"]
    loader.close()
    named = {"3_offload": "3 + offload"}.get(stage, stage)
    pictures = len(stream.batch(0, data.micro_batch).patches) / (data.micro_batch * data.stream.sequence_length)
    memory = estimate(config, stream.vocabulary, 1, pictures=pictures).memory[named]
    return rates(config, flops, seconds) | {
        "wait_share": waited,
        "losses": [round(loss, 4) for loss in losses],
        "form": "compiled" if compiled else "checkpointed" if checkpointed else "plain",
        **({} if checkpointed else {"expected_gigabytes": memory.device / 1e9}),
        **peaks(),
    }


def bare(size: str, shards: list[str]) -> Figures:
    """A loop without a framework: float32 weights, bfloat16 products, fused AdamW, blocks compiled."""
    config = configured(size, shards)
    step, flops = bare_step(config, shards)
    elapsed(step, WARM)
    forget_peak()
    return rates(config, flops, elapsed(step, STEPS)) | {"form": "compiled" if GPU else "plain"} | peaks()


def bare_step(config: TrainConfig, shards: list[str]) -> tuple[Callable[[int], object], float]:
    stream, length = Stream(shards, config.data.stream, config.seed), config.data.stream.sequence_length
    gato = Gato(config.model, stream.vocabulary).initialise(0).to(DEVICE).train()
    objective = Objective(gato, config.loss, *targets_of(stream)).to(DEVICE)
    engine.prepare_blocks(gato, GPU, False)
    optimiser, batches = make_optimiser(gato, config.optimiser), pairs(stream, config)

    def step(n: int) -> None:
        pair = batches[n % len(batches)]
        supervised = sum(len(batch.predict_index) for batch in pair)
        for batch in pair:
            keep = engine.branch_scales(batch.sequence, config.model, 0)
            with torch.autocast(DEVICE.type, torch.bfloat16, enabled=GPU):
                loss = objective(batch.to(DEVICE), None if keep is None else keep.to(DEVICE))
            (loss / supervised).backward()
        torch.nn.utils.clip_grad_norm_(gato.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    return step, gato.flops_per_token(length)


def gpt2(size: str, shards: list[str]) -> Figures:
    """Hugging Face's GPT-2 of the same shape under DeepSpeed at ZeRO 1, the same tokens and targets."""
    from transformers import GPT2Config, GPT2LMHeadModel

    started(5.0)
    config = configured(size, shards)
    model, data = config.model, config.data
    stream = Stream(shards, data.stream, config.seed)
    shape = {"n_embd": model.width, "n_layer": model.blocks, "n_head": model.heads, "n_inner": model.feed_forward}
    off = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0) | {"use_cache": False}
    made = GPT2Config(vocab_size=stream.vocabulary.size, n_positions=data.stream.sequence_length, **shape, **off)
    peer = GPT2LMHeadModel(made)
    body = engine.zero_config(replace(config, deepspeed="zero1" if GPU else "zero1_cpu"), 1)
    optimiser = torch.optim.AdamW(peer.parameters(), lr=1e-4, fused=GPU)
    wrapped, _ = engine.wrap(peer, optimiser, body)
    batches = pairs(stream, config)

    def step(n: int) -> None:
        for batch in batches[n % len(batches)]:
            tokens = torch.from_numpy(batch.tokens.astype(np.int64)).to(DEVICE)
            labels = tokens.masked_fill(~torch.from_numpy(batch.supervised).to(DEVICE), -100)
            wrapped.backward(wrapped(input_ids=tokens, labels=labels).loss)
            wrapped.step()

    elapsed(step, WARM)
    forget_peak()
    flops = Gato(model, stream.vocabulary).flops_per_token(data.stream.sequence_length)
    return rates(config, flops, elapsed(step, STEPS)) | {"form": "plain"} | peaks()


def patches(size: str, shards: list[str]) -> Figures:
    """The patch embedder alone, forward and backward, of a micro-batch, and its share of the bare loop's."""
    config = configured(size, shards)
    step, _ = bare_step(config, shards)
    elapsed(step, WARM)
    whole = statistics.median(elapsed(step, STEPS)) / 2
    stream = Stream(shards, config.data.stream, config.seed)
    batch = stream.batch(0, config.data.micro_batch).to(DEVICE)
    embedder = Gato(config.model, stream.vocabulary).patches.to(DEVICE)

    def alone(n: int) -> None:
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=GPU):
            embedded = embedder(batch.patches, batch.patch_positions)
        embedded.float().sum().backward()

    elapsed(alone, WARM)
    part = statistics.median(elapsed(alone, STEPS))
    found = {"patches": len(batch.patches), "embedder_ms": 1e3 * part, "micro_batch_ms": 1e3 * whole}
    return found | {"share": part / whole}


def kernels(size: str, shards: list[str], count: int = 10) -> Figures:
    """The kernels that take most of a step of the bare loop: name, share of the device's time, calls."""
    step, _ = bare_step(configured(size, shards), shards)
    elapsed(step, WARM)
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if GPU else [])]
    with profile(activities=kinds) as found:
        elapsed(step, 1)
    kind = "self_device_time_total" if GPU else "self_cpu_time_total"
    events = sorted(found.key_averages(), key=lambda event: -getattr(event, kind))
    total = sum(getattr(event, kind) for event in events)
    top = [(event.key[:90], round(getattr(event, kind) / total, 4), event.count) for event in events[:count]]
    return {"kernels": top, "milliseconds": total / 1e3}


def control(size: str, shards: list[str]) -> Figures:
    """The agent at a full window of the first task of each dataset, the simulator left out; and whether graph and
    plain choose the same, greedily."""
    found: Figures = {}
    for folder in shards:
        dataset = Dataset(folder)
        with torch.device(DEVICE):
            model = Gato(PRESETS[size], dataset.manifest.vocabulary).eval()
        model = model.to(torch.bfloat16 if GPU else torch.float32)
        name, context = dataset.manifest.tasks[0].spec.name, RECIPES[size].data.stream.sequence_length
        acted = {}
        for launch in ("plain", "graph", "compiled"):
            config = AgentConfig(decoding="greedy", prompt_share=1.0, launch=launch)
            agent = player(dataset, 0, model, context, config)
            agent.reset(1)
            acted[launch] = np.stack([act(agent, n) for n, _ in zip(logged(dataset, 1), range(20))])
            found[f"{name}, {launch}"] = latencies(agent, dataset, 1)
        found[f"{name}: graph as plain"] = bool((acted["graph"] == acted["plain"]).all())
        found[f"{name}: compiled as plain"] = float((acted["compiled"] == acted["plain"]).mean())
        agent = player(dataset, 0, model, context, AgentConfig(decoding="greedy", prompt_share=1.0, launch="graph"))
        for number in ENVIRONMENTS[1:]:
            agent.reset(number)
            found[f"{name}, graph, {number} environments"] = latencies(agent, dataset, number)
        found[f"{name}: floor"] = floor(model, agent)
    return found


def floor(model: Gato, agent: GatoAgent) -> Figures:
    """Bytes that a timestep must read whatever its kernels: weights once a forward pass, the cache once for each
    environment and pass."""
    passes, e = agent.layout.action, model.tokens.weight.element_size()
    weights = (model.parameter_counts()["transformer"] + agent.head.numel()) * e
    cache = sum(keys[:1].numel() + values[:1].numel() for keys, values in agent.cache.blocks) * e
    return {"passes": passes, "weights_gigabytes": passes * weights / 1e9, "cache_gigabytes": passes * cache / 1e9}


def latencies(agent: GatoAgent, dataset: Dataset, count: int) -> Figures:
    seen = logged(dataset, count)
    elapsed(lambda n: act(agent, next(seen)), 5)
    middle, late = np.quantile(elapsed(lambda n: act(agent, next(seen)), TURNS), (0.5, 0.99))
    return {"timesteps_per_second": count / middle, "p50_ms": 1e3 * middle, "p99_ms": 1e3 * late}


def logged(dataset: Dataset, count: int) -> Iterator[dict[str, np.ndarray]]:
    """A logged piece's observations, or noise where frames are only kept as patches, over and over, for `count`
    environments."""
    (field, *_), rng = dataset.manifest.tasks[0].spec.observation, np.random.default_rng(0)
    if dataset.layouts[0].patches:
        frames = rng.integers(0, 256, (8, *field.shape), np.uint8)
    else:
        frames = dataset.observation(int(dataset.rows(0, held_out=False)[0]))
    while True:
        for frame in frames:
            yield {field.key: np.repeat(frame[None], count, axis=0)}


def configured(size: str, shards: list[str], micro: int = 0) -> TrainConfig:
    recipe, micro = RECIPES[size], micro or MICRO[size]
    data = replace(recipe.data, folders=tuple(shards), micro_batch=micro, global_batch=2 * micro)
    return replace(recipe, data=data)


def pairs(stream: Stream, config: TrainConfig, count: int = 4) -> list[list[Batch]]:
    """Some steps' micro-batches, read before anything is timed."""
    micro = config.data.micro_batch
    return [[stream.batch((2 * n + part) * micro, micro) for part in range(2)] for n in range(count)]


def elapsed(work: Callable[[int], object], count: int, first: int = 0) -> list[float]:
    """Seconds of each of the turns `first`, `first` + 1 ..., the device waited for."""
    found = []
    for n in range(first, first + count):
        begun = time.perf_counter()
        work(n)
        if GPU:
            torch.cuda.synchronize()
        found.append(time.perf_counter() - begun)
    return found


def rates(config: TrainConfig, flops: float, seconds: list[float]) -> Figures:
    """Of a step: tokens/s, milliseconds, FLOP/s by the convention of `Gato.flops_per_token`."""
    middle = statistics.median(seconds)
    rate = config.data.global_batch * config.data.stream.sequence_length / middle
    step = {"step_ms": 1e3 * middle, "slowest_ms": 1e3 * max(seconds), "micro_batch": config.data.micro_batch}
    return {"tokens_per_second": rate, "tflops": rate * flops / 1e12} | step


def forget_peak() -> None:
    if GPU:
        torch.cuda.reset_peak_memory_stats()


def peaks() -> Figures:
    if not GPU:
        return {}
    taken = {"peak": torch.cuda.max_memory_allocated(), "peak_reserved": torch.cuda.max_memory_reserved()}
    return {f"{name}_gigabytes": value / 1e9 for name, value in taken.items()}


PARTS: dict[str, Callable[..., Figures]] = {
    "ceilings": lambda size, shards: ceilings(),
    "train": train,
    "bare": bare,
    "gpt2": gpt2,
    "patches": patches,
    "kernels": kernels,
    "control": control,
}
