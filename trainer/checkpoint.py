"""Checkpoints that are verified by hash, and the export that everything else loads.

    RUN/checkpoints/step-00000200/part-00000.safetensors   one rank's share of weights and optimiser states, by name
    RUN/checkpoints/step-00000200.json                     step, next sequence, sha256 of every part; renamed into
                                                           place last, when all ranks are done
    RUN/export/weights.safetensors                         weights alone
    RUN/export/model.json                                  shape, vocabulary, tasks, hash of the weights; renamed last

There is no other state: learning rate, data, stochastic depth and dropout are functions of the step, the sequence and
the seed, so no generator's state needs to be kept.

Invariant: nothing is loaded before its hash matches, and nothing is unpickled; a folder without a record is ignored.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from schemas import upgrade
from schemas.dataset import ObservationScale, ReturnScale
from schemas.episode import STRICT, TaskSpec
from schemas.files import atomic_write, parse_json, sha256_of, sync_folder, temporary_name
from schemas.layout import layout_of
from schemas.vocabulary import Vocabulary
from shards.cache import Cache
from shards.folder import Folder, digest_of
from trainer.model import Gato, ModelConfig

CHECKPOINT_VERSION = 2
PART = re.compile(r"part-\d{5,9}\.safetensors")
RECORDS = "step-" + "[0-9]" * 8 + ".json"
MODEL, TENSORS, PROMPTS = "model.json", "weights.safetensors", "prompts.safetensors"
EXPORT_VERSION = 3  # 1: tasks as in datasets of schema 3; 2: no scales of observations and returns


class CheckpointError(ValueError):
    """A checkpoint or export cannot be used; the message names the file and the remedy."""


class MissingPart(CheckpointError):
    """A part of a checkpoint is not in its folder; it may lie on the machine whose rank wrote it."""


COPY = "if that rank ran on another machine, copy the file from there"


@dataclass(frozen=True)
class ResumeState:
    """What a run must have in common with the checkpoint that it resumes. `stream`: fingerprint of data, sampling and
    seed; `global_batch`: sequences per step; `config`: the settings of `resume_critical`, as JSON has them;
    `start_from`: sha256 of the weights that a fine-tuning run started with."""

    __pydantic_config__ = STRICT
    stream: str
    global_batch: int
    config: dict[str, Any]
    start_from: str | None = None


@dataclass(frozen=True)
class Record:
    """The JSON file that makes a checkpoint valid. `applied`: optimiser steps without those that were skipped;
    `score`: mean held-out loss at this step (nats per token), if it was evaluated; `files`: sha256 of every part."""

    __pydantic_config__ = STRICT
    version: int
    step: int
    next_sequence: int
    applied: int
    world_size: int
    zero_stage: int
    score: float | None
    state: ResumeState
    files: dict[str, str]

    @property
    def tag(self) -> str:
        return tag_of(self.step)


_RECORD: TypeAdapter[Record] = TypeAdapter(Record)


def tag_of(step: int) -> str:
    """Name of a step's checkpoint."""
    return f"step-{step:08d}"


