"""JAT's Parquet files (huggingface.co/datasets/jat-project/jat-dataset): a folder is one task, a row is one episode.

continuous_observations list<list<float>>, discrete_observations list<list<int64>>, text_observations list<string>,
image_observations list<struct<bytes, path>> (84 x 84 x 4: a stack of four grey frames, the newest last)
continuous_actions list<list<float>> or discrete_actions list<int64>; rewards list<float>
    -> `observation`, `discrete`, `text`, `frame`; T rows each, the observation after the last action is not stored

The rows of test-*.parquet are held out. `scan` reads actions, rewards and discrete observations; `read` a row at a
time. How an episode ended is not stored: each counts as a whole one.

Invariant: memory is that of a row and its pages, whatever the size of a row group.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet

from etl.sources import EpisodeRef, _pictures
from etl.sources._arrays import ArraySource, Column, Log, StoredEpisode, damage
from etl.sources._hdf5 import AGAIN
from etl.sources._recognition import MARK, Recognition, below, files_below, first_with, parquet_schema
from schemas.episode import EpisodeError
from simulators.registry import environment

OBSERVATIONS = {
    "continuous_observations": "observation",
    "discrete_observations": "discrete",
    "image_observations": "frame",
    "text_observations": "text",
}
ACTIONS = ("continuous_actions", "discrete_actions")
REWARDS = "rewards"
HELD_OUT = ("test", "validation")
BUFFER = 2**20
TEXT_BYTES = 4096
ROW_BYTES = 2**31
STACK = 4
_SHARD = re.compile(r"(.+?)-\d{5}-of-\d{5}(?:-[0-9a-f]+)?")
MUJOCO = {  # huggingface/jat, jat/eval/rl/core.py
    "ant": "Ant-v4",
    "doublependulum": "InvertedDoublePendulum-v4",
    "halfcheetah": "HalfCheetah-v4",
    "hopper": "Hopper-v4",
    "humanoid": "Humanoid-v4",
    "pendulum": "InvertedPendulum-v4",
    "pusher": "Pusher-v4",
    "reacher": "Reacher-v4",
    "standup": "HumanoidStandup-v4",
    "swimmer": "Swimmer-v4",
    "walker": "Walker2d-v4",
}


class JAT(ArraySource):
    """Source of JAT's Parquet files."""

    name = "jat"
    suffixes = (".parquet",)
    what = ".parquet file"
    hub = "jat-project/jat-dataset/mujoco-ant"
    listed = tuple(f"jat-project/jat-dataset/mujoco-{name}" for name in MUJOCO)
    fetch = "download a folder of the hub's dataset jat-project/jat-dataset, such as mujoco-ant"

    def recognise(self, input: Path) -> Recognition | None:
        """By the columns."""
        for path in first_with(files_below(input), *self.suffixes):
            names = set(schema.names) if (schema := parquet_schema(path)) else set()
            if REWARDS in names and names & set(ACTIONS) and names & set(OBSERVATIONS):
                return Recognition(f"{below(input, path)} has columns {', '.join(sorted(names)[:4])}", MARK)
        return None

    def tasks(self, files: list[Path]) -> dict[str, list[Path]]:
        """A task per folder of shards (train-00000-of-00003.parquet); a file of another name is one of its own."""
        named: dict[str, list[Path]] = {}
        for path in sorted(map(Path, files)):
            named.setdefault(path.parent.name if _split(path) else path.stem, []).append(path)
        return dict(sorted(named.items()))

    def open(self, place: str) -> Log:
        return _Rows(Path(place))


SOURCE = JAT()


