"""One ShardPlan -> one shard and its ShardRecord: all that a worker does.

refs -> source.read -> check -> tokenize -> ShardWriter -> shard-NNNNNN.tar, then .build/shard-NNNNNN.tar.json

A worker keeps no state between shards. A shard whose record matches its plan is kept, so a rerun does only what is
missing. While it works, a heartbeat shows that it lives.

Invariant: a shard's bytes are a function of (source files, plan), whatever the runner and the number of attempts.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError

from etl import sources
from etl.building.heartbeat import Heartbeat
from etl.building.oddities import Columns
from etl.building.plan import ShardPlan
from etl.building.renaming import with_names
from etl.fetch import remote
from etl.sources import Rejection
from etl.tokenizers.text import TextTokenizer
from etl.tokenizers.timestep import TimestepTokenizer
from schemas.dataset import INDEX_SCHEMA, TEXT_MODEL_NAME, DatasetError, SampleMeta, Shard
from schemas.episode import Document, RawEpisode
from schemas.files import disk_fault
from schemas.task import STRICT
from schemas.vocabulary import by_name
from shards.folder import Folder
from shards.writer import ShardWriter, sample_key, shard_name

BUILD_FOLDER = ".build"
DOCUMENT_PIECE = 64  # pieces of a document are this many times longer than an episode's, in tokens
GATHERED = ("task", "shard", "held_out", "split_episode", "split_stop")  # columns of the index that gather adds


@dataclass(frozen=True)
class ShardRecord:
    """Record of a written shard, for `gather`: `plan`, the digest of its ShardPlan; `rows`, columns of the
    index, one value per sample; counts over its episodes."""

    __pydantic_config__ = STRICT
    plan: str
    number: int
    task: str
    shard: Shard
    rows: dict[str, list[Any]]
    rejected: tuple[Rejection, ...]
    clipped_observations: int
    out_of_range_actions: int
    cut_texts: int
    columns: Columns = Columns()

    def to_json(self) -> bytes:
        body = vars(self) | {"shard": asdict(self.shard), "rejected": [asdict(one) for one in self.rejected]}
        body |= {"columns": asdict(self.columns)}
        return json.dumps(body).encode()

    @staticmethod
    def from_json(data: bytes) -> ShardRecord | None:
        """The record in a file; None where it is none, or one of another version."""
        try:
            return _RECORD.validate_json(data)
        except ValidationError:
            return None


_RECORD: TypeAdapter[ShardRecord] = TypeAdapter(ShardRecord)


def record_name(number: int) -> str:
    return f"{BUILD_FOLDER}/{shard_name(number)}.json"


def write_shard(plan: ShardPlan, place: str) -> ShardRecord:
    """Write one shard and its record into the folder `place`; returns the record. Keeps a finished shard of the
    same plan."""
    folder, name = Folder(place), shard_name(plan.number)
    kept = finished(plan, folder)
    if kept is not None:
        return kept
    with Heartbeat(folder, name):
        for path, url in plan.origins.items():
            remote.ensure(Path(path), url)
        try:
            record = _ShardWork(plan, folder).write()
            # a record that is lost costs its shard's work, and one whose shard was lost does not match it
            folder.write(record_name(plan.number), record.to_json(), durable=False)
        except OSError as error:
            if line := disk_fault(error, place):
                raise DatasetError(line) from None  # one that Beam passes on as it is
            raise
    return record


def finished(plan: ShardPlan, folder: Folder, hashed: bool = True) -> ShardRecord | None:
    """The record of a plan's shard, if both are there and complete. Without `hashed` the size of a shard that
    `write_shard` has just written or kept is enough."""
    data = folder.read(record_name(plan.number))
    record = ShardRecord.from_json(data) if data is not None else None
    if record is None or record.plan != plan.digest:
        return None
    shard = record.shard
    return record if folder.holds(shard.name, shard.bytes, shard.sha256 if hashed else None) else None


class _ShardWork:
    """The work on one plan: rows of the index, counts and rejections collect here."""

    def __init__(self, plan: ShardPlan, folder: Folder):
        self.plan, self.task, self.folder = plan, plan.task, folder
        vocabulary = plan.config.vocabulary
        self.text = _text(str(folder), vocabulary, plan.text_model) if plan.text_model else None
        self.tokenizer = TimestepTokenizer(self.task, by_name(vocabulary), self.text)
        self.rows: dict[str, list[Any]] = {name: [] for name in INDEX_SCHEMA.names if name not in GATHERED}
        self.rejected: list[Rejection] = []
        self.clipped = self.outside = self.cut = 0
        self.columns: list[Columns] = []

    def write(self) -> ShardRecord:
        plan, task = self.plan, self.task
        self.writer = ShardWriter(self.folder, shard_name(plan.number))
        try:
            read = sources.read(with_names(sources.load(plan.source), plan.config.rename), task, plan.episodes)
            for number, result in enumerate(read, start=plan.first_episode):
                if isinstance(result, Rejection):
                    self.rejected.append(result)
                elif isinstance(result, Document):
                    self._document(number, result)
                else:
                    self._episode(number, result)
            shard = self.writer.close()
        finally:
            self.writer.abort()
        counts = self.clipped, self.outside, self.cut
        columns = Columns.joined(self.columns)
        return ShardRecord(
            plan.digest, plan.number, task.name, shard, self.rows, tuple(self.rejected), *counts, columns
        )

    def _episode(self, number: int, episode: RawEpisode) -> None:
        task, T = self.task, episode.timesteps
        encoded, outside = self.tokenizer.encode(episode.observation, episode.action)
        self.clipped, self.outside, self.cut = (
            self.clipped + encoded.clipped,
            self.outside + outside,
            self.cut + encoded.cut,
        )
        members: dict[str, np.ndarray] = {"tokens": encoded.tokens}
        if task.action is not None:
            members["reward"] = episode.reward.astype(np.float32, copy=False)
        if encoded.patches is not None:
            members["patches"] = encoded.patches
        if encoded.values is not None:
            members["observation"] = encoded.values.astype(np.float32, copy=False)
        self.columns.append(Columns.of(encoded.values, episode.action, task))
        if task.action and task.action.kind == "continuous":
            members["action"] = episode.action.reshape(T, -1).astype(np.float32, copy=False)
        meta = SampleMeta(
            task=task.name,
            episode=number,
            start=0,
            timesteps=T,
            episode_timesteps=T,
            episode_return=float(episode.reward.astype(np.float64).sum()),
            terminated=episode.terminated,
            truncated=episode.truncated,
            file=episode.file,
            position=episode.position,
            row=episode.row,
        )
        self._pieces(members, meta, self.plan.config.piece_timesteps)

    def _document(self, number: int, document: Document) -> None:
        assert self.text is not None
        tokens = self.text.encode_document(document.text)[:, None]
        meta = SampleMeta(
            task=self.task.name,
            episode=number,
            start=0,
            timesteps=len(tokens),
            episode_timesteps=len(tokens),
            episode_return=0.0,
            terminated=True,
            truncated=False,
            file=document.file,
            position=document.position,
            row=document.row,
        )
        self._pieces({"tokens": tokens}, meta, DOCUMENT_PIECE * self.plan.config.piece_timesteps)

    def _pieces(self, members: dict[str, np.ndarray], episode: SampleMeta, piece: int) -> None:
        """Write an episode in pieces of so many timesteps."""
        T = episode.episode_timesteps
        for start in range(0, T, piece):
            stop = min(start + piece, T)
            part, meta = members, episode
            if piece < T:
                part = {name: array[start:stop] for name, array in members.items()}
                meta = replace(episode, start=start, timesteps=stop - start)
            places = self.writer.add(sample_key(self.task.name, meta.episode, start), part, meta)
            for name, value in (vars(meta) | places).items():
                if name in self.rows:  # all but the task's name, which is an ordinal in the index
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
