"""One part of a comparison: a model with its seed on a task -> result rows, in a Parquet file of its own.

    dataset + task + model + seed -> weights (a missing baseline is trained first) -> episodes -> parts/NAME.parquet

A part is named by all that decides its rows, so one that is there already is kept, and processes share the work without
a word to each other.

Invariant: the rows of a part are a function of data, weights, protocol and seed, whoever plays it and beside whom.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import imageio.v3 as imageio
import numpy as np
import torch

import simulators
from eval import report, scores
from eval.agent import GatoAgent, agent_for, prompted
from eval.baselines import decision_transformer, device, trajectory_transformer
from eval.environments import Played, play
from eval.options import Options, check
from eval.provenance import host
from eval.ship import shipped_prompt
from schemas.dataset import DatasetError
from schemas.episode import TaskSpec
from schemas.files import atomic_write, sha256_of
from schemas.result import MODELS, RESULT_SCHEMA_VERSION
from shards.reader import Dataset, Store
from shards.stream import find_datasets
from shards.views import trajectories
from simulators import plugins
from simulators.policy import Policy, RandomPolicy
from simulators.registry import clips_rewards
from trainer.checkpoint import CheckpointError, ExportInfo, load_export
from trainer.model import Gato

BASELINES = {"dt": decision_transformer, "tt": trajectory_transformer}

SHIPPED = Path(__file__).resolve().parent / "weights" / "tiny"

Told = Callable[[str], None]


@dataclass(frozen=True)
class Job:
    """One part: a model on a task with a model seed."""

    spec: TaskSpec
    model: str
    seed: int
    dataset: Dataset | None = None
    """None: the task is known from an export alone."""
    task: int = 0
    """Its number in the dataset."""

    @property
    def name(self) -> str:
        return f"{self.spec.name}-{self.model}-{self.seed}"

    @property
    def data(self) -> Dataset:
        assert self.dataset is not None
        return self.dataset

    @property
    def environment(self) -> str:
        """Id of what is played; empty where the log itself is shown."""
        return self.spec.environment.id if self.spec.environment and self.model != "behaviour" else ""

    @property
    def clipped(self) -> bool:
        """Whether the log holds rewards clipped to ±1."""
        return clips_rewards(self.spec.environment, self.spec.source)

    @property
    def fingerprint(self) -> str:
        """Of the dataset; empty without one."""
        return self.dataset.manifest.fingerprint if self.dataset else ""


class Parts:
    """All parts of a comparison: what they share, and how each is made."""

    def __init__(self, options: Options):
        self.options = options
        check(options)
        plugins.load(options.imports)
        torch.set_num_threads(options.threads)
        store = Store()
        folders = list(options.datasets) or find_datasets(options.root)
        self.datasets = [Dataset(folder, store=store) for folder in folders]
        self.exports: dict[int, Path] = {}
        self.gatos: dict[int, tuple[Gato, ExportInfo]] = {}
        for folder in (options.gato or (newest_export(),)) if "gato" in options.models else ():
            model, info = load_export(folder)
            theirs = [one.manifest.vocabulary for one in self.datasets]
            fits = [one for one in theirs if one.fingerprint == info.vocabulary_fingerprint]
            (fits or theirs or [info.vocabulary])[0].require(info.vocabulary_fingerprint, str(folder))
            seed = info.training.seed
            if seed in self.gatos:
                raise CheckpointError(f"{folder}: trained with seed {seed}, as {self.exports[seed]} was; give --gato "
                                      "exports of different seeds")  # fmt: skip
            self.exports[seed], self.gatos[seed] = folder, (model.to(device()), info)
        self.remarks: list[str] = []
        self.tasks = self._tasks()
        if unknown := sorted(set(options.tasks) - {spec.name for spec, _, _ in self.tasks}):
            known = ", ".join(spec.name for spec, _, _ in self.tasks)
            raise DatasetError(f"unknown task '{unknown[0]}'; tasks: {known}")
        self.jobs = self._jobs()
        self.host = host(options.threads)

    def _tasks(self) -> list[tuple[TaskSpec, Dataset | None, int]]:
        """The tasks of all datasets; without one, those that the exports were trained on."""
        if self.datasets:
            return [(t.spec, d, number) for d in self.datasets for number, t in enumerate(d.manifest.tasks)]
        place = f"{self.options.root}: no finished dataset there; build one with python -m etl.build"
        if not self.gatos:
            raise DatasetError(place)
        self.remarks.append(f"{place}. Until then: Gato on the tasks that it was trained on, beside random actions")
        return [(spec, None, 0) for _, info in list(self.gatos.values())[:1] for spec in info.tasks]

    def _jobs(self) -> list[Job]:
        """Every (model, task, seed), cheap models first; what cannot be played is remarked."""
        seeds = {"dt": list(range(self.options.seeds)), "tt": list(range(self.options.seeds))}
        seeds |= {"gato": sorted(self.gatos), "random": [0], "behaviour": [0]}
        found: list[Job] = []
        for model in (m for m in MODELS if m in self.options.models):
            for spec, dataset, number in self.tasks:
                unwanted = bool(self.options.tasks) and spec.name not in self.options.tasks
                if unwanted or spec.action is None or (dataset is None and model not in ("random", "gato")):
                    continue
                if model == "tt" and any(field.kind == "image" for field in spec.observation):
                    continue
                if model != "behaviour" and spec.environment is None:
                    remark = f"{spec.name}: its log names no environment, so only behaviour is shown"
                    self.remarks += [remark] if remark not in self.remarks else []
                    continue
                taught = [spec.name in {task.name for task in info.tasks} for _, info in self.gatos.values()]
                if model == "gato" and not all(taught):
                    self.remarks.append(f"{spec.name}: not among the tasks that Gato was trained on")
                found += [Job(spec, model, seed, dataset, number) for seed in seeds[model]]
        return found

    def rows(self, job: Job, tell: Told = lambda text: None) -> tuple[list[dict[str, Any]], str]:
        """The rows of a job, played now or kept from before, and what happened in words."""
        weights = self.weights(job, tell)
        protocol = self.protocol(job)
        stamp = sha256(f"{job.fingerprint}{weights}{protocol}{job.seed}".encode()).hexdigest()[:12]
        part = self.options.output / "parts" / f"{job.name}-{stamp}.parquet"
        if part.is_file():
            kept = report.load_rows(part).to_pylist()
            # other simulators or libraries may give other returns
            if job.model == "behaviour" or {row["versions"] for row in kept} == {self.host["versions"]}:
                return kept, "kept from before"
        episodes = behaviour(job.data, job.task) if job.model == "behaviour" else self._play(job, tell)
        # Atari logs hold clipped rewards, which the raw references of the score do not fit.
        spec = replace(job.spec, score=None) if job.model == "behaviour" and job.clipped else job.spec
        given = [scores.scored(one.total, spec) for one in episodes]
        rows = [
            {
                **self._about(job),
                "model_sha256": weights,
                "protocol": protocol,
                "episode": number,
                "episode_seed": one.seed,
                "return": one.total,
                "score": given[number][0],
                "score_kind": given[number][1],
                "timesteps": one.timesteps,
                "ending": one.ending,
                "error": one.error,
                "seconds": one.seconds,
            }
            for number, one in enumerate(episodes)
        ]
        report.save_rows(part, rows)
        done = [one.total for one in episodes if one.ending != "error"]
        mean = f"{np.mean(done):.1f}" if done else "-"
        return rows, f"return {mean} over {len(done)} episodes"

    def protocol(self, job: Job) -> str:
        """JSON of everything but weights and data that decides a row."""
        if job.model == "behaviour":
            return json.dumps({"returns": "as logged" + (", clipped to ±1 a step" if job.clipped else "")})
        settings: dict[str, Any] = {"episodes": self.options.episodes, "first_seed": self.options.first_seed}
        settings["step_limit"] = self.options.step_limit
        assert job.spec.environment is not None
        settings["environment"] = simulators.settings(job.spec.environment)
        if job.model == "gato":
            settings |= asdict(prompted(self.options.agent, self.gatos[job.seed][1], job.spec))
        if job.model in BASELINES:
            settings["budget"] = self.options.budget
        return json.dumps(settings, sort_keys=True)

    def weights(self, job: Job, tell: Told) -> str:
        """sha256 of the weights a job plays with; a missing baseline is trained first."""
        if job.model == "gato":
            info = self.gatos[job.seed][1]
            if job.dataset is not None:
                job.data.manifest.vocabulary.require(info.vocabulary_fingerprint, str(self.exports[job.seed]))
            return info.weights_sha256
        if job.model not in BASELINES:
            return ""
        return sha256_of(self.baseline(job, tell) / "weights.safetensors")

    def folder(self, job: Job) -> Path:
        """Where a baseline is kept: the name says data, settings and seed."""
        stamp = sha256(f"{job.fingerprint}{self._config(job)}{job.seed}".encode()).hexdigest()[:12]
        return self.options.baselines / f"{job.name}-{stamp}"

    def _config(self, job: Job) -> Any:
        return getattr(BASELINES[job.model].Config, self.options.budget)(job.spec)

    def baseline(self, job: Job, tell: Told) -> Path:
        """The folder of a trained baseline, trained now if it is missing."""
        module, folder = BASELINES[job.model], self.folder(job)
        if not (folder / "config.json").is_file():
            episodes, config = trajectories(job.data, job.task), self._config(job)
            module.train(episodes, job.spec, config, job.seed, folder, lambda figures: tell(describe(figures)))
        return folder

    def _policy(self, job: Job, tell: Told) -> Policy:
        if job.model == "random":
            assert job.spec.action is not None
            return RandomPolicy(job.spec.action)
        if job.model in BASELINES:
            return BASELINES[job.model].load(self.baseline(job, tell))
        model, info = self.gatos[job.seed]
        if job.dataset is not None:
            return agent_for(model, info, job.dataset, job.task, self.options.agent)
        agent = prompted(self.options.agent, info, job.spec)
        prompt = shipped_prompt(self.exports[job.seed], info, job.spec.name, agent)
        return GatoAgent(model, info, job.spec, agent, prompt)

    def picture(self, job: Job) -> Path:
        """The film of a model's first seed on a task."""
        return self.options.output / "rollouts" / f"{job.spec.name}-{job.model}.gif"

    def _play(self, job: Job, tell: Told) -> list[Played]:
        seeds = [self.options.first_seed + n for n in range(self.options.episodes)]
        assert job.spec.environment is not None
        every = simulators.suite_named(job.spec.environment.suite).film_every
        first = min(self.gatos) if job.model == "gato" else 0
        film = int(self.options.film_seconds * 10) if job.seed == first else 0

        def progress(timesteps: int, active: int) -> None:
            if timesteps % 20 == 0:
                tell(f"timestep {timesteps}, {active} of {len(seeds)} episodes running")

        policy = self._policy(job, tell)
        played = play(policy, job.spec, seeds, self.options.step_limit, job.seed, film, every, progress)
        if played[0].frames:
            images = [thumbnail(frame) for frame in played[0].frames]
            with atomic_write(self.picture(job)) as file:
                file.write(imageio.imwrite("<bytes>", images, extension=".gif", duration=100, loop=0))
        return played

    def failure(self, job: Job, error: str) -> dict[str, Any]:
        """A row that says why there is none."""
        return self._about(job) | {
            "model_sha256": "",
            "protocol": "{}",
            "episode": 0,
            "episode_seed": 0,
            "return": float("nan"),
            "score": float("nan"),
            "score_kind": "",
            "timesteps": 0,
            "ending": "error",
            "error": error,
            "seconds": 0.0,
        }

    def _about(self, job: Job) -> dict[str, Any]:
        """What all rows of a job have in common."""
        return {
            "schema_version": RESULT_SCHEMA_VERSION,
            "dataset": job.spec.name,
            "dataset_fingerprint": job.fingerprint,
            "environment": job.environment,
            "model": job.model,
            "model_seed": job.seed,
            **self.host,
        }


