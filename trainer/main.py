"""`deepspeed trainer/main.py`: train Gato on every dataset that was built.

recipe + command line -> config -> streams -> engine -> steps -> checkpoints, metrics, export

The command can be killed and run again: it goes on from its last checkpoint, at the
next sequence. SIGTERM and SIGINT end it behind a saved checkpoint.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType

if __package__ in (None, ""):
    # Run as a file by the launcher: imports start at the root of the checkout, not at trainer/.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

# Threads that spin while they wait lose most of a core to any other busy process. Read when torch loads OpenMP.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.distributed as dist
import tyro

from schemas.dataset import DatasetError
from schemas.files import atomic_write
from schemas.vocabulary import VocabularyMismatch
from shards.loader import Loader
from shards.reader import Store
from shards.stream import Stream, find_datasets
from trainer import checkpoint, engine
from trainer.config import TrainConfig, deciding, to_dict
from trainer.heldout import evaluate
from trainer.metrics import Metrics
from trainer.model import Gato
from trainer.recipes import RECIPES


def parse(arguments: list[str]) -> tuple[str, int, TrainConfig]:
    """(recipe name, local rank, configuration)."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--recipe", choices=sorted(RECIPES), default="79m" if torch.cuda.is_available() else "tiny")
    first.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)
    known, rest = first.parse_known_args(arguments)
    text = f"Train Gato. --recipe {{{','.join(RECIPES)}}} sets the defaults below; now: {known.recipe}."
    config = tyro.cli(
        TrainConfig, default=RECIPES[known.recipe], args=rest, prog="deepspeed trainer/main.py", description=text
    )
    return known.recipe, known.local_rank, config


class StopRequest:
    """Set by SIGTERM or SIGINT; the run ends at the next step's end, behind a checkpoint."""

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True


def train(recipe: str, config: TrainConfig, device: torch.device) -> None:
    """The whole run, from whatever checkpoint there is to the last step and the export."""
    stop, output = StopRequest(), config.run.output
    folders = list(config.data.folders) or find_datasets(config.data.root)
    if not folders:
        raise DatasetError(
            f"{config.data.root}: no finished dataset there; build one with python -m etl.build, or name --data.folders"
        )
    store, data = Store(config.data.cache), config.data
    stream = Stream(folders, data.stream, config.seed, False, data.verify, data.on_bad_shard, store)
    held_out = None
    if any(task.held_out_episodes for dataset in stream.datasets for task in dataset.manifest.tasks):
        held_out = Stream(folders, data.stream, config.seed, True, "size", data.on_bad_shard, store)
    model = Gato(config.model, stream.vocabulary).initialise(config.seed)
    _check_layouts(stream, config)
    specs = [t.dataset.manifest.tasks[t.task].spec for t in stream.timelines]
    continuous = [bool(spec.action and spec.action.kind == "continuous") for spec in specs]
    run = engine.Engine(model, config, device, continuous)
    step = _resume(run, config, stream, output / "checkpoints")
    metrics = Metrics(output, step, config.steps) if run.rank == 0 else None
    if run.rank == 0:
        with atomic_write(output / "config.json") as file:
            file.write(json.dumps({"recipe": recipe} | to_dict(config), indent=1).encode())
        counts = ", ".join(f"{name} {count / 1e6:.2f}M" for name, count in model.parameter_counts().items())
        print(
            f"parameters: {counts}; tasks: {', '.join(stream.tasks)}; {run.world} process(es) on {device}", flush=True
        )
    G, L = config.data.global_batch, config.data.stream.sequence_length
    pinned = device.type == "cuda"
    batches = Loader(stream, step * G, G, data.micro_batch, run.rank, run.world, data.threads, pinned)
    if held_out and step == 0:
        untrained = evaluate(
            run.whole_model(), held_out, config.run.evaluate_sequences, config.data.micro_batch, device
        )
        if metrics:
            metrics.write(0, 0, 0.0, untrained)
    begun = interval = time.monotonic()
    first, losses = step, []
    while step < config.steps:
        result = run.train_step(step, next(batches), stop.asked)
        step += 1
        losses.append(result.loss)
        now = time.monotonic()
        last = step == config.steps or result.stop_requested
        figures: dict[str, float] = {}
        if metrics and (step % config.run.log_every == 0 or last):
            rate = (step - first) * G * L / (now - interval)
            figures = {
                "train/loss": sum(losses) / len(losses),
                "train/learning_rate": engine.learning_rate(step - 1, config.optimiser),
                "train/gradient_norm": result.gradient_norm,
                "train/tokens_per_second": rate,
                **batches.figures(),
            }
            wait = 100 * figures["data/wait_share"]
            metrics.progress(step, f"loss {figures['train/loss']:.4f}  {rate:,.0f} tokens/s  data wait {wait:.1f} %")
            interval, first, losses = now, step, []
        if held_out and (step % config.run.evaluate_every == 0 or last):
            figures |= evaluate(
                run.whole_model(), held_out, config.run.evaluate_sequences, config.data.micro_batch, device
            )
        if metrics and figures:
            metrics.write(step, step * G * L, time.monotonic() - begun, figures)
        if step % config.run.save_every == 0 or last:
            _save(run, config, stream, step)
        if result.stop_requested:
            break
    batches.close()
    weights = run.weights()
    if metrics and weights:
        metrics.close()
        info = checkpoint.ExportInfo(
            format="gato.model",
            version=checkpoint.EXPORT_VERSION,
            model=config.model,
            vocabulary=stream.vocabulary,
            vocabulary_fingerprint=stream.vocabulary.fingerprint,
            sequence_length=L,
            step=step,
            tasks=tuple(specs),
            datasets={d.place.name: d.manifest.fingerprint for d in stream.datasets},
            training={"recipe": recipe, "steps": config.steps, "global_batch": G, "seed": config.seed},
        )
        checkpoint.export(output / "export", weights, info)
        done = "stopped on request, run the same command to go on" if step < config.steps else "finished"
        print(f"{done} at step {step}; weights in {output / 'export'}", flush=True)


