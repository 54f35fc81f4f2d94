"""Reports of a run: a progress line, TensorBoard events, `metrics.jsonl`, and Weights & Biases on request.

    training loop (rank 0) -> MetricsWriter.write(step, tokens, seconds, metrics) -> all of these places

Invariant: metrics.jsonl holds one line per reported step, ascending; a run that resumes drops the lines after its
checkpoint and appends to the rest.
"""

from __future__ import annotations

import logging
import math
import threading
from collections import Counter
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from schemas.files import atomic_write
from schemas.metrics import NAMED_TASKS, MetricsLine, read_lines
from shards.stream import Stream
from trainer.config import RunConfig

# Peak dense rates in bfloat16 with float32 accumulation, TFLOP/s, from the makers' data sheets; by part of the name.
PEAK_TFLOPS = {
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "B200": 2250.0,
    "A100": 312.0,
    "L40S": 362.0,
    "RTX 4090": 165.2,
    "RTX 3090": 71.0,
}


class MetricsWriter:
    """Writes the metrics of one run folder; only rank 0 has one. `step`: steps already done, of `steps` in all.

    Raises:
        ValueError: Weights & Biases is asked for and not installed, or metrics.jsonl is damaged.
    """

    def __init__(self, config: RunConfig, step: int, steps: int):
        folder = config.output
        folder.mkdir(parents=True, exist_ok=True)
        self.peak_tflops, self.steps, self.held_out = config.peak_tflops, steps, math.nan
        self.wandb = _wandb_run(config.wandb, folder) if config.wandb else None
        path = folder / "metrics.jsonl"
        kept = [line for line in read_lines(path) if line.step <= step]
        with atomic_write(path) as file:
            file.write("".join(line.to_json() + "\n" for line in kept).encode())
        self.seconds_before = max((line.seconds for line in kept), default=0.0)
        self.file = path.open("a", encoding="utf-8")
        logging.getLogger("tensorboard").setLevel(logging.ERROR)
        threading.excepthook = _without_tensorboard
        self.board: SummaryWriter | None = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
        self.bar = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True))
        self.task = self.bar.add_task("starting", total=steps, completed=step)
        self.bar.start()

    def progress(self, step: int, metrics: dict[str, float], tokens: int) -> None:
        """Move the bar to `step`, of `tokens` tokens each; without a terminal, print a line instead."""
        self.held_out = metrics.get("held_out/loss", self.held_out)
        text = words(metrics, self.held_out)
        self.bar.update(self.task, completed=step, description=text)
        if not self.bar.console.is_terminal:
            left = timedelta(seconds=round((self.steps - step) * tokens / metrics["train/tokens_per_second"]))
            print(f"step {step}: {text}  {left} left of {self.steps} steps", flush=True)

    def peak_flops(self, device: torch.device) -> float:
        """Peak FLOP/s of a device, as configured or known by name; 0 if neither."""
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        known = next((rate for part, rate in PEAK_TFLOPS.items() if part in name), 0.0)
        return (self.peak_tflops or known) * 1e12

    def write(self, step: int, tokens: int, seconds: float, metrics: dict[str, float]) -> None:
        """Record the metrics of a step. `tokens` since the run's start, `seconds` since this process started."""
        line = MetricsLine(step, tokens, round(self.seconds_before + seconds, 3), metrics)
        try:
            self.file.write(line.to_json() + "\n")
            self.file.flush()
        except OSError as error:  # a full disk costs a line, not the run
            print(f"warning: metrics of step {step} not written: {error}", flush=True)
        self.held_out = metrics.get("held_out/loss", self.held_out)
        try:
            if self.board is not None:
                for name, value in metrics.items():
                    self.board.add_scalar(name, value, step)
        except OSError as error:  # of its thread, which has ended
            print(f"warning: no more curves for TensorBoard: {error}; all metrics are in metrics.jsonl", flush=True)
            self.board = None
        if self.wandb is not None:
            self.wandb.log(metrics, step=step)

    def close(self) -> None:
        """Finish the bar and close the files."""
        self.bar.stop()
        for file in (self.file, self.board):
            with suppress(OSError):  # of a full disk
                if file is not None:
                    file.close()
        if self.wandb is not None:
            self.wandb.finish()


def _without_tensorboard(arguments: threading.ExceptHookArgs) -> None:
    """Leave out the traceback of TensorBoard's thread on a disk that refuses it: `MetricsWriter.write` says so."""
    if not (issubclass(arguments.exc_type, OSError) and "AsyncWriter" in type(arguments.thread).__name__):
        threading.__excepthook__(arguments)


def tasks_in_words(stream: Stream) -> str:
    """The names of a stream's tasks; of many, their number in each domain."""
    if len(stream.tasks) <= NAMED_TASKS:
        return f"tasks: {', '.join(stream.tasks)}"
    counts = Counter(timeline.spec.domain for timeline in stream.timelines)
    return f"{len(stream.tasks)} tasks: {', '.join(f'{name} {count}' for name, count in sorted(counts.items()))}"


def words(metrics: dict[str, float], held_out: float) -> str:
    """A step's metrics in a line. `held_out`: the last evaluation's loss, NaN before the first."""
    parts = [f"loss {metrics.get('train/loss', math.nan):.4f}"]
    if not math.isnan(held_out):
        own = {name.split("/")[1]: value for name, value in metrics.items() if name.startswith("domains/")}
        by_domain = f" ({', '.join(f'{name} {loss:.2f}' for name, loss in own.items())})" if own else ""
        parts.append(f"held-out {held_out:.4f}{by_domain}")
    if epochs := [value for name, value in metrics.items() if name.startswith("data/epochs/")]:
        least, most = f"{min(epochs):.2f}", f"{max(epochs):.2f}"
        parts.append(f"epochs {least}" + (f" to {most}" if most != least else ""))
    parts.append(f"{metrics['train/tokens_per_second']:,.0f} tokens/s")
    if "train/mfu" in metrics:
        parts.append(f"MFU {100 * metrics['train/mfu']:.1f} %")
    return "  ".join([*parts, f"data wait {100 * metrics['data/wait_share']:.1f} %"])


def _wandb_run(project: str, folder: Path) -> Any:
    """A run of Weights & Biases that continues when the training run does: its id is kept in the folder."""
    try:
        import wandb
    except ImportError:
        raise ValueError("--run.wandb needs Weights & Biases: pip install wandb") from None
    identity = folder / "wandb.id"
    if not identity.is_file():
        with atomic_write(identity) as file:
            file.write(uuid4().hex[:16].encode())
    return wandb.init(
        project=project, id=identity.read_text("utf-8"), resume="allow", dir=str(folder), name=folder.name
    )
