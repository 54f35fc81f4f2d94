"""A training run, from whatever checkpoint there is to the last step and the export.

    streams, model -> newest whole checkpoint (or none) -> engine -> steps: batches -> loss -> metrics, evaluation, save

Rank 0 decides and tells the others: what to resume from, what is published. What is written is written under another
name and renamed when every rank has finished; a save that fails leaves the last checkpoint as it was.

Invariant: weights, states and metrics at step n are the same whether the run was interrupted or not (on one machine
and world size bit for bit), and sequence n G is the first of the next step.
"""

from __future__ import annotations

import json
import math
import time
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.distributed as dist

from schemas.dataset import DatasetError
from schemas.files import atomic_write
from shards.loader import Loader
from shards.reader import Store
from shards.stream import Stream, find_datasets
from trainer import checkpoint
from trainer.config import TrainConfig, deciding, differences, to_dict
from trainer.engine import Engine, StepResult, agreed, learning_rate
from trainer.heldout import evaluate
from trainer.loss import targets_of
from trainer.metrics import Metrics
from trainer.model import Gato, ModelConfig
from trainer.recipes import RECIPES
from trainer.watch import Stop, expect_sign_of_life, only_run

STANDARDISE = 512  # sequences whose observations say where a new model's places start


def train(recipe: str, config: TrainConfig, device: torch.device, stop: Stop) -> None:
    """The whole run. ValueError (DatasetError, CheckpointError) or OSError, the same on every rank where rank 0 found
    the fault, says what to do."""
    with ExitStack() as held:
        agreed(lambda: held.enter_context(only_run(config.run.output)))
        run = Run(recipe, config, device)
        held.callback(run.close)
        run.go(stop)


