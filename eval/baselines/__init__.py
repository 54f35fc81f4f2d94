"""The baselines of the comparison, a single file each, and the one export form that both use.

FOLDER/weights.safetensors, then FOLDER/config.json, which vouches for it by hash; nothing is unpickled
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from safetensors.torch import load_file, save

from schemas.episode import TaskSpec
from schemas.files import atomic_write, sha256_of

VERSION = 1


def save_folder(
    out: Path, form: str, model: torch.nn.Module, config: Any, task: TaskSpec, seed: int, extra: dict[str, Any]
) -> Path:
    """Write weights first and the JSON that names their hash last."""
    with atomic_write(out / "weights.safetensors") as file:
        file.write(save({name: value.contiguous() for name, value in model.state_dict().items()}))
    body = {
        "format": form,
        "version": VERSION,
        "seed": seed,
        "config": asdict(config),
        "task": asdict(task),
        "weights_sha256": sha256_of(out / "weights.safetensors"),
        "extra": extra,
    }
    with atomic_write(out / "config.json") as file:
        file.write((json.dumps(body) + "\n").encode())
    return out


def load_folder(folder: Path, form: str, config: type) -> tuple[dict[str, Any], Any, TaskSpec, dict[str, torch.Tensor]]:
    """(JSON body, config, task, weights) of a trained baseline. ValueError names the file and the remedy."""
    path, weights = folder / "config.json", folder / "weights.safetensors"
    if not path.is_file():
        raise ValueError(f"{folder}: no config.json, so no trained baseline; run python -m eval.compare to train it")
    body = json.loads(path.read_text())
    if (body.get("format"), body.get("version")) != (form, VERSION):
        raise ValueError(f"{path}: format {body.get('format')} {body.get('version')}, expected {form} {VERSION}")
    if not weights.is_file() or sha256_of(weights) != body["weights_sha256"]:
        raise ValueError(f"{weights}: missing or damaged; remove {folder} and it is trained again")
    parsed = TypeAdapter(config).validate_python(body["config"])
    return body, parsed, TypeAdapter(TaskSpec).validate_python(body["task"]), load_file(weights)