def _check_layouts(stream: Stream, config: TrainConfig) -> None:
    for name, timeline in zip(stream.tasks, stream.timelines):
        if timeline.layout.length > min(config.data.stream.sequence_length, config.model.local_positions):
            raise DatasetError(
                f"task '{name}': a timestep has {timeline.layout.length} tokens, more than the sequence length "
                f"{config.data.stream.sequence_length} or the {config.model.local_positions} local positions; raise "
                "--data.stream.sequence-length or --model.local-positions"
            )


def _state(config: TrainConfig, stream: Stream) -> dict:
    return {"stream": stream.fingerprint, "global_batch": config.data.global_batch, "config": deciding(config)}


def _resume(run: engine.Engine, config: TrainConfig, stream: Stream, folder: Path) -> int:
    """Load the newest whole checkpoint; returns the steps done."""
    pointer = checkpoint.latest(folder)
    if pointer is None:
        return 0
    if config.run.resume == "never":
        raise checkpoint.CheckpointError(f"{folder}: holds checkpoints; give another --run.output or --run.resume auto")
    state = json.loads(json.dumps(_state(config, stream)))
    changed = sorted(key for key in state if state[key] != pointer.state.get(key))
    if changed:
        raise checkpoint.CheckpointError(
            f"{folder}: made with another {', '.join(changed)}, so its run cannot be continued exactly; "
            "restore that, or give another --run.output"
        )
    if pointer.world_size != run.world and run.engine.zero_optimization_stage() > 0:
        raise checkpoint.CheckpointError(
            f"{folder}: saved by {pointer.world_size} processes under ZeRO, now {run.world}; start as many again"
        )
    run.load(folder, pointer.tag)
    if run.rank == 0:
        print(f"resuming at step {pointer.step}", flush=True)
    return pointer.step


def _save(run: engine.Engine, config: TrainConfig, stream: Stream, step: int) -> None:
    folder, tag = config.run.output / "checkpoints", f"step-{step:08d}"
    run.save(folder, tag)
    if run.rank == 0:
        following = step * config.data.global_batch
        pointer = checkpoint.Pointer(
            checkpoint.CHECKPOINT_VERSION, tag, step, following, run.world, _state(config, stream), {}
        )
        checkpoint.publish(folder, pointer, config.run.keep_last)
    dist.barrier()


def main() -> int:
    faulthandler.enable()  # a mapped shard that is cut while it is read ends the process: say where
    recipe, local_rank, config = parse(sys.argv[1:])
    try:
        device = engine.start(local_rank)
        train(recipe, config, device)
    except (DatasetError, VocabularyMismatch, ValueError, OSError) as error:
        if not dist.is_initialized() or dist.get_rank() == 0:
            print(f"error: {error}", file=sys.stderr)
        return 1
    except dist.DistNetworkError as error:
        remedy = "another training may hold the port: give deepspeed --master_port another number"
        print(f"error: {str(error).splitlines()[0]}; {remedy}", file=sys.stderr)
        return 1
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
