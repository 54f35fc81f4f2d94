"""Runs one part of a comparison: a model with its seed on a task -> result rows, in a Parquet file of its own.

    dataset + task + model + seed -> weights (a missing baseline is trained first) -> episodes -> parts/NAME.parquet

The name of a part's file contains a hash of everything that decides its rows. So a part without failures is reused, and
processes share the work without talking to each other.

Invariant: the rows of a part are a function of data, weights, protocol and seed, whichever process plays it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import imageio.v3 as imageio
import numpy as np
import torch

import simulators
from eval import scores
from eval.agents import agent_alone, agent_for, prompted
from eval.baselines import decision_transformer, device, trajectory_transformer
from eval.environments import Played, play
from eval.exports import find_export, newest_export
from eval.jobs import Job, KnownTask, known_tasks, plan_jobs
from eval.options import Options, check
from eval.provenance import host
from eval.rows import load_rows, save_rows
from schemas.dataset import DatasetError
from schemas.episode import TaskSpec
from schemas.files import atomic_write, safe_name, sha256_of
from schemas.metrics import NAMED_TASKS
from schemas.result import EpisodeResult, ResultError, from_table
from shards.reader import Dataset, Store
from shards.stream import find_datasets
from shards.views import trajectories
from simulators import plugins
from simulators.policy import Policy, RandomPolicy
from trainer.checkpoint import CheckpointError
from trainer.model import Gato
from trainer.model.export import ExportInfo, load_export

BASELINES = {"dt": decision_transformer, "tt": trajectory_transformer}

ProgressCallback = Callable[[str], None]
"""Called with a line on what a job is doing now."""


@dataclass(frozen=True)
class JobResult:
    """A job's outcome: its rows, a line on what happened, and the reason if it failed."""

    rows: tuple[EpisodeResult, ...]
    summary: str
    error: str = ""


