"""The baselines of the comparison, and what both share: one training loop, one export.

episodes -> train -> FOLDER/weights.safetensors, then FOLDER/config.json -> load -> policy

Invariant: config.json is written last and vouches for the weights by hash; nothing is unpickled.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import load_file, save

from schemas import upgrade
from schemas.episode import STRICT, TaskSpec
from schemas.files import atomic_write, sha256_of
from shards.views import Trajectory

VERSION = 2  # 1: tasks as in datasets of schema 3
CURVE_POINTS = 200

C = TypeVar("C")


@dataclass(frozen=True)
class Training:
    """Optimisation, the same fields for both baselines. Learning rate: linear over `warmup` steps, then constant,
    or a cosine down to a tenth at step `decay`, and a tenth from there on."""

    __pydantic_config__ = STRICT
    steps: int = 100_000
    batch: int = 64
    lr: float = 1e-4
    warmup: int = 10_000
    decay: int | None = None
    weight_decay: float = 1e-4
    decay_all: bool = False
    """Decay every parameter; else the weights of layers alone, without biases, norms, embeddings and tables."""
    beta_2: float = 0.999
    clip: float = 0.25
    dropout: float = 0.1


def device() -> torch.device:
    """A GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def complete_episodes(trajectories: Sequence[Trajectory], task: TaskSpec) -> list[Trajectory]:
    """The episodes that the log did not cut, since only their returns are known; all, where it cut every one.
    ValueError where there are none."""
    if not trajectories:
        raise ValueError(f"task '{task.name}': no training episodes; build its shards with python -m etl.build")
    return [episode for episode in trajectories if episode.complete] or list(trajectories)


def optimise(
    model: torch.nn.Module, config: Training, loss: Callable[[], torch.Tensor], progress: Callable[[dict], None] | None
) -> list[tuple[int, float]]:
    """AdamW over `config.steps` draws of `loss`. The training curve: (step, mean loss since the point before).
    FloatingPointError once the loss is not finite."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    tables |= {id(p) for name, p in model.named_parameters() if name.startswith("place")}
    decayed = [p for p in model.parameters() if config.decay_all or (p.ndim > 1 and id(p) not in tables)]
    chosen = {id(p) for p in decayed}
    plain = [p for p in model.parameters() if id(p) not in chosen]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, config.beta_2))

    def rate(step: int) -> float:
        if step < config.warmup or config.decay is None:
            return min(1.0, (step + 1) / max(1, config.warmup))
        done = min(1.0, (step - config.warmup) / max(1, config.decay - config.warmup))
        return max(0.1, 0.5 * (1 + math.cos(math.pi * done)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, rate)
    every = max(1, config.steps // CURVE_POINTS)
    curve: list[tuple[int, float]] = []
    recent: list[float] = []
    model.train()
    for step in range(1, config.steps + 1):
        value = loss()
        optimiser.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimiser.step()
        schedule.step()
        recent.append(value.item())
        if not math.isfinite(recent[-1]):
            raise FloatingPointError(f"the loss is {recent[-1]} at step {step}; lower lr ({config.lr})")
        if step % every == 0 or step == config.steps:
            curve.append((step, float(np.mean(recent))))
            recent.clear()
            if progress:
                progress({"step": step, "of": config.steps, "loss": curve[-1][1]})
    return curve


def save_folder(
    out: Path, form: str, model: torch.nn.Module, config: Any, task: TaskSpec, seed: int, extra: dict[str, Any]
) -> Path:
    """Write the weights, then the JSON that names their hash: form, version, seed, config, task and `extra`."""
    with atomic_write(out / "weights.safetensors") as file:
        file.write(save({name: value.cpu().contiguous() for name, value in model.state_dict().items()}))
    body = {"format": form, "version": VERSION, "seed": seed, "config": asdict(config), "task": asdict(task)}
    body |= {"weights_sha256": sha256_of(out / "weights.safetensors"), "extra": extra}
    with atomic_write(out / "config.json") as file:
        file.write((json.dumps(body, allow_nan=False) + "\n").encode())
    return out


def load_folder(
    folder: Path, form: str, config: type[C]
) -> tuple[C, TaskSpec, dict[str, Any], dict[str, torch.Tensor]]:
    """(config, task, extra, weights) of a trained baseline. ValueError names the file and the remedy."""
    path, weights = Path(folder) / "config.json", Path(folder) / "weights.safetensors"
    remedy = f"remove {folder}, and python -m eval.compare trains it again"
    if not path.is_file():
        raise ValueError(f"{folder}: no config.json, so no finished baseline; {remedy}")
    try:
        body = json.loads(path.read_text("utf-8"))
        if body["format"] != form or body["version"] not in range(1, VERSION + 1):
            found = f"{body['format']} {body['version']}"
            raise ValueError(f"{path}: format {found}, expected {form} 1 to {VERSION}; {remedy}")
        parsed = TypeAdapter(config).validate_python(body["config"])
        task = TypeAdapter(TaskSpec).validate_python(upgrade.task(body["task"]))
        digest, extra = body["weights_sha256"], body["extra"]
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not JSON ({error}); {remedy}") from None
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: field {error} is missing; {remedy}") from None
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{path}: field '{'.'.join(map(str, first['loc']))}': {first['msg']}; {remedy}") from None
    if not weights.is_file() or sha256_of(weights) != digest:
        raise ValueError(f"{weights}: missing or changed since {path.name} was written; {remedy}")
    return parsed, task, extra, load_file(weights)
