"""Small whole logs of each source, written by the real writers: what the fuzzer starts from.

SEEDS: source -> functions that write one seed each into an empty folder

Invariant: every seed reads without a rejection; a new source is fuzzed from when it has an entry here.
"""

from __future__ import annotations

import gzip
import json
import os
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet
from gymnasium import spaces

from etl.sources.atari.writer import ReplayWriter
from etl.sources.d4rl.writer import D4RLWriter
from simulators import environment
from tests.fuzz.mutate import Tree


def trees(source: str) -> list[Tree]:
    """The seeds of a source, in memory."""
    found: list[Tree] = []
    for write in SEEDS[source]:
        with TemporaryDirectory() as name:
            write(Path(name))
            files = sorted(path for path in Path(name).rglob("*") if path.is_file())
            found.append({path.relative_to(name).as_posix(): path.read_bytes() for path in files})
    return found


def recorded_d4rl(folder: Path) -> None:
    rng = np.random.default_rng(0)
    log = D4RLWriter(folder / "log.hdf5", environment("Hopper-v4"), "fuzz")
    for row in range(24):
        values = {
            "observations": rng.normal(size=3),
            "actions": rng.uniform(-1, 1, 2),
            "infos/qpos": rng.normal(size=2),
        }
        flags = {"rewards": np.float32(row), "terminals": row == 9, "timeouts": row == 16}
        log.add({key: value.astype(np.float32) for key, value in values.items()} | flags)
    log.close()


def old_d4rl(folder: Path) -> None:
    """A file of v0: contiguous float64, no timeouts, columns (N, 1)."""
    rng = np.random.default_rng(0)
    with h5py.File(folder / "hopper_medium-v2.hdf5", "w") as file:
        file["observations"], file["actions"] = rng.normal(size=(12, 4)), rng.uniform(-1, 1, (12, 2))
        file["rewards"], file["terminals"] = np.ones((12, 1)), np.eye(12, 1, -5)


def maze_d4rl(folder: Path) -> None:
    """The newest file format, small chunks with filters, a goal beside the observations."""
    rng = np.random.default_rng(0)
    with h5py.File(folder / "maze.h5", "w", libver="latest") as file:
        for key in ("observations", "actions", "infos/goal"):
            packed = {"chunks": (8, 2), "compression": "gzip", "shuffle": True, "fletcher32": True}
            file.create_dataset(key, data=rng.uniform(-1, 1, (30, 2)).astype(np.float32), **packed)
        file.create_dataset("rewards", data=np.zeros(30, np.float32), chunks=(8,), maxshape=(None,))
        file["terminals"], file["timeouts"] = np.zeros(30, bool), np.arange(30) % 10 == 9
        file.attrs["env_id"] = b"PointMaze_UMaze-v3"


def recorded_atari(folder: Path) -> None:
    log = ReplayWriter(folder / "Pong" / "1" / "replay_logs")
    for row in range(8):
        frame = np.full((84, 84), row, np.uint8)
        log.add({"observation": frame, "action": row % 6, "reward": row % 3 - 1, "terminal": row == 4})
    log.close()


def coloured_atari(folder: Path) -> None:
    """Two checkpoints of RGB frames, with padding rows and one stale row."""
    rng = np.random.default_rng(0)
    run = folder / "Breakout" / "2" / "replay_logs"
    run.mkdir(parents=True)
    written = np.arange(10) > 2
    frames = rng.integers(0, 255, (10, 16, 20, 3), dtype=np.uint8) * written[:, None, None, None]
    arrays = {"observation": frames, "action": (np.arange(10) % 4 * written).astype(np.int32)}
    arrays |= {"reward": np.zeros(10, np.float32), "terminal": np.arange(10) == 5}
    small = {"add_count": np.array(19), "invalid_range": np.arange(8, 13) % 10}
    for name, array in (small | {f"$store$_{key}": array for key, array in arrays.items()}).items():
        for number in (0, 12):
            with gzip.GzipFile(run / f"{name}_ckpt.{number}.gz", "wb", mtime=0) as file:
                np.save(file, np.asarray(array), allow_pickle=False)


def minari(observation: spaces.Space, action: spaces.Space, folder: Path) -> None:
    """Two short episodes of samples of the spaces, written by Minari."""
    from minari import create_dataset_from_buffers
    from minari.data_collector import EpisodeBuffer

    def columns(space: spaces.Space, values: list) -> Any:
        if isinstance(space, spaces.Dict):
            return {key: columns(sub, [v[key] for v in values]) for key, sub in space.spaces.items()}
        if isinstance(space, spaces.Tuple):
            return tuple(columns(sub, [v[i] for v in values]) for i, sub in enumerate(space.spaces))
        return values

    observation.seed(0), action.seed(0)
    buffers = []
    for steps in (4, 3):
        seen, played = [observation.sample() for _ in range(steps + 1)], [action.sample() for _ in range(steps)]
        ends, never = [False] * (steps - 1) + [True], [False] * steps
        arrays = (columns(observation, seen), columns(action, played), [0.5] * steps, ends, never)
        buffers.append(EpisodeBuffer(None, None, None, *arrays, infos={}))
    os.environ["MINARI_DATASETS_PATH"] = str(folder)
    with warnings.catch_warnings(action="ignore"):
        create_dataset_from_buffers("own/data-v0", buffers, observation_space=observation, action_space=action)
    del os.environ["MINARI_DATASETS_PATH"]


def lines_text(folder: Path) -> None:
    lines = [{"text": "A first document.", "id": 1}, {"text": "A second, é 日本 🙂", "meta": {"a": [1]}}, {"text": "x"}]
    (folder / "lines.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")


def mixed_text(folder: Path) -> None:
    (folder / "plain.txt").write_text("One paragraph\nof two lines.\n\nAnother.\r\n\r\n\n  Third é\n")
    (folder / "lines.jsonl").write_text('{"text": "short"}\n\n{"text": "shorter"}')
    table = pa.table({"id": [1, 2, 3, 4], "text": ["One.", "Two, é", "Three 🙂", "Four"]})
    pyarrow.parquet.write_table(table, folder / "table.parquet", row_group_size=3)


_PARTS = {"place": spaces.Box(-5, 5, (2, 2), np.float64), "level": spaces.Discrete(5, start=2), "say": spaces.Text(8)}
_NESTED = spaces.Dict(_PARTS | {"pair": spaces.Tuple((spaces.MultiDiscrete([3, 4]), spaces.MultiBinary(3)))})
_SEEING = spaces.Dict({"frame": spaces.Box(0, 255, (32, 32, 3), np.uint8)})
_SYMBOLS = {"direction": spaces.Discrete(4), "image": spaces.Box(0, 2, (7, 7, 3), np.uint8), "mission": spaces.Text(9)}

SEEDS: dict[str, list[Callable[[Path], None]]] = {
    "d4rl": [recorded_d4rl, old_d4rl, maze_d4rl],
    "atari": [recorded_atari, coloured_atari],
    "babyai": [partial(minari, spaces.Dict(_SYMBOLS), spaces.Discrete(7))],
    "minari": [
        partial(minari, spaces.Box(-np.inf, np.inf, (3,)), spaces.Box(-1, 1, (2,))),
        partial(minari, _NESTED, spaces.MultiDiscrete([3, 2])),
        partial(minari, _SEEING, spaces.Discrete(4)),
    ],
    "text": [lines_text, mixed_text],
}
