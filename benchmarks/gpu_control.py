"""Control as `benchmarks.gpu` measures it: timesteps per second of the agent at a full window, without a simulator.

shards, random weights -> eval.agents, as a graph | compiled | plain; one environment, then several -> rates, p50, p99

What is most wanted comes first, and every figure is kept as soon as it is known, so a part that time cuts loses only
what it had not reached.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import torch

from benchmarks.control import act, player
from benchmarks.gpu_timing import DEVICE, GPU, Figures, keep, timed
from eval.agents import AgentConfig, TokenAgent
from shards.reader import Dataset
from trainer.model import PRESETS, Gato
from trainer.recipes import RECIPES

ENVIRONMENTS = (16, 64, 256) if GPU else (2, 4)
CACHE_GIGABYTES = 16.0  # most that the environments' keys and values may take; more than that is not measured
WANTED = "halfcheetah"  # the task that is played, where a dataset has it


def control(size: str, shards: list[str], seconds: float) -> Figures:
    """The agent on one task of each dataset, greedily; `seconds`: after which nothing more is begun."""
    begun, found, agents = time.monotonic(), Figures(), []
    for folder in shards:
        dataset = Dataset(folder)
        task = task_of(dataset)
        with DEVICE:
            model = Gato(PRESETS[size], dataset.manifest.vocabulary).initialise(0).eval()
        model = model.to(torch.bfloat16 if GPU else torch.float32)
        agents.append((dataset, task, model, dataset.manifest.tasks[task].spec.name))
        found[f"{agents[-1][3]}: floor"] = floor(model, agent_of(size, dataset, task, model, "plain"))

    def left() -> bool:
        return time.monotonic() - begun < seconds

    for launch in ("graph", "compiled", "plain"):
        for dataset, task, model, name in agents:
            if left():
                agent = agent_of(size, dataset, task, model, launch)
                agent.reset(1)
                found[f"{name}, {launch}"] = latencies(agent, dataset, task, 1)
                keep(found)
    for count in ENVIRONMENTS:
        for dataset, task, model, name in agents:
            agent = agent_of(size, dataset, task, model, "graph")
            if left() and fits(agent, count):
                agent.reset(count)
                found[f"{name}, graph, {count} environments"] = latencies(agent, dataset, task, count)
                keep(found)
    for dataset, task, model, name in agents:
        if left():
            found[f"{name}: graph as plain"] = graph_as_plain(size, dataset, task, model)
    return found


def agent_of(size: str, dataset: Dataset, task: int, model: Gato, launch: str) -> TokenAgent:
    config = AgentConfig(decoding="greedy", prompt_share=1.0, launch=launch)  # type: ignore[arg-type]
    return player(dataset, task, model, RECIPES[size].data.stream.sequence_length, config)


def task_of(dataset: Dataset) -> int:
    """HalfCheetah's task, or the first."""
    names = [task.spec.name for task in dataset.manifest.tasks]
    return next((number for number, name in enumerate(names) if name.startswith(WANTED)), 0)


def fits(agent: TokenAgent, count: int) -> bool:
    """True if the cache of so many environments is within bounds."""
    config = agent.model.config
    numbers = 2 * config.blocks * config.heads * config.head_size * len(agent.slot)
    return count * numbers * agent.model.tokens.weight.element_size() <= CACHE_GIGABYTES * 1e9


def graph_as_plain(size: str, dataset: Dataset, task: int, model: Gato, turns: int = 20) -> bool:
    """True if a replayed agent chooses what the plain one does."""
    acted = []
    for launch in ("plain", "graph"):
        agent = agent_of(size, dataset, task, model, launch)
        agent.reset(1)
        acted.append(np.stack([act(agent, seen) for seen, _ in zip(logged(dataset, task, 1), range(turns))]))
    return bool((acted[0] == acted[1]).all())


def floor(model: Gato, agent: TokenAgent) -> Figures:
    """Bytes that a timestep must read whatever its kernels: weights once per forward pass, the cache once for each
    environment and pass."""
    config, passes, e = model.config, agent.layout.action, model.tokens.weight.element_size()
    weights = (model.parameter_counts()["transformer"] + agent.head.numel()) * e
    cache = 2 * config.blocks * config.heads * config.head_size * len(agent.slot) * e
    return {"passes": passes, "weights_gigabytes": passes * weights / 1e9, "cache_gigabytes": passes * cache / 1e9}


def latencies(agent: TokenAgent, dataset: Dataset, task: int, count: int) -> Figures:
    seen = logged(dataset, task, count)
    timed(lambda n: act(agent, next(seen)), 0.0, 5, 5)
    taken = timed(lambda n: act(agent, next(seen)), 1.5, 30, 300)
    middle, late = np.quantile(taken, (0.5, 0.99))
    return {"timesteps_per_second": count / middle, "p50_ms": 1e3 * middle, "p99_ms": 1e3 * late}


def logged(dataset: Dataset, task: int, count: int) -> Iterator[dict[str, np.ndarray]]:
    """A logged piece's observations, or noise where frames are only kept as patches, over and over, for `count`
    environments."""
    (field, *_), rng = dataset.manifest.tasks[task].spec.observation, np.random.default_rng(0)
    if dataset.layouts[task].patches:
        frames = rng.integers(0, 256, (8, *field.shape), np.uint8)
    else:
        frames = dataset.observation(int(dataset.rows(task, held_out=False)[0]))
    while True:
        for frame in frames:
            yield {field.key: np.repeat(frame[None], count, axis=0)}
