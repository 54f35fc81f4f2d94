"""`python -m eval.curve RUN`: returns in the real simulators against training.

    RUN/exports/step-N and RUN/export -> one agent each -> episodes with the same seeds -> RUN/returns.jsonl

A low held-out loss does not mean that a policy walks; only playing shows that. A training run that was started with
`--run.export-every N` leaves the weights of its steps; each is played once, and the report of `eval.compare` draws the
lines of returns.jsonl next to those of metrics.jsonl.

Invariant: a line is written when all tasks of its export have been played, so a killed command resumes where it was;
lines of other weights or another protocol are replaced.
"""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from eval.agents import AgentConfig, agent_for
from eval.environments import play
from eval.jobs import known_tasks
from schemas.dataset import DatasetError
from schemas.files import atomic_write, disk_fault, parse_json
from schemas.ranges import require
from schemas.terminal import command, status_of
from schemas.vocabulary import VocabularyMismatch
from shards.reader import Dataset, Store
from shards.stream import find_datasets
from simulators import plugins
from simulators.rollout import COMPARED
from trainer.checkpoint import CheckpointError
from trainer.model.export import load_export, parse_export

RETURNS = "returns.jsonl"


@dataclass(frozen=True)
class Options:
    """Play every export of a training run."""

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of the run, with exports/."""
    datasets: tuple[str, ...] = ()
    """Dataset folders or URLs, for prompts; all finished ones in --root where none is named."""
    root: str = "data/shards"
    tasks: tuple[str, ...] = ()
    """Only these tasks."""
    episodes: int = 5
    """Episodes of each task and export."""
    first_seed: int = COMPARED.start
    """Episode n is reset with first_seed + n, the same for every export."""
    imports: plugins.Imports = ()
    """Module to import first: it registers environments or suites. May be given several times."""
    agent: AgentConfig = field(default_factory=AgentConfig)


def exports(run: Path) -> list[tuple[int, Path, str]]:
    """(step, folder, weights' sha256) of a run's exports, ascending. CheckpointError where there is none."""
    found: dict[int, tuple[Path, str]] = {}
    for model in [*run.glob("exports/step-*/model.json"), *run.glob("export/model.json")]:
        try:
            info = parse_export(model.read_bytes())
        except ValueError as error:
            raise CheckpointError(f"{model}: damaged ({str(error).splitlines()[0]}); remove its folder") from None
        found[info.step] = model.parent, info.weights_sha256
    if not found:
        raise CheckpointError(f"{run}: no exports; train with --run.export-every N")
    return [(step, *export) for step, export in sorted(found.items())]


def played(run: Path, protocol: dict) -> list[dict]:
    """The lines of returns.jsonl that were played as asked for, and of the weights that are there."""
    path, weights = run / RETURNS, {sha256 for _, _, sha256 in exports(run)}
    lines = []
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        with suppress(ValueError):  # one that was cut is played again
            lines.append(parse_json(line))
    known = [line for line in lines if isinstance(line, dict) and line.get("protocol") == protocol]
    return [line for line in known if line.get("weights_sha256") in weights]


def returns(folder: Path, options: Options, datasets: list[Dataset]) -> dict[str, float]:
    """`returns/TASK/{return, return_deviation, share_of_behaviour}` of one export, for every task that it can play:
    means and standard deviations over episodes; the share is of the mean return that the task's log holds."""
    metrics: dict[str, float] = {}
    for dataset in datasets:
        model, info = load_export(folder, dataset.manifest.vocabulary)
        for number, task in enumerate(dataset.manifest.tasks):
            spec = task.spec
            wanted = spec.environment and spec.action and (not options.tasks or spec.name in options.tasks)
            if not wanted or spec.name not in {known.name for known in info.tasks}:
                continue
            agent = agent_for(model, info, dataset, number, options.agent)
            seeds = [options.first_seed + n for n in range(options.episodes)]
            episode_returns = [one.episode_return for one in play(agent, spec, seeds)]
            metrics[f"returns/{spec.name}/return"] = float(np.mean(episode_returns))
            metrics[f"returns/{spec.name}/return_deviation"] = float(np.std(episode_returns))
            if task.return_mean:
                metrics[f"returns/{spec.name}/share_of_behaviour"] = float(np.mean(episode_returns)) / task.return_mean
    return metrics


@command
def main() -> int:
    """The command; its exit status."""
    options = tyro.cli(Options, prog="python -m eval.curve", description=__doc__.splitlines()[0])
    try:
        require("episodes", options.episodes, 1, 10**6)
        require("first-seed", options.first_seed, 0, 2**31)
        options.agent.check()
        plugins.load(options.imports)
        store = Store()
        folders = list(options.datasets) or find_datasets(options.root)
        datasets = [Dataset(folder, store=store) for folder in folders]
        known = [task.spec.name for task in known_tasks(datasets)]
        if unknown := sorted(set(options.tasks) - set(known)):
            raise DatasetError(f"unknown task '{unknown[0]}'; tasks: {', '.join(known)}")
        protocol = {"episodes": options.episodes, "first_seed": options.first_seed, "tasks": list(options.tasks)}
        protocol |= {"agent": asdict(options.agent)}
        lines = played(options.run, protocol)
        for step, folder, weights in exports(options.run):
            if weights in {line["weights_sha256"] for line in lines}:
                continue
            metrics = returns(folder, options, datasets)
            if not metrics:
                places = ", ".join(map(str, folders)) or options.root
                raise DatasetError(
                    f"{folder}: none of its tasks is in {places}; name --datasets that it was trained on"
                )
            lines.append({"step": step, "weights_sha256": weights, "protocol": protocol} | metrics)
            with atomic_write(options.run / RETURNS) as file:
                file.write("".join(json.dumps(line) + "\n" for line in lines).encode())
            shown = ", ".join(f"{name.split('/', 1)[1]} {value:.4g}" for name, value in metrics.items())
            print(f"step {step}: {shown}", flush=True)
    except (DatasetError, CheckpointError, VocabularyMismatch, ValueError, OSError) as error:
        print(f"error: {disk_fault(error, options.run) or error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as interrupt:
        print("interrupted: the same command resumes with the next export", file=sys.stderr)
        return status_of(interrupt)
    return 0


if __name__ == "__main__":
    sys.exit(main())
