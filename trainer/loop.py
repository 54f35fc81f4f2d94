"""A training run, from its newest checkpoint (or the start) to the last step and the export.

    streams, model -> newest intact checkpoint, if any -> engine -> steps: batches -> loss -> metrics, evaluation, save

Rank 0 decides for all ranks what to resume from and what is published. Files are written under a temporary name and
renamed when every rank is done, so a save that fails leaves the last checkpoint intact.

Invariant: weights, states and metrics at step n are the same whether the run was interrupted or not (on one machine
and world size bit for bit), and sequence n G is the first of the next step.
"""

from __future__ import annotations

import json
import math
import time
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist

from schemas.dataset import DatasetError, ObservationScale
from schemas.files import atomic_write
from shards.loader import Loader
from trainer import checkpoint
from trainer.config import TrainConfig, differences, remarks, resume_critical, to_dict
from trainer.deepspeed_file import precision, resolve_auto
from trainer.distributed import agreement
from trainer.distributed.ranks import on_every_rank, on_rank_0
from trainer.engine import Engine, StepResult, learning_rate, read_config, zero_config
from trainer.heldout import evaluate, mean_losses
from trainer.inputs import adopted, load_initial_model, open_streams, recipe_of, text_model_of
from trainer.lifecycle import StopRequest, exclusive_run, restart_watchdog
from trainer.loss import targets_of
from trainer.metrics import MetricsWriter, tasks_in_words
from trainer.model import Gato
from trainer.model.export import EXPORT_VERSION, ExportInfo, TrainingInfo, held_out_loss_of, save_export
from trainer.scales import observation_scales


def train(recipe: str, config: TrainConfig, device: torch.device, stop: StopRequest) -> None:
    """Train to the last step, or until a stop is requested, and export. Collective.

    Raises:
        ValueError: DatasetError, CheckpointError or a setting; the same on every rank if rank 0 found the fault.
        OSError: the last checkpoint or the export cannot be written.
    """
    with ExitStack() as resources:
        on_rank_0(lambda: resources.enter_context(exclusive_run(config.run.output, stop=stop)))
        body = on_every_rank(lambda: read_config(config.deepspeed))
        agreement.require_same_program(config, body)
        agreement.require_same_folder(config.run.output)
        if dist.get_rank() == 0:
            announce_device(config, body, device)
        run = Run(recipe, config, device)
        resources.callback(run.close)
        run.run_steps(stop)


def announce_device(config: TrainConfig, body: dict[str, Any], device: torch.device) -> None:
    """Print where and in which precision this run computes, and how "auto" in the DeepSpeed file was understood."""
    used, remarks = zero_config(config, dist.get_world_size()), resolve_auto(body, device.type == "cuda")[1]
    stage = used.get("zero_optimization", {}).get("stage", 0)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    shared = f"{dist.get_world_size()} process(es) on {name}, {precision(used)}, ZeRO {stage} ({config.deepspeed})"
    print("\n".join([shared, *(f"{config.deepspeed}: {line}" for line in remarks)]), flush=True)


