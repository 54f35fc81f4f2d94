"""Checkpoints that are verified by hash; trainer/model/export.py has the export.

    RUN/checkpoints/step-00000200/part-00000.safetensors   one rank's share of weights and optimiser states, by name
    RUN/checkpoints/step-00000200.json                     step, next sequence, sha256 of every part; renamed into
                                                           place last, when all ranks are done

There is no other state: learning rate, data, stochastic depth and dropout are functions of the step, the sequence and
the seed, so no generator's state needs to be kept.

Invariant: nothing is loaded before its hash matches, and nothing is unpickled; a folder without a record is ignored.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from schemas.episode import STRICT
from schemas.files import atomic_write, parse_json, sha256_of, sync_folder, temporary_name

CHECKPOINT_VERSION = 2
PART = re.compile(r"part-\d{5,9}\.safetensors")
RECORDS = "step-" + "[0-9]" * 8 + ".json"


class CheckpointError(ValueError):
    """A checkpoint or export cannot be used; the message names the file and the remedy."""


class MissingPart(CheckpointError):
    """A part of a checkpoint is not in its folder; it may lie on the machine whose rank wrote it."""


COPY = "if that rank ran on another machine, copy the file from there"


@dataclass(frozen=True)
class ResumeState:
    """State that a run must share with the checkpoint that it resumes. `stream`: fingerprint of data, sampling and
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
            raise CheckpointError(
                f"{folder / record.tag}: holds no '{name}', so it is of another model; give another --run.output"
            )
        return part_of[name].get_tensor(name)

    return read
