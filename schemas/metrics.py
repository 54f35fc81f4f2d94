"""One line of a run's `metrics.jsonl`: written by trainer, read by eval and by a run that resumes.

Invariant: a line is one JSON object with the keys step, tokens, seconds, then the metrics by name.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from schemas.files import parse_json

NAMED_TASKS = 24
"""With more tasks, people are shown domains."""


@dataclass(frozen=True)
class MetricsLine:
    """Measurements at a step. `tokens`: training tokens so far; `seconds`: of training so far, all resumed runs
    together; `values`: by name, such as 'train/loss' (nats per token), 'held_out/TASK/accuracy' or
    'domains/DOMAIN/loss' (the mean of its tasks' held-out losses)."""

    step: int
    tokens: int
    seconds: float
    values: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> str:
        """One line, without its end."""
        return json.dumps({"step": self.step, "tokens": self.tokens, "seconds": self.seconds} | self.values)

    @classmethod
    def from_json(cls, line: str) -> MetricsLine:
        """Inverse of `to_json`. Raises ValueError for anything else."""
        body = parse_json(line)
        if not isinstance(body, dict) or not isinstance(body.get("step"), int):
            raise ValueError("not a line of metrics: no step in it")
        step, tokens, seconds = body.pop("step"), body.pop("tokens", 0), body.pop("seconds", 0.0)
        return cls(step, tokens, seconds, body)


def read_lines(path: Path) -> Iterator[MetricsLine]:
    """The complete lines of a metrics.jsonl; nothing where there is no file. A last line without its end was cut by a
    kill and is left out. Raises ValueError that names the file and the line."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if line.endswith("\n"):
                try:
                    yield MetricsLine.from_json(line)
                except ValueError as error:
                    raise ValueError(f"{path}: line {number}: {error}; remove this line") from None