class _Rows(Log):
    """One file."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self.file = pa.parquet.ParquetFile(path, pre_buffer=False, buffer_size=BUFFER)
        except FileNotFoundError as error:
            raise EpisodeError("missing file", f"{path.name} is no file; {AGAIN}") from error
        except (OSError, pa.ArrowException, ValueError) as error:
            why = " ".join(str(error).split())[:200]
            raise EpisodeError("corrupt Parquet", f"{path.name}: {why}; {AGAIN}") from error
        names = self.file.schema_arrow.names
        self.action = next((name for name in ACTIONS if name in names), "")
        self.seen = [name for name in OBSERVATIONS if name in names]
        if not self.action or not self.seen or REWARDS not in names:
            self.close()
            raise EpisodeError("missing key", f"no columns of actions, observations and {REWARDS} in it, there are "
                               f"{', '.join(names[:8])}; texts and captions are sources of their own")  # fmt: skip
        self.count = self.file.metadata.num_rows
        if (_split(path) or "").startswith(HELD_OUT):
            self.held_out = dict.fromkeys(range(self.count), True)
        self.environment = None
        domain, _, task = path.parent.name.partition("-")
        if domain == "mujoco" and task in MUJOCO:
            self.environment = environment(MUJOCO[task])

    def scan(self) -> Iterator[tuple[int, StoredEpisode | EpisodeError]]:
        """Rows, with pictures, texts and real-valued observations only up to the first that is whole."""
        light = [
            name for name in ("discrete_observations", self.action, REWARDS) if name in self.file.schema_arrow.names
        ]
        first = 0
        for row, found in self._rows(0, None):
            yield row, found
            first = row + 1
            if not isinstance(found, EpisodeError):
                break
        yield from self._rows(first, light)

    def read(self, refs: list[EpisodeRef]) -> Iterator[StoredEpisode | EpisodeError]:
        """In their order, out of what is read forwards: begun again where a ref lies before what was read."""
        rows: Iterator[tuple[int, StoredEpisode | EpisodeError]] = iter(())
        at = -1
        for ref in refs:
            if at < 0 or ref.position < at:
                rows, at = self._rows(ref.position, None), ref.position
            found: StoredEpisode | EpisodeError = EpisodeError("empty", f"no row {ref.position} in it; {AGAIN}")
            for position, one in rows:
                at = position + 1
                if position == ref.position:
                    found = one
                    break
            yield found

    def close(self) -> None:
        if hasattr(self, "file"):
            self.file.close()

    def _rows(self, start: int, columns: list[str] | None) -> Iterator[tuple[int, StoredEpisode | EpisodeError]]:
        """Rows from `start` on; a page that cannot be read is an error of its row and of all that follow in it."""
        first = 0
        wanted = columns or [*self.seen, self.action, REWARDS]
        for group in range(self.file.num_row_groups):
            last = first + self.file.metadata.row_group(group).num_rows
            row = first
            if last > start:
                try:
                    for batch in self.file.iter_batches(1, row_groups=[group], columns=wanted):
                        if row >= start and len(batch):
                            yield row, self._tried_row(batch)
                        row += len(batch)
                except (OSError, pa.ArrowException, ValueError) as error:
                    why = " ".join(str(error).split())[:200]
                    wrong = EpisodeError("corrupt Parquet", f"{self.path.name}: {why}; {AGAIN}")
                    yield from ((n, wrong) for n in range(max(row, start), last))
            first = last

    def _tried_row(self, batch: pa.RecordBatch) -> StoredEpisode | EpisodeError:
        try:
            with damage():
                return self._row(batch)
        except EpisodeError as error:
            return error
        except pa.ArrowException as error:
            return EpisodeError("corrupt Parquet", f"{' '.join(str(error).split())[:200]}; {AGAIN}")

    def _row(self, batch: pa.RecordBatch) -> StoredEpisode:
        if batch.nbytes > ROW_BYTES:
            raise EpisodeError("too large", f"a row of {batch.nbytes} bytes; record shorter episodes")
        given = {name: _inner(batch.column(name), name) for name in batch.schema.names}
        reward = _numbers(given.pop(REWARDS), REWARDS)
        action = _numbers(given.pop(self.action), self.action)
        T = len(reward)
        observation: dict[str, Column] = {}
        for name, values in given.items():
            key = OBSERVATIONS[name]
            if len(values) != T:
                raise EpisodeError("wrong length", f"'{name}' has {len(values)} timesteps, '{REWARDS}' {T}; {AGAIN}")
            if name == "image_observations":
                observation[key] = _Pictures(values, name)
            elif name == "text_observations":
                observation[key] = _texts(values, name)
            else:
                observation[key] = _numbers(values, name)
        if len(action) != T:
            raise EpisodeError("wrong length", f"'{self.action}' has {len(action)} timesteps, '{REWARDS}' {T}; {AGAIN}")
        return StoredEpisode(T, observation, action, reward, False, True)


class _Pictures:
    """Coded pictures of one episode: of a stack of grey frames the newest."""

    def __init__(self, values: pa.Array, name: str):
        codes = values.field("bytes") if pa.types.is_struct(values.type) else values
        if not (pa.types.is_binary(codes.type) or pa.types.is_large_binary(codes.type)):
            raise EpisodeError("wrong dtype", f"'{name}' is {str(values.type)[:80]}, expected coded pictures; {AGAIN}")
        if codes.null_count:
            raise EpisodeError("missing key", f"'{name}' names files in place of pictures; store their bytes")
        self.codes, self.name = codes, name
        self.picture = _pictures.size_of(codes[0].as_py(), name) if len(codes) else (1, 1, 1)
        self.stacked = self.picture[2] == STACK
        self.shape = (len(codes), *self.picture[:2], 1 if self.stacked else self.picture[2])
        self.dtype = np.dtype(np.uint8)

    def __getitem__(self, rows: slice, /) -> np.ndarray:
        codes, newest = self.codes[rows], slice(-1, None) if self.stacked else slice(None)
        return _pictures.decode_all((code.as_py() for code in codes), len(codes), self.name, self.picture, newest)


def _inner(column: pa.Array, name: str) -> pa.Array:
    """The timesteps of a row's list."""
    if not _is_list(column.type) or column.null_count:
        raise EpisodeError("wrong dtype", f"'{name}' is {str(column.type)[:80]}, expected a list a row; {AGAIN}")
    return column.flatten()


def _numbers(values: pa.Array, name: str) -> np.ndarray:
    """(T, ...) of lists of lists of numbers."""
    shape = [len(values)]
    while _is_list(values.type):
        widths = pc.list_value_length(values)
        if values.null_count or (len(values) and pc.min(widths) != pc.max(widths)):
            raise EpisodeError("wrong shape", f"'{name}' has timesteps of unequal sizes; {AGAIN}")
        shape.append(widths[0].as_py() if len(values) else 0)
        values = values.flatten()
    kind = values.type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)) or values.null_count:
        raise EpisodeError("wrong dtype", f"'{name}' holds {str(kind)[:40]}, expected numbers; {AGAIN}")
    return values.to_numpy(zero_copy_only=False).reshape(shape)


def _texts(values: pa.Array, name: str) -> np.ndarray:
    if not (pa.types.is_string(values.type) or pa.types.is_large_string(values.type)) or values.null_count:
        raise EpisodeError("wrong dtype", f"'{name}' holds {str(values.type)[:40]}, expected strings; {AGAIN}")
    if len(values) and pc.max(pc.binary_length(values)).as_py() > TEXT_BYTES:
        raise EpisodeError("too large", f"'{name}' holds a text of more than {TEXT_BYTES} bytes")
    return np.array(values.to_pylist(), np.str_)


def _is_list(kind: Any) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _split(path: Path) -> str | None:
    """train of train-00000-of-00003.parquet."""
    match = _SHARD.fullmatch(path.stem)
    return match[1] if match else None
