"""A dataset on disk: the manifest (`dataset.json`) and the index (`index.arrow`).

    folder/shard-000000.tar ...   plain WebDataset, one sample = one episode (or a piece of a long one)
    folder/index.arrow            one row per sample: where its members are, which episode it is; the rows of a task
                                  follow each other, training before held out, in the order of episodes
    folder/shards.arrow           one row per shard: size, sha256, counts
    folder/rejected.jsonl         one line per episode or file that could not be used
    folder/text.model             the SentencePiece model, if a task holds text
    folder/dataset.json           written last; without it there is no dataset

Invariant: the manifest names size and sha256 of every other file (of the shards through shards.arrow), so a folder is
complete exactly when its manifest says so. Nothing in it depends on the clock, the machine or the runner. The manifest
and a mapped index are enough to find any timestep: opening a dataset scans nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import TypeAdapter, ValidationError

from schemas import upgrade
from schemas.files import parse_json
from schemas.task import STRICT, TaskSpec
from schemas.vocabulary import Vocabulary

SCHEMA_VERSION = 4
MANIFEST_NAME = "dataset.json"
INDEX_NAME = "index.arrow"
SHARDS_NAME = "shards.arrow"
REJECTED_NAME = "rejected.jsonl"
TEXT_MODEL_NAME = "text.model"

MEMBERS = ("tokens", "patches", "reward", "observation", "action")

INDEX_SCHEMA = pa.schema(
    [
        pa.field("task", pa.int32()),  # ordinal in Manifest.tasks
        pa.field("shard", pa.int32()),  # row of shards.arrow
        pa.field("episode", pa.int64()),  # ordinal in the task, shared by the pieces of one episode
        pa.field("start", pa.int32()),  # first timestep of this piece in its episode
        pa.field("timesteps", pa.int32()),  # timesteps of this piece (tokens of a text document)
        pa.field("episode_timesteps", pa.int32()),
        pa.field("episode_return", pa.float64()),  # of the whole episode, as logged
        pa.field("terminated", pa.bool_()),
        pa.field("truncated", pa.bool_()),  # neither: the log's end cut the episode
        pa.field("held_out", pa.bool_()),
        pa.field("split_episode", pa.int64()),  # ordinal of the episode in its task's split (training or held out)
        pa.field("split_stop", pa.int64()),  # timesteps of the task's split up to this piece's end
        pa.field("file", pa.string()),  # source file's name
        pa.field("position", pa.int64()),  # ordinal of the episode in that file
        pa.field("row", pa.int64()),  # first row of the episode in that file
    ]
    # byte offset of each member's array data (after its .npy header) in the shard, and its bytes; -1, 0: absent
    + [pa.field(f"{member}_{what}", pa.int64()) for member in MEMBERS for what in ("offset", "bytes")]
)

SHARD_SCHEMA = pa.schema(
    [
        pa.field("name", pa.string()),
        pa.field("bytes", pa.int64()),
        pa.field("sha256", pa.string()),
        pa.field("samples", pa.int64()),
        pa.field("timesteps", pa.int64()),
    ]
)


def parse_shards(data: bytes) -> list[Shard]:
    """The rows of a shards.arrow whose hash was checked."""
    return [Shard(**row) for row in pa.ipc.open_file(pa.py_buffer(data)).read_all().to_pylist()]


class DatasetError(ValueError):
    """A dataset folder cannot be used; the message names the file and the remedy."""


@dataclass(frozen=True)
class Shard:
    """A row of shards.arrow."""

    name: str
    bytes: int
    sha256: str
    samples: int
    timesteps: int


@dataclass(frozen=True)
class SampleMeta:
    """A sample's meta.json: an episode, or a piece of it from timestep `start` on; see the index's columns."""

    __pydantic_config__ = STRICT
    task: str
    episode: int
    start: int
    timesteps: int
    episode_timesteps: int
    episode_return: float
    terminated: bool
    truncated: bool
    file: str = ""
    position: int = 0
    row: int = 0

    def to_json(self) -> bytes:
        return json.dumps(vars(self), sort_keys=True).encode()


@dataclass(frozen=True)
class FileDigest:
    __pydantic_config__ = STRICT
    name: str
    bytes: int
    sha256: str
    rows: int


@dataclass(frozen=True)
class TextModel:
    """The SentencePiece model that made the text tokens. `padding`: the id that fills a timestep's text up to its
    length and carries no loss."""

    __pydantic_config__ = STRICT
    file: FileDigest
    pieces: int
    padding: int


@dataclass(frozen=True)
class TaskSummary:
    """A task and what the dataset holds of it. Returns are raw, over complete (not cut) episodes;
    `returns` is (min, 25 %, median, 75 %, max). `filtered_episodes`: good ones that the build's filters left out.
    Rows [first_row, first_row + rows) of the index are the task's, the last `held_out_rows` of them held out."""

    __pydantic_config__ = STRICT
    spec: TaskSpec
    episodes: int
    cut_episodes: int
    held_out_episodes: int
    rejected_episodes: int
    filtered_episodes: int
    timesteps: int
    held_out_timesteps: int
    first_row: int
    rows: int
    held_out_rows: int
    tokens: int
    bytes: int
    return_mean: float | None
    return_std: float | None
    returns: tuple[float, ...] | None
    out_of_range_actions: int
    clipped_observations: int
    cut_texts: int

    def split(self, held_out: bool) -> tuple[int, int]:
        """Timesteps and episodes that are held out, or that are trained on."""
        if held_out:
            return self.held_out_timesteps, self.held_out_episodes
        return self.timesteps - self.held_out_timesteps, self.episodes - self.held_out_episodes


