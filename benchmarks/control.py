"""`python -m benchmarks.control`: timesteps per second of the agent, what its cache is worth, and what the rolling
window costs in truth.

shards, weights (random, or --export's) -> agents -> rate against a naive agent, latencies, rate against the batch's
size (a plot), divergence of the rolling window from the exact one on real episodes

The naive agent runs the whole window through the plain forward for each action token, as NEKO's predict_control does
(gato/policy/gato_policy.py at 075d72d); unlike that it scores the last token alone, and embeds what it saw once a
timestep in one go. Both have the same weights, the same full context and take turns, A B A B ...; both choose greedily
and must choose the same where nothing was dropped. Seconds are the process's own, of one thread.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.stream import build
from eval.agents import AgentConfig, Prompt, TokenAgent, demonstration
from eval.charts import COLOURS, STYLE
from eval.environments import play
from schemas.layout import SEPARATOR
from shards.batch import Batch
from shards.reader import Dataset
from simulators.policy import Observations, Rng
from trainer.model import PRESETS, Gato
from trainer.model.export import ExportInfo, TrainingInfo, load_export

CONTEXTS = {"tiny": 256, "79m": 1024}
BATCHES = (1, 2, 4, 8, 16, 32, 64)


class Naive:
    """One environment, greedy; what it saw and did as stored tokens, cut to the window."""

    def __init__(self, agent: TokenAgent, prompt: Prompt):
        self.agent, self.stored = agent, prompt.tokens[-agent.window :]

    def act(self, observation: dict[str, np.ndarray]) -> np.ndarray:
        agent, layout = self.agent, self.agent.layout
        now = np.zeros((1, layout.stored), np.uint16)
        now[:, : layout.stored - layout.action] = agent.tokenizer.encode_observation(observation).tokens
        self.stored = np.concatenate([self.stored, now])[-agent.window :]
        for column in range(layout.action):
            token = agent.ids[column].start + int(self.logits(column).argmax())
            self.stored[-1, layout.stored - layout.action + column] = token
        return agent.tokenizer.decode_action(self.stored[-1:, layout.stored - layout.action :])

    @torch.inference_mode()
    def logits(self, column: int) -> Tensor:
        """Of the present timestep's action token `column`."""
        layout, count = self.agent.layout, len(self.stored)
        grid = np.zeros((count, layout.length), np.int32)
        grid[:, layout.stored_columns] = self.stored
        grid[:, layout.roles == SEPARATOR] = self.agent.model.vocabulary.separator
        length = (count - 1) * layout.length + layout.length - layout.action + column
        batch = Batch.empty(np.zeros(1, np.int64), length, 0, 1)
        batch.tokens[0] = grid.reshape(-1)[:length]
        batch.roles[0] = np.tile(layout.roles, count)[:length]
        batch.positions[0] = np.tile(layout.local_positions, count)[:length]
        batch.segments[:] = 0
        return self.agent.model(batch.to("cpu"))[0, -1] @ self.agent.head.T


def player(dataset: Dataset, task: int, model: Gato, context: int, config: AgentConfig) -> TokenAgent:
    vocabulary, spec = dataset.manifest.vocabulary, dataset.manifest.tasks[task].spec
    info = ExportInfo("", 0, model.config, vocabulary, vocabulary.fingerprint, context, 0, (spec,), {}, TrainingInfo())
    return TokenAgent(model, info, spec, config, demonstration(dataset, task, config, info))


def logged(dataset: Dataset, task: int) -> np.ndarray:
    """Observations of a held-out piece, or of the first."""
    rows = [*dataset.rows(task, held_out=True), *dataset.rows(task, held_out=False)]
    return dataset.observation(int(rows[0]))


