"""`python -m benchmarks.gpu --shards FOLDER`: all figures that need an accelerator, in one go, part by part.

    deepspeed trainer/main.py, size x ZeRO stage -> its metrics.jsonl  \\
    bare loop, and where it is installed GPT-2, of the same shape       > a JSON line a part, with its hardware
    profile of a step; the agent's timesteps, one and many at once     /

A part that its file of results holds is kept, and one that fails leaves its error there, so the command is run again to
go on. `--minutes` bounds all parts together. Without an accelerator the same parts run on the CPU (`--sizes tiny`),
which tests this script and measures nothing of interest.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.control import act, logged, player
from benchmarks.trainer import free_port
from eval.agent import AgentConfig, GatoAgent
from eval.host import host
from schemas.vocabulary import SEED
from shards.reader import Dataset
from shards.stream import Stream, StreamConfig
from trainer import engine
from trainer.dry_run import estimate
from trainer.loss import Objective
from trainer.model import PRESETS, Gato
from trainer.optimiser import make_optimiser
from trainer.recipes import RECIPES

ROOT = Path(__file__).resolve().parent.parent
GPU = torch.cuda.is_available()
MICRO = {"tiny": 4, "79m": 32, "364m": 16, "1.18b": 8}
STEPS = 24  # of which the first third warms up
BATCHES = (1, 4, 16, 64, 256)

Figures = dict[str, Any]


def trained(size: str, shards: list[str], stage: str, output: Path, *extra: str) -> Figures:
    """Rates of the real command: a step of two micro-batches, evaluation and saves left out."""
    micro, every = MICRO[size], STEPS // 6
    command = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "1", "--master_port", free_port()]
    command += ["trainer/main.py", "--recipe", size, "--deepspeed", f"zero{stage}" + ("" if GPU else "_cpu")]
    command += ["--data.folders", *shards, "--steps", str(STEPS), "--data.micro-batch", str(micro)]
    command += ["--data.global-batch", str(2 * micro), "--run.log-every", str(every), "--run.evaluate-every", "100000"]
    command += ["--run.save-every", "100000", "--run.resume", "never", "--run.output", str(output), *extra]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError((done.stdout + done.stderr)[-2000:])
    lines = [json.loads(line) for line in (output / "metrics.jsonl").open()]
    later = [line for line in lines if line["step"] > STEPS // 3 and "train/tokens_per_second" in line]
    names = ("train/tokens_per_second", "train/mfu", "data/wait_share", "train/peak_gigabytes")
    found = {name.split("/")[1]: statistics.median(line[name] for line in later if name in line)
             for name in names if name in later[-1]}  # fmt: skip
    return found | {"losses": [round(line["train/loss"], 4) for line in lines if "train/loss" in line]}


def bare(size: str, shards: list[str], steps: int = 12, profiled: bool = False) -> Figures:
    """A loop without a framework: float32 weights, bfloat16 products, fused AdamW, blocks compiled."""
    device, config = torch.device("cuda" if GPU else "cpu"), RECIPES[size]
    stream = Stream(shards, StreamConfig(sequence_length=config.data.stream.sequence_length), seed=0)
    specs = [timeline.dataset.manifest.tasks[timeline.task].spec for timeline in stream.timelines]
    gato = Gato(config.model, stream.vocabulary).initialise(0).to(device).train()
    objective = Objective(gato, config.loss, [s.action.kind == "continuous" for s in specs if s.action], False).to(
        device
    )
    engine.prepare_blocks(gato, GPU, False)
    optimiser, micro = make_optimiser(gato, config.optimiser), MICRO[size]
    batches = [stream.batch(n * micro, micro).to(device) for n in range(4)]

    def loss(n: int) -> Tensor:
        batch = batches[n % len(batches)]
        keep = engine.branch_scales(batch.sequence.cpu().numpy(), config.model, 0)
        return objective(batch, None if keep is None else keep.to(device)) / batch.supervised.sum()

    step = partial(stepped, gato, optimiser, loss)
    for n in range(4):
        step(n)
    if profiled:
        return {"kernels": kernels(lambda: step(0))}
    seconds = elapsed(step, steps)
    tokens = micro * config.data.stream.sequence_length
    return {"tokens_per_second": tokens / statistics.median(seconds), "peak_gigabytes": peak()}


def stepped(model: nn.Module, optimiser: torch.optim.Optimizer, loss: Callable[[int], Tensor], n: int) -> None:
    """Training step n of a bare loop."""
    with torch.autocast("cuda" if GPU else "cpu", torch.bfloat16, enabled=GPU):
        value = loss(n)
    value.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)


def gpt2(size: str, shards: list[str]) -> Figures:
    """Hugging Face's GPT-2 of the same shape on the same tokens and labels, bfloat16 products."""
    from transformers import GPT2Config, GPT2LMHeadModel

    device, config = torch.device("cuda" if GPU else "cpu"), RECIPES[size]
    model, length = config.model, config.data.stream.sequence_length
    stream = Stream(shards, StreamConfig(sequence_length=length), seed=0)
    batch = stream.batch(0, MICRO[size]).to(device)
    labels = batch.tokens.long().masked_fill(~batch.supervised, -100)
    shape = {"n_embd": model.width, "n_layer": model.blocks, "n_head": model.heads, "n_inner": model.feed_forward}
    rates = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "use_cache": False}
    made = GPT2Config(vocab_size=stream.vocabulary.size, n_positions=length, **shape, **rates)
    peer = GPT2LMHeadModel(made).to(device)
    optimiser = torch.optim.AdamW(peer.parameters(), fused=True)

    def loss(n: int) -> Tensor:
        return peer(input_ids=batch.tokens.long(), labels=labels).loss

    step = partial(stepped, peer, optimiser, loss)
    for n in range(3):
        step(n)
    seconds = elapsed(step, 6)
    return {"tokens_per_second": MICRO[size] * length / statistics.median(seconds), "peak_gigabytes": peak()}