class Run:
    """The parts of a run, and what happens between its steps."""

    def __init__(self, recipe: str, config: TrainConfig, device: torch.device):
        config, start = started(recipe, config)
        self.recipe, self.config, self.device = recipe, config, device
        self.folder = config.run.output / "checkpoints"
        self.stream, self.held_out = open_streams(config)
        if start is not None:
            self.stream.vocabulary.require(start[1].vocabulary_fingerprint, config.run.start_from)
        self.started_from = start[1].weights_sha256 if start else None
        self.specs = [t.dataset.manifest.tasks[t.task].spec for t in self.stream.timelines]
        mixed = [t.name for t in self.stream.timelines if t.layout.text and t.layout.action]
        if mixed and config.model.sequence == "timesteps":
            raise DatasetError(
                f"--model.sequence timesteps: task '{mixed[0]}' predicts text within a timestep, which it shows; "
                "leave it out by --data.stream.tasks, or use tokens"
            )
        model = Gato(config.model, self.stream.vocabulary).initialise(config.seed)
        record = agreed(self._newest)
        if record is not None:
            read = checkpoint.reader(self.folder, record)
            model.load_state_dict({name: read(f"{name}/weight") for name, _ in model.named_parameters()})
        elif start is not None:
            model.load_state_dict(start[0].state_dict())
        elif model.by_timesteps:
            model.standardise(self.stream.batch(0, STANDARDISE).to("cpu"))
        # before the engine: under ZeRO 3 its parameters are empty
        self.counts, self.flops = model.parameter_counts(), model.flops_per_token(config.data.stream.sequence_length)
        self.engine = Engine(model, config, device, *targets_of(self.stream))
        if record is not None:
            self.engine.restore(read, record.applied)
        self.step = record.step if record else 0
        self.skipped_in_a_row = 0
        self.best = checkpoint.score_of(config.run.output / "best") if record else math.inf
        self.first = self.engine.rank == 0
        self.metrics = Metrics(config.run, self.step, config.steps) if self.first else None
        self.batches = self._loader()
        if self.first:
            self._introduce(record)

    def _newest(self) -> checkpoint.Record | None:
        """The checkpoint to go on from. CheckpointError where its run was another one."""
        record = checkpoint.latest(self.folder)
        if record is None:
            return None
        if self.config.run.resume == "never":
            raise checkpoint.CheckpointError(
                f"{self.folder}: holds checkpoints; give another --run.output or --run.resume auto"
            )
        state = self._state()
        if changed := differences(state, record.state):
            raise checkpoint.CheckpointError(
                f"{self.folder}: made with another configuration ({'; '.join(changed)}), so its run cannot be "
                "continued exactly; restore that, or give another --run.output"
            )
        return record

    def _state(self) -> dict:
        """What decides losses and weights, as JSON has it."""
        config, G = deciding(self.config), self.config.data.global_batch
        state = {"stream": self.stream.fingerprint, "global_batch": G, "config": config}
        start = {"start_from": self.started_from} if self.started_from else {}
        return json.loads(json.dumps(state | start))

    def _loader(self) -> Loader:
        data, run, pinned = self.config.data, self.engine, self.device.type == "cuda"
        start, micro = self.step * data.global_batch, data.micro_batch
        return Loader(self.stream, start, data.global_batch, micro, run.rank, run.world, data.threads, pinned)

    def _introduce(self, record: checkpoint.Record | None) -> None:
        with atomic_write(self.config.run.output / "config.json") as file:
            file.write(json.dumps({"recipe": self.recipe} | to_dict(self.config), indent=1).encode())
        counts = ", ".join(f"{name} {count / 1e6:.2f}M" for name, count in self.counts.items())
        ranks = f"{self.engine.world} process(es) on {self.device}, ZeRO {self.engine.stage}"
        print(f"parameters: {counts}; tasks: {', '.join(self.stream.tasks)}; {ranks}", flush=True)
        if record is not None:
            before = f"{record.world_size} process(es), ZeRO {record.zero_stage}"
            print(f"resuming at step {record.step} (saved by {before})", flush=True)
        elif self.started_from:
            print(f"starting from the weights of {self.config.run.start_from}", flush=True)
            usual, own = asdict(RECIPES[self.recipe].model), asdict(self.config.model)
            if others := [f"{name} {own[name]} (recipe {usual[name]})" for name in own if own[name] != usual[name]]:
                print(f"its shape is not the recipe's: {', '.join(others)}", flush=True)

    def go(self, stop: Stop) -> None:
        """All steps that are left, or as many as are taken before somebody asks to stop."""
        config, ended = self.config, False
        self._interval = self._begun = time.monotonic()
        self._since, self._losses = self.step, list[float]()
        if self.step == 0 and self.metrics_wanted(0):
            self._write(self._evaluate())
        while self.step < config.steps and not ended:
            expect_sign_of_life(config.run.patience_minutes)
            result = self.engine.train_step(self.step, next(self.batches), stop.asked)
            self._count(result)
            self.step += 1
            ended = result.stop_requested
            last = ended or self.step == config.steps
            figures = self._figures(result) if last or self.step % config.run.log_every == 0 else {}
            if self.held_out and (last or self.metrics_wanted(self.step)):
                figures |= self._evaluate()
            self._write(figures)
            score = figures.get("held_out/loss")
            if (last or self.step % config.run.save_every == 0) and not self._save(score) and last:
                raise checkpoint.CheckpointError(f"{self.folder}: the last step could not be saved, see above")
            if score is not None and score < self.best:
                self.best = score
                self._export("best", score)
            if config.run.export_every and self.step % config.run.export_every == 0:
                self._export(f"exports/step-{self.step}")
        expect_sign_of_life(0)
        self._export("export")
        if self.first:
            done = "stopped on request, run the same command to go on" if self.step < config.steps else "finished"
            print(f"{done} at step {self.step}; weights in {config.run.output / 'export'}", flush=True)

    def metrics_wanted(self, step: int) -> bool:
        """Whether held-out episodes are evaluated behind a step."""
        return self.held_out is not None and step % self.config.run.evaluate_every == 0

    def _count(self, result: StepResult) -> None:
        """Losses of applied steps; an end to steps that change nothing. The same on every rank."""
        if result.applied:
            self._losses.append(result.loss)
            self.skipped_in_a_row = 0
            return
        self.skipped_in_a_row += 1
        G = self.config.data.global_batch
        where = f"step {self.step} (sequences {self.step * G} to {(self.step + 1) * G - 1})"
        if self.first:
            print(f"warning: gradients of {where} are not finite, loss {result.loss}; skipped", flush=True)
        if self.skipped_in_a_row >= self.config.run.skip_limit:
            raise ValueError(
                f"{self.skipped_in_a_row} steps in a row, up to {where}, had gradients that are not finite; lower "
                "--optimiser.peak-lr or look at the data. The last checkpoint is whole"
            )

    def _figures(self, result: StepResult) -> dict[str, float]:
        """What happened since the last figures; {} on other ranks than 0."""
        if self.metrics is None:
            return {}
        now, data = time.monotonic(), self.config.data
        tokens = data.global_batch * data.stream.sequence_length
        rate = (self.step - self._since) * tokens / (now - self._interval)
        figures = {
            "train/learning_rate": learning_rate(self.step - 1, self.config.optimiser),
            "train/tokens_per_second": rate,
            "train/skipped_steps": self.step - self.engine.applied,
            **self.batches.figures(),
        }
        if self.device.type == "cuda":
            figures["train/peak_gigabytes"] = torch.cuda.max_memory_allocated(self.device) / 1e9
        if self._losses:
            figures["train/loss"] = sum(self._losses) / len(self._losses)
        if math.isfinite(result.gradient_norm):
            figures["train/gradient_norm"] = result.gradient_norm
        text = f"loss {figures.get('train/loss', math.nan):.4f}  {rate:,.0f} tokens/s"
        if peak := self.metrics.peak_flops(self.device):
            figures["train/mfu"] = rate * self.flops / (peak * self.engine.world)
            text += f"  MFU {100 * figures['train/mfu']:.1f} %"
        self.metrics.progress(self.step, f"{text}  data wait {100 * figures['data/wait_share']:.1f} %")
        self._interval, self._since, self._losses = now, self.step, []
        return figures

    def _evaluate(self) -> dict[str, float]:
        """Held-out figures of all tasks, each evaluated by one rank, on every rank. Collective."""
        assert self.held_out is not None
        engine, config = self.engine, self.config
        mine = range(engine.rank, len(self.held_out.tasks), engine.world)
        sequences, micro = config.run.evaluate_sequences, config.data.micro_batch
        own = evaluate(engine.whole_model(), self.held_out, mine, sequences, micro, self.device)
        parts: list[dict[str, float]] = [{}] * engine.world
        dist.all_gather_object(parts, own)
        figures = dict(sorted(item for part in parts for item in part.items()))
        losses = [value for name, value in figures.items() if name.endswith("/loss")]
        return figures | {"held_out/loss": sum(losses) / len(losses)}

    def _write(self, figures: dict[str, float]) -> None:
        if self.metrics and figures:
            data = self.config.data
            tokens = self.step * data.global_batch * data.stream.sequence_length
            self.metrics.write(self.step, tokens, time.monotonic() - self._begun, figures)

    def _save(self, score: float | None) -> bool:
        """A checkpoint of this step; False, and the last one stays, where it cannot be written. Collective."""
        engine, tag, state = self.engine, checkpoint.tag_of(self.step), self._state()
        agreed(lambda: checkpoint.discard(self.folder, tag))
        tensors = engine.tensors()
        try:
            name, digest, fault = *checkpoint.write_part(self.folder / tag, engine.rank, tensors), ""
        except OSError as error:
            name, digest, fault = "", "", str(error)
        told: list[tuple[str, str, str]] = [("", "", "")] * engine.world
        dist.all_gather_object(told, (name, digest, fault))
        fault = next((fault for _, _, fault in told if fault), "")
        run, files = self.config.run, {name: digest for name, digest, _ in told}
        record = checkpoint.Record(
            version=checkpoint.CHECKPOINT_VERSION,
            step=self.step,
            next_sequence=self.step * self.config.data.global_batch,
            applied=engine.applied,
            world_size=engine.world,
            zero_stage=engine.stage,
            score=score,
            state=state,
            files=files,
        )

        def publish() -> str:
            try:
                if not fault:
                    checkpoint.publish(self.folder, record, run.keep_last, run.keep_best)
                    return ""
                said = fault
            except OSError as error:
                said = str(error)
            checkpoint.discard(self.folder, tag)
            print(f"warning: step {self.step} not saved: {said}; make room, older checkpoints stay", flush=True)
            return said

        return not agreed(publish)

    def _export(self, name: str, score: float | None = None) -> None:
        """Weights and what they need to be used, in a folder of the run. Collective."""
        weights = self.engine.weights()
        if weights is None:
            return
        config, stream = self.config, self.stream
        info = checkpoint.ExportInfo(
            format="gato.model",
            version=checkpoint.EXPORT_VERSION,
            model=config.model,
            vocabulary=stream.vocabulary,
            vocabulary_fingerprint=stream.vocabulary.fingerprint,
            sequence_length=config.data.stream.sequence_length,
            step=self.step,
            tasks=tuple(self.specs),
            datasets={d.place.name: d.manifest.fingerprint for d in stream.datasets},
            training={
                "recipe": self.recipe,
                "steps": config.steps,
                "global_batch": config.data.global_batch,
                "seed": config.seed,
                "held_out_loss": score,
                "start_from": self.started_from,
            },
        )
        try:
            checkpoint.export(config.run.output / name, weights, info)
        except OSError as error:
            if name == "export":
                raise
            print(f"warning: {config.run.output / name} could not be written: {error}", flush=True)

    def close(self) -> None:
        """Stop the loader's threads and finish the metrics."""
        self.batches.close()
        if self.metrics:
            self.metrics.close()


