"""A LeRobotDataset's folder `meta`, v2.0 to v3.0, in one form.

info.json (+ tasks, episodes, stats as .jsonl or Parquet) -> Dataset: features, instructions, where each video lies

v2.0   meta/{tasks,episodes}.jsonl, stats.json            a Parquet file and a video per episode and camera
v2.1   meta/{tasks,episodes,episodes_stats}.jsonl         the same
v3.0   meta/tasks.parquet, meta/episodes/**, stats.json   many episodes per file; a table says where each begins

Invariant: nothing that a file says leads out of the dataset's folder; unknown keys are ignored, and what is missing
but not needed is None.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from etl.sources._recognition import all_files_below, read_json, require_file
from schemas.episode import EpisodeError

INFO = "meta/info.json"
VERSIONS = ("v2.0", "v2.1", "v3.0")
AGAIN = "download or record the dataset again"
BOOKKEEPING = {"timestamp", "frame_index", "episode_index", "index", "task_index", "task"}
META_BYTES = 2**28
DAMAGE: tuple[type[Exception], ...] = (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError)
DAMAGE += (pa.ArrowException, RecursionError, MemoryError, StopIteration)
_VIDEO = {
    "v2": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
    "v3": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
}


def tables(folder: Path) -> list[Path]:
    """The Parquet files below a folder, without hidden ones (a Mac leaves a "._" beside each file)."""
    return sorted(path for path in all_files_below(folder) if path.suffix == ".parquet")


@dataclass(frozen=True)
class Feature:
    """One column or video. `dtype` as in info.json; `shape` of one frame, pictures as (height, width, channels)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    depth: bool = False

    @property
    def picture(self) -> bool:
        return self.dtype in ("image", "video")

    @property
    def key(self) -> str:
        """The field's: 'images/front' of observation.images.front."""
        return self.name.removeprefix("observation.").replace(".", "/")


@dataclass(frozen=True)
class Clip:
    """Place of an episode in a video: its frame at `timestamp` is shown at `start` + timestamp seconds."""

    path: Path
    start: float


