"""What a run tells about itself: a progress line, TensorBoard events, `metrics.jsonl`, and Weights & Biases if asked.

metrics.jsonl holds one JSON object a line, keys `step`, `tokens`, `seconds`, then
figures by name; a resumed run drops the lines behind its checkpoint and goes on.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from schemas.files import atomic_write
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


class Metrics:
    """Open for one run folder; only rank 0 has one. `step`: steps already done. ValueError where Weights & Biases is
    wanted and not installed."""

    def __init__(self, config: RunConfig, step: int, steps: int):
        folder = config.output
        folder.mkdir(parents=True, exist_ok=True)
        self.peak_tflops = config.peak_tflops
        self.wandb = _wandb(config.wandb, folder) if config.wandb else None
        self.path = folder / "metrics.jsonl"
        kept = [line for line in _lines(self.path) if json.loads(line)["step"] <= step]
        with atomic_write(self.path) as old:
            old.write("".join(line + "\n" for line in kept).encode())
        self.seconds = max((json.loads(line).get("seconds", 0.0) for line in kept), default=0.0)
        self.file = self.path.open("a")
        logging.getLogger("tensorboard").setLevel(logging.ERROR)
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
        self.bar = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True))
        self.task = self.bar.add_task("starting", total=steps, completed=step)
        self.bar.start()

    def progress(self, step: int, text: str) -> None:
        """Move the bar to `step`; without a terminal, print the line instead."""
        self.bar.update(self.task, completed=step, description=text)
        if not self.bar.console.is_terminal:
            print(f"step {step}: {text}", flush=True)

    def peak_flops(self, device: torch.device) -> float:
        """Peak FLOP/s of a device, as configured or known by name; 0 where neither."""
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        known = next((rate for part, rate in PEAK_TFLOPS.items() if part in name), 0.0)
        return (self.peak_tflops or known) * 1e12

    def write(self, step: int, tokens: int, seconds: float, figures: dict[str, float]) -> None:
        """Record figures of a step in all places."""
        record = {"step": step, "tokens": tokens, "seconds": round(self.seconds + seconds, 3)} | figures
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()
        for name, value in figures.items():
            self.board.add_scalar(name, value, step)
        if self.wandb is not None:
            self.wandb.log(figures, step=step)

    def close(self) -> None:
        self.bar.stop()
        self.file.close()
        self.board.close()
        if self.wandb is not None:
            self.wandb.finish()


def _lines(path: Path) -> list[str]:
    """Whole lines; a last one without its end was cut by a kill."""
    return [line[:-1] for line in path.open() if line.endswith("\n")] if path.is_file() else []


def _wandb(project: str, folder: Path) -> Any:
    """A run of Weights & Biases that goes on when the training run does: its id is kept in the folder."""
    try:
        import wandb
    except ImportError:
        raise ValueError("--run.wandb needs Weights & Biases: pip install wandb") from None
    identity = folder / "wandb.id"
    if not identity.is_file():
        with atomic_write(identity) as file:
            file.write(uuid4().hex[:16].encode())
    return wandb.init(project=project, id=identity.read_text(), resume="allow", dir=str(folder), name=folder.name)