class ComparisonRunner:
    """Datasets, models and jobs of a comparison, and how a job is run.

    Raises:
        DatasetError, CheckpointError, VocabularyMismatch: a dataset or export is missing, damaged or does not fit.
        ValueError: an option makes no sense, or nothing is left to play.
    """

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
        if "gato" in options.models:
            for folder in [find_export(place) for place in options.gato] or [newest_export()]:
                self._load_gato(folder)
        self.tasks, self.remarks = self._known_tasks()
        if unknown := sorted(set(options.tasks) - {task.spec.name for task in self.tasks}):
            known = ", ".join(task.spec.name for task in self.tasks)
            raise DatasetError(f"unknown task '{unknown[0]}'; tasks: {known}")
        self.jobs, remarks = plan_jobs(options, self.tasks, {seed: info for seed, (_, info) in self.gatos.items()})
        self.remarks += remarks
        self.host = host(options.threads)
        self.seeds = [options.first_seed + n for n in range(options.episodes)]
        self.many = len({job.spec.name for job in self.jobs}) > NAMED_TASKS
        """True if only the worst and best tasks get a film, once they are known."""

    def _load_gato(self, folder: Path) -> None:
        model, info = load_export(folder)
        vocabularies = [dataset.manifest.vocabulary for dataset in self.datasets]
        same = [one for one in vocabularies if one.fingerprint == info.vocabulary_fingerprint]
        (same or vocabularies or [info.vocabulary])[0].require(info.vocabulary_fingerprint, str(folder))
        seed = info.training.seed
        if seed in self.gatos:
            raise CheckpointError(
                f"{folder}: trained with seed {seed}, as {self.exports[seed]} was; give --gato exports of different "
                "seeds"
            )
        self.exports[seed], self.gatos[seed] = folder, (model.to(device()), info)

    def _known_tasks(self) -> tuple[list[KnownTask], list[str]]:
        """The tasks of all datasets; without a dataset those that the first export was trained on, and a remark."""
        if self.datasets:
            return known_tasks(self.datasets), []
        missing = f"{self.options.root}: no finished dataset there; build one with python -m etl.build"
        if not self.gatos:
            raise DatasetError(missing)
        remark = f"{missing}. Until then Gato plays the tasks that it was trained on, compared with random actions"
        return [KnownTask(spec) for spec in next(iter(self.gatos.values()))[1].tasks], [remark]

    def run(self, job: Job, progress: ProgressCallback = lambda text: None) -> JobResult:
        """Play a job now, or read the rows that an earlier comparison left.

        Raises whatever the simulator, the model or the disk raises; `eval.workers.run_job` turns that into rows.
        """
        weights, protocol = self.weights(job, progress), self.protocol(job)
        stamp = sha256(f"{job.fingerprint}{weights}{protocol}{job.seed}".encode()).hexdigest()[:12]
        part = self.options.output / "parts" / f"{safe_name(job.name)}-{stamp}.parquet"
        # the references of a score are raw, and do not fit clipped rewards
        clipped = job.model == "behaviour" and job.clipped
        spec = replace(job.spec, score=None, environment=None) if clipped else job.spec
        kept: list[EpisodeResult] | None = None  # a log may hold no whole episode
        if part.is_file():
            with suppress(ResultError):  # a damaged part is played again
                kept = from_table(load_rows(part))
        # failed episodes are played again; other simulators or libraries may give other returns
        alike = job.model == "behaviour" or {row.versions for row in kept or ()} == {self.host["versions"]}
        if kept is not None and alike and not any(row.failed for row in kept):
            return JobResult(tuple(rescored(row, spec) for row in kept), "kept from before")
        episodes = behaviour(job.dataset, job.task.number) if job.model == "behaviour" else self._play(job, progress)
        common = self._common(job) | {"model_sha256": weights, "protocol": protocol}
        rows = []
        for number, episode in enumerate(episodes):
            score, kind = scores.scored(episode.episode_return, spec)
            rows.append(
                EpisodeResult(
                    **common,
                    episode=number,
                    episode_seed=episode.seed,
                    episode_return=episode.episode_return,
                    score=score,
                    score_kind=kind,
                    timesteps=episode.timesteps,
                    ending=episode.ending,
                    error=episode.error,
                    seconds=episode.seconds,
                )
            )
        if episodes:
            self._save_film(rows[0], episodes[0])
        save_rows(part, rows)
        done = [row.episode_return for row in rows if not row.failed]
        mean = f"{np.mean(done):.1f}" if done else "-"
        failures = sorted({row.error for row in rows if row.failed})
        summary = f"return {mean} over {len(done)} episodes"
        if failures:
            summary += f", {len(rows) - len(done)} failed: {failures[0]}"
        return JobResult(tuple(rows), summary, "" if done or not failures else failures[0])

    def failure(self, job: Job, error: str) -> tuple[EpisodeResult, ...]:
        """The rows of a job that could not run at all: one per episode, a single one for a log."""
        nan = float("nan")
        return tuple(
            EpisodeResult(
                **self._common(job),
                model_sha256="",
                protocol="{}",
                episode=number,
                episode_seed=seed,
                episode_return=nan,
                score=nan,
                score_kind="",
                timesteps=0,
                ending="error",
                error=error,
                seconds=0.0,
            )
            for number, seed in enumerate([0] if job.model == "behaviour" else self.seeds)
        )

    def protocol(self, job: Job) -> str:
        """JSON of everything that decides a row, except weights and data."""
        if job.model == "behaviour":
            clipped = ", clipped to ±1 a step" if job.clipped else ""
            return json.dumps({"returns": "as logged" + clipped})
        settings: dict[str, Any] = {"episodes": self.options.episodes, "first_seed": self.options.first_seed}
        settings["step_limit"] = self.options.step_limit
        assert job.spec.environment is not None
        settings["environment"] = simulators.settings(job.spec.environment)
        if job.model == "gato":
            info = self.gatos[job.seed][1]
            settings |= asdict(prompted(self.options.agent, info, job.spec))
            if job.spec.name not in {task.name for task in info.tasks}:
                settings["zero_shot"] = True  # the table marks it
        if job.model in BASELINES:
            settings["budget"] = self.options.budget
        return json.dumps(settings, sort_keys=True)

    def weights(self, job: Job, progress: ProgressCallback) -> str:
        """sha256 of the weights that a job plays with; a missing baseline is trained first."""
        if job.model == "gato":
            info = self.gatos[job.seed][1]
            if job.task.dataset is not None:
                data, export = job.dataset, str(self.exports[job.seed])
                info.require_data(data.manifest, job.spec, str(data.place), export)
            return info.weights_sha256
        if job.model not in BASELINES:
            return ""
        return sha256_of(self.baseline(job, progress) / "weights.safetensors")

    def baseline_folder(self, job: Job) -> Path:
        """Folder of a baseline; its name contains a hash of data, settings and seed."""
        stamp = sha256(f"{job.fingerprint}{self._baseline_config(job)}{job.seed}".encode()).hexdigest()[:12]
        return self.options.baselines / f"{safe_name(job.name)}-{stamp}"

    def _baseline_config(self, job: Job) -> Any:
        return getattr(BASELINES[job.model].Config, self.options.budget)(job.spec)

    def baseline(self, job: Job, progress: ProgressCallback) -> Path:
        """The folder of a trained baseline, which is trained now if it is missing."""
        module, folder = BASELINES[job.model], self.baseline_folder(job)
        if not (folder / "config.json").is_file():
            folder.mkdir(parents=True, exist_ok=True)  # a place that cannot be written fails before the training
            episodes, config = trajectories(job.dataset, job.task.number), self._baseline_config(job)
            module.train(episodes, job.spec, config, job.seed, folder, lambda metrics: progress(in_words(metrics)))
        return folder

    def picture(self, row: EpisodeResult) -> Path:
        """The film of a model's first seed on a task."""
        return self.options.output / "rollouts" / f"{safe_name(row.dataset)}-{row.model}.gif"

    def filmed(self, row: EpisodeResult) -> bool:
        """True if the film is there and shows the row's weights, data, protocol and versions, by its comment."""
        return self.picture(row).is_file() and film_stamp(row) in self.picture(row).read_bytes()

    def _policy(self, job: Job, progress: ProgressCallback) -> Policy:
        if job.model == "random":
            assert job.spec.action is not None
            return RandomPolicy(job.spec.action)
        if job.model in BASELINES:
            return BASELINES[job.model].load(self.baseline(job, progress))
        model, info = self.gatos[job.seed]
        if job.task.dataset is not None:
            return agent_for(model, info, job.dataset, job.task.number, self.options.agent)
        return agent_alone(model, info, self.exports[job.seed], job.spec, self.options.agent)

    def _play(self, job: Job, progress: ProgressCallback) -> list[Played]:
        first = min(self.gatos) if job.model == "gato" else 0
        frames = int(self.options.film_seconds * 10) if job.seed == first and not self.many else 0

        def each_timestep(timesteps: int, active: int) -> None:
            if timesteps % 20 == 0:
                progress(f"timestep {timesteps}, {active} of {len(self.seeds)} episodes running")

        return self._episodes(job, self.seeds, frames, self.options.step_limit, each_timestep, progress)

    def film(self, job: Job, row: EpisodeResult) -> None:
        """The film of a job's first row, unless it is there: the episode again, as far as the film goes.
        Raises what the simulator raises."""
        assert job.spec.environment is not None
        frames = int(self.options.film_seconds * 10)
        limit = frames * simulators.suite_named(job.spec.environment.suite).film_every
        limit = min(limit, self.options.step_limit or limit)
        if frames and not self.filmed(row):
            self._save_film(row, self._episodes(job, self.seeds[:1], frames, limit)[0])

    def _episodes(
        self,
        job: Job,
        seeds: list[int],
        frames: int,
        limit: int | None,
        each_timestep: Callable[[int, int], None] = lambda timesteps, active: None,
        progress: ProgressCallback = lambda text: None,
    ) -> list[Played]:
        assert job.spec.environment is not None
        every = simulators.suite_named(job.spec.environment.suite).film_every
        policy = self._policy(job, progress)
        return play(policy, job.spec, seeds, limit, job.seed, frames, every, each_timestep)

    def _save_film(self, row: EpisodeResult, played: Played) -> None:
        if played.frames:
            images, stamp = [thumbnail(frame) for frame in played.frames], film_stamp(row)
            with atomic_write(self.picture(row)) as file:
                file.write(imageio.imwrite("<bytes>", images, extension=".gif", duration=100, loop=0, comment=stamp))

    def _common(self, job: Job) -> dict[str, Any]:
        """The fields that all rows of a job share."""
        return {
            "dataset": job.spec.name,
            "dataset_fingerprint": job.fingerprint,
            "environment": job.environment,
            "model": job.model,
            "model_seed": job.seed,
            **self.host,
        }


