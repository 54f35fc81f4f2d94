"""Datasets of any shape, written by the project's own writer without logs; manifests that agree with changed files."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from etl.building.gather import _ordered
from schemas.dataset import (
    INDEX_NAME,
    MANIFEST_NAME,
    SCHEMA_VERSION,
    SHARD_SCHEMA,
    SHARDS_NAME,
    TEXT_MODEL_NAME,
    FileDigest,
    Manifest,
    SampleMeta,
    TaskSummary,
    TextModel,
)
from schemas.episode import ActionSpec, FieldSpec, TaskSpec
from schemas.files import sha256_of
from schemas.layout import PATCH_SIZE, layout_of
from schemas.vocabulary import DISJOINT
from shards.folder import Folder
from shards.writer import ShardWriter, sample_key, shard_name, write_file, write_manifest, write_table

PADDING = 31


@dataclass(frozen=True)
class Task:
    """lengths: timesteps of each episode; held_out: ordinals of those never trained on; patches: (rows, columns)."""

    name: str
    lengths: tuple[int, ...]
    held_out: tuple[int, ...] = ()
    observation: int = 3
    choices: int = 0
    """Where not 0, observations are discrete."""
    action: int = 2
    patches: tuple[int, int] = (0, 0)
    channels: int = 1
    text: int = 0
    """Text tokens a timestep; a task without action is one of documents."""

    @property
    def spec(self) -> TaskSpec:
        kind = (
            ("discrete", (self.observation,), (self.choices,)) if self.choices else ("continuous", (self.observation,))
        )
        fields = [FieldSpec("observation", *kind)] if self.observation else []
        if self.patches[0]:
            size = tuple(PATCH_SIZE * n for n in self.patches)
            fields.insert(0, FieldSpec("image", "image", (*size, self.channels), resized=size))
        if self.text:
            fields.append(FieldSpec("text", "text", (self.text,)))
        action = ActionSpec.continuous(-1.0, 1.0, self.action) if self.action else None
        return TaskSpec(self.name, "made", tuple(fields), action)


def make(folder: Path, tasks: list[Task], piece: int = 1000, shards: int = 1, seed: int = 0) -> Path:
    """A finished dataset: each task's episodes, in pieces, over so many shards of its own. Token and pixel values say
    where they are from as far as they can."""
    place, rng = Folder(folder), np.random.default_rng(seed)
    columns: dict[str, list] = {}
    written = []
    for number, task in enumerate(tasks):
        layout = layout_of(task.spec)
        parts = np.array_split(np.arange(len(task.lengths)), min(shards, len(task.lengths)))
        for part in parts:
            writer = ShardWriter(place, shard_name(len(written)))
            for episode in part.tolist():
                T = task.lengths[episode]
                for start in range(0, T, piece):
                    t = np.arange(start, min(T, start + piece))
                    # small numbers, so that a text holds its padding now and then
                    tokens = (episode * 1009 + t[:, None] * 31 + np.arange(layout.stored)) % DISJOINT.size
                    members = {
                        "tokens": tokens.astype(np.uint16),
                        "reward": np.ones(len(t), np.float32) if task.action else None,
                        "observation": rng.random((len(t), task.observation), np.float32)
                        if task.observation and not task.choices
                        else None,
                        "action": rng.random((len(t), task.action), np.float32) if task.action else None,
                    }
                    if layout.patches:
                        shape = (len(t), layout.patches, PATCH_SIZE, PATCH_SIZE, layout.channels)
                        members["patches"] = rng.integers(0, 256, shape, np.uint8)
                    members = {name: array for name, array in members.items() if array is not None}
                    key = sample_key(task.name, episode, start)
                    row = {
                        "task": number, "shard": len(written), "episode": episode, "start": start, "timesteps": len(t),
                        "episode_timesteps": T, "episode_return": float(T), "terminated": True, "truncated": False,
                        "held_out": episode in task.held_out, "file": "made", "position": episode, "row": 0,
                    }  # fmt: skip
                    names = ("episode", "start", "timesteps", "episode_timesteps", "episode_return")
                    meta = SampleMeta(task.name, *(row[name] for name in names), terminated=True, truncated=False)
                    row |= writer.add(key, members, meta)
                    for name, value in row.items():
                        columns.setdefault(name, []).append(value)
            written.append(asdict(writer.close()))
    text = TextModel(write_file(place, TEXT_MODEL_NAME, b"none", 1), 1, PADDING) if any(t.text for t in tasks) else None
    manifest = Manifest(
        "gato.dataset", SCHEMA_VERSION, folder.name, DISJOINT, DISJOINT.fingerprint, text,
        tasks=tuple(_summary(task, number, columns, written) for number, task in enumerate(tasks)),
        shards=write_table(place, SHARDS_NAME, pa.Table.from_pylist(written, SHARD_SCHEMA)),
        index=write_table(place, INDEX_NAME, _ordered(columns)),
        rejected=write_file(place, "rejected.jsonl", b"", 0),
    )  # fmt: skip
    write_manifest(place, manifest)
    return folder


def _summary(task: Task, number: int, columns: dict[str, list], written: list[dict]) -> TaskSummary:
    own = np.array(columns["task"]) == number
    held_out = np.array(columns["held_out"])[own]
    timesteps = np.array(columns["timesteps"])[own]
    size = sum(written[shard]["bytes"] for shard in np.unique(np.array(columns["shard"])[own]))
    return TaskSummary(
        task.spec, len(task.lengths), 0, len(task.held_out), 0, 0, int(timesteps.sum()), int(timesteps[held_out].sum()),
        first_row=int(np.argmax(own)), rows=int(own.sum()), held_out_rows=int(held_out.sum()),
        tokens=int(timesteps.sum()) * layout_of(task.spec).length, bytes=size, return_mean=None, return_std=None,
        returns=None, out_of_range_actions=0, clipped_observations=0, cut_texts=0,
    )  # fmt: skip


def sign(folder: Path, names: list[str] | None = None) -> None:
    """Make the manifest agree with the files as they are now. `names`: other ones of the shards."""
    manifest = json.loads((folder / MANIFEST_NAME).read_text())
    with pa.memory_map(str(folder / SHARDS_NAME)) as source:
        shards = pa.ipc.open_file(source).read_all().to_pylist()
    for number, shard in enumerate(shards):
        shard["name"] = names[number] if names else shard["name"]
        path = folder / shard["name"]
        if path.is_file():
            shard |= {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    manifest["shards"] = asdict(write_table(Folder(folder), SHARDS_NAME, pa.Table.from_pylist(shards, SHARD_SCHEMA)))
    index = folder / INDEX_NAME
    manifest["index"] |= {"bytes": index.stat().st_size, "sha256": sha256_of(index)}
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest))


def reindexed(folder: Path, **columns: object) -> None:
    """Replace whole columns of index.arrow, and sign."""
    with pa.memory_map(str(folder / INDEX_NAME)) as source:
        table = pa.ipc.open_file(source).read_all()
    for name, values in columns.items():
        at = table.schema.get_field_index(name)
        table = table.set_column(at, table.schema.field(at), pa.array(values, table.schema.field(at).type))
    digest: FileDigest = write_table(Folder(folder), INDEX_NAME, table)
    assert digest.rows == table.num_rows
    sign(folder)