class Run:
    """Streams, engine, metrics of one run, and what happens between its steps."""

    def __init__(self, recipe: str, config: TrainConfig, device: torch.device):
        config, initial = on_every_rank(lambda: load_initial_model(recipe, config))
        self.recipe, self.config, self.device = recipe, config, device
        self.folder = config.run.output / "checkpoints"
        self.stream, self.held_out = on_every_rank(lambda: open_streams(config))
        agreement.require_same_data(self.stream)
        self.text_model = on_every_rank(lambda: text_model_of(self.stream))
        if initial is not None:
            for timeline in self.stream.timelines:
                manifest, place = timeline.dataset.manifest, str(timeline.dataset.place)
                initial[1].require_data(manifest, timeline.spec, place, config.run.start_from)
        self.initial_sha256 = initial[1].weights_sha256 if initial else None
        self.specs = [t.dataset.manifest.tasks[t.task].spec for t in self.stream.timelines]
        mixed = [t.name for t in self.stream.timelines if t.layout.action and self.stream.predicts_text(t)]
        if mixed and config.model.sequence == "timesteps":
            raise DatasetError(
                f"--model.sequence timesteps: cannot predict the text of task '{mixed[0]}', which is an input of its "
                "timestep; give --data.stream.no-text-loss, or --recipe tiny-tokens"
            )
        with device:
            model = Gato(config.model, self.stream.vocabulary).initialise(config.seed)
        record = on_rank_0(self._checkpoint_to_resume)
        if record is not None:
            read = on_every_rank(lambda: checkpoint.tensor_reader(self.folder, record))
            model.load_state_dict({name: read(f"{name}/weight") for name, _ in model.named_parameters()})
        elif initial is not None:
            model.load_state_dict(initial[0].state_dict())
        self.scales: dict[str, ObservationScale] = {}
        if model.by_timesteps:
            self.scales = observation_scales(self.stream, shared=config.model.shared_scales)
            if initial is not None:  # whose weights know values as they were scaled then
                own = [(spec.name, initial[1].observation_scale(spec)) for spec in self.specs]
                self.scales |= {name: scale for name, scale in own if scale}
            model.standardise(self.scales)
        # before the engine: under ZeRO 3 its parameters are empty
        self.counts, self.flops = model.parameter_counts(), model.flops_per_token(config.data.stream.sequence_length)
        self.engine = Engine(model, config, device, targets_of(self.stream))
        if record is not None:
            self.engine.restore(read, record.applied)
        self.step = record.step if record else 0
        self.skipped_in_a_row = 0
        self.best_loss = held_out_loss_of(config.run.output / "best") if record else math.inf
        self.is_rank_0 = self.engine.rank == 0
        self.metrics = MetricsWriter(config.run, self.step, config.steps) if self.is_rank_0 else None
        self.batches = self._loader()
        if self.is_rank_0:
            self._announce(record)

    def _checkpoint_to_resume(self) -> checkpoint.Record | None:
        """The newest checkpoint. CheckpointError if its run had other settings than this one."""
        record = checkpoint.latest(self.folder)
        if record is None:
            return None
        if self.config.run.resume == "never":
            raise checkpoint.CheckpointError(
                f"{self.folder}: holds checkpoints; give another --run.output or --run.resume auto"
            )
        if changed := differences(asdict(self._resume_state()), asdict(record.state)):
            raise checkpoint.CheckpointError(
                f"{self.folder}: made with another configuration ({'; '.join(changed)}), so its run cannot be "
                "continued exactly; restore that, or give another --run.output"
            )
        return record

    def _resume_state(self) -> checkpoint.ResumeState:
        """State that determines losses and weights."""
        config = json.loads(json.dumps(resume_critical(self.config)))
        return checkpoint.ResumeState(
            self.stream.fingerprint, self.config.data.global_batch, config, self.initial_sha256
        )

    def _loader(self) -> Loader:
        data, engine, pinned = self.config.data, self.engine, self.device.type == "cuda"
        start, micro = self.step * data.global_batch, data.micro_batch
        return Loader(self.stream, start, data.global_batch, micro, engine.rank, engine.world, data.threads, pinned)

    def _announce(self, record: checkpoint.Record | None) -> None:
        """Save the configuration and print what is trained, from what. Rank 0 only."""
        with atomic_write(self.config.run.output / "config.json") as file:
            file.write(json.dumps({"recipe": self.recipe} | to_dict(self.config), indent=1).encode())
        counts = ", ".join(f"{name} {count / 1e6:.2f}M" for name, count in self.counts.items())
        print(f"parameters: {counts}; {tasks_in_words(self.stream)}", flush=True)
        if record is not None:
            before = f"{record.world_size} process(es), ZeRO {record.zero_stage}"
            print(f"resuming at step {record.step} (saved by {before})", flush=True)
        elif self.initial_sha256:
            print(f"starting from the weights of {self.config.run.start_from}", flush=True)
            own, usual = adopted(self.config), adopted(recipe_of(self.recipe))
            if others := [f"{name} {own[name]} (recipe {usual[name]})" for name in own if own[name] != usual[name]]:
                print(f"from it, or from the command line, and not the recipe's: {', '.join(others)}", flush=True)
        for line in remarks(self.config):
            print(f"warning: {line}", flush=True)

    def run_steps(self, stop: StopRequest) -> None:
        """Take all remaining steps, or as many as are taken before a stop is requested; then export."""
        config, ended, last_loss = self.config, False, math.nan
        self._start_time = self._interval_start = time.monotonic()
        self._interval_step, self._losses = self.step, list[float]()
        tokens = config.data.global_batch * config.data.stream.sequence_length
        if self.step == 0 and self._is_evaluation_step():
            self._write(self._evaluate())
        while self.step < config.steps and not ended:
            restart_watchdog(config.run.patience_minutes)
            result = self.engine.train_step(self.step, next(self.batches), stop.requested)
            self._count(result)
            self.step += 1
            ended = result.stop_requested
            last = ended or self.step == config.steps
            metrics = self._training_metrics(result) if last or self.step % config.run.log_every == 0 else {}
            if self.held_out and (last or self._is_evaluation_step()):
                metrics |= self._evaluate()
            if self.metrics and "train/tokens_per_second" in metrics:
                self.metrics.progress(self.step, metrics, tokens)
            self._write(metrics)
            loss = metrics.get("held_out/loss")
            if (last or self.step % config.run.save_every == 0) and not self._save(loss) and last:
                raise checkpoint.CheckpointError(f"{self.folder}: the last step could not be saved, see above")
            if loss is not None:
                last_loss = loss
                if loss < self.best_loss:
                    self.best_loss = loss
                    self._export("best", loss)
            if config.run.export_every and self.step % config.run.export_every == 0:
                self._export(f"exports/step-{self.step}")
        restart_watchdog(0)
        self._export("export")
        if self.is_rank_0:
            outcome = "stopped on request, run the same command to resume"
            if self.step >= config.steps:
                outcome = "finished" if self.step == config.steps else f"nothing to do for --steps {config.steps}"
            print(f"{outcome} at step {self.step}; weights in {config.run.output / 'export'}", flush=True)
            if last_loss > 1.05 * self.best_loss:
                print(
                    f"held-out loss rose from {self.best_loss:.4f} at its lowest to {last_loss:.4f}, as when few data "
                    f"are learned by heart; the weights of the lowest are in {config.run.output / 'best'}: play both",
                    flush=True,
                )

    def _is_evaluation_step(self) -> bool:
        """True if held-out episodes are evaluated now, after `self.step` steps."""
        return self.held_out is not None and self.step % self.config.run.evaluate_every == 0

    def _count(self, result: StepResult) -> None:
        """Collect the losses of applied steps; ValueError after too many skipped ones. The same on every rank."""
        if result.applied:
            self._losses.append(result.loss)
            self.skipped_in_a_row = 0
            return
        self.skipped_in_a_row += 1
        G = self.config.data.global_batch
        where = f"step {self.step} (sequences {self.step * G} to {(self.step + 1) * G - 1})"
        if self.is_rank_0:
            print(f"warning: gradients of {where} are not finite, loss {result.loss}; skipped", flush=True)
        if self.skipped_in_a_row >= self.config.run.skip_limit:
            raise ValueError(
                f"{self.skipped_in_a_row} steps in a row, up to {where}, had gradients that are not finite; lower "
                "--optimiser.peak-lr or look at the data. The last checkpoint is intact"
            )

    def _training_metrics(self, result: StepResult) -> dict[str, float]:
        """Metrics since the last call; {} on other ranks than 0."""
        if self.metrics is None:
            return {}
        now, data = time.monotonic(), self.config.data
        tokens = data.global_batch * data.stream.sequence_length
        rate = (self.step - self._interval_step) * tokens / (now - self._interval_start)
        metrics = {
            "train/learning_rate": learning_rate(self.step - 1, self.config.optimiser),
            "train/tokens_per_second": rate,
            "train/skipped_steps": self.step - self.engine.applied,
            **self.batches.metrics(),
        }
        if self.device.type == "cuda":
            metrics["train/peak_gigabytes"] = torch.cuda.max_memory_allocated(self.device) / 1e9
        if self._losses:
            metrics["train/loss"] = sum(self._losses) / len(self._losses)
        if math.isfinite(result.gradient_norm):
            metrics["train/gradient_norm"] = result.gradient_norm
        if peak := self.metrics.peak_flops(self.device):
            metrics["train/mfu"] = rate * self.flops / (peak * self.engine.world)
        self._interval_start, self._interval_step, self._losses = now, self.step, []
        return metrics

    def _evaluate(self) -> dict[str, float]:
        """Held-out metrics of all tasks, each evaluated by one rank, on every rank. Collective."""
        assert self.held_out is not None
        engine, config = self.engine, self.config
        own_tasks = range(engine.rank, len(self.held_out.tasks), engine.world)
        sequences, micro = config.run.evaluate_sequences, config.data.micro_batch
        own = evaluate(engine.evaluation_model(), self.held_out, own_tasks, sequences, micro, self.device)
        gathered: list[dict[str, float]] = [{}] * engine.world
        dist.all_gather_object(gathered, own)
        metrics = dict(sorted(item for of_rank in gathered for item in of_rank.items()))
        return metrics | mean_losses(metrics, [timeline.spec for timeline in self.held_out.timelines])

    def _write(self, metrics: dict[str, float]) -> None:
        if self.metrics and metrics:
            data = self.config.data
            tokens = self.step * data.global_batch * data.stream.sequence_length
            self.metrics.write(self.step, tokens, time.monotonic() - self._start_time, metrics)

    def _save(self, score: float | None) -> bool:
        """Save a checkpoint of this step. False, with a warning, if it cannot be written; older ones stay then.
        Collective."""
        engine, tag = self.engine, checkpoint.tag_of(self.step)
        on_rank_0(lambda: checkpoint.discard(self.folder, tag))
        tensors = engine.tensors()
        try:
            name, digest, fault = *checkpoint.write_part(self.folder / tag, engine.rank, tensors), ""
        except OSError as error:
            name, digest, fault = "", "", str(error)
        gathered: list[tuple[str, str, str]] = [("", "", "")] * engine.world
        dist.all_gather_object(gathered, (name, digest, fault))
        first_fault = next((fault for _, _, fault in gathered if fault), "")
        run = self.config.run
        record = checkpoint.Record(
            version=checkpoint.CHECKPOINT_VERSION,
            step=self.step,
            next_sequence=self.step * self.config.data.global_batch,
            applied=engine.applied,
            world_size=engine.world,
            zero_stage=engine.stage,
            score=score,
            state=self._resume_state(),
            files={name: digest for name, digest, _ in gathered},
        )

        def publish() -> bool:
            fault = first_fault
            try:
                if not fault:
                    checkpoint.publish(self.folder, record, run.keep_last, run.keep_best)
                    return True
            except OSError as error:
                fault = str(error)
            checkpoint.discard(self.folder, tag)
            print(f"warning: step {self.step} not saved: {fault}; make room, older checkpoints stay", flush=True)
            return False

        return on_rank_0(publish)

    def _export(self, name: str, score: float | None = None) -> None:
        """Weights and what is needed to use them, in a folder of the run. Collective."""
        weights = self.engine.weights()
        if weights is None:
            return
        config, stream = self.config, self.stream
        info = ExportInfo(
            format="gato.model",
            version=EXPORT_VERSION,
            model=config.model,
            vocabulary=stream.vocabulary,
            vocabulary_fingerprint=stream.vocabulary.fingerprint,
            sequence_length=config.data.stream.sequence_length,
            step=self.step,
            tasks=tuple(self.specs),
            datasets={d.place.name: d.manifest.fingerprint for d in stream.datasets},
            observations=self.scales,
            returns=stream.return_scales if config.model.returns else {},
            training=TrainingInfo(
                recipe=self.recipe,
                steps=config.steps,
                global_batch=config.data.global_batch,
                seed=config.seed,
                held_out_loss=score,
                start_from=self.initial_sha256,
                loss=asdict(config.loss),
            ),
        )
        try:
            save_export(config.run.output / name, weights, info, self.text_model)
        except OSError as error:
            if name == "export":
                raise
            print(f"warning: {config.run.output / name} could not be written: {error}", flush=True)

    def close(self) -> None:
        """Stop the loader's threads and finish the metrics."""
        self.batches.close()
        if self.metrics:
            self.metrics.close()