def write_part(root: Path, rank: int, tensors: dict[str, Tensor]) -> tuple[str, str]:
    """Write one rank's tensors (on the CPU, contiguous) and sync them to disk.

    Returns:
        The file's name and sha256.

    Raises:
        OSError: as the disk gives it; no file is left then.
    """
    root.mkdir(parents=True, exist_ok=True)
    path = root / f"part-{rank:05d}.safetensors"
    temporary = temporary_name(path)
    try:
        try:
            save_file(tensors, temporary)
        except Exception as error:  # safetensors wraps the disk's error in an exception of its own
            raise OSError(f"{path}: {error}") from error
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        digest = sha256_of(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(root)
    return path.name, digest


def publish(folder: Path, record: Record, keep_last: int, keep_best: int) -> None:
    """Write the record of a checkpoint that all ranks have finished, then remove old checkpoints: all but the last
    `keep_last` and the `keep_best` of the lowest score. Call on one rank."""
    body = asdict(record)
    with atomic_write(folder / f"{record.tag}.json") as file:
        file.write(json.dumps({"sha256": _digest(body), "record": body}, indent=1).encode())
    records = _records(folder)
    scored = sorted((known.score, -known.step, known.tag) for known in records if known.score is not None)
    kept = {known.tag for known in records[:keep_last]} | {tag for _, _, tag in scored[:keep_best]}
    for old in [path for path in folder.glob("step-" + "[0-9]" * 8) if path.is_dir() and path.name not in kept]:
        discard(folder, old.name)


def discard(folder: Path, tag: str) -> None:
    """Remove a checkpoint, complete or not: its record first. Nothing where the disk refuses that."""
    with suppress(OSError):
        (folder / f"{tag}.json").unlink(missing_ok=True)
        shutil.rmtree(folder / tag, ignore_errors=True)


def latest(folder: Path) -> Record | None:
    """The newest checkpoint whose parts all match their hashes, or None if there never was one.

    Raises:
        CheckpointError: there are checkpoints and none is intact.
    """
    faults: list[str] = []
    remedy = "start again with another --run.output"
    for path in _record_files(folder):
        try:
            record = _parse(path)
            _check(folder / record.tag, record)
        except MissingPart as error:
            faults.append(str(error))
            remedy = "copy the missing part, then run the same command"
        except CheckpointError as error:
            faults.append(str(error))
        else:
            for fault in faults:
                print(f"warning: {fault}; resuming from {record.tag} instead", flush=True)
            return record
    if faults:
        missing = next((fault for fault in faults if fault.endswith(COPY)), faults[0])
        raise CheckpointError(f"{missing}; no other checkpoint is intact: {remedy}")
    if (folder / "latest.json").is_file():
        raise CheckpointError(f"{folder}: checkpoints of an older version of this package; give another --run.output")
    return None


def _parse(path: Path) -> Record:
    """A record that is as it was written; CheckpointError if it is not."""
    try:
        raw = parse_json(path.read_bytes())
        if raw["sha256"] == _digest(raw["record"]):
            record = _RECORD.validate_python(raw["record"])
            if all(PART.fullmatch(name) for name in record.files):  # no path out of the folder
                return record
    except (ValueError, KeyError, TypeError):  # JSON's, Unicode's and pydantic's errors are ValueErrors
        pass
    raise CheckpointError(f"{path}: damaged")


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _record_files(folder: Path) -> list[Path]:
    """The files with a record's name, the newest first; what else lies there is not looked at."""
    return sorted((path for path in folder.glob(RECORDS) if path.is_file()), reverse=True)


def _records(folder: Path) -> list[Record]:
    """All records that can be read, the newest first."""
    found = []
    for path in _record_files(folder):
        with suppress(CheckpointError):
            found.append(_parse(path))
    return found


def _check(root: Path, record: Record) -> None:
    if record.version != CHECKPOINT_VERSION:
        raise CheckpointError(f"{root}: checkpoint version {record.version}, this package reads {CHECKPOINT_VERSION}")
    for name, digest in record.files.items():
        path = root / name
        if not path.is_file():
            rank = int(name[5:].split(".")[0])
            raise MissingPart(f"{path}: the part of rank {rank} is missing; {COPY}")
        if sha256_of(path) != digest:
            raise CheckpointError(f"{path}: sha256 differs from the checkpoint's record, the file is damaged")


def tensor_reader(folder: Path, record: Record) -> Callable[[str], Tensor]:
    """A function from a tensor's name to the tensor, read from disk when it is called, whichever part holds it."""
    parts = [safe_open(folder / record.tag / name, framework="pt") for name in sorted(record.files)]
    part_of = {key: part for part in parts for key in part.keys()}  # noqa: SIM118

    def read(name: str) -> Tensor:
        if name not in part_of:
            raise CheckpointError(f"{folder / record.tag}: holds no '{name}'; it is of another model")
        return part_of[name].get_tensor(name)

    return read


@dataclass(frozen=True)
class TrainingInfo:
    """How an export's weights were trained. `global_batch`: sequences per step; `held_out_loss`: nats per token, if the
    export was made for its score; `start_from`: sha256 of the weights that a fine-tuning run started with; `loss`: the
    settings of its loss by name, None in an export from before 2026-11-28."""

    recipe: str = ""
    steps: int = 0
    global_batch: int = 0
    seed: int = 0
    held_out_loss: float | None = None
    start_from: str | None = None
    loss: dict[str, Any] | None = None


@dataclass(frozen=True)
class ExportInfo:
    """`model.json` of an export. `sequence_length`: the context that it was trained with, in tokens; `datasets`:
    fingerprints of their manifests by name."""

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
    training: TrainingInfo
    first_id: int = 0
    """Rows of the embedding table before this one are left out, see eval/ship.py."""
    weights_sha256: str = ""
    prompts_sha256: str = ""
    observations: dict[str, ObservationScale] = field(default_factory=dict)
    """What a model that reads timesteps standardises by, by task."""
    returns: dict[str, ReturnScale] = field(default_factory=dict)
    """What a model with `returns` is asked for, by task."""

    def observation_scale(self, task: TaskSpec) -> ObservationScale | None:
        """The scale of a task: its own, that of a task of its environment, or in a domain whose tasks share theirs, and
        where nothing is continuous, that of a task of its layout; one of no values there, and else None."""
        layout, names = layout_of(task), self._of_environment(task)
        plain = all(field.kind != "continuous" for field in task.observation)
        if plain or task.domain in self.model.shared_scales:
            alike = (other for other in self.tasks if other.domain == task.domain and layout_of(other) == layout)
            names += [other.name for other in alike]
        found = next((self.observations[name] for name in names if name in self.observations), None)
        return ObservationScale((0.0,) * layout.length, (0.0,) * layout.length) if plain and found is None else found

    def return_scale(self, task: TaskSpec) -> ReturnScale | None:
        """The scale of a task, or of another one of its environment; None where the model was trained on neither."""
        return next((self.returns[name] for name in self._of_environment(task) if name in self.returns), None)

    def _of_environment(self, task: TaskSpec) -> list[str]:
        """The task, then those of its environment."""
        alike = (other for other in self.tasks if task.environment and other.environment == task.environment)
        return [task.name, *(other.name for other in alike)]


_EXPORT: TypeAdapter[ExportInfo] = TypeAdapter(ExportInfo)


def export(folder: Path, weights: dict[str, torch.Tensor], info: ExportInfo) -> None:
    """Write weights (float32, contiguous), then `model.json` with their hash.

    Raises:
        ValueError: a weight is not finite.
    """
    if broken := [name for name, tensor in weights.items() if not tensor.isfinite().all()]:
        raise ValueError(f"{folder}: not exported, '{broken[0]}' holds values that are not finite")
    with atomic_write(folder / "weights.safetensors") as file:
        file.write(save({name: tensor.detach().cpu().float().contiguous() for name, tensor in weights.items()}))
    body = _EXPORT.dump_python(info, mode="json") | {"weights_sha256": sha256_of(folder / "weights.safetensors")}
    with atomic_write(folder / "model.json") as file:
        file.write((json.dumps(body, indent=1) + "\n").encode())


def parse_export(data: bytes) -> ExportInfo:
    """The content of a model.json, of an older schema too. ValueError where it is none."""
    return _EXPORT.validate_python(upgrade.tasks(parse_json(data)))


def held_out_loss_of(folder: Path) -> float:
    """Held-out loss of an export that was made for its score; infinite if there is none."""
    try:
        loss = parse_export((folder / "model.json").read_bytes()).training.held_out_loss
    except (OSError, ValueError):
        return math.inf
    return math.inf if loss is None else loss


def load_export(folder: Path, vocabulary: Vocabulary | None = None) -> tuple[Gato, ExportInfo]:
    """Load an exported model, in evaluation mode, on the CPU.

    Raises:
        CheckpointError: no export, a damaged one, or one of another version.
        VocabularyMismatch: it was trained with another vocabulary than `vocabulary`.
    """
    path = Path(folder) / "model.json"
    if not path.is_file():
        inner = Path(folder) / "export"
        remedy = f"give {inner}" if (inner / MODEL).is_file() else "give the export folder of a run, RUN/export"
        raise CheckpointError(f"{folder}: no model.json, so no export; {remedy}")
    try:
        info = parse_export(path.read_bytes())
    except ValueError as error:  # of json and of pydantic
        detail = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        raise CheckpointError(f"{path}: not an export this package reads ({detail}); export again") from None
    if info.format != "gato.model" or not 1 <= info.version <= EXPORT_VERSION:
        raise CheckpointError(f"{path}: format {info.format} {info.version}, expected gato.model 1 to {EXPORT_VERSION}")
    if info.version < 3 and info.model.sequence == "timesteps":
        raise CheckpointError(f"{path}: its observations are scaled by place, not by task as now; train again")
    (vocabulary or info.vocabulary).require(info.vocabulary_fingerprint, str(path))
    weights = path.with_name("weights.safetensors")
    if not weights.is_file() or sha256_of(weights) != info.weights_sha256:
        raise CheckpointError(f"{weights}: missing or damaged (sha256 differs from {path.name}); export again")
    model = Gato(info.model, info.vocabulary)
    found = load_file(weights)
    found["tokens.weight"] = torch.nn.functional.pad(found["tokens.weight"], (0, 0, info.first_id, 0))
    model.load_state_dict(found)
    return model.eval(), info


def download_export(url: str, cache: Cache) -> Path:
    """A local copy of a remote export, its folder named by the hash of model.json. CheckpointError where there is none,
    or a file of another hash than model.json names; DatasetError where the store does not answer."""
    url = url.removesuffix(f"/{MODEL}")
    place = Folder(url)
    body = cache.read(place, MODEL)
    if body is None:
        raise CheckpointError(f"{url}: no {MODEL} there; give the URL of an export folder")
    try:
        parsed = parse_json(body)
        wanted = {TENSORS: parsed["weights_sha256"], PROMPTS: parsed.get("prompts_sha256", "")}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{url}/{MODEL}: not an export ({error}); give the URL of an export folder") from None
    folder = cache.folder.parent / "models" / digest_of(body)
    target = Folder(folder)
    for name, digest in wanted.items():
        path = folder / name
        if not digest or (path.is_file() and sha256_of(path) == digest):
            continue
        data = cache.read(place, name)
        if data is None or digest_of(data) != digest:
            problem = "is missing" if data is None else f"has another sha256 than {MODEL} names"
            raise CheckpointError(f"{url}/{name}: {problem}; upload the export again")
        target.write(name, data)
    target.write(MODEL, body)
    return folder
