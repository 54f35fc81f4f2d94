"""`make bench`: ratios, each measured side by side in one run.

Every pair does the same work on the same data in turn, A B A B ...; the ratio is that of
the best times, and above 1 means that the first one is faster.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import baselines, control, etl, scale, stream, trainer
from benchmarks.etl import pair as timed
from benchmarks.formats import robots, sources
from schemas.vocabulary import DISJOINT
from shards.stream import Stream, StreamConfig
from trainer.loss import LossConfig, Objective, Targets
from trainer.model import PRESETS, Gato

REPEATS = 3


def pair(name: str, first: Callable[[], object], second: Callable[[], object], unit: str, amount: float) -> None:
    timed(name, first, second, unit, amount, REPEATS)


def command(*arguments: str | Path) -> None:
    subprocess.run([sys.executable, "-m", *map(str, arguments)], check=True, capture_output=True)


def bench_loss(folder: Path) -> None:
    """Forward and backward of `tiny` with the fused loss against whole logits."""
    batch = Stream([folder / "shards"], StreamConfig(sequence_length=256), seed=0).batch(0, 16).to("cpu")

    def step(chunk: int) -> Callable[[], None]:
        objective = Objective(
            Gato(PRESETS["tiny"], DISJOINT).initialise(0),
            LossConfig(soft_bins=8.0, chunk=chunk),
            Targets((True,), text=True, text_shown=True),
        )
        return lambda: objective(batch).backward()

    pair("model: fused loss / plain loss, forward and backward", step(128), step(0), "tokens/s", 16 * 256)


def main() -> None:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command("etl.record", "-e", "Hopper-v4", "--steps", "10000", "-o", folder / "d4rl")
        command("etl.build", "--source", "d4rl", "-i", folder / "d4rl", "-o", folder / "shards")
        etl.run(folder / "etl")
        robots.run(folder / "robots")
        stream.run(folder / "stream", stream.peers_python(Path(".venv-peers")))
        trainer.run(folder / "trainer", stream.peers_python(Path(".venv-transformers"), trainer.REQUIREMENTS))
        scale.open_many(folder / "many")
        scale.grow(folder / "grown")
        bench_loss(folder)
        control.run(folder / "control", None, [], Path("results/control.svg"), REPEATS)
        sources.run(folder / "sources")
        baselines.run()


if __name__ == "__main__":
    main()
