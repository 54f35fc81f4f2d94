"""The loop that a user would write where there is no build: a log's episodes to the bytes of a dataset, byte for byte.

a format's reader -> Episode: arrays as they were stored -> `write`: tokens, patches, tar members, hashes, index
    -> shard-*.tar, index.arrow, shards.arrow, rejected.jsonl, text.model: those of the build, or ValueError

It is plain NumPy, one pass, and shares no code with tokenizers, shard writer and `gather`: an independent reference of
the bytes. It knows what its author knows of one good log: how many episodes of which length, and the range of actions.
So it does not scan, look for copies, check values, try files that may be damaged, or resume. dataset.json and
oddities.json are left out: they hold the build's options, the input files' names and what looked odd, not the episodes.

Invariant: a ratio is printed only after the loop wrote the build's bytes.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import shutil
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import sentencepiece

from benchmarks.etl import best_times, build_once, one_core, ratios
from etl.tokenizers.text import DEFAULT_MODEL
from schemas.dataset import INDEX_SCHEMA, SHARD_SCHEMA, load_manifest
from schemas.files import atomic_write
from schemas.task import TaskSpec

REPEATS = 3
MEMBERS = ("tokens", "patches", "reward", "observation", "action")
OBSERVATIONS, ACTIONS, BINS, MU, M = 32000, 33024, 1024, 100.0, 256.0
HELD_OUT = 0.05
SHARD_BYTES = 2**26
ABOUT = ("build's own", "dataset.json", "oddities.json")


@dataclass
class Episode:
    """`pictures` (T, H, W, C) uint8 and `numbers` (T, ...), in the order of their tokens; floats are real numbers,
    integers choices from 0. `action` (T, A) floats or (T,) integers, None for a caption; `texts`: T lines, or none."""

    file: str
    position: int
    row: int
    action: np.ndarray | None
    reward: np.ndarray
    terminated: bool
    truncated: bool
    pictures: list[np.ndarray] = field(default_factory=list)
    numbers: list[np.ndarray] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)


Reader = Callable[[Path], Iterator[Episode]]


class Tar:
    """A shard: members one after the other, hashed as they are written."""

    def __init__(self, file: io.BufferedWriter):
        self.file, self.digest, self.at = file, hashlib.sha256(), 0

    def write(self, data: bytes | memoryview) -> None:
        self.file.write(data)
        self.digest.update(data)
        self.at += len(data)

    def add(self, name: str, head: bytes, body: memoryview) -> int:
        """Append a member; where its body begins."""
        info = tarfile.TarInfo(name)
        info.size = len(head) + len(body)
        self.write(info.tobuf(tarfile.USTAR_FORMAT) + head)
        start = self.at
        self.write(body)
        self.write(bytes(-info.size % tarfile.BLOCKSIZE))
        return start


class Text:
    """Tokens of texts, cut or padded."""

    def __init__(self, task: TaskSpec):
        lengths = [spec.shape[0] for spec in task.observation if spec.kind == "text"]
        self.length, self.end = sum(lengths), task.action is None
        if lengths:
            self.model = sentencepiece.SentencePieceProcessor(model_file=str(DEFAULT_MODEL))

    def tokens(self, lines: list[str]) -> np.ndarray:
        """(T, n) of T lines; equal ones cost once."""
        pieces = {line: self.model.encode(line) + [self.model.eos_id()] * self.end for line in set(lines)}
        padding = [self.model.unk_id()] * self.length
        return np.array([(pieces[line] + padding)[: self.length] for line in lines], np.uint16)


def patches_of(frames: np.ndarray) -> np.ndarray:
    """(T, H, W, C) to (T, P, 16, 16, C)."""
    T, H, W, C = frames.shape
    grid = frames.reshape(T, H // 16, 16, W // 16, 16, C).transpose(0, 1, 3, 2, 4, 5)
    return grid.reshape(T, -1, 16, 16, C)


def uniform(values: np.ndarray, start: int) -> np.ndarray:
    """Values from -1 to 1, clipped, to tokens of 1024 bins."""
    return np.clip((values + 1.0) * (BINS / 2), 0, BINS - 1).astype(np.uint16) + np.uint16(start)


def observation_tokens(values: np.ndarray) -> np.ndarray:
    """(T, ...) to (T, n): choices, or real numbers by the mu-law (paper, appendix B)."""
    flat = values.reshape(len(values), -1)
    if flat.dtype.kind in "iu":
        return (flat + OBSERVATIONS).astype(np.uint16)
    wide = flat.astype(np.float32).astype(np.float64)
    return uniform(np.sign(wide) * (np.log(np.abs(wide) * MU + 1.0) / np.log(M * MU + 1.0)), OBSERVATIONS)


def action_tokens(values: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    if values.dtype.kind in "iu":
        return (values.reshape(len(values), -1) + ACTIONS).astype(np.uint16)
    wide = values.astype(np.float32).astype(np.float64)
    if (low != -1.0).any() or (high != 1.0).any():
        wide = 2.0 * (wide - low) / (high - low) - 1.0
    return uniform(wide, ACTIONS)


def members_of(episode: Episode, text: Text, bounds: tuple[np.ndarray, np.ndarray]) -> dict[str, np.ndarray]:
    """What a sample holds of an episode, in the order of the tar."""
    T = len(episode.reward)
    tokens = [text.tokens(episode.texts)] if text.length else []
    tokens += map(observation_tokens, episode.numbers)
    patches = [patches_of(frames) for frames in episode.pictures]
    members = {"patches": patches[0] if len(patches) == 1 else np.concatenate(patches, axis=1)} if patches else {}
    if (action := episode.action) is not None:
        tokens.append(action_tokens(action, *bounds))
        members["reward"] = episode.reward.astype(np.float32)
        real = [one.reshape(T, -1).astype(np.float32) for one in episode.numbers if one.dtype.kind == "f"]
        if real:
            members["observation"] = real[0] if len(real) == 1 else np.concatenate(real, axis=1)
        if action.dtype.kind == "f":
            members["action"] = action.astype(np.float32)
    return {"tokens": np.concatenate(tokens, axis=1)} | members


def write(task: TaskSpec, folder: Path, episodes: Iterable[Episode], count: int, T: int) -> None:
    """`count` episodes of T timesteps each as a dataset without dataset.json."""
    text = Text(task)
    bounds = (np.array(task.action.low), np.array(task.action.high)) if task.action else (np.empty(0), np.empty(0))
    key = task.name.replace(".", "_")
    rows: list[dict] = []
    shards: list[dict] = []
    stream, left = iter(episodes), 0
    first = next(stream)
    for size in shard_sizes(members_of(first, text, bounds), count, T):
        name = f"shard-{len(shards):06d}.tar"
        with atomic_write(folder / name) as file:
            tar = Tar(file)
            for number in range(left, left + size):
                episode = first if number == 0 else next(stream)
                rows.append(add(tar, f"{key}-{number:07d}-0000000", task.name, number, episode, text, bounds))
                rows[-1] |= {"shard": len(shards)}
            tar.write(bytes(2 * tarfile.BLOCKSIZE))
        left += size
        shards.append({"name": name, "bytes": tar.at, "sha256": tar.digest.hexdigest()})
        shards[-1] |= {"samples": size, "timesteps": size * T}
    write_table(folder / "shards.arrow", pa.Table.from_pylist(shards, SHARD_SCHEMA))
    write_table(folder / "index.arrow", index_of(task.name, rows))
    with atomic_write(folder / "rejected.jsonl"):
        pass
    if text.length:
        with atomic_write(folder / "text.model") as file:
            file.write(DEFAULT_MODEL.read_bytes())


def shard_sizes(members: dict[str, np.ndarray], count: int, T: int) -> list[int]:
    """How many episodes each shard takes: shards of one size, the largest below 64 MiB."""
    sizes = np.full(count, sum(member.nbytes for member in members.values()) + 4096.0)
    shards = max(1, math.ceil(sizes.sum() / SHARD_BYTES))
    return np.bincount(((np.cumsum(sizes) - sizes / 2) / sizes.sum() * shards).astype(int)).tolist()


def add(
    tar: Tar, key: str, task: str, number: int, episode: Episode, text: Text, bounds: tuple[np.ndarray, np.ndarray]
) -> dict:
    """Append an episode; its row of the index."""
    T, places = len(episode.reward), {}
    members = members_of(episode, text, bounds)
    for name in MEMBERS:
        places |= {f"{name}_offset": -1, f"{name}_bytes": 0}
        if name in members:
            array, head = members[name], io.BytesIO()
            np.lib.format.write_array_header_1_0(head, np.lib.format.header_data_from_array_1_0(array))
            at = tar.add(f"{key}.{name}.npy", head.getvalue(), memoryview(array.reshape(-1).view(np.uint8)))
            places |= {f"{name}_offset": at, f"{name}_bytes": array.nbytes}
    meta = {"task": task, "episode": number, "start": 0, "timesteps": T, "episode_timesteps": T}
    meta["episode_return"] = float(episode.reward.astype(np.float32).sum(dtype=np.float64))
    meta |= {"terminated": episode.terminated, "truncated": episode.truncated}
    meta |= {"file": episode.file, "position": episode.position, "row": episode.row}
    tar.add(f"{key}.meta.json", json.dumps(meta, sort_keys=True).encode(), memoryview(b""))
    return meta | places


def index_of(task: str, rows: list[dict]) -> pa.Table:
    """Training before held out, with running sums within each."""
    places = [f"{task}/{row['file']}/{row['position']}".encode() for row in rows]
    marks = [int.from_bytes(hashlib.sha256(place).digest()[:8], "big") for place in places]
    limit = max(HELD_OUT * 2**64, min(marks) + 1)
    for row, mark in zip(rows, marks):
        row |= {"task": 0, "held_out": mark < limit}
    ordered = sorted(rows, key=lambda row: row["held_out"])
    sums = {True: (0, 0), False: (0, 0)}
    for row in ordered:
        episodes, timesteps = sums[row["held_out"]]
        row["split_episode"], row["split_stop"] = episodes, timesteps + row["timesteps"]
        sums[row["held_out"]] = episodes + 1, row["split_stop"]
    return pa.Table.from_pylist(ordered, INDEX_SCHEMA)


def write_table(path: Path, table: pa.Table) -> None:
    with atomic_write(path) as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)


def against_loop(name: str, folder: Path, source: str, place: Path, read: Reader, count: int, T: int) -> None:
    """Print the speed of the build of `place`, `count` episodes of T timesteps, against that of two loops on one core:
    one that makes the same bytes, and one that only reads, and writes bytes that were made before. No build reaches
    the second: where logs are neither packed nor coded, it is a copy of memory."""
    outputs = [folder / one for one in ("built", "looped", "copied")]

    def build() -> None:
        build_once(source, place, outputs[0])

    build()
    task = load_manifest(outputs[0]).tasks[0].spec
    loop = partial(write, task, outputs[1])
    contents = {path.name: path.read_bytes() for path in outputs[0].iterdir() if path.is_file()}
    loop(read(place), count, T)
    require_equal(outputs[1], contents)

    def copy() -> None:
        for _ in read(place):
            pass
        for file, data in contents.items():
            with atomic_write(outputs[2] / file) as out:
                out.write(data)

    def clear() -> None:
        for path in outputs:
            shutil.rmtree(path, ignore_errors=True)

    clear()
    with one_core():
        built, looped, copied = best_times([build, lambda: loop(read(place), count, T), copy], REPEATS, clear)
    ratios(f"etl: {name} build / loop that makes the same bytes", built, looped, "timesteps/s", count * T)
    what = "loop that reads, and writes bytes made before"
    ratios(f"etl: {name} build / {what}", built, copied, "timesteps/s", count * T)


def require_equal(folder: Path, contents: dict[str, bytes]) -> None:
    """ValueError unless the loop wrote the build's bytes; `contents`: the build's."""
    made = {path.name for path in folder.iterdir()}
    for name in sorted(made | set(contents) - set(ABOUT)):
        data = (folder / name).read_bytes() if name in made else b""
        if hashlib.sha256(data).digest() != hashlib.sha256(contents.get(name, b"")).digest():
            raise ValueError(f"{folder / name}: not the bytes that the build wrote")
