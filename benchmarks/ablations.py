"""`python -m benchmarks.ablations --data FOLDER`: what each open choice is worth at an equal budget.

    recipe `tiny-tokens`, one setting changed -> so many CPU-seconds of a core -> held-out errors, returns when played

One seed, a bare loop of one thread. The budget is the process's own time, so that others on the machine disturb less,
and the learning rate follows it. The changes are listed below; the base is `tiny-tokens`. Each result is a line of
`--output`, kept when the command is run again, and the table is printed at the end.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table

from eval.agents import AgentConfig, demonstration, make_agent
from eval.environments import play
from shards.stream import Stream
from trainer.config import TrainConfig
from trainer.engine import learning_rate
from trainer.heldout import evaluate
from trainer.loss import Objective, targets_of
from trainer.model import Gato
from trainer.model.export import ExportInfo, TrainingInfo
from trainer.optimiser import make_optimiser
from trainer.recipes import RECIPES
from trainer.scales import observation_scales

# windows of four timesteps or so; as many as take a core some 0.2 seconds
SHORT: dict[str, Any] = {"sequence_length": 96, "prompt_probability": 0.0}
WIDE: dict[str, Any] = {"global_batch": 128, "micro_batch": 128}
TIMESTEPS: dict[str, Any] = {"sequence": "timesteps"}
SMOOTH: dict[str, Any] = {"matrices": "muon", "bins": "smooth"}
# name -> {part of the configuration: {field: value}}
CHANGES: dict[str, dict[str, dict[str, Any]]] = {
    "as tiny-tokens": {},
    "no rotary attention (the paper's form)": {"model": {"rotary": "none"}},
    "action position: one shared": {"model": {"action_position": "shared"}},
    "action position: none": {"model": {"action_position": "none"}},
    "feed-forward: GEGLU of the same size": {"model": {"feed_forward_form": "geglu", "feed_forward": 344}},
    "no loss on prompts": {"stream": {"prompt_loss": False}},
    "no prompts": {"stream": {"prompt_probability": 0.0}},
    "plain start of the bins": {"model": {"smooth_bins": False}},
    "targets: the exact bin": {"loss": {"soft_bins": 0.0}},
    "targets: over 8 bins": {"loss": {"soft_bins": 8.0}},
    "softmax over the vocabulary": {"loss": {"softmax": "vocabulary"}},
    "queries and keys normalised": {"model": {"qk_norm": True}},
    "Muon for the blocks' matrices": {"optimiser": {"matrices": "muon"}},
    "Muon, over 8 bins": {"optimiser": {"matrices": "muon"}, "loss": {"soft_bins": 8.0}},
    "patches: GroupNorm (the paper's form)": {"model": {"patch_norm": "group"}},
    "sequences of 128": {"stream": {"sequence_length": 128}},
    "windows of 96 tokens, no prompts": {"stream": SHORT, "data": {"global_batch": 42, "micro_batch": 42}},
    "timesteps": {"model": TIMESTEPS, "stream": SHORT, "data": WIDE},
    "timesteps, Muon": {"model": TIMESTEPS, "stream": SHORT, "data": WIDE, "optimiser": {"matrices": "muon"}},
    "timesteps, Muon, smooth bins": {"model": TIMESTEPS, "stream": SHORT, "data": WIDE, "optimiser": SMOOTH},
    "timesteps, Muon, smooth bins, 2 blocks": {
        "model": {**TIMESTEPS, "blocks": 2},
        "stream": SHORT,
        "data": WIDE,
        "optimiser": SMOOTH,
    },
    "the paper's form": {
        "model": {"rotary": "none", "action_position": "shared", "smooth_bins": False, "patch_norm": "group"},
        "loss": {"soft_bins": 0.0, "softmax": "vocabulary"},
    },
}


@dataclass(frozen=True)
class Options:
    """Train `tiny-tokens` once for every change and compare."""

    data: Path
    """A dataset folder of tasks that the simulators play."""
    minutes: float = 2.0
    """CPU time of each training."""
    episodes: int = 4
    """Played with each result; 0: none."""
    only: tuple[str, ...] = ()
    """Names of changes."""
    output: Path = Path("results/ablations.jsonl")
    agent: AgentConfig = field(default_factory=lambda: AgentConfig(prompt="none"))
    """How it is played; without a prompt, so that what is learned of prompts does not stand between."""


def changed(base: TrainConfig, change: dict[str, dict[str, Any]]) -> TrainConfig:
    """The configuration with its one difference."""
    data = replace(base.data, stream=replace(base.data.stream, **change.get("stream", {})), **change.get("data", {}))
    model, loss = replace(base.model, **change.get("model", {})), replace(base.loss, **change.get("loss", {}))
    optimiser = replace(base.optimiser, **change.get("optimiser", {}))
    return replace(base, model=model, loss=loss, optimiser=optimiser, data=data)


def trained(config: TrainConfig, stream: Stream, seconds: float) -> tuple[Gato, int]:
    """A model after so much CPU time, and its steps. The rate warms up in a twentieth of it, then falls by cosine."""
    gato = Gato(config.model, stream.vocabulary).initialise(config.seed)
    if gato.by_timesteps:
        gato.standardise(observation_scales(stream))
    objective = Objective(gato, config.loss, targets_of(stream))
    shape = config.optimiser
    optimiser = make_optimiser(gato, shape)
    schedule = replace(shape, warmup_steps=50, decay_steps=1000)  # of a thousandth of the time each
    steps, begun, B = 0, time.process_time(), config.data.global_batch
    while (used := (time.process_time() - begun) / seconds) < 1:
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(int(1000 * used), schedule)
        batch = stream.batch(steps * B, B).to("cpu")
        (objective(batch) / batch.supervised.sum()).backward()
        torch.nn.utils.clip_grad_norm_(gato.parameters(), shape.gradient_clip)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        steps += 1
    return gato, steps


def measured(name: str, options: Options) -> dict[str, Any]:
    """Train, evaluate and play one change."""
    config = changed(RECIPES["tiny-tokens"], CHANGES[name])
    data = config.data.stream
    stream, held_out = (Stream([options.data], data, config.seed, split) for split in (False, True))
    gato, steps = trained(config, stream, 60 * options.minutes)
    result: dict[str, Any] = {"name": name, "minutes": options.minutes, "steps": steps}
    result["tokens"] = steps * config.data.global_batch * data.sequence_length
    result |= evaluate(gato, held_out, range(len(held_out.tasks)), 64, 16, torch.device("cpu"))
    gato.eval()
    for timeline in stream.timelines if options.episodes else []:
        spec, agent = timeline.dataset.manifest.tasks[timeline.task].spec, options.agent
        fingerprint = stream.vocabulary.fingerprint
        info = ExportInfo(
            "", 0, config.model, stream.vocabulary, fingerprint, data.sequence_length, 0, (), {}, TrainingInfo()
        )
        player = make_agent(gato, info, spec, agent, demonstration(timeline.dataset, timeline.task, agent, info))
        totals = [one.episode_return for one in play(player, spec, [1000 + n for n in range(options.episodes)])]
        result[f"returns/{spec.name}"] = [float(np.mean(totals)), float(np.std(totals))]
    return result


def main() -> None:
    options = tyro.cli(Options, prog="python -m benchmarks.ablations")
    torch.set_num_threads(1)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.loads(line) for line in options.output.open()] if options.output.is_file() else []
    done = {(line["name"], line["minutes"]): line for line in lines}
    for name in options.only or CHANGES:
        if (name, options.minutes) not in done:
            done[name, options.minutes] = measured(name, options)
            with options.output.open("a") as file:
                file.write(json.dumps(done[name, options.minutes]) + "\n")
    shown = [line for line in done.values() if line["minutes"] == options.minutes]
    tasks = sorted({key.split("/")[1] for line in shown for key in line if key.startswith("held_out/")})
    table = Table(title=f"{options.minutes:g} CPU-minutes each, {asdict(options)['data']}")
    for heading in ("", "M tokens", *(f"{t}: {kind}" for t in tasks for kind in ("error", "bins", "loss", "return"))):
        table.add_column(heading)
    for line in shown:
        cells = [line["name"], f"{line['tokens'] / 1e6:.2f}"]
        for task in tasks:
            mean, spread = line.get(f"returns/{task}", (float("nan"),) * 2)
            kinds = ("mean_error", "bin_error", "loss")
            error, bins, loss = (line.get(f"held_out/{task}/{kind}", float("nan")) for kind in kinds)
            cells += [f"{error:.4f}", f"{bins:.0f}", f"{loss:.3f}", f"{mean:.0f} ± {spread:.0f}"]
        table.add_row(*cells)
    Console().print(table)


if __name__ == "__main__":
    main()
