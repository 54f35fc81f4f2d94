"""From the records of all shards to a dataset: index, rejections, and last the manifest.

.build/shard-*.json -> rejected.jsonl -> index.arrow -> dataset.json -> .build/ goes

Invariant: every episode of the plan is a row of the index or a line of rejected.jsonl, and the manifest is written
after every file that it names is complete.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict

import numpy as np
import pyarrow as pa

from etl.building import oddities
from etl.building.filters import DUPLICATE
from etl.building.oddities import Columns
from etl.building.plan import BuildConfig, ShardPlan, manifest_config
from etl.building.shard import BUILD_FOLDER, ShardRecord, finished
from etl.sources import STALE, Rejection, TaskScan
from etl.tokenizers.text import TextTokenizer
from schemas.dataset import (
    INDEX_NAME,
    INDEX_SCHEMA,
    REJECTED_NAME,
    SCHEMA_VERSION,
    SHARD_SCHEMA,
    SHARDS_NAME,
    TEXT_MODEL_NAME,
    DatasetError,
    FileDigest,
    Manifest,
    TaskSummary,
    TextModel,
)
from schemas.episode import TaskSpec
from schemas.layout import layout_of
from schemas.vocabulary import by_name
from shards.folder import Folder
from shards.writer import shard_name, write_file, write_manifest, write_table

STRICT_LOST = 0.01  # with --strict: share of action values, and per timestep observation values and texts


def gather(
    plan: list[ShardPlan],
    scans: list[TaskScan],
    folder: Folder,
    config: BuildConfig,
    max_rejected_share: float = 1.0,
    text: TextTokenizer | None = None,
    max_clipped_share: float = 1.0,
    strict: bool = False,
) -> Manifest:
    """Records of all shards -> index, rejections, manifest (last). DatasetError if a shard is missing,
    damaged, nothing at all could be used, more than `max_rejected_share` of the episodes could not, or too many
    values are not kept (`require_values`)."""
    records = []
    for shard in plan:
        record = finished(shard, folder, hashed=False)
        if record is None:
            name = folder.path(shard_name(shard.number))
            raise DatasetError(f"{name}: not written; run the same command again")
        records.append(record)
    early = [rejection for scan in scans for rejection in scan.rejected]
    rejected = early + [rejection for record in records for rejection in record.rejected]
    records = [record for record in records if record.shard.samples]
    specs = {scan.task.name: scan.task for scan in scans if scan.task}
    filtered = {scan.task.name: scan.filtered for scan in scans if scan.task}
    used = sorted({record.task for record in records})
    if not used:
        raise DatasetError(f"{folder}: no usable episode in the input; {_first(rejected)}")
    planned = sum(len(shard.refs) for shard in plan) + _lost(early)
    lost = _lost(rejected)
    lines = "".join(json.dumps(asdict(r), sort_keys=True) + "\n" for r in rejected).encode()
    rejected_digest: FileDigest = write_file(folder, REJECTED_NAME, lines, len(rejected))
    if lost > max_rejected_share * planned:
        raise DatasetError(
            f"{folder}: {lost} of {planned} episodes and files rejected, more than --max-rejected-share "
            f"{max_rejected_share}; see {folder.path(REJECTED_NAME)}"
        )
    columns: dict[str, list] = {name: [] for name in ("task", "shard")}
    for number, record in enumerate(records):
        count = record.shard.samples
        columns["task"] += [used.index(record.task)] * count
        columns["shard"] += [number] * count
        for column, values in record.rows.items():
            columns.setdefault(column, []).extend(values)
    firsts: list[list[int]] = [[] for _ in used]
    for row, (task, start) in enumerate(zip(columns["task"], columns["start"])):
        if start == 0:
            firsts[task].append(row)
    marked = {
        (shard.task.name, n): mark for shard in plan for n, mark in enumerate(shard.held_out, shard.first_episode)
    }
    columns["held_out"] = _held_out(columns, used, firsts, config.held_out_share, marked)
    index = _ordered(columns)
    shards = [asdict(record.shard) for record in records]
    vocabulary = by_name(config.vocabulary)
    manifest = Manifest(
        schema="gato.dataset",
        schema_version=SCHEMA_VERSION,
        name=folder.name,
        vocabulary=vocabulary,
        vocabulary_fingerprint=vocabulary.fingerprint,
        text_model=_text_model(plan, text),
        tasks=tuple(
            _summary(specs[name], number, firsts[number], columns, records, rejected, filtered[name])
            for number, name in enumerate(used)
        ),
        shards=write_table(folder, SHARDS_NAME, pa.Table.from_pylist(shards, SHARD_SCHEMA)),
        index=write_table(folder, INDEX_NAME, index),
        rejected=rejected_digest,
        config=manifest_config(plan, config),
    )
    require_values(folder, manifest, max_clipped_share, strict)
    own_scans = {scan.task.name: scan for scan in scans if scan.task}
    lengths = [[columns["episode_timesteps"][row] for row in first] for first in firsts]
    odd = {
        task.spec.name: oddities.task_oddities(
            task,
            lengths[number],
            Columns.joined(record.columns for record in records if record.task == task.spec.name),
            own_scans[task.spec.name],
            rejected,
            config.held_out_share,
            vocabulary,
        )
        for number, task in enumerate(manifest.tasks)
    }
    oddities.write(folder, odd)
    known = {shard["name"] for shard in shards}
    for stray in folder.names("shard-*.tar"):
        if stray not in known:
            folder.remove(stray)
    folder.sync()
    write_manifest(folder, manifest)
    folder.remove(BUILD_FOLDER)
    return manifest


def require_values(folder: Folder, manifest: Manifest, max_clipped_share: float, strict: bool) -> None:
    """DatasetError for a task whose actions mostly lie beyond their range: it is another one; if `strict`, for one that
    loses more than a few values of any kind."""
    for task in manifest.tasks:
        share, name = oddities.clipped_share(task), task.spec.name
        if share > max_clipped_share or (strict and share > STRICT_LOST):
            allowed, without = f"--max-clipped-share {max_clipped_share:g}", "with --max-clipped-share 1"
            if share <= max_clipped_share:
                allowed, without = f"the {STRICT_LOST:g} of --strict", "without --strict"
            raise DatasetError(
                f"{folder}: {share:.1%} of the action values of '{name}' lie beyond their range, more than {allowed}: "
                "is it the right one? --action-low and --action-high give another, --action-bounds log takes the "
                f"log's own, and {without} they are clipped all the same"
            )
        beyond = f"observation values beyond ±{manifest.vocabulary.scale:g} are clipped; divide them in the log"
        cut = "texts are cut at their length; give more --text-tokens"
        for count, what in ((task.clipped_observations, beyond), (task.cut_texts, cut)):
            if strict and count > STRICT_LOST * task.timesteps:
                rate = f"in {task.timesteps:,} timesteps of '{name}'"
                raise DatasetError(f"--strict: {folder}: {rate} {count:,} {what}, or leave out --strict")


def _text_model(plan: list[ShardPlan], text: TextTokenizer | None) -> TextModel | None:
    if text is None or not any(shard.text_model for shard in plan):
        return None
    return TextModel(FileDigest(TEXT_MODEL_NAME, len(text.bytes), text.fingerprint, 1), text.pieces, text.padding)


def _lost(rejected: list[Rejection]) -> int:
    """How many of the rejections are damage, a whole file counted as one; copies and left-over rows are none."""
    return sum(r.reason not in (DUPLICATE, STALE) for r in rejected)


def _first(rejected: list[Rejection]) -> str:
    if not rejected:
        return "the input holds no episode"
    first = rejected[0]
    return f"first of {len(rejected)} rejections: {first.file}: {first.reason}: {first.detail}"


def _held_out(
    columns: dict[str, list],
    tasks: list[str],
    firsts: list[list[int]],
    share: float,
    marked: Mapping[tuple[str, int], bool | None],
) -> list[bool]:
    """As the logs mark them, else by a hash of task and place in the source, so that adding data moves no episode
    between splits. `firsts`: rows of the index where an episode begins, for each task."""
    chosen: set[tuple[int, int]] = set()
    for task, rows in enumerate(firsts):
        marks: dict[int, int] = {}
        for row in rows:
            place = f"{tasks[task]}/{columns['file'][row]}/{columns['position'][row]}"
            mark = int.from_bytes(hashlib.sha256(place.encode()).digest()[:8], "big")
            said = marked.get((tasks[task], columns["episode"][row]))
            marks[columns["episode"][row]] = mark if said is None else -1 if said else 2**64
        own = {episode for episode, mark in marks.items() if mark < share * 2**64}
        if share > 0 and len(marks) > 1 and not own and min(marks.values()) < 2**64:
            own = {min(marks, key=lambda episode: marks[episode])}
        if len(own) == len(marks):
            own.discard(max(marks, key=lambda episode: marks[episode]))
        chosen |= {(task, episode) for episode in own}
    return [key in chosen for key in zip(columns["task"], columns["episode"])]


def _ordered(columns: dict[str, list]) -> pa.Table:
    """The index: rows by task, split, episode and start, with the running sums that a reader needs."""
    task, held_out, episode, start = (np.array(columns[n]) for n in ("task", "held_out", "episode", "start"))
    order = np.lexsort((start, episode, held_out, task))
    task, held_out, episode = task[order], held_out[order], episode[order]
    new_split = (np.diff(task, prepend=-1) != 0) | (np.diff(held_out.astype(int), prepend=-1) != 0)
    new_episode = new_split | (np.diff(episode, prepend=-1) != 0)
    stop, number = np.cumsum(np.array(columns["timesteps"])[order]), np.cumsum(new_episode) - 1
    first = np.flatnonzero(new_split)[np.cumsum(new_split) - 1]  # row at which a row's split begins
    before = np.concatenate([[0], stop])[first]
    derived = {"split_episode": number - number[first], "split_stop": stop - before}
    listed = pa.table({name: values for name, values in columns.items() if name not in derived}).take(order)
    arrays = [derived[f.name] if f.name in derived else listed.column(f.name).cast(f.type) for f in INDEX_SCHEMA]
    return pa.table(arrays, schema=INDEX_SCHEMA)


def _summary(
    spec: TaskSpec,
    number: int,
    first: list[int],
    columns: dict[str, list],
    records: list[ShardRecord],
    rejected: list[Rejection],
    filtered: int,
) -> TaskSummary:
    complete = [row for row in first if columns["terminated"][row] or columns["truncated"][row]]
    returns = np.array([columns["episode_return"][row] for row in complete if spec.action], np.float64)
    timesteps = sum(columns["episode_timesteps"][row] for row in first)
    own = [record for record in records if record.task == spec.name]
    held_out = [row for row in first if columns["held_out"][row]]
    rows = np.flatnonzero(np.array(columns["task"]) == number)
    return TaskSummary(
        spec=spec,
        episodes=len(first),
        cut_episodes=len(first) - len(complete),
        held_out_episodes=len(held_out),
        rejected_episodes=sum(r.task == spec.name for r in rejected),
        filtered_episodes=filtered,
        timesteps=timesteps,
        held_out_timesteps=sum(columns["episode_timesteps"][row] for row in held_out),
        first_row=int(rows[0]),
        rows=len(rows),
        held_out_rows=int(np.array(columns["held_out"])[rows].sum()),
        bytes=sum(record.shard.bytes for record in own),
        tokens=timesteps * layout_of(spec).length,
        return_mean=float(returns.mean()) if len(returns) else None,
        return_std=float(returns.std()) if len(returns) else None,
        returns=tuple(float(q) for q in np.quantile(returns, [0, 0.25, 0.5, 0.75, 1])) if len(returns) else None,
        out_of_range_actions=sum(record.out_of_range_actions for record in own),
        clipped_observations=sum(record.clipped_observations for record in own),
        cut_texts=sum(record.cut_texts for record in own),
    )
