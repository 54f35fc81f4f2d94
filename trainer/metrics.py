"""What a run tells about itself: a progress line, TensorBoard events, `metrics.jsonl`.

metrics.jsonl holds one JSON object a line, keys `step`, `tokens`, `seconds`, then
figures by name; a resumed run drops the lines behind its checkpoint and goes on.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from schemas.files import atomic_write


class Metrics:
    """Open for one run folder; only rank 0 has one. `step`: steps already done."""

    def __init__(self, folder: Path, step: int, steps: int):
        folder.mkdir(parents=True, exist_ok=True)
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

    def write(self, step: int, tokens: int, seconds: float, figures: dict[str, float]) -> None:
        """Record figures of a step in all places."""
        record = {"step": step, "tokens": tokens, "seconds": round(self.seconds + seconds, 3)} | figures
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()
        for name, value in figures.items():
            self.board.add_scalar(name, value, step)

    def close(self) -> None:
        self.bar.stop()
        self.file.close()
        self.board.close()


def _lines(path: Path) -> list[str]:
    """Whole lines; a last one without its end was cut by a kill."""
    return [line[:-1] for line in path.open() if line.endswith("\n")] if path.is_file() else []