@dataclass(frozen=True)
class Dataset:
    """A dataset whose info.json was read and makes sense."""

    root: Path
    version: str
    fps: float
    features: dict[str, Feature]
    video_path: str
    chunks_size: int
    total_episodes: int | None
    about: dict[str, Any] = field(repr=False)

    @cached_property
    def instructions(self) -> dict[int, str]:
        """Task string by task_index. EpisodeError where the file cannot be read."""
        path = self.root / "meta/tasks.parquet"
        if self.version != "v3.0" and not path.is_file():
            path = path.with_suffix(".jsonl")
        with damage(path):
            if path.suffix == ".parquet":
                table = pa.parquet.read_table(path)
                names = [name for name in table.column_names if name != "task_index"]
                column = "task" if "task" in names else names[0]  # pandas' index, under whatever name
                return dict(zip(table["task_index"].to_pylist(), map(str, table[column].to_pylist())))
            lines = list(json_lines(path))
            return {int(line["task_index"]): str(line["task"]) for line in lines}

    @cached_property
    def lengths(self) -> dict[int, int]:
        """Frames by episode_index, as meta has them. EpisodeError where the file cannot be read."""
        if self.version == "v3.0":
            with damage(self.root / "meta/episodes"):
                return {n: int(row["length"]) for n, row in self._episodes.items()}
        path = self.root / "meta/episodes.jsonl"
        with damage(path):
            return {int(line["episode_index"]): int(line["length"]) for line in json_lines(path)}

    def clip(self, camera: str, episode: int) -> Clip:
        """The video of an episode. EpisodeError where meta does not say where it lies, or out of the folder."""
        if self.version == "v3.0":
            row, at = self._episodes.get(episode), f"videos/{camera}"
            if row is None or row.get(f"{at}/file_index") is None:
                raise EpisodeError("missing key", f"meta/episodes has no '{at}' of episode {episode}; {AGAIN}")
            with damage(self.root / "meta/episodes"):
                indices = {"chunk_index": int(row[f"{at}/chunk_index"]), "file_index": int(row[f"{at}/file_index"])}
                start = float(row[f"{at}/from_timestamp"])
        else:
            indices, start = {"episode_chunk": episode // self.chunks_size, "episode_index": episode}, 0.0
        with damage(self.root / INFO):
            name = self.video_path.format(video_key=camera, **indices)
        path = Path(os.path.normpath(self.root / name))
        if not path.is_relative_to(self.root):
            raise EpisodeError("corrupt metadata", f"video_path '{name}' leads out of the dataset; {AGAIN}")
        return Clip(path, start)

    def span(self, features: list[str]) -> tuple[np.ndarray, np.ndarray] | None:
        """Lowest and highest value of each element of some columns one after the other, (N,) float64 each, by the
        dataset's statistics; None where it has none that make sense."""
        try:
            spans = [self._span(name) for name in features]
        except DAMAGE:
            return None
        low, high = (np.concatenate(bounds) for bounds in zip(*spans))
        return (low, high) if np.isfinite([low, high]).all() and (low <= high).all() else None

    def meta_files(self) -> list[Path]:
        """Every file of meta that the episodes depend on."""
        names = ("info.json", "tasks.parquet", "tasks.jsonl", "episodes.jsonl")
        meta = self.root / "meta"
        return [meta / name for name in names if (meta / name).is_file()] + tables(meta / "episodes")

    def _span(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        rows = self._stats
        low = np.min([np.ravel(np.array(row[name]["min"], np.float64)) for row in rows], axis=0)
        high = np.max([np.ravel(np.array(row[name]["max"], np.float64)) for row in rows], axis=0)
        size = math.prod(self.features[name].shape)
        if low.shape != (size,) or high.shape != (size,):
            raise ValueError(f"statistics of '{name}' do not fit its shape")
        return low, high

    @cached_property
    def _stats(self) -> list[dict[str, Any]]:
        """Statistics of all episodes together, or one entry each."""
        path = self.root / "meta/stats.json"
        if path.is_file():
            return [_json(path)]
        return [line["stats"] for line in json_lines(path.with_name("episodes_stats.jsonl"))]

    @cached_property
    def _episodes(self) -> dict[int, dict[str, Any]]:
        """v3.0's table without its statistics, by episode_index."""
        found: dict[int, dict[str, Any]] = {}
        cameras = [name for name, feature in self.features.items() if feature.dtype == "video"]
        wanted = {"episode_index", "length"} | {
            f"videos/{camera}/{part}" for camera in cameras for part in ("chunk_index", "file_index", "from_timestamp")
        }
        for path in tables(self.root / "meta/episodes"):
            with damage(path):
                names = pa.parquet.read_schema(path).names
                table = pa.parquet.read_table(path, columns=[name for name in names if name in wanted])
                for row in table.to_pylist():
                    found[int(row["episode_index"])] = row
        return found


@contextmanager
def damage(path: Path, reason: str = "corrupt metadata") -> Iterator[None]:
    """Turns what libraries raise for damaged bytes into an EpisodeError of that reason, naming the file."""
    try:
        yield
    except EpisodeError:
        raise
    except FileNotFoundError as error:
        raise EpisodeError("missing file", f"{path.name} is not there; {AGAIN}") from error
    except DAMAGE as error:
        why = f"no '{error.args[0]}'" if isinstance(error, KeyError) else " ".join(str(error).split())[:160]
        raise EpisodeError(reason, f"{path.name} cannot be read ({why or type(error).__name__}); {AGAIN}") from error


def load(root: Path) -> Dataset:
    """The dataset in a folder, read once per change of a file of meta. EpisodeError says what is wrong with it."""
    path = root / INFO
    with damage(path):
        status = path.stat()
        tables = tuple(sorted((str(p), p.stat().st_mtime_ns) for p in path.parent.rglob("*")))
    return _load(root, status.st_mtime_ns, tables)


@lru_cache(maxsize=8)
def _load(root: Path, changed: int, tables: tuple) -> Dataset:
    path = root / INFO
    with damage(path):
        about = _json(path)
        version = str(about.get("codebase_version"))[:80]
        if version not in VERSIONS:
            remedy = "convert it with lerobot's own scripts" if version < VERSIONS[0] else "a newer Gato may read it"
            raise EpisodeError(
                "unknown version", f"codebase_version is {version}; {', '.join(VERSIONS)} are read: {remedy}"
            )
        features = {name: _feature(name, one) for name, one in about["features"].items()}
        fps, total = float(about.get("fps") or 0), about.get("total_episodes")
        video_path = about.get("video_path") or _VIDEO[version[:2]]
        chunks_size = int(about.get("chunks_size") or 1000)
        if not (0 < fps < math.inf and chunks_size > 0 and isinstance(video_path, str)):
            raise ValueError(f"fps {fps}, chunks_size {chunks_size}")
    total = total if isinstance(total, int) else None
    return Dataset(root, version, fps, features, video_path, chunks_size, total, about)


def _feature(name: str, about: dict[str, Any]) -> Feature:
    dtype, shape = str(about["dtype"]), tuple(int(side) for side in about["shape"])
    if len(shape) > 8 or any(side < 1 for side in shape):
        raise ValueError(f"feature '{name}' of shape {shape}")
    info = about.get("info") or about.get("video_info") or {}
    depth = bool(info.get("video.is_depth_map")) or bool(info.get("is_depth_map"))
    if dtype in ("image", "video"):
        names = about.get("names")
        # the files hold height, width, channels in any case
        first = isinstance(names, list) and len(names) == 3 and str(names[0]).startswith("channel")
        if first or (len(shape) == 3 and not isinstance(names, list) and shape[0] in (1, 3, 4) and shape[2] > 4):
            shape = (*shape[1:], shape[0])
        if len(shape) == 2:
            shape = (*shape, 1)
    return Feature(name, dtype, () if shape == (1,) else shape, depth)


def json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a .jsonl file, one at a time."""
    require_file(path)
    with open(path, encoding="utf-8") as file:
        while line := file.readline(META_BYTES):
            if line.strip():
                yield json.loads(line)


def _json(path: Path) -> dict[str, Any]:
    value = read_json(path, META_BYTES)
    if not isinstance(value, dict):
        raise ValueError("no object")
    return value
