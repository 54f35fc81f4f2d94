"""Exports: a trained model by itself, which everything else loads.

    RUN/export/weights.safetensors   weights alone
    RUN/export/text.model            the tokenizer of its texts, where a task has some
    RUN/export/model.json            shape, vocabulary, tasks, hashes of the others; renamed into place last

Invariant: nothing is loaded before its hash matches, and nothing is unpickled.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import load_file, save

from schemas import upgrade
from schemas.dataset import TEXT_MODEL_NAME, DatasetError, Manifest, ObservationScale, ReturnScale
from schemas.episode import STRICT, ActionSpec, FieldSpec, TaskSpec
from schemas.files import atomic_write, parse_json, sha256_of
from schemas.layout import layout_of, picture_size
from schemas.vocabulary import Vocabulary
from shards.cache import Cache
from shards.folder import Folder, digest_of
from trainer.checkpoint import CheckpointError
from trainer.model.gato import Gato
from trainer.model.presets import ModelConfig

MODEL, TENSORS, PROMPTS = "model.json", "weights.safetensors", "prompts.safetensors"
EXPORT_VERSION = 3  # 1: tasks as in datasets of schema 3; 2: no scales of observations and returns


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
    kept: tuple[tuple[int, int], ...] = ()
    """Rows [start, stop) of the embedding table that the weights hold, ascending; all where it is empty, see
    eval/ship.py."""
    weights_sha256: str = ""
    prompts_sha256: str = ""
    text_sha256: str = ""
    observations: dict[str, ObservationScale] = field(default_factory=dict)
    """Scales by which a model that reads timesteps standardises, by task."""
    returns: dict[str, ReturnScale] = field(default_factory=dict)
    """Returns that a model with `returns` is asked for, by task."""

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

    def require_data(self, manifest: Manifest, task: TaskSpec, data: str, export: str) -> None:
        """Require that the tokens of a task in the dataset `data` mean what they meant when `export` was trained.

        Raises:
            VocabularyMismatch: its vocabulary is another one.
            DatasetError: the task's fields or actions are others, or its texts were made with another text model.
        """
        self.vocabulary.require(manifest.vocabulary_fingerprint, data)
        held, own = (
            {one.name: one for one in tasks}.get(task.name) for tasks in ((t.spec for t in manifest.tasks), self.tasks)
        )
        if held and own and (difference := _difference(held, own)):
            raise DatasetError(
                f"{data}: task '{task.name}' is not what {export} was trained on: {difference}; give the dataset that "
                "it was trained on, or build this one again with the options of that one and --overwrite"
            )
        model = manifest.text_model
        if layout_of(task).text and self.text_sha256 and model and model.file.sha256 != self.text_sha256:
            raise DatasetError(
                f"{data}: the texts of task '{task.name}' were made with another text model than those of {export}; "
                f"build it again with --text-model {export}/{TEXT_MODEL_NAME} --overwrite"
            )

    def _of_environment(self, task: TaskSpec) -> list[str]:
        """The task, then those of its environment."""
        alike = (other for other in self.tasks if task.environment and other.environment == task.environment)
        return [task.name, *(other.name for other in alike)]


def _difference(data: TaskSpec, export: TaskSpec) -> str:
    """The first field or action whose tokens mean something else in two tasks; empty where all mean the same."""
    found, wanted = (
        {f"field '{spec.key}'": spec for spec in task.observation} | {"action": task.action} for task in (data, export)
    )
    for name in sorted(found.keys() | wanted.keys()):
        here, there = _meaning(found.get(name)), _meaning(wanted.get(name))
        if not here or not there:
            return f"{name} is in the {'data' if here else 'export'} alone"
        for key in sorted(here.keys() | there.keys()):
            if here.get(key) != there.get(key):
                return f"{name} has {key} {here.get(key)}, in the export {there.get(key)}"
    return ""


def _meaning(spec: FieldSpec | ActionSpec | None) -> dict[str, Any]:
    """The attributes of a field or an action, equal for specs that say the same in different words."""
    if spec is None:
        return {}
    found = asdict(spec)
    for name in ("choices", "start"):  # one number may stand for all
        found[name] = found[name][:1] if len(set(found[name])) == 1 else found[name]
    for name in {"low", "high"} & found.keys():  # float32 in most logs and simulators
        found[name] = tuple(float(np.float32(value)) for value in found[name])
    if isinstance(spec, FieldSpec) and spec.kind == "image":
        found["resized"] = picture_size(spec)
        found["fit"] = "pad" if found["resized"] == spec.shape[:2] or spec.resized is None else spec.fit
    return found


_EXPORT: TypeAdapter[ExportInfo] = TypeAdapter(ExportInfo)


def save_export(folder: Path, weights: dict[str, torch.Tensor], info: ExportInfo, text: bytes | None = None) -> None:
    """Write weights (float32, contiguous) and the model of the text tokenizer, then `model.json` with their hashes.

    Raises:
        ValueError: a weight is not finite.
    """
    if broken := [name for name, tensor in weights.items() if not tensor.isfinite().all()]:
        raise ValueError(f"{folder}: not exported, '{broken[0]}' holds values that are not finite")
    with atomic_write(folder / TENSORS) as file:
        file.write(save({name: tensor.detach().cpu().float().contiguous() for name, tensor in weights.items()}))
    body = _EXPORT.dump_python(info, mode="json") | {"weights_sha256": sha256_of(folder / TENSORS)}
    if text is not None:
        with atomic_write(folder / TEXT_MODEL_NAME) as file:
            file.write(text)
        body["text_sha256"] = digest_of(text)
    with atomic_write(folder / MODEL) as file:
        file.write((json.dumps(body, indent=1) + "\n").encode())


def parse_export(data: bytes) -> ExportInfo:
    """The content of a model.json, of an older schema too. ValueError where it is none."""
    return _EXPORT.validate_python(upgrade.export(parse_json(data)))


def held_out_loss_of(folder: Path) -> float:
    """Held-out loss of an export that was made for its score; infinite if there is none."""
    try:
        loss = parse_export((folder / MODEL).read_bytes()).training.held_out_loss
    except (OSError, ValueError):
        return math.inf
    return math.inf if loss is None else loss


def load_export(folder: Path, vocabulary: Vocabulary | None = None) -> tuple[Gato, ExportInfo]:
    """Load an exported model, in evaluation mode, on the CPU.

    Raises:
        CheckpointError: no export, a damaged one, or one of another version.
        VocabularyMismatch: it was trained with another vocabulary than `vocabulary`.
    """
    path = Path(folder) / MODEL
    if not path.is_file():
        inner = Path(folder) / "export"
        remedy = f"give {inner}" if (inner / MODEL).is_file() else "give the export folder of a run, RUN/export"
        raise CheckpointError(f"{folder}: no {MODEL}, so no export; {remedy}")
    try:
        info = parse_export(path.read_bytes())
    except ValueError as error:  # of json and of pydantic
        detail = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        raise CheckpointError(f"{path}: not an export this package reads ({detail}); export again") from None
    if info.format != "gato.model" or not 1 <= info.version <= EXPORT_VERSION:
        raise CheckpointError(
            f"{path}: format {info.format} {info.version}, this package reads gato.model 1 to {EXPORT_VERSION}; "
            "install the version that wrote it"
        )
    if info.version < 3 and info.model.sequence == "timesteps":
        raise CheckpointError(f"{path}: its observations are scaled by place, not by task as now; train again")
    (vocabulary or info.vocabulary).require(info.vocabulary_fingerprint, str(path))
    weights = intact(path.with_name(TENSORS), info.weights_sha256)
    model = Gato(info.model, info.vocabulary)
    found = load_file(weights)
    try:
        found["tokens.weight"] = _whole(found["tokens.weight"], info)
        model.load_state_dict(found)
    except (KeyError, RuntimeError, ValueError) as error:
        detail = str(error).splitlines()[-1].strip()
        raise CheckpointError(f"{path}: its weights are of another shape ({detail}); export or ship it again") from None
    return model.eval(), info


def intact(path: Path, sha256: str) -> Path:
    """A file of an export. CheckpointError unless it is there and has that hash."""
    if not path.is_file() or sha256_of(path) != sha256:
        raise CheckpointError(f"{path}: missing or damaged (sha256 differs from {MODEL}); export or ship it again")
    return path


def _whole(kept: torch.Tensor, info: ExportInfo) -> torch.Tensor:
    """The embedding table (ids, width) of the rows that were kept; the others are zero. ValueError where those are not
    as many, or not ascending."""
    if not info.kept:
        return kept
    size = info.vocabulary.padded_size
    ids = [id for start, stop in info.kept for id in range(max(start, 0), min(stop, size))]
    if len(ids) != len(kept) or sorted(set(ids)) != ids:
        raise ValueError(f"'kept' names {len(ids)} rows, tokens.weight has {len(kept)}")
    table = kept.new_zeros(size, kept.shape[1])
    table[ids] = kept
    return table


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
        wanted[TEXT_MODEL_NAME] = parsed.get("text_sha256", "")
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
