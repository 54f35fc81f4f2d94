"""One plan item -> one shard and a record of it: all that a worker does.

refs -> source.read -> check -> tokenize -> ShardWriter -> shard-NNNNNN.tar, then .build/shard-NNNNNN.tar.json

A worker keeps no state between items. A shard whose record matches the item is kept, so that a rerun redoes only
what is missing. While it works, a heartbeat shows that it lives.

Invariant: a shard's bytes are a function of (source files, item), whatever the runner and the number of attempts.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from etl import sources
from etl.building.heartbeat import Heartbeat
from etl.building.plan import Item, digest, refs_of
from etl.fetch import remote
from etl.sources import Rejection
from etl.tokenizers.text import TextTokenizer
from etl.tokenizers.timestep import TimestepTokenizer
from schemas.dataset import INDEX_SCHEMA, TEXT_MODEL_NAME, DatasetError
from schemas.episode import Document, RawEpisode, TaskSpec
from schemas.layout import continuous_values
from schemas.vocabulary import by_name
from shards.folder import Folder
from shards.writer import ShardWriter, sample_key, shard_name

BUILD_FOLDER = ".build"
DOCUMENT_PIECE = 64  # pieces of a document are this many times longer than an episode's, in tokens
GATHERED = ("task", "shard", "held_out", "split_episode", "split_stop")  # columns of the index that gather adds
COUNTS = ("clipped_observations", "out_of_range_actions", "cut_texts")
_TASK: TypeAdapter[TaskSpec] = TypeAdapter(TaskSpec)


def record_name(number: int) -> str:
    return f"{BUILD_FOLDER}/{shard_name(number)}.json"


def write_shard(item: Item, place: str) -> dict[str, Any]:
    """Write one shard and its record into the folder `place`; returns the record. Keeps a finished shard of the
    same plan item."""
    folder, name = Folder(place), shard_name(item["number"])
    kept = finished(item, folder)
    if kept is not None:
        return kept
    with Heartbeat(folder, name):
        for path, url in item["origins"].items():
            remote.ensure(Path(path), url)
        record = _Shard(item, folder).write()
        # a record that is lost costs its shard's work, and one whose shard was lost does not match it
        folder.write(record_name(item["number"]), json.dumps(record).encode(), durable=False)
    return record


def finished(item: Item, folder: Folder, hashed: bool = True) -> dict[str, Any] | None:
    """The record of an item's shard, if both are there and whole. Without `hashed` the size of a shard that
    `write_shard` has just written or kept is enough."""
    data = folder.read(record_name(item["number"]))
    if data is None:
        return None
    try:
        record = json.loads(data)
    except ValueError:
        return None
    shard = record["shard"]
    sha256 = shard["sha256"] if hashed else None
    whole = record["plan"] == digest(item) and folder.holds(shard["name"], shard["bytes"], sha256)
    return record if whole else None


class _Shard:
    """The work on one item: rows of the index, counts and rejections collect here."""

    def __init__(self, item: Item, folder: Folder):
        self.item, self.folder = item, folder
        self.task = _TASK.validate_python(item["task"])
        vocabulary = item["config"]["vocabulary"]
        self.text = _text(str(folder), vocabulary, item["text_model"]) if item["text_model"] else None
        self.tokenizer = TimestepTokenizer(self.task, by_name(vocabulary), self.text)
        self.rows: dict[str, list] = {name: [] for name in INDEX_SCHEMA.names if name not in GATHERED}
        self.rejected: list[Rejection] = []
        self.counts = dict.fromkeys(COUNTS, 0)

    def write(self) -> dict[str, Any]:
        item, task = self.item, self.task
        self.writer = ShardWriter(self.folder, shard_name(item["number"]))
        try:
            read = sources.read(sources.load(item["source"]), task, refs_of(item))
            for number, result in enumerate(read, start=item["first_episode"]):
                if isinstance(result, Rejection):
                    self.rejected.append(result)
                elif isinstance(result, Document):
                    self._document(number, result)
                else:
                    self._episode(number, result)
            shard = self.writer.close()
        finally:
            self.writer.abort()
        return {
            "plan": digest(item),
            "number": item["number"],
            "task": task.name,
            "shard": asdict(shard),
            "rows": self.rows,
            "rejected": [asdict(r) for r in self.rejected],
            **self.counts,
        }

    def _episode(self, number: int, episode: RawEpisode) -> None:
        task = self.task
        encoded = self.tokenizer.encode_observation(episode.observation)
        actions, outside = self.tokenizer.encode_action(episode.action)
        for name, count in zip(COUNTS, (encoded.clipped, outside, encoded.cut)):
            self.counts[name] += count
        T = episode.timesteps
        members: dict[str, np.ndarray] = {
            "tokens": np.concatenate([encoded.tokens, actions], axis=1),
            "reward": episode.reward.astype(np.float32, copy=False),
        }
        if encoded.patches is not None:
            members["patches"] = encoded.patches
        raw = continuous_values(task, episode.observation)
        if raw is not None:
            members["observation"] = raw.astype(np.float32, copy=False)
        if task.action and task.action.kind == "continuous":
            members["action"] = episode.action.reshape(T, -1).astype(np.float32, copy=False)
        about = {
            "episode": number,
            "episode_timesteps": T,
            "episode_return": float(episode.reward.astype(np.float64).sum()),
            "terminated": episode.terminated,
            "truncated": episode.truncated,
            "file": episode.file,
            "position": episode.position,
            "row": episode.row,
        }
        self._pieces(members, about, self.item["config"]["piece_timesteps"])

    def _document(self, number: int, document: Document) -> None:
        assert self.text is not None
        tokens = self.text.encode_document(document.text)[:, None]
        about = {
            "episode": number,
            "episode_timesteps": len(tokens),
            "episode_return": 0.0,
            "terminated": True,
            "truncated": False,
            "file": document.file,
            "position": document.position,
            "row": document.row,
        }
        self._pieces({"tokens": tokens}, about, DOCUMENT_PIECE * self.item["config"]["piece_timesteps"])

    def _pieces(self, members: dict[str, np.ndarray], about: dict[str, Any], piece: int) -> None:
        T, number = about["episode_timesteps"], about["episode"]
        for start in range(0, T, piece):
            stop = min(start + piece, T)
            part = {name: array[start:stop] for name, array in members.items()}
            here = about | {"start": start, "timesteps": stop - start}
            key = sample_key(self.task.name, number, start)
            where = self.writer.add(key, stop - start, part, here | {"task": self.task.name})
            for name, value in (here | where).items():
                self.rows[name].append(value)


@lru_cache(maxsize=4)
def _text(place: str, vocabulary: str, fingerprint: str) -> TextTokenizer:
    """The dataset's own text model, which the build put there before any shard."""
    folder = Folder(place)
    data = folder.read(TEXT_MODEL_NAME)
    if data is None:
        raise DatasetError(f"{folder.path(TEXT_MODEL_NAME)}: missing; run python -m etl.build again")
    text = TextTokenizer(data, by_name(vocabulary))
    if text.fingerprint != fingerprint:
        raise DatasetError(f"{folder.path(TEXT_MODEL_NAME)}: not this build's; run python -m etl.build again")
    return text
