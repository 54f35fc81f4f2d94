"""Checkpoints that can be trusted, and the export that everything else loads.

    RUN/checkpoints/step-00000200/...   written by DeepSpeed, every rank its part
    RUN/checkpoints/latest.json         pointer: step, next sequence, sha256 of every file; renamed into place last
    RUN/export/weights.safetensors      weights alone
    RUN/export/model.json               shape, vocabulary, tasks, hash of the weights; renamed into place last

Invariant: nothing is loaded before its hash matches; a folder that the pointer does
not name does not exist.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import load_file, save

from schemas.episode import STRICT, TaskSpec
from schemas.files import atomic_write, sha256_of
from schemas.vocabulary import Vocabulary
from trainer.model import Gato, ModelConfig

CHECKPOINT_VERSION = 1
EXPORT_VERSION = 1


class CheckpointError(ValueError):
    """A checkpoint or export cannot be used; the message names the file and the remedy."""


@dataclass(frozen=True)
class Pointer:
    """What `latest.json` says. `state` is small JSON of the trainer's: stream fingerprint, configuration."""

    __pydantic_config__ = STRICT
    version: int
    tag: str
    step: int
    next_sequence: int
    world_size: int
    state: dict[str, Any]
    files: dict[str, str]


_POINTER: TypeAdapter[Pointer] = TypeAdapter(Pointer)


def publish(folder: Path, pointer: Pointer, keep_last: int) -> None:
    """Hash the files of a checkpoint that all ranks have finished, then point at it, then drop old ones.
    Call on one rank, behind a barrier."""
    root = folder / pointer.tag
    files = {str(path.relative_to(root)): sha256_of(path) for path in sorted(root.rglob("*")) if path.is_file()}
    for name in (f"{pointer.tag}.json", "latest.json"):
        with atomic_write(folder / name) as file:
            file.write(json.dumps(asdict(pointer) | {"files": files}, indent=1).encode())
    kept = sorted(path.stem for path in folder.glob("step-*.json"))[-keep_last:]
    for old in folder.glob("step-*"):
        if old.is_dir() and old.name not in kept:
            (folder / f"{old.name}.json").unlink(missing_ok=True)
            shutil.rmtree(old)


def latest(folder: Path) -> Pointer | None:
    """The newest checkpoint whose every file has its hash, or None where there never was one.
    CheckpointError where there are some and none is whole."""
    names = ["latest.json", *sorted((p.name for p in folder.glob("step-*.json")), reverse=True)]
    faults: list[str] = []
    for name in names:
        path = folder / name
        if not path.is_file():
            continue
        try:
            pointer = _POINTER.validate_json(path.read_text())
            _check(folder / pointer.tag, pointer)
            if faults:
                print(f"warning: {faults[0]}; going on from {pointer.tag} instead", flush=True)
            return pointer
        except (ValidationError, CheckpointError, UnicodeDecodeError) as error:
            faults.append(str(error).splitlines()[0] if isinstance(error, CheckpointError) else f"{path}: damaged")
    if faults:
        raise CheckpointError(f"{faults[0]}; no other checkpoint is whole: remove {folder} to start anew")
    return None


def _check(root: Path, pointer: Pointer) -> None:
    if pointer.version != CHECKPOINT_VERSION:
        raise CheckpointError(f"{root}: checkpoint version {pointer.version}, this package reads {CHECKPOINT_VERSION}")
    for name, digest in pointer.files.items():
        path = root / name
        if not path.is_file():
            raise CheckpointError(f"{path}: missing from the checkpoint")
        if sha256_of(path) != digest:
            raise CheckpointError(f"{path}: sha256 differs from the checkpoint's record, the file is damaged")


@dataclass(frozen=True)
class ExportInfo:
    """`model.json` of an export. `sequence_length` is the context it was trained with."""

    __pydantic_config__ = STRICT
    format: str
    version: int
    model: ModelConfig
    vocabulary: Vocabulary
    vocabulary_fingerprint: str
    sequence_length: int
    step: int
    tasks: tuple[TaskSpec, ...]
    datasets: dict[str, str]
    training: dict[str, Any]
    weights_sha256: str = ""


_EXPORT: TypeAdapter[ExportInfo] = TypeAdapter(ExportInfo)


def export(folder: Path, weights: dict[str, torch.Tensor], info: ExportInfo) -> None:
    """Write weights (float32, contiguous) and then the JSON that vouches for them."""
    with atomic_write(folder / "weights.safetensors") as file:
        file.write(save({name: tensor.detach().cpu().float().contiguous() for name, tensor in weights.items()}))
    body = _EXPORT.dump_python(info, mode="json") | {"weights_sha256": sha256_of(folder / "weights.safetensors")}
    with atomic_write(folder / "model.json") as file:
        file.write((json.dumps(body, indent=1) + "\n").encode())


def load_export(folder: Path, vocabulary: Vocabulary | None = None) -> tuple[Gato, ExportInfo]:
    """The exported model, in evaluation mode on the CPU. CheckpointError or VocabularyMismatch name the
    file and the remedy; nothing is unpickled."""
    path = Path(folder) / "model.json"
    if not path.is_file():
        raise CheckpointError(f"{folder}: no model.json, so no export; train with deepspeed trainer/main.py")
    try:
        info = _EXPORT.validate_json(path.read_text())
    except (ValidationError, UnicodeDecodeError) as error:
        detail = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        raise CheckpointError(f"{path}: not an export this package reads ({detail}); export again") from None
    if (info.format, info.version) != ("gato.model", EXPORT_VERSION):
        raise CheckpointError(f"{path}: format {info.format} {info.version}, expected gato.model {EXPORT_VERSION}")
    (vocabulary or info.vocabulary).require(info.vocabulary_fingerprint, str(path))
    weights = path.with_name("weights.safetensors")
    if not weights.is_file() or sha256_of(weights) != info.weights_sha256:
        raise CheckpointError(f"{weights}: missing or damaged (sha256 differs from {path.name}); export again")
    model = Gato(info.model, info.vocabulary)
    model.load_state_dict(load_file(weights))
    return model.eval(), info
