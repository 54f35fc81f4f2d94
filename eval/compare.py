"""`python -m eval.compare`: DT, TT and Gato on the same datasets, simulators and seeds.

datasets x models x seeds -> one part file of result rows each -> rows.parquet -> table.md, report.html

A part that is already there with the same weights, data and protocol is kept, so a killed
comparison goes on where it was. Missing baselines are trained first, from the same shards.

Invariant: every figure is an aggregate of rows in rows.parquet, and every row names its
seed, weights, data, versions and protocol.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, Literal

import imageio.v3 as imageio
import numpy as np
import pyarrow as pa
import torch
import tyro
from rich.console import Console

from etl import simulators
from eval import report, scores
from eval.agent import AgentConfig, GatoAgent, demonstration, text_tokenizer
from eval.baselines import decision_transformer, trajectory_transformer
from eval.environments import Played, Policy, RandomPolicy, play
from schemas.dataset import DatasetError
from schemas.episode import TaskSpec
from schemas.files import atomic_write, sha256_of
from schemas.result import MODELS, RESULT_SCHEMA, RESULT_SCHEMA_VERSION
from schemas.vocabulary import VocabularyMismatch
from shards.reader import Dataset, Store
from shards.stream import find_datasets
from shards.views import trajectories
from trainer.checkpoint import CheckpointError, load_export

BASELINES = {"dt": decision_transformer, "tt": trajectory_transformer}
# one job cannot run, the others can
FAULTS = (RuntimeError, ArithmeticError, ValueError, OSError)


@dataclass(frozen=True)
class Options:
    """Play the real simulators with DT, TT and Gato; print and save
    `Dataset | Environment | DT | TT | Gato | Random | Behaviour`."""

    gato: Path | None = None
    """Folder of an exported model (…/export); the newest runs/*/export where not given."""
    datasets: tuple[str, ...] = ()
    """Dataset folders or URLs; all finished ones in --root where none is named."""
    root: str = "data/shards"
    tasks: tuple[str, ...] = ()
    """Only these tasks of the datasets."""
    models: tuple[Literal["random", "behaviour", "dt", "tt", "gato"], ...] = ("random", "behaviour", "dt", "tt", "gato")
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("results/compare")
    baselines: Path = Path("runs/baselines")
    """Where trained baselines are kept."""
    budget: Literal["quick", "paper"] = "quick"
    """Size and training steps of the baselines: quick for CPUs, or those of their papers."""
    episodes: int = 10
    """Episodes of each model, environment and model seed."""
    seeds: int = 1
    """Model seeds of each baseline; Gato has the one it was trained with."""
    first_seed: int = 1000
    """Episode n is reset with first_seed + n, for every model alike."""
    step_limit: int | None = None
    """End episodes after this many timesteps; part of the protocol that every row names."""
    film_seconds: float = 6.0
    """Length of each rollout picture; 0 for none."""
    agent: AgentConfig = field(default_factory=AgentConfig)


@dataclass(frozen=True)
class Job:
    """One part: a model on a task with a model seed."""

    dataset: Dataset
    task: int
    model: str
    seed: int

    @property
    def spec(self) -> TaskSpec:
        return self.dataset.manifest.tasks[self.task].spec

    @property
    def name(self) -> str:
        return f"{self.spec.name}-{self.model}-{self.seed}"


class Comparison:
    """What all jobs share: options, the Gato export, where things lie, who we are."""

    def __init__(self, options: Options, console: Console):
        self.options, self.console = options, console
        self.folders = list(options.datasets) or find_datasets(options.root)
        if not self.folders:
            raise DatasetError(f"{options.root}: no finished dataset there; build one with python -m etl.build")
        store = Store()
        self.datasets = [Dataset(folder, store=store) for folder in self.folders]
        known = [task.spec.name for dataset in self.datasets for task in dataset.manifest.tasks]
        if unknown := sorted(set(options.tasks) - set(known)):
            raise DatasetError(f"unknown task '{unknown[0]}'; tasks: {', '.join(known)}")
        self.export: Path | None = None
        if "gato" in options.models:
            self.export = options.gato or newest_export()
            self.gato, self.info = load_export(self.export)
            known_as = self.info.vocabulary_fingerprint
            fits = [one for one in self.datasets if one.manifest.vocabulary.fingerprint == known_as]
            (fits or self.datasets)[0].manifest.vocabulary.require(known_as, str(self.export))
        self.host = {
            "commit": commit(),
            "versions": json.dumps(simulators.versions() | {"torch": torch.__version__, "numpy": np.__version__}),
            "hardware": f"{platform.machine()}, {torch.get_num_threads()} threads",
        }

    def jobs(self) -> list[Job]:
        """Every (dataset, model, seed), cheap models first."""
        chosen = [
            (dataset, number)
            for dataset in self.datasets
            for number, task in enumerate(dataset.manifest.tasks)
            if task.spec.action and (not self.options.tasks or task.spec.name in self.options.tasks)
        ]
        found: list[Job] = []
        for dataset, number in chosen:
            spec = dataset.manifest.tasks[number].spec
            for model in (m for m in MODELS if m in self.options.models):
                if model == "behaviour":
                    found.append(Job(dataset, number, model, 0))
                elif spec.environment is None:
                    self.console.print(f"{spec.name}: its log names no environment, so only behaviour is shown")
                elif not (model == "tt" and any(f.kind == "image" for f in spec.observation)):
                    seeds = self.options.seeds if model in BASELINES else 1
                    found += [Job(dataset, number, model, seed) for seed in range(seeds)]
        return found

    def rows(self, job: Job) -> list[dict[str, Any]]:
        """The rows of a job, played now or kept from before."""
        weights = self.weights(job)
        protocol = self.protocol(job)
        stamp = sha256(f"{job.dataset.manifest.fingerprint}{weights}{protocol}{job.seed}".encode()).hexdigest()[:12]
        part = self.options.output / "parts" / f"{job.name}-{stamp}.parquet"
        if part.is_file():
            self.console.print(f"{job.name}: kept from before", highlight=False)
            return report.load_rows(part).to_pylist()
        if job.model == "behaviour":
            episodes, environment = behaviour(job.dataset, job.task), ""
        else:
            assert job.spec.environment is not None
            environment = job.spec.environment.id
            episodes = self._play(job)
        # Atari logs hold clipped rewards, which the raw references of the score do not fit.
        spec = replace(job.spec, score=None) if job.model == "behaviour" and job.spec.source == "atari" else job.spec
        given = [scores.scored(one.total, spec) for one in episodes]
        rows = [
            {
                "schema_version": RESULT_SCHEMA_VERSION,
                "dataset": job.spec.name,
                "dataset_fingerprint": job.dataset.manifest.fingerprint,
                "environment": environment,
                "model": job.model,
                "model_seed": job.seed,
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
                **self.host,
            }
            for number, one in enumerate(episodes)
        ]
        report.save_rows(part, rows)
        done = [one.total for one in episodes if one.ending != "error"]
        mean = f"{np.mean(done):.1f}" if done else "-"
        self.console.print(f"{job.name}: return {mean} over {len(done)} episodes", highlight=False)
        return rows

    def protocol(self, job: Job) -> str:
        """JSON of everything but weights and data that decides a row."""
        if job.model == "behaviour":
            return json.dumps(
                {"returns": "as logged" + (", clipped to ±1 a step" if job.spec.source == "atari" else "")}
            )
        settings: dict[str, Any] = {"episodes": self.options.episodes, "first_seed": self.options.first_seed}
        settings["step_limit"] = self.options.step_limit
        assert job.spec.environment is not None
        settings["environment"] = simulators.settings(job.spec.environment)
        if job.model == "gato":
            settings |= asdict(self.options.agent)
        if job.model in BASELINES:
            settings["budget"] = self.options.budget
        return json.dumps(settings, sort_keys=True)

    def weights(self, job: Job) -> str:
        """sha256 of the weights a job plays with; a missing baseline is trained first."""
        if job.model == "gato":
            job.dataset.manifest.vocabulary.require(self.info.vocabulary_fingerprint, str(self.export))
            return self.info.weights_sha256
        if job.model not in BASELINES:
            return ""
        return sha256_of(self._baseline(job) / "weights.safetensors")

    def _baseline(self, job: Job) -> Path:
        module = BASELINES[job.model]
        config = module.Config.quick(job.spec) if self.options.budget == "quick" else module.Config.paper(job.spec)
        stamp = sha256(f"{job.dataset.manifest.fingerprint}{config}{job.seed}".encode()).hexdigest()[:12]
        folder = self.options.baselines / f"{job.name}-{stamp}"
        if not (folder / "config.json").is_file():
            self.console.print(f"{job.name}: training the baseline", highlight=False)
            with self.console.status(job.name) as status:
                module.train(
                    trajectories(job.dataset, job.task),
                    job.spec,
                    config,
                    job.seed,
                    folder,
                    lambda figures: status.update(f"{job.name}: " + describe(figures)),
                )
        return folder

    def _policy(self, job: Job) -> Policy:
        if job.model == "random":
            return RandomPolicy(job.spec)
        if job.model in BASELINES:
            return BASELINES[job.model].load(self._baseline(job))
        prompt = demonstration(job.dataset, job.task, self.options.agent)
        return GatoAgent(self.gato, self.info, job.spec, self.options.agent, prompt, text_tokenizer(job.dataset))

    def _play(self, job: Job) -> list[Played]:
        seeds = [self.options.first_seed + n for n in range(self.options.episodes)]
        every = 4 if job.spec.environment and job.spec.environment.suite == "atari" else 5
        film = int(self.options.film_seconds * 10)
        with self.console.status(job.name) as status:

            def progress(timesteps: int, active: int) -> None:
                if timesteps % 20 == 0:
                    status.update(f"{job.name}: timestep {timesteps}, {active} of {len(seeds)} episodes running")

            played = play(self._policy(job), job.spec, seeds, self.options.step_limit, job.seed, film, every, progress)
        if played[0].frames:
            path = self.options.output / "rollouts" / f"{job.spec.name}-{job.model}.gif"
            images = [thumbnail(frame) for frame in played[0].frames]
            with atomic_write(path) as file:
                file.write(imageio.imwrite("<bytes>", images, extension=".gif", duration=100, loop=0))
        return played

    def run(self) -> Path:
        """All jobs, then rows, table and report; a job that cannot run leaves an error row."""
        rows: list[dict[str, Any]] = []
        rollouts: dict[tuple[str, str], Path] = {}
        for job in self.jobs():
            try:
                rows += self.rows(job)
            except FAULTS as error:
                self.console.print(f"[red]{job.name}[/]: {error}", highlight=False)
                rows.append(self._failure(job, str(error)))
            picture = self.options.output / "rollouts" / f"{job.spec.name}-{job.model}.gif"
            if picture.is_file():
                rollouts[job.spec.name, job.model] = picture
        report.save_rows(self.options.output / "rows.parquet", rows)
        table = pa.Table.from_pylist(rows, schema=RESULT_SCHEMA)
        tasks = {task.spec.name: task.spec for dataset in self.datasets for task in dataset.manifest.tasks}
        self.console.print(report.console(scores.aggregate(table), tasks))
        metrics = {}
        if self.export and (self.export.parent / "metrics.jsonl").is_file():
            metrics[self.export.parent.name] = self.export.parent / "metrics.jsonl"
        manifests = [dataset.manifest for dataset in self.datasets]
        return report.write_report(self.options.output, table, manifests, metrics, rollouts, "DT, TT and Gato compared")

    def _failure(self, job: Job, error: str) -> dict[str, Any]:
        empty: dict[str, Any] = {name: None for name in RESULT_SCHEMA.names}
        nothing = {
            "model_sha256": "",
            "protocol": "{}",
            "episode": 0,
            "episode_seed": 0,
            "timesteps": 0,
            "seconds": 0.0,
        }
        nan = float("nan")
        return (
            empty
            | nothing
            | {
                "schema_version": RESULT_SCHEMA_VERSION,
                "dataset": job.spec.name,
                "dataset_fingerprint": job.dataset.manifest.fingerprint,
                "environment": job.spec.environment.id if job.spec.environment and job.model != "behaviour" else "",
                "model": job.model,
                "model_seed": job.seed,
                "return": nan,
                "score": nan,
                "score_kind": "",
                "ending": "error",
                "error": error,
                **self.host,
            }
        )


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
    """The most recently finished export under runs/."""
    found = sorted(root.glob("*/export/model.json"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise CheckpointError(
            f"{root}: no exported model there; train one with deepspeed trainer/main.py, or give --gato"
        )
    return found[-1].parent


def thumbnail(frame: np.ndarray, width: int = 160) -> np.ndarray:
    """A small copy of a picture (H, W, 3), by taking every n-th pixel."""
    stride = max(1, -(-frame.shape[1] // width))
    return frame[::stride, ::stride]


def describe(figures: dict) -> str:
    """Progress figures in one line."""
    return ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in figures.items())


def commit() -> str:
    """Commit of the checkout, or empty outside one."""
    where = Path(__file__).resolve().parent
    asked = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=where, capture_output=True, text=True)
    return asked.stdout.strip() if asked.returncode == 0 else ""


def main() -> int:
    options = tyro.cli(Options, prog="python -m eval.compare")
    console = Console(stderr=True)
    try:
        path = Comparison(options, console).run()
    except (DatasetError, CheckpointError, VocabularyMismatch, scores.ResultError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: the same command again keeps what was played", file=sys.stderr)
        return 130
    print((path.parent / "table.md").read_text())
    print(f"report: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
