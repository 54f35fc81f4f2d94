"""Small whole logs of each source, written by the real writers: what the fuzzer starts from.

SEEDS: source -> functions that write one seed each into an empty folder

Invariant: every seed reads without a rejection; a new source is fuzzed from when it has an entry here.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
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
from PIL import Image

from etl.sources._tfrecord import frame
from etl.sources.atari.writer import ReplayWriter
from etl.sources.d4rl.writer import D4RLWriter
from simulators import environment
from tests.etl.tfexample import written
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


def minari(observation: spaces.Space, action: spaces.Space, folder: Path, form: str = "hdf5") -> None:
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
    given: dict[str, Any] = {"observation_space": observation, "action_space": action}
    os.environ["MINARI_DATASETS_PATH"] = str(folder)
    with warnings.catch_warnings(action="ignore"):
        create_dataset_from_buffers("own/data-v0", buffers, data_format=form, **given)
    del os.environ["MINARI_DATASETS_PATH"]


def lines_text(folder: Path) -> None:
    lines = [{"text": "A first document.", "id": 1}, {"text": "A second, é 日本 🙂", "meta": {"a": [1]}}, {"text": "x"}]
    (folder / "lines.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")


def mixed_text(folder: Path) -> None:
    (folder / "plain.txt").write_text("One paragraph\nof two lines.\n\nAnother.\r\n\r\n\n  Third é\n")
    (folder / "lines.jsonl").write_text('{"text": "short"}\n\n{"text": "shorter"}')
    table = pa.table({"id": [1, 2, 3, 4], "text": ["One.", "Two, é", "Three 🙂", "Four"]})
    pyarrow.parquet.write_table(table, folder / "table.parquet", row_group_size=3)


def small_robomimic(folder: Path) -> None:
    """Two demos with a camera and an instruction, one of them held out."""
    rng = np.random.default_rng(0)
    with h5py.File(folder / "lift.hdf5", "w") as file:
        for number, T in enumerate((4, 3)):
            demo = file.create_group(f"data/demo_{number}")
            demo.attrs["num_samples"] = T
            demo["actions"], demo["rewards"] = rng.uniform(-1, 1, (T, 2)), np.ones(T)
            demo["dones"] = (np.arange(T) == T - 1).astype(np.int64)
            demo["obs/pos"] = rng.normal(size=(T, 3))
            pictures = rng.integers(0, 256, (T, 32, 32, 3), np.uint8)
            demo.create_dataset("obs/view", data=pictures, compression="gzip", chunks=(2, 32, 32, 3))
        file["data"].attrs["env_args"] = json.dumps({"env_name": "Lift", "env_kwargs": {"horizon": 10}})
        file["data"].attrs["problem_info"] = json.dumps({"language_instruction": "lift it"})
        file["mask/train"], file["mask/valid"] = np.array([b"demo_0"]), np.array([b"demo_1"])


def new_d3rlpy(folder: Path) -> None:
    rng = np.random.default_rng(0)
    with h5py.File(folder / "log.h5", "w") as file:
        for number, T in enumerate((4, 3)):
            file[f"observations_{number}_0"] = rng.normal(size=(T, 3)).astype(np.float32)
            file[f"observations_{number}_1"] = rng.normal(size=(T, 2)).astype(np.float32)
            file[f"actions_{number}"] = rng.uniform(-2, 2, (T, 1)).astype(np.float32)
            file[f"rewards_{number}"], file[f"terminated_{number}"] = np.ones((T, 1), np.float32), bool(number)
        file["num_episodes"], file["version"], file["columns"] = 2, "2.1", ["observations", "actions"]


def old_d3rlpy(folder: Path) -> None:
    rng = np.random.default_rng(0)
    with h5py.File(folder / "old.h5", "w") as file:
        file["observations"], file["actions"] = rng.normal(size=(9, 3)), rng.integers(0, 3, 9)
        file["rewards"], file["terminals"] = np.ones(9), np.arange(9) == 4
        file["episode_terminals"] = (np.arange(9) == 4) | (np.arange(9) == 8)


def small_maniskill(folder: Path) -> None:
    rng = np.random.default_rng(0)
    with h5py.File(folder / "trajectory.h5", "w") as file:
        for number, T in enumerate((4, 3)):
            group = file.create_group(f"traj_{number}")
            group["actions"], group["rewards"] = rng.uniform(-1, 1, (T, 2)).astype(np.float32), np.ones(T)
            group["terminated"], group["truncated"] = np.arange(T) == T - 1, np.zeros(T, bool)
            group["obs/agent/qpos"] = rng.normal(size=(T + 1, 3)).astype(np.float32)
            pictures = rng.integers(0, 256, (T + 1, 32, 32, 3), np.uint8)
            group.create_dataset("obs/sensor_data/base/rgb", data=pictures, compression="gzip")
    listed = [{"episode_id": number, "elapsed_steps": T} for number, T in enumerate((4, 3))]
    info = {"env_id": "PickCube-v1", "max_episode_steps": 50, "env_kwargs": {}}
    (folder / "trajectory.json").write_text(json.dumps({"env_info": info, "episodes": listed}))


def small_vintix(folder: Path) -> None:
    rng = np.random.default_rng(0)
    with h5py.File(folder / "trajectories_0000.h5", "w") as file:
        for first, last in ((0, 5), (6, 9)):
            group, rows = file.create_group(f"{first}-{last}"), last - first + 1
            group["proprio_observation"], group["action"] = rng.normal(size=(rows, 3)), rng.uniform(-1, 1, (rows, 2))
            group["reward"], group["step_num"] = np.ones(rows), np.arange(first, last + 1) % 4


def aloha(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for number in range(2):
        with h5py.File(folder / f"episode_{number}.hdf5", "w") as file:
            file["action"] = rng.normal(size=(4, 3))
            file["observations/qpos"] = rng.normal(size=(4, 3))
            codes = [_png(rng.integers(0, 256, (32, 32, 3), np.uint8)) for _ in range(4)]
            longest = max(map(len, codes))
            padded = np.stack([np.frombuffer(code.ljust(longest, b"\0"), np.uint8) for code in codes])
            file["observations/images/top"] = padded


def dreamer(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for number in range(2):
        arrays = {"image": rng.integers(0, 256, (5, 32, 32, 3), np.uint8), "action": rng.uniform(-1, 1, (5, 2))}
        arrays |= {"reward": np.ones(5), "is_first": np.arange(5) == 0, "is_last": np.arange(5) == 4}
        save = np.savez if number else np.savez_compressed
        save(folder / f"{number}.npz", **arrays)


def jat(folder: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [
        {
            "image_observations": [
                {"bytes": _png(p), "path": None} for p in rng.integers(0, 256, (T, 32, 32, 4), "u1")
            ],
            "continuous_observations": rng.normal(size=(T, 2)).tolist(),
            "discrete_actions": rng.integers(0, 3, T).tolist(),
            "rewards": rng.normal(size=T).tolist(),
        }
        for T in (4, 3, 2)
    ]
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), folder / "log.parquet", row_group_size=2)


def control_records(folder: Path) -> None:
    """Episodes of the control suite."""
    rng = np.random.default_rng(0)
    rows = []
    for number, T in enumerate((4, 3)):
        lists = {"action": rng.uniform(-1, 1, 2 * T), "reward": np.ones(T), "discount": np.ones(T)}
        lists |= {"step_type": np.array([0.0, *[1.0] * (T - 2), 2.0]), "observation/pos": rng.normal(size=3 * T)}
        rows.append(written(**lists | {"episode_id": np.array([number])}))
    (folder / "train-00000-of-00001").write_bytes(gzip.compress(b"".join(map(frame, rows)), mtime=0))


def atari_records(folder: Path) -> None:
    """Transitions of two episodes."""
    rng = np.random.default_rng(0)
    rows = []
    for number, T in ((3, 4), (5, 3)):
        codes = [_png(picture) for picture in rng.integers(0, 256, (T + 4, 32, 32), np.uint8)]
        for t in range(T):
            lists = {"o_t": codes[t : t + 4], "o_tp1": codes[t + 1 : t + 5], "r_t": np.ones(1), "d_t": np.ones(1)}
            rows.append(written(**lists | {"a_t": np.array([t % 3]), "episode_id": np.array([number])}))
    (folder / "run_1-00000-of-00001").write_bytes(gzip.compress(b"".join(map(frame, rows)), mtime=0))


def captions(folder: Path) -> None:
    rng = np.random.default_rng(0)
    with tarfile.open(folder / "00000.tar", "w") as archive:
        for number in range(3):
            about = json.dumps({"caption": f"a picture {number}"}).encode()
            for ending, data in (("png", _png(rng.integers(0, 256, (20, 30, 3), np.uint8))), ("json", about)):
                member = tarfile.TarInfo(f"{number:05d}.{ending}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))


def unpacked(archive: str, folder_name: str, folder: Path) -> None:
    """What the format's own library wrote, see tests/fixtures."""
    with tarfile.open(FIXTURES / archive) as file:
        file.extractall(folder, [m for m in file if m.name.startswith(f"{folder_name}/")], filter="data")


def _png(picture: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return file.getvalue()


def minari_tables(form: str, folder: Path) -> None:
    """A dataset of episodes in tables."""
    minari(_SEEING, spaces.Discrete(4), folder, form)


FIXTURES = Path(__file__).parents[1] / "fixtures"
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
        partial(minari_tables, "arrow"),
        partial(minari_tables, "parquet"),
    ],
    "robomimic": [small_robomimic],
    "d3rlpy": [new_d3rlpy, old_d3rlpy],
    "maniskill": [small_maniskill],
    "vintix": [small_vintix],
    "hdf5": [aloha, dreamer],
    "jat": [jat],
    "rl_unplugged": [control_records, atari_records],
    "lerobot": [partial(unpacked, "lerobot.tar.xz", "v21"), partial(unpacked, "lerobot.tar.xz", "v30")],
    "rlds": [partial(unpacked, "rlds.tar.xz", "two_cameras")],
    "imagetext": [captions],
    "text": [lines_text, mixed_text],
}
