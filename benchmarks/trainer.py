"""`python -m benchmarks.trainer`: our model beside Hugging Face's GPT-2, our engine beside a bare PyTorch loop.

logs (GATO_SHARED_DATA/{d4rl,dqn_replay}, else recorded here) -> shards -> batches of the recipes' lengths
-> forward and backward of Gato and its loss | of GPT2LMHeadModel of the same shape, in an environment of its own
-> whole steps of trainer.engine at ZeRO 0   | of a loop with the same model, loss, optimiser and clipping

GPT-2 has the same token ids and labels at the same places (-100 elsewhere), its own loss, scaled dot product
attention, no dropout, float32. Both sides take turns, A B A B ..., one thread each; rates are those of the best turns,
and beside their ratio is that of the medians. Seconds are the process's own on its core, which on an idle core are
those of the clock, so that others on the machine disturb less. Control batches have no
patches; Atari's are timed apart.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.stream import build, peers_python
from shards.batch import Batch
from shards.stream import Stream, StreamConfig
from trainer import engine
from trainer.config import TrainConfig
from trainer.loss import Objective, targets_of
from trainer.model import Gato
from trainer.optimiser import make_optimiser
from trainer.recipes import RECIPES
from trainer.scales import observation_scales

PEER = Path(__file__).with_name("gpt2.py")
REQUIREMENTS = Path(__file__).with_name("trainer.txt")
BATCHES = {"tiny-tokens": (1, 16), "79m": (1, 1)}
"""Batches per turn and sequences per batch."""

PARTS = "tiny-tokens,79m,engine,forms,sequences,atari"

Turn = Callable[[], float]
"""Does the work of a turn, and gives its processor seconds."""


def read(shards: Path, recipe: str) -> list[Batch]:
    """The batches of a turn, as tensors."""
    count, size = BATCHES[recipe]
    stream = Stream([shards], StreamConfig(sequence_length=RECIPES[recipe].data.stream.sequence_length), seed=0)
    return [stream.batch(n * size, size).to("cpu") for n in range(count)]


def objective(config: TrainConfig, shards: Path) -> Objective:
    stream = Stream([shards], StreamConfig(), seed=0)
    model = Gato(config.model, stream.vocabulary).initialise(0).train()
    if model.by_timesteps:
        model.standardise(observation_scales(stream))
    return Objective(model, config.loss, targets_of(stream))


def timed(work: Callable[[], object]) -> Turn:
    def turn() -> float:
        begun = time.process_time()
        work()
        return time.process_time() - begun

    return turn


def gradients(ours: Objective, batches: list[Batch]) -> Turn:
    """Forward and backward, with stochastic depth as the recipe has it."""
    config = ours.gato.config

    def work() -> None:
        for batch in batches:
            ours.zero_grad(set_to_none=True)
            keep = engine.branch_scales(batch.sequence, config, 0)
            ours(batch, keep).backward()

    return timed(work)


class Peer:
    """Hugging Face's GPT-2 in a process of its own; a turn is a line to it and one back."""

    def __init__(self, python: Path, ours: Objective, batches: list[Batch], folder: Path):
        model, vocabulary = ours.gato.config, ours.gato.vocabulary
        assert model.heads * model.head_size == model.width and not any(len(batch.patches) for batch in batches)
        tokens = torch.stack([batch.tokens for batch in batches]).long()
        labels = tokens.masked_fill(~torch.stack([batch.supervised for batch in batches]), -100)
        np.savez(folder / "batches.npz", tokens=tokens.numpy(), labels=labels.numpy())
        shape = {
            "vocab_size": vocabulary.size, "n_positions": tokens.shape[-1], "n_embd": model.width,
            "n_layer": model.blocks, "n_head": model.heads, "n_inner": model.feed_forward,
        }  # fmt: skip
        self.process = subprocess.Popen(
            [python, PEER, folder / "batches.npz", json.dumps(shape)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            text=True,
        )
        assert self.process.stdin and self.process.stdout
        self.into, self.out = self.process.stdin, self.process.stdout
        ready, self.version, self.parameters = (self.out.readline() or "failed - 0").split()
        if ready != "ready":
            raise RuntimeError("benchmarks/gpt2.py did not start")

    def __call__(self) -> float:
        self.into.write("\n")
        self.into.flush()
        return float(self.out.readline())

    def close(self) -> None:
        self.into.close()
        self.process.wait()


def bare(ours: Objective, config: TrainConfig, steps: list[list[Batch]]) -> Turn:
    """What one would write without a framework."""
    parameters, settings = list(ours.parameters()), config.optimiser
    optimiser = make_optimiser(ours.gato, settings)

    def work() -> None:
        for step, batches in enumerate(steps):
            for group in optimiser.param_groups:
                group["lr"] = engine.learning_rate(step, settings)
            supervised = sum(int(batch.supervised.sum()) for batch in batches)
            for batch in batches:
                (ours(batch) / supervised).backward()
            torch.nn.utils.clip_grad_norm_(parameters, settings.gradient_clip)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)

    return timed(work)