def control(size: str, shards: list[str]) -> Figures:
    """Timesteps/s of the agent at a full window of the first task, one environment and many; the simulator left out."""
    device, dataset = torch.device("cuda" if GPU else "cpu"), Dataset(shards[0])
    model = Gato(PRESETS[size], dataset.manifest.vocabulary).initialise(0).eval()
    model = model.to(device, torch.bfloat16 if GPU else torch.float32)
    context = RECIPES[size].data.stream.sequence_length
    agent, seen = player(dataset, 0, model, context, AgentConfig(prompt_share=1.0)), logged(dataset, 0)
    found: Figures = {"task": dataset.manifest.tasks[0].spec.name}
    for count in BATCHES if GPU else BATCHES[:2]:
        agent.reset(count)
        observations = np.resize(seen, (count, seen.shape[1]))
        play = partial(acted, agent, observations)
        elapsed(play, 5)
        seconds = elapsed(play, 60 if GPU else 5)
        middle, late = np.quantile(seconds, (0.5, 0.99))
        found[f"{count} at once"] = {"timesteps/s": count / middle, "p50_ms": 1e3 * middle, "p99_ms": 1e3 * late}
    return found


def acted(agent: GatoAgent, observations: np.ndarray, n: int) -> None:
    act(agent, observations)


def elapsed(work: Callable[[int], object], count: int) -> list[float]:
    """Seconds of each of `count` turns, the device waited for."""
    found = []
    for n in range(count):
        begun = time.perf_counter()
        work(n)
        if GPU:
            torch.cuda.synchronize()
        found.append(time.perf_counter() - begun)
    return found


def peak() -> float:
    return torch.cuda.max_memory_allocated() / 1e9 if GPU else 0.0


def kernels(work: Callable[[], object], count: int = 10) -> list[tuple[str, float]]:
    """The kernels that take most of a step, and their shares."""
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if GPU else [])]) as found:
        work()
    kind = "self_device_time_total" if GPU else "self_cpu_time_total"
    events = sorted(found.key_averages(), key=lambda event: -getattr(event, kind))
    total = sum(getattr(event, kind) for event in events)
    return [(event.key[:90], round(getattr(event, kind) / total, 4)) for event in events[:count]]


def parts(sizes: list[str], shards: list[str], scratch: Path) -> Iterator[tuple[str, Callable[[], Figures]]]:
    """(name, what measures it), the most wanted first."""
    for size in reversed(sizes):
        for stage in "123":
            extra = ["--compile"] if GPU and stage != "3" else []
            yield (
                f"train {size} ZeRO {stage}",
                partial(trained, size, shards, stage, scratch / f"{size}-{stage}", *extra),
            )
        for name, what in (("bare loop", "bare"), ("GPT-2", "gpt2"), ("control", "control"), ("profile", "profile")):
            yield f"{name} {size}", partial(in_a_process, what, size, shards)
    size, small = sizes[-1], ["--activation-checkpointing", "--data.micro-batch", "1"]
    yield f"train {size} ZeRO 3, offload", partial(trained, size, shards, "3_offload", scratch / "offload", *small)


def in_a_process(what: str, size: str, shards: list[str]) -> Figures:
    """A part with a device of its own, whose memory is free again behind it."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--one", what, "--sizes", size, "--shards", *shards]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def one(what: str, size: str, shards: list[str]) -> Figures:
    """What a process of its own measures."""
    measures = {"bare": bare, "gpt2": gpt2, "control": control, "profile": lambda s, d: bare(s, d, profiled=True)}
    return measures[what](size, shards)  # type: ignore[operator]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shards", nargs="+", required=True, help="finished dataset folders")
    parser.add_argument("--sizes", nargs="+", default=["79m", "364m", "1.18b"], choices=list(MICRO))
    parser.add_argument("--output", type=Path, default=Path("docs/results/gpu"))
    parser.add_argument("--minutes", type=float, default=25.0)
    parser.add_argument("--one", choices=("bare", "gpt2", "control", "profile"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(options.one, options.sizes[0], options.shards)))
        return
    options.output.mkdir(parents=True, exist_ok=True)
    path, deadline = options.output / "figures.jsonl", time.monotonic() + 60 * options.minutes
    known = [json.loads(line) for line in path.open()] if path.is_file() else []
    kept = {line["part"] for line in known if "error" not in line}
    who = host(torch.get_num_threads())
    for name, measure in parts(options.sizes, options.shards, options.output / f"runs-{os.getpid()}"):
        if name in kept or time.monotonic() > deadline:
            continue
        begun = time.monotonic()
        try:
            found = measure()
        except RuntimeError as error:
            found = {"error": str(error)}
        line = {"part": name, "seconds": round(time.monotonic() - begun, 1)} | found | who
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print({key: value for key, value in line.items() if key not in who}, flush=True)
    for size in options.sizes:
        config = replace(RECIPES[size], deepspeed="zero1" if GPU else "zero1_cpu")
        memory = estimate(replace(config, data=replace(config.data, micro_batch=MICRO[size])), SEED, 1).memory
        print(size, "by --dry-run, GB:", {stage: round(need.device / 1e9, 2) for stage, need in memory.items()})


if __name__ == "__main__":
    main()