def behaviour(dataset: Dataset, task: int) -> list[Played]:
    """The log's own whole episodes, as if played."""
    rows = np.concatenate([dataset.rows(task, held_out) for held_out in (False, True)])
    ends = dataset.column("terminated")[rows] | dataset.column("truncated")[rows]
    rows = np.sort(rows[ends & (dataset.column("start")[rows] == 0)])
    return [
        Played(
            seed=0,
            total=float(dataset.column("episode_return")[row]),
            timesteps=int(dataset.column("episode_timesteps")[row]),
            ending="terminated" if dataset.column("terminated")[row] else "truncated",
        )
        for row in rows
    ]


def newest_export(root: Path = Path("runs")) -> Path:
    """The most recently finished export under runs/; the one that comes with the project where there is none."""
    found = sorted(root.glob("*/export/model.json"), key=lambda path: path.stat().st_mtime)
    if not found and not (SHIPPED / "model.json").is_file():
        remedy = "train one with deepspeed trainer/main.py, or give --gato"
        raise CheckpointError(f"{root}: no exported model there; {remedy}")
    return found[-1].parent if found else SHIPPED


def thumbnail(frame: np.ndarray, width: int = 160) -> np.ndarray:
    """A small copy of a picture (H, W, 3), by taking every n-th pixel."""
    stride = max(1, -(-frame.shape[1] // width))
    return frame[::stride, ::stride]


def describe(figures: dict) -> str:
    """Progress figures in one line."""
    return ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in figures.items())