def whole_steps(run: engine.Engine, steps: list[list[Batch]]) -> Turn:
    return timed(lambda: [run.train_step(step, batches, False) for step, batches in enumerate(steps)])


def turns(count: int, *sides: Turn) -> list[list[float]]:
    """Seconds of each side's turns; a first one that does not count."""
    found: list[list[float]] = [[] for _ in sides]
    for n in range(count + 1):
        for seconds, side in zip(found, sides):
            took = side()
            seconds += [took] if n else []
    return found


def row(table: Table, name: str, tokens: int, ours: list[float], theirs: list[float]) -> None:
    ratio, middle = min(theirs) / min(ours), statistics.median(theirs) / statistics.median(ours)
    table.add_row(name, f"{tokens / min(ours):,.0f}", f"{tokens / min(theirs):,.0f}", f"{ratio:.2f}", f"{middle:.2f}")


def models(table: Table, control: Path, python: Path, folder: Path, recipe: str, repeats: int) -> None:
    """A recipe's model and loss against GPT-2, and where that has a softmax over fewer ids also the paper's."""
    config, batches = RECIPES[recipe], read(control, recipe)
    sides: dict[str, Turn] = {config.loss.softmax: gradients(objective(config, control), batches)}
    if config.loss.softmax != "vocabulary":
        loss = replace(config.loss, soft_bins=0.0, softmax="vocabulary")
        sides["vocabulary"] = gradients(objective(replace(config, loss=loss), control), batches)
    peer = Peer(python, objective(config, control), batches, folder)
    *ours, theirs = turns(repeats, *sides.values(), peer)
    peer.close()
    tokens = sum(batch.tokens.numel() for batch in batches)
    for softmax, seconds in zip(sides, ours):
        name = f"{recipe}, softmax over the {softmax}: Gato / GPT-2 (transformers {peer.version})"
        row(table, name, tokens, seconds, theirs)


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def started(patience_minutes: float) -> torch.device:
    """A process group of one, without a launcher."""
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    os.environ.update(alone)
    return engine.start(0, patience_minutes)


def engines(table: Table, control: Path, repeats: int) -> None:
    """`tiny`: DeepSpeed at ZeRO 0 against the bare loop, without and with accumulation."""
    device = started(1.0)
    torch.set_num_threads(1)
    for accumulation in (1, 4):
        recipe = RECIPES["tiny-tokens"]
        micro = recipe.data.global_batch // accumulation
        config = replace(recipe, data=replace(recipe.data, micro_batch=micro))
        stream = Stream([control], recipe.data.stream, seed=0)
        steps = [[stream.batch(16 * n + first, micro).to("cpu") for first in range(0, 16, micro)] for n in range(2)]
        mine, theirs = objective(config, control), objective(config, control)
        run = engine.Engine(mine.gato, config, device, mine.asked)
        seconds = turns(repeats, whole_steps(run, steps), bare(theirs, config, steps))
        tokens = sum(batch.tokens.numel() for batches in steps for batch in batches)
        row(table, f"tiny, whole steps of {accumulation} micro-batches: engine / bare loop", tokens, *seconds)


