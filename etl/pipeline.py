"""From a plan to shards, through Beam, and from shards to a dataset.

    scans -> plan (shard -> task, episodes) -> Create | Reshuffle | ParDo(write_shard) -> records -> index, manifest

Nothing but plan items and small records passes between workers: each worker reads
its own episodes, writes its shard under a temporary name, renames it, and then
leaves a record of it in `.build/`. A rerun keeps every shard whose record matches
the plan and redoes the rest; the manifest comes last and removes `.build/`.

Invariant: shard bytes are a function of (source files, options), whatever the
runner, the worker count and the number of attempts.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import apache_beam as beam
import numpy as np
from apache_beam.options.pipeline_options import PipelineOptions
from pydantic import TypeAdapter

from etl import sources
from etl.sources import EpisodeRef, Rejection, TaskScan
from etl.tokenizers.timestep import TimestepTokenizer
from schemas.dataset import (
    INDEX_SCHEMA,
    MANIFEST_NAME,
    REJECTED_NAME,
    SCHEMA_VERSION,
    DatasetError,
    FileDigest,
    Manifest,
    Shard,
    TaskSummary,
)
from schemas.episode import EpisodeError, RawEpisode, TaskSpec
from schemas.files import atomic_write, sha256_of
from schemas.layout import PATCH_SIZE, layout_of
from schemas.vocabulary import by_name
from shards.writer import ShardWriter, shard_name, write_file, write_index, write_manifest

BUILD_FOLDER = ".build"
_TASK: TypeAdapter[TaskSpec] = TypeAdapter(TaskSpec)


@dataclass(frozen=True)
class BuildConfig:
    """Options that shape a dataset's bytes; kept in its manifest."""

    vocabulary: str = "seed"
    shard_megabytes: float = 64.0
    """A shard is closed at the first episode end behind this size."""
    piece_timesteps: int = 1024
    """Longer episodes are stored in pieces of this many timesteps."""
    held_out_share: float = 0.05
    """Share of episodes, chosen by a hash of where they come from, that are never trained on; at least
    one of each task that has two."""


def make_plan(source: str, scans: list[TaskScan], config: BuildConfig) -> list[dict[str, Any]]:
    """Shards in order: JSON-able items {number, source, task, config, first_episode, refs, stamps}."""
    plan: list[dict[str, Any]] = []
    for scan in sorted((s for s in scans if s.task and s.episodes), key=lambda s: s.task.name if s.task else ""):
        assert scan.task is not None
        layout = layout_of(scan.task)
        bytes_each = 2 * layout.stored + layout.patches * PATCH_SIZE**2 * layout.channels + 4
        bytes_each += sum(4 * int(np.prod(f.shape)) for f in scan.task.observation if f.kind == "continuous")
        refs: list[EpisodeRef] = []
        size = first = 0
        for number, ref in enumerate(scan.episodes):
            refs.append(ref)
            size += ref.timesteps * bytes_each
            if size >= config.shard_megabytes * 2**20 or number + 1 == len(scan.episodes):
                read = {part for file in {r.file for r in refs} for part in sources.load(source).parts(file)}
                stamps = sorted((str(part), *_stamp(part)) for part in read)
                plan.append(
                    {
                        "number": len(plan),
                        "source": source,
                        "task": asdict(scan.task),
                        "config": asdict(config),
                        "first_episode": first,
                        "refs": [asdict(r) for r in refs],
                        "stamps": [list(s) for s in stamps],
                    }
                )
                refs, size, first = [], 0, number + 1
    return plan


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _digest(item: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(item, sort_keys=True).encode()).hexdigest()


