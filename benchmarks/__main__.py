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

import numpy as np
import torch

from benchmarks import baselines, etl, scale, stream, trainer
from benchmarks.etl import pair as timed
from eval.agent import AgentConfig, GatoAgent, demonstration
from schemas.vocabulary import SEED
from shards.reader import Dataset
from shards.stream import Stream, StreamConfig
from trainer.checkpoint import ExportInfo
from trainer.loss import LossConfig, Objective
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
        objective = Objective(Gato(PRESETS["tiny"], SEED).initialise(0), LossConfig(soft_bins=8.0, chunk=chunk), [True])
        return lambda: objective(batch).backward()

    pair("model: fused loss / plain loss, forward and backward", step(128), step(0), "tokens/s", 16 * 256)


def bench_agent(folder: Path) -> None:
    """Control with the cache against recomputing the window, both at full context."""
    dataset = Dataset(folder / "shards")
    task, vocabulary = dataset.manifest.tasks[0].spec, dataset.manifest.vocabulary
    info = ExportInfo("gato.model", 1, PRESETS["tiny"], vocabulary, vocabulary.fingerprint, 1024, 0, (task,), {}, {})
    model = Gato(PRESETS["tiny"], vocabulary).initialise(0).eval()
    observation = {"observation": np.zeros((1, 11), np.float32)}

    def steps(window: str) -> Callable[[], None]:
        config = AgentConfig(window=window, prompt_share=1.0)  # type: ignore[arg-type]
        agent = GatoAgent(model, info, task, config, demonstration(dataset, 0, config))
        agent.reset(1)
        rng, active = np.random.default_rng(0), np.ones(1, bool)

        def run() -> None:
            for _ in range(10):
                agent.act(observation, np.zeros(1), active, rng)

        return run

    pair("agent: cached / recomputed window of 1024 tokens", steps("rolling"), steps("exact"), "timesteps/s", 10)


def main() -> None:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command("etl.record", "-e", "Hopper-v4", "--steps", "10000", "-o", folder / "d4rl")
        command("etl.build", "--source", "d4rl", "-i", folder / "d4rl", "-o", folder / "shards")
        etl.run(folder / "etl")
        stream.run(folder / "stream", stream.peers_python(Path(".venv-peers")))
        trainer.run(folder / "trainer", stream.peers_python(Path(".venv-transformers"), trainer.REQUIREMENTS))
        scale.open_many(folder / "many")
        scale.grow(folder / "grown")
        bench_loss(folder)
        bench_agent(folder)
        baselines.run()


if __name__ == "__main__":
    main()
