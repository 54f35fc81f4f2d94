"""`python -m benchmarks.formats.sources`: the build of each log format against a loop that makes the same bytes.

logs in the format's own layout, made here -> build; the same files read by the lightest library -> loop.py, the same
bytes written

A reader gives every episode's arrays as they are stored, with h5py, numpy, pyarrow or Pillow. One core for each side.

Invariant: both sides of a pair read the same files and write the same files, in this run.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
import sys
import tarfile
import tempfile
import warnings
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from unittest import mock

import h5py
import minari
import numpy as np
import pyarrow as pa
import pyarrow.parquet
from gymnasium import spaces
from minari.data_collector import EpisodeBuffer
from PIL import Image

from benchmarks.formats.loop import Episode, Reader, against_loop
from etl.sources._tfrecord import Records, example, frame
from tests.etl.tfexample import written

T = 200
LONG = 1000  # timesteps of an episode of dm_control and of most of Minari's
SIDE = 64
CAMERAS = ("agentview_image", "eye_in_hand_image")
# logs without pictures, or of one timestep: a quarter as many of the others
PLAIN = ("d3rlpy", "vintix", "imagetext", "rl_unplugged")
# builds of so many take 5 to 10 s; half a second of it starts Beam and the process that tries HDF5 files
EPISODES = {"robomimic": 1000, "d3rlpy": 7000, "maniskill": 1600, "hdf5, ALOHA": 2400, "hdf5, npz": 4000}
EPISODES |= {"vintix": 12000, "jat": 2000, "imagetext": 600, "minari, Parquet": 4000, "rl_unplugged": 4000}


def pictures(rng: np.random.Generator, count: int, channels: int = 3) -> np.ndarray:
    """(count, SIDE, SIDE, channels) uint8 that pack as pictures of a simulator do."""
    small = rng.integers(0, 256, (count, SIDE // 8, SIDE // 8, channels), np.uint8)
    return small.repeat(8, axis=1).repeat(8, axis=2)


def write_robomimic(folder: Path, rng: np.random.Generator, episodes: int) -> int:
    with h5py.File(folder / "lift.hdf5", "w") as file:
        for number in range(episodes // 4):
            demo = file.create_group(f"data/demo_{number}")
            demo.attrs["num_samples"] = T
            demo["actions"], demo["rewards"] = rng.uniform(-1, 1, (T, 7)), rng.normal(size=T)
            demo["dones"], demo["obs/pos"] = (np.arange(T) == T - 1).astype(int), rng.normal(size=(T, 9))
            for name in CAMERAS:
                demo.create_dataset(f"obs/{name}", data=pictures(rng, T), compression="gzip")
        file["data"].attrs["env_args"] = json.dumps({"env_name": "Lift"})
    return episodes // 4 * T


def read_robomimic(folder: Path) -> Iterator[Episode]:
    with h5py.File(folder / "lift.hdf5") as file:
        for number in range(len(file["data"])):
            demo = file[f"data/demo_{number}"]
            frames = [demo[f"obs/{name}"][()] for name in CAMERAS]
            flags = bool(demo["dones"][()][-1]), False
            numbers = [demo["obs/pos"][()]]
            yield Episode("lift.hdf5", number, 0, demo["actions"][()], demo["rewards"][()], *flags, frames, numbers)


def write_d3rlpy(folder: Path, rng: np.random.Generator, episodes: int) -> int:
    with h5py.File(folder / "log.h5", "w") as file:
        for number in range(episodes):
            file[f"observations_{number}"] = rng.normal(size=(T, 17)).astype(np.float32)
            file[f"actions_{number}"] = rng.uniform(-1, 1, (T, 6)).astype(np.float32)
            file[f"rewards_{number}"] = rng.normal(size=(T, 1)).astype(np.float32)
            file[f"terminated_{number}"] = True
        file["num_episodes"], file["version"] = episodes, "2.1"
    return episodes * T


def read_d3rlpy(folder: Path) -> Iterator[Episode]:
    with h5py.File(folder / "log.h5") as file:
        for n in range(int(file["num_episodes"][()])):
            seen, action, reward = (file[f"{key}_{n}"][()] for key in ("observations", "actions", "rewards"))
            ended = bool(file[f"terminated_{n}"][()])
            yield Episode("log.h5", n, 0, action, reward[:, 0], ended, not ended, numbers=[seen])


def write_maniskill(folder: Path, rng: np.random.Generator, episodes: int) -> int:
    listed = []
    with h5py.File(folder / "trajectory.h5", "w") as file:
        for number in range(episodes // 4):
            group = file.create_group(f"traj_{number}")
            group["actions"], group["rewards"] = rng.uniform(-1, 1, (T, 7)).astype(np.float32), np.zeros(T, np.float32)
            group["terminated"], group["truncated"] = np.arange(T) == T - 1, np.zeros(T, bool)
            group["obs/agent/qpos"] = rng.normal(size=(T + 1, 9)).astype(np.float32)
            frames = pictures(rng, T + 1)
            group.create_dataset("obs/rgb", data=frames, compression="gzip", compression_opts=5)
            listed.append({"episode_id": number, "elapsed_steps": T})
    about = {"env_info": {"env_id": "PickCube-v1", "max_episode_steps": T}, "episodes": listed}
    (folder / "trajectory.json").write_text(json.dumps(about))
    return episodes // 4 * T


def read_maniskill(folder: Path) -> Iterator[Episode]:
    with h5py.File(folder / "trajectory.h5") as file:
        for number in range(len(file)):
            group = file[f"traj_{number}"]
            action, reward, *flags = (group[key][()] for key in ("actions", "rewards", "terminated", "truncated"))
            ends = (bool(flag[-1]) for flag in flags)
            seen = group["obs/agent/qpos"][()], group["obs/rgb"][()]  # one row more than there are actions
            yield Episode("trajectory.h5", number, 0, action, reward, *ends, [seen[1][:-1]], [seen[0][:-1]])


def write_hdf5(folder: Path, rng: np.random.Generator, episodes: int) -> int:
    for number in range(episodes // 4):
        with h5py.File(folder / f"episode_{number}.hdf5", "w") as file:
            file["action"], file["observations/qpos"] = rng.normal(size=(T, 14)), rng.normal(size=(T, 14))
            frames = pictures(rng, T)
            file.create_dataset("observations/images/top", data=frames, chunks=(1, SIDE, SIDE, 3))
    return episodes // 4 * T


def read_hdf5(folder: Path) -> Iterator[Episode]:
    for path in sorted(folder.glob("*.hdf5")):
        with h5py.File(path) as file:
            keys = ("action", "observations/qpos", "observations/images/top")
            action, joints, frames = (file[key][()] for key in keys)
        yield Episode(path.name, 0, 0, action, np.zeros(len(action)), False, True, [frames], [joints])


def write_npz(folder: Path, rng: np.random.Generator, episodes: int) -> int:
    for number in range(episodes // 4):
        arrays = {"image": pictures(rng, T + 1), "action": rng.uniform(-1, 1, (T + 1, 6)), "reward": np.zeros(T + 1)}
        flags = {"is_first": np.arange(T + 1) == 0, "is_last": np.arange(T + 1) == T}
        np.savez_compressed(folder / f"{number}.npz", **arrays, **flags)
    return episodes // 4 * T


def read_npz(folder: Path) -> Iterator[Episode]:
    for path in sorted(folder.glob("*.npz")):
        with np.load(path) as file:
            frames, action, reward, _, last = (
                file[key] for key in ("image", "action", "reward", "is_first", "is_last")
            )
        # a row's action led to its picture
        yield Episode(path.name, 0, 0, action[1:], reward[1:], False, bool(last[-1]), [frames[:-1]])


def write_vintix(folder: Path, rng: np.random.Generator, episodes: int) -> int:
    rows, each = episodes * T, 10_000
    with h5py.File(folder / "trajectories_0000.h5", "w") as file:
        for first in range(0, rows, each):
            group = file.create_group(f"{first}-{first + each - 1}")
            arrays = {"proprio_observation": rng.normal(size=(each, 27)), "action": rng.uniform(-1, 1, (each, 8))}
            arrays |= {"reward": rng.normal(size=each), "step_num": np.arange(first, first + each) % T}
            for key, values in arrays.items():
                group.create_dataset(key, data=values)
    return rows


def read_vintix(folder: Path) -> Iterator[Episode]:
    with h5py.File(folder / "trajectories_0000.h5") as file:
        names = sorted(file, key=lambda name: int(name.split("-")[0]))
        position = row = 0
        for name in names:
            keys = ("proprio_observation", "action", "reward", "step_num")
            seen, action, reward, steps = (file[name][key][()] for key in keys)
            for start, stop in pairwise([*np.flatnonzero(steps == 0).tolist(), len(steps)]):
                own, whole = slice(start, stop), name != names[-1] or stop < len(steps)  # the file cuts its last one
                place = "trajectories_0000.h5", position, row + start
                yield Episode(*place, action[own], reward[own], False, whole, numbers=[seen[own]])
                position += 1
            row += len(steps)


def write_minari(folder: Path, rng: np.random.Generator, episodes: int) -> int:
    """By Minari's own writer, as Parquet."""
    seen, allowed = spaces.Box(-np.inf, np.inf, (17,)), spaces.Box(-1, 1, (6,))
    count = episodes // 4
    buffers = [
        EpisodeBuffer(
            observations=rng.normal(size=(LONG + 1, 17)).astype(np.float32),
            actions=rng.uniform(-1, 1, (LONG, 6)).astype(np.float32),
            rewards=rng.normal(size=LONG).tolist(),
            terminations=[False] * LONG,
            truncations=[False] * (LONG - 1) + [True],
            infos={},
        )
        for _ in range(count)
    ]
    there = mock.patch.dict(os.environ, MINARI_DATASETS_PATH=str(folder))
    with there, warnings.catch_warnings(action="ignore"):  # of what a dataset should say of itself
        minari.create_dataset_from_buffers(
            "bench-v0", buffers, observation_space=seen, action_space=allowed, data_format="parquet"
        )
    return count * LONG