def started(recipe: str, config: TrainConfig) -> tuple[TrainConfig, tuple[Gato, checkpoint.ExportInfo] | None]:
    """The configuration with the shape of the model that a run starts from, and that model, where it starts from one.
    CheckpointError or ValueError where it cannot."""
    if not config.run.start_from:
        return config, None
    start = checkpoint.load_export(Path(config.run.start_from))
    return replace(config, model=shape_of(start[1].model, config, recipe)), start


def shape_of(exported: ModelConfig, config: TrainConfig, recipe: str) -> ModelConfig:
    """The model of a run that starts from an export: the export's, but for what acts in training alone. ValueError
    names a setting of the command line that the export contradicts."""
    own, usual = config.model, RECIPES[recipe].model
    model = replace(exported, dropout=own.dropout, stochastic_depth=own.stochastic_depth)
    for name, value in asdict(own).items():
        if value not in (getattr(usual, name), getattr(model, name)):
            raise ValueError(
                f"--model.{name.replace('_', '-')} {value}: the export {config.run.start_from} has "
                f"{getattr(model, name)}; leave it out, or train from the start"
            )
    return model


def open_streams(config: TrainConfig) -> tuple[Stream, Stream | None]:
    """The training stream, and the held-out one where there are held-out episodes."""
    data = config.data
    folders = list(data.folders) or find_datasets(data.root)
    if not folders:
        raise DatasetError(
            f"{data.root}: no finished dataset there; build one with python -m etl.build, or name --data.folders"
        )
    store = Store(data.cache)
    stream = Stream(folders, data.stream, config.seed, False, data.verify, data.on_bad_shard, store)
    longest = min(data.stream.sequence_length, config.model.local_positions)
    for name, timeline in zip(stream.tasks, stream.timelines):
        if timeline.layout.length > longest:
            raise DatasetError(
                f"task '{name}': a timestep has {timeline.layout.length} tokens, more than the sequence length "
                f"{data.stream.sequence_length} or the {config.model.local_positions} local positions; raise "
                "--data.stream.sequence-length or --model.local-positions"
            )
    if not any(t.dataset.manifest.tasks[t.task].held_out_episodes for t in stream.timelines):
        return stream, None
    return stream, Stream(folders, data.stream, config.seed, True, "size", data.on_bad_shard, store)