def film_stamp(row: EpisodeResult) -> bytes:
    """A hash of everything that decides what a row's film shows, for the film's comment."""
    identity = (row.dataset_fingerprint, row.model_seed, row.model_sha256, row.protocol, row.versions)
    return sha256(repr(identity).encode()).hexdigest().encode()


def rescored(row: EpisodeResult, spec: TaskSpec) -> EpisodeResult:
    """An earlier row with its score by today's reference."""
    if row.failed:
        return row
    score, kind = scores.scored(row.episode_return, spec)
    return replace(row, score=score, score_kind=kind)


def behaviour(dataset: Dataset, task: int) -> list[Played]:
    """The complete episodes of the log itself, in the form of played ones."""
    rows = np.concatenate([dataset.rows(task, held_out) for held_out in (False, True)])
    ends = dataset.column("terminated")[rows] | dataset.column("truncated")[rows]
    rows = np.sort(rows[ends & (dataset.column("start")[rows] == 0)])
    return [
        Played(
            seed=0,
            episode_return=float(dataset.column("episode_return")[row]),
            timesteps=int(dataset.column("episode_timesteps")[row]),
            ending="terminated" if dataset.column("terminated")[row] else "truncated",
        )
        for row in rows
    ]


def thumbnail(frame: np.ndarray, width: int = 160) -> np.ndarray:
    """A small copy of a picture (H, W, 3): every n-th pixel, so that it is at most `width` wide."""
    stride = max(1, -(-frame.shape[1] // width))
    return frame[::stride, ::stride]


def in_words(metrics: dict[str, Any]) -> str:
    """Progress metrics in one line."""
    return ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in metrics.items())