@dataclass(frozen=True)
class ObservationScale:
    """Mean and standard deviation of each column of a task's timestep, over all tasks that share it: 0 and 1 where
    a column holds no observation, 0 and 0 where a discrete one, whose ids may be those of continuous values."""

    __pydantic_config__ = STRICT
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class ReturnScale:
    """How a task's episode returns become the number that a model may be shown: (return - mean) / std, over all tasks
    of the environment, so that their levels stay apart; and the raw return that an agent asks for."""

    __pydantic_config__ = STRICT
    mean: float
    std: float
    target: float

    def scaled(self, episode_return: Any) -> Any:
        """Of raw returns, an array or a number."""
        return (episode_return - self.mean) / self.std


def return_scales(tasks: Sequence[TaskSummary]) -> dict[str, ReturnScale]:
    """The scale of each task by name, from the returns of the tasks that share its environment; the target is the
    upper quartile of its own. Tasks without an environment or complete episodes have none."""
    known = [task for task in tasks if task.returns and task.spec.environment]
    scales = {}
    for task in known:
        group = [other for other in known if other.spec.environment == task.spec.environment]
        means, stds = (np.array([getattr(one, name) for one in group]) for name in ("return_mean", "return_std"))
        episodes = np.array([one.episodes for one in group], np.float64)
        mean = float(np.average(means, weights=episodes))
        variance = float(np.average(stds**2 + (means - mean) ** 2, weights=episodes))
        scales[task.spec.name] = ReturnScale(mean, max(variance**0.5, 1e-6), float(task.returns[3]))  # type: ignore[index]
    return scales


@dataclass(frozen=True)
class Manifest:
    """`dataset.json`. `config` holds the build's options that shape its bytes."""

    __pydantic_config__ = STRICT
    schema: str
    schema_version: int
    name: str
    vocabulary: Vocabulary
    vocabulary_fingerprint: str
    text_model: TextModel | None
    tasks: tuple[TaskSummary, ...]
    shards: FileDigest
    index: FileDigest
    rejected: FileDigest
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def files(self) -> list[FileDigest]:
        """Every file of the dataset but the manifest itself and the shards."""
        text = [self.text_model.file] if self.text_model else []
        return [self.index, self.shards, self.rejected, *text]

    @property
    def bytes(self) -> int:
        """Of all files but the manifest."""
        return sum(file.bytes for file in self.files) + sum(task.bytes for task in self.tasks)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over everything above but the name: equal for equal content. One of an older schema keeps the
        fingerprint that it was written with, so that runs and tables that name it still agree."""
        return _fingerprint(asdict(self))

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, sort_keys=True) + "\n"


_MANIFEST: TypeAdapter[Manifest] = TypeAdapter(Manifest)


def _fingerprint(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body | {"name": ""}, sort_keys=True).encode()).hexdigest()


def load_manifest(folder: Path) -> Manifest:
    """Read and check `folder`/dataset.json. DatasetError for a folder without one, another schema
    version, an unknown key or a vocabulary that does not match its fingerprint."""
    path = Path(folder) / MANIFEST_NAME
    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        if Path(folder).is_file():
            raise DatasetError(f"{folder}: a file; give the folder of a dataset, {Path(folder).parent}") from None
        below = sorted(str(found.parent) for found in Path(folder).glob(f"*/{MANIFEST_NAME}"))
        if below:
            some = f"{', '.join(below[:3])}{', ...' if len(below) > 3 else ''}"
            raise DatasetError(f"{folder}: no dataset, but a folder of some; give {some}") from None
        raise DatasetError(
            f"{folder}: no {MANIFEST_NAME}, so no finished dataset; give a folder that python -m etl.build wrote, or "
            "run the build again to finish it"
        ) from None
    return parse_manifest(data, str(path))


def parse_manifest(data: bytes, path: str) -> Manifest:
    """The manifest in the bytes of a dataset.json, which `path` names in errors; see `load_manifest`."""
    try:
        raw = parse_json(data)
    except ValueError as error:
        raise DatasetError(f"{path}: not JSON ({error}); rebuild the dataset with python -m etl.build") from None
    if not isinstance(raw, dict) or raw.get("schema") != "gato.dataset":
        raise DatasetError(f"{path}: not a Gato dataset manifest; point at a folder that python -m etl.build wrote")
    version = raw.get("schema_version")
    if not isinstance(version, int) or not upgrade.OLDEST_SCHEMA <= version <= SCHEMA_VERSION:
        newer = isinstance(version, int) and version > SCHEMA_VERSION
        remedy = "update this package" if newer else "rebuild the dataset with python -m etl.build"
        known = f"{upgrade.OLDEST_SCHEMA} to {SCHEMA_VERSION}"
        raise DatasetError(f"{path}: schema version {version}, this package reads {known}; {remedy}")
    old = version < SCHEMA_VERSION
    try:
        manifest = _MANIFEST.validate_python(upgrade.manifest(raw, SCHEMA_VERSION) if old else raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise DatasetError(f"{path}: field '{where}': {first['msg']}; rebuild it with python -m etl.build") from None
    manifest.vocabulary.require(manifest.vocabulary_fingerprint, path)
    if old:
        vars(manifest)["fingerprint"] = _fingerprint(raw)
    return manifest