def against_naive(table: Table, dataset: Dataset, task: int, size: str, timesteps: int, repeats: int) -> None:
    """A full window, one environment, each with the same observations."""
    model = Gato(PRESETS[size], dataset.manifest.vocabulary).initialise(0).eval()
    config = AgentConfig(decoding="greedy", prompt_share=1.0, batch_invariant=False)
    agent, seen = player(dataset, task, model, CONTEXTS[size], config), logged(dataset, task)
    assert agent.prompt is not None and len(agent.prompt.tokens) >= agent.window
    half = player(dataset, task, model, CONTEXTS[size], replace(config, prompt_share=0.5))
    check = Naive(half, Prompt(agent.prompt.tokens[-(half.window // 2) :], None))
    half.reset(1)
    for observation in seen[:2]:
        shown = {"observation": observation[None]}
        assert np.array_equal(act(half, shown), check.act(shown))
    agent.reset(1)
    naive = Naive(agent, agent.prompt)
    took: tuple[list[float], list[float]] = ([], [])
    for repeat in range(repeats):
        for seconds, count in zip(took, (timesteps, 1)):
            for n in range(count):
                observation = seen[(repeat * timesteps + n) % len(seen)][None]
                begun = time.process_time()
                if seconds is took[0]:
                    act(agent, {"observation": observation})
                else:
                    naive.act({"observation": observation})
                seconds.append(time.process_time() - begun)
    middle, late = np.quantile(took[0], (0.5, 0.99))
    theirs = statistics.median(took[1])
    name = f"{size}, {dataset.manifest.tasks[task].spec.name}, {agent.slots} tokens of context"
    cells = f"{1 / middle:.1f}", f"{1 / theirs:.2f}", f"{theirs / middle:.1f}", f"{min(took[1]) / min(took[0]):.1f}"
    table.add_row(name, *cells, f"{1e3 * middle:.1f}", f"{1e3 * late:.1f}")


def act(agent: TokenAgent, observations: dict[str, np.ndarray]) -> np.ndarray:
    count = len(next(iter(observations.values())))
    return agent.act(observations, np.zeros(count), np.ones(count, bool), np.random.default_rng(0))


def batches(dataset: Dataset, task: int, timesteps: int, picture: Path) -> None:
    """Environment steps per second by the batch's size at `tiny`, without the simulators; two turns, the better one."""
    model = Gato(PRESETS["tiny"], dataset.manifest.vocabulary).initialise(0).eval()
    agent, seen = player(dataset, task, model, CONTEXTS["tiny"], AgentConfig(prompt_share=1.0)), logged(dataset, task)
    rates = dict.fromkeys(BATCHES, 0.0)
    table = Table(f"tiny, {dataset.manifest.tasks[task].spec.name}: environments", "steps/s", "p50 ms", "p99 ms")
    took: dict[int, list[float]] = {size: [] for size in BATCHES}
    for _ in range(2):
        for size in BATCHES:
            agent.reset(size)
            for n in range(timesteps):
                observations = np.resize(seen[n:], (size, seen.shape[1]))
                begun = time.process_time()
                act(agent, {"observation": observations})
                took[size].append(time.process_time() - begun)
    for size, seconds in took.items():
        middle, late = np.quantile(seconds, (0.5, 0.99))
        rates[size] = size / middle
        table.add_row(str(size), f"{rates[size]:.0f}", f"{1e3 * middle:.1f}", f"{1e3 * late:.1f}")
    Console(width=140).print(table)
    draw(rates, picture)


def draw(rates: dict[int, float], picture: Path) -> None:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.4, 2.8), layout="constrained")
        axes = figure.add_subplot()
        axes.plot(list(rates), list(rates.values()), color=COLOURS["gato"], marker="o", markersize=3.5)
        axes.set_xscale("log", base=2)
        axes.set_xticks(list(rates), [str(size) for size in rates])
        axes.set_ylim(bottom=0)
        axes.set_xlabel("environments in the batch")
        axes.set_title("environment steps per second, tiny, one thread", fontsize=9.5, loc="left")
        axes.grid(axis="y")
        picture.parent.mkdir(parents=True, exist_ok=True)
        FigureCanvasSVG(figure).print_svg(picture, metadata={"Date": None, "Creator": None})
    print(f"drawn: {picture}", flush=True)


class Leader(TokenAgent):
    """Keeps each token's logits and choice."""

    def reset(self, batch: int) -> None:
        self.said: list[tuple[Tensor, Tensor]] = []
        super().reset(batch)

    def _choose(self, logits: Tensor, points: Tensor) -> Tensor:
        self.said.append((logits, super()._choose(logits, points)))
        return self.said[-1][1]


class Follower(Leader):
    """Does what a leader did, and keeps what it would have done."""

    leader: Leader

    def _choose(self, logits: Tensor, points: Tensor) -> Tensor:
        super()._choose(logits, points)
        return self.leader.said[len(self.said) - 1][1]


class Pair:
    """A policy: the exact window plays, the rolling one watches."""

    def __init__(self, leader: Leader, follower: Follower):
        self.both = leader, follower
        follower.leader = leader

    def reset(self, batch: int) -> None:
        for agent in self.both:
            agent.reset(batch)

    def act(self, observations: Observations, previous_reward: np.ndarray, active: np.ndarray, rng: Rng) -> np.ndarray:
        actions, _ = (agent.act(observations, previous_reward, active, rng) for agent in self.both)
        return actions


def divergence(table: Table, folder: Path, dataset: Dataset, task: int, timesteps: int) -> None:
    """The exact window plays a real episode; what the rolling one says to the same tokens, by timesteps since the
    window was full."""
    model, info = load_export(folder, dataset.manifest.vocabulary)
    spec, pair = dataset.manifest.tasks[task].spec, []
    for kind, window in ((Leader, "exact"), (Follower, "rolling")):
        config = AgentConfig(decoding="mean", window=window)  # type: ignore[arg-type]
        pair.append(kind(model, info, spec, config, demonstration(dataset, task, config, info)))
    leader, follower = pair
    (one,) = play(Pair(leader, follower), spec, [1000], step_limit=timesteps)  # type: ignore[arg-type]
    A, full = leader.layout.action, leader.window - int(leader.window * leader.config.prompt_share)
    ids = leader.ids[0].size
    assert spec.action is not None
    span = float(np.mean(np.subtract(spec.action.high, spec.action.low)))
    edges = [0, full, 2 * full, 4 * full, 8 * full, 16 * full, one.timesteps]
    for first, stop in zip(edges, edges[1:]):
        if first >= (stop := min(stop, one.timesteps)):
            break
        exact, rolling = (agent.said[A * first : A * stop] for agent in (leader, follower))
        apart = torch.cat([a - b for (a, _), (b, _) in zip(exact, rolling)]).abs()
        size = torch.cat([a.std(dim=1) for a, _ in exact]).mean()
        places = torch.cat([a - b for (_, a), (_, b) in zip(exact, rolling)]).abs().double()
        same, action = (places == 0).double().mean(), span / ids * places.mean()
        cells = f"{first - full:+d} to {stop - full - 1:+d}", f"{apart.mean():.4f}", f"{apart.mean() / size:.4f}"
        table.add_row(f"{spec.name}, rotary {model.config.rotary}", *cells, f"{same:.3f}", f"{action:.4f}")


def run(folder: Path, shards: Path | None, exports: list[Path], picture: Path, repeats: int) -> None:
    torch.set_num_threads(1)
    dataset = Dataset(shards or build("control", folder))
    tasks = range(len(dataset.manifest.tasks))
    headings = "timesteps/s", "naive", "ratio of medians", "of best", "p50 ms", "p99 ms"
    table = Table("one environment, float32, one core", *headings)
    for size, timesteps in (("tiny", 40), ("79m", 8)):
        for task in tasks[:1]:
            against_naive(table, dataset, task, size, timesteps, repeats)
    Console(width=140).print(table)
    for task in tasks[:1]:
        batches(dataset, task, 20, picture)
    if exports:
        headings = (
            "timesteps since a full window",
            "|logits apart|",
            "/ deviation",
            "same action tokens",
            "|actions apart|",
        )
        table = Table("rolling against exact window", *headings)
        for export in exports:
            for task in tasks:
                divergence(table, export, dataset, task, 300)
        Console(width=140).print(table)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shards", type=Path, help="a dataset folder of control tasks, built before")
    parser.add_argument("--exports", type=Path, nargs="*", default=[], help="trained models, for the divergence")
    parser.add_argument("--picture", type=Path, default=Path("results/control.svg"))
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        run(Path(name), options.shards, options.exports, options.picture, options.repeats)


if __name__ == "__main__":
    main()