def forms(table: Table, control: Path, recipe: str, repeats: int) -> None:
    """A recipe's model with its blocks compiled, or checkpointed, against the plain one."""
    config, batches = RECIPES[recipe], read(control, recipe)
    sides = [objective(config, control) for _ in range(3)]
    engine.prepare_blocks(sides[1].gato, compile=True, activation_checkpointing=False)
    engine.prepare_blocks(sides[2].gato, compile=False, activation_checkpointing=True)
    plain, *others = turns(repeats, *[gradients(side, batches) for side in sides])
    tokens = sum(batch.tokens.numel() for batch in batches)
    for form, seconds in zip(("compiled", "checkpointed"), others):
        row(table, f"{recipe}, blocks {form} / plain", tokens, seconds, plain)


def sequences(table: Table, control: Path, repeats: int) -> None:
    """An element of the sequence per timestep against one per token: whole steps of two recipes, each its own batch."""
    sides, counts = [], []
    for name in ("tiny", "tiny-tokens"):
        config = RECIPES[name]
        batch = Stream([control], config.data.stream, seed=0).batch(0, config.data.global_batch).to("cpu")
        sides.append(bare(objective(config, control), config, [[batch]]))
        counts.append(batch.tokens.numel())
    ours, theirs = turns(repeats, *sides)
    row(table, "tiny / tiny-tokens", counts[0], ours, [seconds * counts[0] / counts[1] for seconds in theirs])


def pictures(table: Table, atari: Path, repeats: int) -> None:
    """Atari batches, what the patch embedder alone takes of them, and its rate beside that of embedding every patch."""
    batches = read(atari, "tiny-tokens")
    ours = objective(RECIPES["tiny-tokens"], atari)
    embedder = ours.gato.patches

    def embed(by: Callable[[Tensor], Tensor]) -> Callable[[], None]:
        def work() -> None:
            for batch in batches:
                embedder.zero_grad(set_to_none=True)
                by(batch.patches).sum().backward()

        return work

    sides = (gradients(ours, batches), timed(embed(embedder.appearance)), timed(embed(embedder.each)))
    whole, part, every = turns(repeats, *sides)
    tokens = sum(batch.tokens.numel() for batch in batches)
    name = "tiny, Atari, Gato alone; patch embedder's share"
    table.add_row(name, f"{tokens / min(whole):,.0f}", "", f"{min(part) / min(whole):.2f}", "")
    row(table, "tiny, Atari, different patches embedded once / every patch", tokens, part, every)


def run(folder: Path, python: Path, shards: Path | None = None, repeats: int = 5, parts: str = PARTS):
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    table = Table("forward and backward, float32, one core", "tokens/s", "theirs", "ratio", "of medians")
    control = shards / "control" if shards else build("control", folder)
    chosen = parts.split(",")
    for recipe in BATCHES:
        if recipe in chosen:
            models(table, control, python, folder, recipe, repeats if recipe == "tiny-tokens" else max(2, repeats // 2))
    if "engine" in chosen:
        engines(table, control, repeats)
    if "forms" in chosen:
        forms(table, control, "tiny-tokens", repeats)
    if "sequences" in chosen:
        sequences(table, control, repeats)
    if "atari" in chosen:
        pictures(table, shards / "atari" if shards else build("atari", folder), repeats)
    Console(width=140).print(table)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--peers", type=Path, default=Path(".venv-transformers"), help="the peer's virtual environment")
    parser.add_argument("--shards", type=Path, help="a folder with control/ and atari/, built before")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--parts", default=PARTS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        python = peers_python(options.peers, REQUIREMENTS)
        run(Path(name), python, options.shards, options.repeats, options.parts)


if __name__ == "__main__":
    main()