def read_minari(folder: Path) -> Iterator[Episode]:
    data = folder / "bench-v0/data"
    for number in range(len(list(data.glob("*/*.parquet")))):
        table = pa.parquet.read_table(data / f"{number}/part-0.parquet")
        seen, action = (table[key].combine_chunks().flatten().to_numpy() for key in ("observations", "actions"))
        rest = (table[key].to_numpy() for key in ("rewards", "terminations", "truncations"))
        reward, *flags = (values[:-1] for values in rest)  # the last row holds an observation alone
        arrays = action.reshape(LONG + 1, -1)[:-1], reward, bool(flags[0][-1]), bool(flags[1][-1])
        yield Episode(
            f"bench-v0/{number}/part-0.parquet",
            number,
            number * LONG,
            *arrays,
            numbers=[seen.reshape(LONG + 1, -1)[:-1]],
        )


def write_rl_unplugged(folder: Path, rng: np.random.Generator, episodes: int) -> int:
    with gzip.open(folder / "walker_walk-00000-of-00001", "wb", compresslevel=1) as file:
        for number in range(episodes):
            rows = {
                "observation/pose": rng.normal(size=(LONG + 1, 14)),
                "observation/speed": rng.normal(size=(LONG + 1, 9)),
            }
            rows |= {"action": rng.uniform(-1, 1, (LONG + 1, 6)), "reward": rng.uniform(size=LONG + 1)}
            rows |= {"discount": np.ones(LONG + 1), "step_type": np.array([0.0, *[1.0] * (LONG - 1), 2.0])}
            lists = {key: values.astype(np.float32).ravel() for key, values in rows.items()}
            file.write(frame(written(**lists, episode_id=[number], timestamp=[1])))
    return episodes * LONG