def write_shard(item: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Write one shard and its record; returns the record. Keeps a finished shard of the same plan item."""
    record_path = folder / BUILD_FOLDER / f"{shard_name(item['number'])}.json"
    kept = _finished(item, folder, record_path)
    if kept is not None:
        return kept
    task = _TASK.validate_python(item["task"])
    tokenizer = TimestepTokenizer(task, by_name(item["config"]["vocabulary"]))
    refs = [EpisodeRef(**ref) for ref in item["refs"]]
    rows: dict[str, list] = {name: [] for name in INDEX_SCHEMA.names if name not in ("shard", "held_out", "task")}
    rejected: list[Rejection] = []
    counts = {"clipped_observations": 0, "out_of_range_actions": 0}
    writer = ShardWriter(folder / shard_name(item["number"]))
    try:
        read = sources.load(item["source"]).read(task, refs)
        for episode, (ref, result) in enumerate(zip(refs, read, strict=True), start=item["first_episode"]):
            if isinstance(result, Rejection):
                rejected.append(result)
                continue
            try:
                _write_episode(writer, tokenizer, episode, result, item["config"]["piece_timesteps"], rows, counts)
            except EpisodeError as error:
                rejected.append(Rejection(task.name, result.file, ref.position, ref.start, error.reason, error.detail))
        shard = writer.close()
    finally:
        writer.abort()
    record = {
        "plan": _digest(item),
        "number": item["number"],
        "task": task.name,
        "shard": asdict(shard),
        "rows": rows,
        "rejected": [asdict(r) for r in rejected],
        **counts,
    }
    with atomic_write(record_path) as file:
        file.write(json.dumps(record).encode())
    return record


def _finished(item: dict[str, Any], folder: Path, record_path: Path) -> dict[str, Any] | None:
    if not record_path.is_file():
        return None
    record = json.loads(record_path.read_text())
    path = folder / record["shard"]["name"]
    whole = record["plan"] == _digest(item) and path.is_file() and sha256_of(path) == record["shard"]["sha256"]
    return record if whole else None


def _write_episode(
    writer: ShardWriter,
    tokenizer: TimestepTokenizer,
    number: int,
    episode: RawEpisode,
    piece: int,
    rows: dict[str, list],
    counts: dict[str, int],
) -> None:
    task = tokenizer.task
    episode.check(task)
    encoded = tokenizer.encode_observation(episode.observation)
    actions, outside = tokenizer.encode_action(episode.action)
    counts["clipped_observations"] += encoded.clipped
    counts["out_of_range_actions"] += outside
    T = episode.timesteps
    members: dict[str, np.ndarray] = {
        "tokens": np.concatenate([encoded.tokens, actions], axis=1),
        "reward": episode.reward.astype(np.float32),
    }
    if encoded.patches is not None:
        members["patches"] = encoded.patches
    raw = [episode.observation[f.key].reshape(T, -1) for f in tokenizer.fields if f.kind == "continuous"]
    if raw:
        members["observation"] = np.concatenate(raw, axis=1).astype(np.float32)
    if task.action and task.action.kind == "continuous":
        members["action"] = episode.action.reshape(T, -1).astype(np.float32)
    total = float(episode.reward.astype(np.float64).sum())
    about = {
        "episode": number,
        "episode_timesteps": T,
        "episode_return": total,
        "terminated": episode.terminated,
        "truncated": episode.truncated,
        "file": episode.file,
        "position": episode.position,
        "row": episode.row,
    }
    safe = task.name.replace(".", "_").replace("/", "_")
    for start in range(0, T, piece):
        stop = min(start + piece, T)
        part = {name: array[start:stop] for name, array in members.items()}
        here = about | {"start": start, "timesteps": stop - start}
        where = writer.add(f"{safe}-{number:07d}-{start:07d}", stop - start, part, here | {"task": task.name})
        for name, value in (here | where).items():
            rows[name].append(value)


class WriteShard(beam.DoFn):
    """Plan item -> number of the shard written; everything else stays on disk."""

    def __init__(self, folder: str):
        self.folder = folder

    def process(self, item: dict[str, Any]) -> Iterator[int]:
        yield write_shard(item, Path(self.folder))["number"]


def run(plan: list[dict[str, Any]], folder: Path, beam_arguments: list[str]) -> None:
    """Write every shard of the plan with the chosen Beam runner; blocks until all are written."""
    (folder / BUILD_FOLDER).mkdir(parents=True, exist_ok=True)
    with beam.Pipeline(options=PipelineOptions(beam_arguments, save_main_session=False)) as pipeline:
        _ = (
            pipeline
            | "plan" >> beam.Create(plan, reshuffle=False)
            | "spread" >> beam.Reshuffle()
            | "write" >> beam.ParDo(WriteShard(str(folder)))
        )


def finished_shards(folder: Path) -> int:
    """Shards that this build has finished so far, for the progress bar."""
    return sum(1 for _ in (folder / BUILD_FOLDER).glob("shard-*.json"))


def gather(
    name: str,
    plan: list[dict[str, Any]],
    scans: list[TaskScan],
    folder: Path,
    config: BuildConfig,
    max_rejected_share: float = 1.0,
) -> Manifest:
    """Records of all shards -> index, rejections, manifest (last). DatasetError if a shard is missing,
    damaged, nothing at all could be used, or more than `max_rejected_share` of the episodes could not."""
    records = []
    for item in plan:
        record = _finished(item, folder, folder / BUILD_FOLDER / f"{shard_name(item['number'])}.json")
        if record is None:
            raise DatasetError(f"{folder / shard_name(item['number'])}: not written; run the same command again")
        records.append(record)
    rejected = [asdict(r) for scan in scans for r in scan.rejected] + [r for rec in records for r in rec["rejected"]]
    records = [record for record in records if record["shard"]["samples"]]
    specs = {scan.task.name: scan.task for scan in scans if scan.task}
    used = sorted({record["task"] for record in records})
    if not used:
        raise DatasetError(f"{folder}: no usable episode in the input; {_first(rejected)}")
    planned, lost = sum(len(item["refs"]) for item in plan), sum(r["position"] >= 0 for r in rejected)
    lines = "".join(json.dumps(r, sort_keys=True) + "\n" for r in rejected).encode()
    rejected_digest: FileDigest = write_file(folder / REJECTED_NAME, lines, len(rejected))
    if lost > max_rejected_share * planned:
        raise DatasetError(
            f"{folder}: {lost} of {planned} episodes rejected, more than --max-rejected-share "
            f"{max_rejected_share}; see {folder / REJECTED_NAME}"
        )
    columns: dict[str, list] = {name: [] for name in INDEX_SCHEMA.names}
    for number, record in enumerate(records):
        count = record["shard"]["samples"]
        columns["task"] += [used.index(record["task"])] * count
        columns["shard"] += [number] * count
        for column, values in record["rows"].items():
            columns[column] += values
    columns["held_out"] = _held_out(columns, used, config.held_out_share)
    vocabulary = by_name(config.vocabulary)
    manifest = Manifest(
        schema="gato.dataset",
        schema_version=SCHEMA_VERSION,
        name=name,
        vocabulary=vocabulary,
        vocabulary_fingerprint=vocabulary.fingerprint,
        text_tokenizer=None,
        tasks=tuple(_summary(specs[t], n, columns, records, rejected) for n, t in enumerate(used)),
        shards=tuple(Shard(**record["shard"]) for record in records),
        index=write_index(folder, columns),
        rejected=rejected_digest,
        config=asdict(config) | {"inputs": inputs_of(plan)},
    )
    known = {shard.name for shard in manifest.shards}
    for stray in folder.glob("shard-*.tar"):
        if stray.name not in known:
            stray.unlink()
    write_manifest(folder, manifest)
    shutil.rmtree(folder / BUILD_FOLDER)
    return manifest


def inputs_of(plan: list[dict[str, Any]]) -> list[list]:
    """[task, name, bytes] of every source file of a plan, sorted."""
    found = {(item["task"]["name"], Path(s[0]).name, s[1]) for item in plan for s in item["stamps"]}
    return [list(entry) for entry in sorted(found)]


def _first(rejected: list[dict]) -> str:
    if not rejected:
        return "the input holds no episode"
    first = rejected[0]
    return f"first of {len(rejected)} rejections: {first['file']}: {first['reason']}: {first['detail']}"


def _held_out(columns: dict[str, list], tasks: list[str], share: float) -> list[bool]:
    """By a hash of task and place in the source, so that adding data moves no episode between splits."""
    marks: dict[tuple[int, int], int] = {}
    for task, episode, file, position in zip(*(columns[n] for n in ("task", "episode", "file", "position"))):
        text = f"{tasks[task]}/{file}/{position}"
        marks[task, episode] = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
    chosen = {key for key, mark in marks.items() if mark < share * 2**64}
    for task in range(len(tasks)):
        keys = [key for key in marks if key[0] == task]
        if share > 0 and len(keys) > 1 and not chosen.intersection(keys):
            chosen.add(min(keys, key=lambda key: marks[key]))
        if len(keys) == len(chosen.intersection(keys)):
            chosen.discard(max(keys, key=lambda key: marks[key]))
    return [key in chosen for key in zip(columns["task"], columns["episode"])]


def _summary(
    spec: TaskSpec, number: int, columns: dict[str, list], records: list[dict], rejected: list[dict]
) -> TaskSummary:
    episodes: dict[int, int] = {}
    for row, (task, episode) in enumerate(zip(columns["task"], columns["episode"])):
        if task == number:
            episodes.setdefault(episode, row)
    first = list(episodes.values())
    whole = [row for row in first if columns["terminated"][row] or columns["truncated"][row]]
    returns = np.array([columns["episode_return"][row] for row in whole], np.float64)
    timesteps = sum(columns["episode_timesteps"][row] for row in first)
    own = [record for record in records if record["task"] == spec.name]
    return TaskSummary(
        spec=spec,
        episodes=len(first),
        cut_episodes=len(first) - len(whole),
        held_out_episodes=sum(columns["held_out"][row] for row in first),
        rejected_episodes=sum(r["task"] == spec.name for r in rejected),
        timesteps=timesteps,
        tokens=timesteps * layout_of(spec).length,
        return_mean=float(returns.mean()) if len(returns) else None,
        return_std=float(returns.std()) if len(returns) else None,
        returns=tuple(float(q) for q in np.quantile(returns, [0, 0.25, 0.5, 0.75, 1])) if len(returns) else None,
        out_of_range_actions=sum(record["out_of_range_actions"] for record in own),
        clipped_observations=sum(record["clipped_observations"] for record in own),
    )


def damaged_file(folder: Path, manifest: Manifest) -> str | None:
    """Name of the first file that is missing or differs from the manifest's hash, or None."""
    files: list[Shard | FileDigest] = [*manifest.shards, manifest.index, manifest.rejected]
    for file in files:
        if not (folder / file.name).is_file() or sha256_of(folder / file.name) != file.sha256:
            return file.name
    return None


def remove_dataset(folder: Path) -> None:
    """Take back a finished dataset: manifest first, so that no half-removed folder looks whole."""
    (folder / MANIFEST_NAME).unlink(missing_ok=True)
    for path in folder.glob("shard-*.tar"):
        path.unlink()
