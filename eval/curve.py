"""`python -m eval.curve RUN`: returns in the real simulators against training.

    RUN/exports/step-N and RUN/export -> one agent each -> episodes with the same seeds -> RUN/returns.jsonl

A low held-out loss does not mean that a policy walks; only playing shows that. A training run that was started with
`--run.export-every N` leaves the weights of its steps; each is played once, and the report of `eval.compare` draws the
lines of returns.jsonl next to those of metrics.jsonl.

Invariant: a line is written when all tasks of its export have been played, so a killed command resumes where it was;
lines of other weights, data, versions or another protocol are replaced, and those with failed episodes played again.
"""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from eval.agents import AgentConfig, agent_for
from eval.environments import play
from eval.jobs import Job, KnownTask, known_tasks
from eval.provenance import versions
from schemas.dataset import DatasetError
from schemas.files import atomic_write, disk_fault, parse_json
from schemas.ranges import require
from schemas.terminal import command, status_of
from shards.reader import Dataset, Store
from shards.stream import find_datasets
from simulators import SimulatorError, plugins
from simulators.rollout import COMPARED
from trainer.checkpoint import CheckpointError
from trainer.model.export import ExportInfo, load_export, parse_export

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


def exports(run: Path) -> list[tuple[Path, ExportInfo]]:
    """A run's exports by step, ascending. CheckpointError where there is none."""
    found: dict[int, tuple[Path, ExportInfo]] = {}
    for model in [*run.glob("exports/step-*/model.json"), *run.glob("export/model.json")]:
        try:
            info = parse_export(model.read_bytes())
        except ValueError as error:
            raise CheckpointError(f"{model}: damaged ({str(error).splitlines()[0]}); remove its folder") from None
        found[info.step] = model.parent, info
    if not found:
        raise CheckpointError(f"{run}: no exports; train with --run.export-every N")
    return [found[step] for step in sorted(found)]


def jobs_of(info: ExportInfo, known: list[KnownTask], options: Options) -> list[Job]:
    """The tasks that an export is to play, of those that were asked for."""
    names = {task.name for task in info.tasks} & set(options.tasks or [task.spec.name for task in known])
    playable = [task for task in known if task.spec.environment and task.spec.action and task.spec.name in names]
    return [Job(task, "gato", info.training.seed) for task in playable]


def earlier_lines(run: Path) -> list[dict[str, Any]]:
    """The lines of returns.jsonl of which no episode failed."""
    path, lines = run / RETURNS, []
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        with suppress(ValueError):  # one that was cut is played again
            lines.append(parse_json(line))
    return [line for line in lines if isinstance(line, dict) and not line.get("failed")]


def returns(folder: Path, jobs: list[Job], options: Options) -> tuple[dict[str, float], list[str]]:
    """`returns/TASK/{return, return_deviation, share_of_behaviour}` of one export, and the errors of failed episodes:
    means and standard deviations over the finished ones. The share is of the mean return that the task's log holds;
    there is none where that is of clipped rewards."""
    metrics: dict[str, float] = {}
    errors: list[str] = []
    model, info = load_export(folder)
    for job in jobs:
        name, data = job.spec.name, job.dataset
        info.require_data(data.manifest, job.spec, str(data.place), str(folder))
        agent = agent_for(model, info, data, job.task.number, options.agent)
        episodes = play(agent, job.spec, [options.first_seed + n for n in range(options.episodes)])
        errors += [f"{name}: {one.error}" for one in episodes if one.ending == "error"]
        finished = [one.episode_return for one in episodes if one.ending != "error"]
        if not finished:
            continue
        mean, logged = float(np.mean(finished)), data.manifest.tasks[job.task.number].return_mean
        metrics |= {f"returns/{name}/return": mean, f"returns/{name}/return_deviation": float(np.std(finished))}
        if logged and not job.clipped:
            metrics[f"returns/{name}/share_of_behaviour"] = mean / logged
    return metrics, errors


def play_exports(options: Options) -> int:
    """Play the exports that returns.jsonl has no line of; returns the number of failed episodes.

    Raises:
        ValueError: an option, export or dataset cannot be used (DatasetError, CheckpointError and VocabularyMismatch
            are its subclasses).
        OSError: a file cannot be read or written; SimulatorError: a simulator cannot be made.
    """
    require("episodes", options.episodes, 1, 10**6)
    require("first-seed", options.first_seed, 0, 2**31)
    options.agent.check()
    plugins.load(options.imports)
    store = Store()
    folders = list(options.datasets) or find_datasets(options.root)
    known = known_tasks([Dataset(folder, store=store) for folder in folders])
    names = [task.spec.name for task in known]
    if unknown := sorted(set(options.tasks) - set(names)):
        raise DatasetError(f"unknown task '{unknown[0]}'; tasks: {', '.join(names)}")
    protocol = {"episodes": options.episodes, "first_seed": options.first_seed, "agent": asdict(options.agent)}
    earlier, plans, lines, failed = earlier_lines(options.run), [], [], 0
    for folder, info in exports(options.run):
        jobs = jobs_of(info, known, options)
        if not jobs:
            places = ", ".join(map(str, folders)) or options.root
            raise DatasetError(f"{folder}: none of its tasks is in {places}; name --datasets that it was trained on")
        data = {job.spec.name: job.fingerprint for job in jobs}
        key = {"step": info.step, "weights_sha256": info.weights_sha256}
        key |= {"protocol": protocol | {"data": data, "versions": versions()}}
        same = [line for line in earlier if line | key == line]
        lines += same[:1]
        plans += [] if same else [(folder, jobs, key)]
    for folder, jobs, key in plans:
        metrics, errors = returns(folder, jobs, options)
        lines.append(key | metrics | ({"failed": len(errors)} if errors else {}))
        with atomic_write(options.run / RETURNS) as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines).encode())
        shown = ", ".join(f"{name.split('/', 1)[1]} {value:.4g}" for name, value in metrics.items())
        print(f"step {key['step']}: {shown or 'no episode was finished'}", flush=True)
        if errors:
            print(f"step {key['step']}: failed episodes, left out: {len(errors)}; {errors[0]}", file=sys.stderr)
        failed += len(errors)
    return failed


@command
def main() -> int:
    """The command; returns its exit status: 1 where an episode failed."""
    options = tyro.cli(Options, prog="python -m eval.curve", description=__doc__.splitlines()[0])
    try:
        if failed := play_exports(options):
            print(f"error: failed episodes: {failed}; the same command plays their exports again", file=sys.stderr)
            return 1
    except (ValueError, OSError, SimulatorError) as error:
        print(f"error: {disk_fault(error, options.run) or error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as interrupt:
        print("interrupted: the same command resumes with the next export", file=sys.stderr)
        return status_of(interrupt)
    return 0


if __name__ == "__main__":
    sys.exit(main())