def read_rl_unplugged(folder: Path) -> Iterator[Episode]:
    path = folder / "walker_walk-00000-of-00001"
    for position, (_, data) in enumerate(Records(path)):
        lists = example(data)
        keys = ("observation/pose", "observation/speed", "action")
        pose, speed, action = (np.asarray(lists[key]).reshape(LONG + 1, -1)[:-1] for key in keys)
        yield Episode(path.name, position, 0, action, np.asarray(lists["reward"])[1:], False, True, [], [pose, speed])


def write_jat(folder: Path, rng: np.random.Generator, episodes: int) -> int:
    rows = [
        {
            "image_observations": [{"bytes": png(frame), "path": None} for frame in pictures(rng, T, 4)],
            "discrete_actions": rng.integers(0, 6, T).tolist(),
            "rewards": rng.normal(size=T).tolist(),
        }
        for _ in range(episodes // 4)
    ]
    pa.parquet.write_table(pa.Table.from_pylist(rows), folder / "train-00000-of-00001.parquet", row_group_size=10)
    return episodes // 4 * T


def read_jat(folder: Path) -> Iterator[Episode]:
    path = folder / "train-00000-of-00001.parquet"
    for position, batch in enumerate(pa.parquet.ParquetFile(path).iter_batches(1)):
        codes = batch.column("image_observations").flatten().field("bytes")
        frames = np.stack([np.asarray(Image.open(io.BytesIO(code.as_py())))[..., -1:] for code in codes])
        action, reward = (batch.column(key).flatten().to_numpy() for key in ("discrete_actions", "rewards"))
        yield Episode(path.name, position, 0, action, reward, False, True, [frames])


def write_imagetext(folder: Path, rng: np.random.Generator, episodes: int) -> int:
    count = episodes * T // 10
    with tarfile.open(folder / "00000.tar", "w") as archive:
        for number, frame in enumerate(pictures(rng, count)):
            for ending, data in (("png", png(frame)), ("txt", f"caption number {number}".encode())):
                member = tarfile.TarInfo(f"{number:08d}.{ending}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return count


def read_imagetext(folder: Path) -> Iterator[Episode]:
    with tarfile.open(folder / "00000.tar") as archive:
        for position, member in enumerate(archive):
            data = archive.extractfile(member)
            assert data is not None
            if member.name.endswith(".png"):
                frame = np.asarray(Image.open(data).resize((128, 128), Image.Resampling.BILINEAR))
                continue
            place = "00000.tar", position // 2, position // 2
            yield Episode(*place, None, np.zeros(1), True, False, [frame[None]], texts=[data.read().decode()])


def png(frame: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "PNG", compress_level=1)
    return file.getvalue()


Write = Callable[[Path, np.random.Generator, int], int]
FORMATS: dict[str, tuple[str, Write, Reader]] = {
    "robomimic": ("robomimic", write_robomimic, read_robomimic),
    "d3rlpy": ("d3rlpy", write_d3rlpy, read_d3rlpy),
    "maniskill": ("maniskill", write_maniskill, read_maniskill),
    "hdf5, ALOHA": ("hdf5", write_hdf5, read_hdf5),
    "hdf5, npz": ("hdf5", write_npz, read_npz),
    "vintix": ("vintix", write_vintix, read_vintix),
    "jat": ("jat", write_jat, read_jat),
    "minari, Parquet": ("minari", write_minari, read_minari),
    "rl_unplugged": ("rl_unplugged", write_rl_unplugged, read_rl_unplugged),
    "imagetext": ("imagetext", write_imagetext, read_imagetext),
}


def timesteps_of(name: str) -> int:
    """Of an episode of a format's logs."""
    return {"imagetext": 1, "minari, Parquet": LONG, "rl_unplugged": LONG}.get(name, T)


def bench(name: str, folder: Path) -> None:
    """One format's build against both loops."""
    source, write, read = FORMATS[name]
    logs = folder / "logs"
    logs.mkdir(parents=True)
    timesteps = write(logs, np.random.default_rng(0), EPISODES[name])
    length = timesteps_of(name)
    against_loop(name, folder, source, logs, read, timesteps // length, length)
    shutil.rmtree(folder)


def run(folder: Path, names: list[str] | None = None) -> None:
    """All of them, or some; `folder` is for scratch files, some 5 GB at a time."""
    for number, name in enumerate(names or list(FORMATS)):
        bench(name, folder / str(number))


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        run(Path(name), sys.argv[1:] or None)


if __name__ == "__main__":
    main()
