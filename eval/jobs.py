"""The parts of a comparison: every (model, task, seed) that can be played, and remarks on what cannot.

    options + tasks + loaded Gatos -> plan_jobs -> jobs, cheap models first, and remarks

Invariant: a job is a value; planning opens nothing and plays nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from eval.options import Options
from schemas.dataset import DatasetError
from schemas.episode import TaskSpec
from schemas.result import MODELS
from shards.reader import Dataset
from simulators.registry import clips_rewards
from trainer.model.export import ExportInfo


@dataclass(frozen=True)
class KnownTask:
    """A task with the dataset that holds it; `dataset` None where it is known from an export alone."""

    spec: TaskSpec
    dataset: Dataset | None = None
    number: int = 0
    """Its number in the dataset."""


def known_tasks(datasets: Sequence[Dataset]) -> list[KnownTask]:
    """The tasks of all datasets. DatasetError for one that two of them hold: its rows could not be distinguished."""
    found: dict[str, KnownTask] = {}
    for dataset in datasets:
        for number, task in enumerate(dataset.manifest.tasks):
            if task.spec.name in found:
                raise DatasetError(
                    f"task '{task.spec.name}' is in more than one dataset folder; name only one of them by --datasets"
                )
            found[task.spec.name] = KnownTask(task.spec, dataset, number)
    return list(found.values())


@dataclass(frozen=True)
class Job:
    """One part: a model on a task with a model seed."""

    task: KnownTask
    model: str
    seed: int

    @property
    def spec(self) -> TaskSpec:
        return self.task.spec

    @property
    def name(self) -> str:
        return f"{self.spec.name}-{self.model}-{self.seed}"

    @property
    def dataset(self) -> Dataset:
        assert self.task.dataset is not None
        return self.task.dataset

    @property
    def environment(self) -> str:
        """Id of what is played; empty where the log itself is shown."""
        return self.spec.environment.id if self.spec.environment and self.model != "behaviour" else ""

    @property
    def clipped(self) -> bool:
        """The log holds rewards clipped to ±1."""
        return clips_rewards(self.spec.environment, self.spec.source)

    @property
    def fingerprint(self) -> str:
        """Of the dataset; empty without one."""
        return self.task.dataset.manifest.fingerprint if self.task.dataset else ""


def plan_jobs(
    options: Options, tasks: Sequence[KnownTask], gatos: Mapping[int, ExportInfo]
) -> tuple[list[Job], list[str]]:
    """All jobs, and remarks on what is left out. `gatos`: the exports by their training seed.

    Raises:
        ValueError: nothing is left to play; the message says why and what to do.
    """
    seeds = {"dt": list(range(options.seeds)), "tt": list(range(options.seeds))}
    seeds |= {"gato": sorted(gatos), "random": [0], "behaviour": [0]}
    taught = [{task.name for task in info.tasks} for info in gatos.values()]
    jobs: list[Job] = []
    remarks: list[str] = []
    for model in (model for model in MODELS if model in options.models):
        for task in tasks:
            spec = task.spec
            if (options.tasks and spec.name not in options.tasks) or spec.action is None:
                continue
            if task.dataset is None and model not in ("random", "gato"):
                continue
            if model == "tt" and any(field.kind == "image" for field in spec.observation):
                continue
            if model != "behaviour" and spec.environment is None:
                remark = (
                    f"{spec.name}: its log names no environment, so no model can play it; "
                    "build it again with python -m etl.build --environment ID --overwrite"
                )
                remarks += [remark] if remark not in remarks else []
                continue
            if model == "gato" and not all(spec.name in names for names in taught):
                remarks.append(f"{spec.name}: not among the tasks that this Gato was trained on")
            jobs += [Job(task, model, seed) for seed in seeds[model]]
    if not jobs:
        why = "; ".join(remarks) or (
            f"none of the models {', '.join(options.models)} can play {', '.join(task.spec.name for task in tasks)}; "
            "give other --models or --datasets"
        )
        raise ValueError(f"nothing to play: {why}")
    return jobs, remarks
