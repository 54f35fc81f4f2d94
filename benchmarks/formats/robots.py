"""`python -m benchmarks.formats.robots`: builds of robots' datasets against plain loops, and LeRobot's own loader.

two-camera dataset in both formats, made longer than the fixtures -> build, loop.py -> ratios

A reader gives every episode's arrays with the plainest light library (pyarrow, Pillow, PyAV; our TFRecord reader, since
there is no other without TensorFlow), and loop.py makes the build's bytes of them. With LEROBOT_PYTHON, the interpreter
of an environment with lerobot, its loader reads the same frames, one core each.

Invariant: both sides of a pair read the same files and write the same files, in this run.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import tempfile
import zlib
from collections.abc import Callable, Iterator
from itertools import islice, product
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet
from PIL import Image

from benchmarks.etl import command, one_core, timesteps
from benchmarks.formats.loop import Episode, Reader, against_loop
from etl.sources._tfrecord import Records, Values, example, frame
from tests.etl.tfexample import written

FIXTURES = Path(__file__).parents[2] / "tests/fixtures"
EPISODES, ROWS, FPS, SIDE = 40, 120, 10, (96, 128)
MEMORY = (10, 100)  # episodes of one file
CAMERA, INDEX = "observation.images.front", "__index_level_0__"
LOADER = """
import sys, time
from lerobot.datasets.lerobot_dataset import LeRobotDataset
dataset = LeRobotDataset("own/bench", root=sys.argv[1])
best = float("inf")
for _ in range(2):
    start = time.perf_counter()
    for n in range(len(dataset)):
        dataset[n]
    best = min(best, time.perf_counter() - start)
print(len(dataset) / best)
"""


def write_lerobot(root: Path, episodes: int = 4 * EPISODES) -> Path:
    """LeRobotDataset v3.0 of one Parquet file and one H.264 video, keyframes as often as LeRobot has them; a second
    camera of PNGs, states and actions."""
    sides, integer = ["height", "width", "channels"], {"dtype": "int64", "shape": [1], "names": None}
    vector = {"dtype": "float32", "shape": [6], "names": None}
    features = {"observation.state": vector, "action": vector, "timestamp": integer | {"dtype": "float32"}}
    features["observation.images.front"] = {"dtype": "video", "shape": [*SIDE, 3], "names": sides}
    features["observation.images.wrist"] = {"dtype": "image", "shape": [64, 64, 3], "names": sides}
    features |= {key: integer for key in ("frame_index", "episode_index", "index", "task_index")}
    info = {"codebase_version": "v3.0", "fps": FPS, "features": features, "chunks_size": 1000, "robot_type": "arm"}
    info |= {"total_episodes": episodes, "total_frames": episodes * ROWS, "total_tasks": 1}
    info |= {"data_files_size_in_mb": 100, "video_files_size_in_mb": 200, "splits": {"train": f"0:{episodes}"}}
    info["data_path"] = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
    info["video_path"] = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
    names = ("meta/episodes", "data", f"videos/{CAMERA}")
    meta, data, video = (root / name / "chunk-000" for name in names)
    for folder in (meta, data, video):
        folder.mkdir(parents=True)
    (root / "meta/info.json").write_text(json.dumps(info))
    bounds = {"min": [-1.0] * 6, "max": [1.0] * 6, "mean": [0.0] * 6, "std": [1.0] * 6, "count": [episodes * ROWS]}
    (root / "meta/stats.json").write_text(json.dumps({"action": bounds, "observation.state": bounds}))
    column = {"pandas_type": "int64", "numpy_type": "int64", "metadata": None}
    columns = [{"name": name, "field_name": name or INDEX} | column for name in ("task_index", None)]
    pandas = {"index_columns": [INDEX], "column_indexes": [], "columns": columns, "pandas_version": "2.0"}
    tasks = pa.table({"task_index": [0], INDEX: ["stack the cubes"]})
    tasks = tasks.replace_schema_metadata({"pandas": json.dumps(pandas)})
    pa.parquet.write_table(tasks, root / "meta/tasks.parquet")
    starts = np.arange(episodes) * ROWS
    zeros, at = np.zeros(episodes, np.int64), f"videos/{CAMERA}"
    table = {"episode_index": np.arange(episodes), "tasks": [["stack the cubes"]] * episodes, "length": zeros + ROWS}
    table |= {
        "dataset_from_index": starts,
        "dataset_to_index": starts + ROWS,
        f"{at}/to_timestamp": (starts + ROWS) / FPS,
    }
    table |= {f"{at}/chunk_index": zeros, f"{at}/file_index": zeros, f"{at}/from_timestamp": starts / FPS}
    pa.parquet.write_table(
        pa.table(table | {"data/chunk_index": zeros, "data/file_index": zeros}), meta / "file-000.parquet"
    )
    random = np.random.default_rng(0)
    with pa.parquet.ParquetWriter(data / "file-000.parquet", episode(0, random).schema) as writer:
        for n in range(episodes):
            writer.write_table(episode(n, random))
    write_video(video / "file-000.mp4", episodes)
    return root


def episode(n: int, random: np.random.Generator) -> pa.Table:
    numbers = pa.list_(pa.float32(), 6)
    cells = [{"bytes": png(random), "path": f"frame_{t:06d}.png"} for t in range(ROWS)]
    return pa.table(
        {
            "observation.state": pa.array(random.uniform(-1, 1, (ROWS, 6)).astype(np.float32).tolist(), numbers),
            "observation.images.wrist": pa.array(cells),
            "action": pa.array(random.uniform(-1, 1, (ROWS, 6)).astype(np.float32).tolist(), numbers),
            "timestamp": pa.array(np.arange(ROWS, dtype=np.float32) / FPS),
            "frame_index": np.arange(ROWS),
            "episode_index": np.full(ROWS, n),
            "index": np.arange(n * ROWS, (n + 1) * ROWS),
            "task_index": np.zeros(ROWS, np.int64),
        }
    )


def png(random: np.random.Generator) -> bytes:
    out = io.BytesIO()
    coarse = random.integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(coarse.repeat(4, axis=0).repeat(4, axis=1)).save(out, "PNG")
    return out.getvalue()


def write_video(path: Path, episodes: int) -> None:
    y, x = np.mgrid[0 : SIDE[0], 0 : SIDE[1]]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"g": "2", "crf": "30"})
        stream.height, stream.width, stream.pix_fmt = *SIDE, "yuv420p"
        for n, t in product(range(episodes), range(ROWS)):
            waves = [128 + 100 * np.sin((x + 3 * t + 17 * n) / 9), 128 + 100 * np.cos((y - 2 * t) / 7), x + 0 * y]
            picture = av.VideoFrame.from_ndarray(np.stack(waves, axis=-1).astype(np.uint8), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())


def write_rlds(root: Path, episodes: int = 4 * EPISODES) -> Path:
    """The steps of the fixture's records as episodes of `ROWS` steps, each with another first state: copies would be
    left out."""
    shutil.unpack_archive(FIXTURES / "rlds.tar.xz", root, filter="data")
    folder = root / "two_cameras/1.0.0"
    files = sorted(folder.glob("*.tfrecord-*"))
    records = [example(data) for path in files for _, data in Records(path)]
    for path in (*files, folder / "dataset_info.json"):
        path.unlink()
    steps = sum(len(record["steps/is_last"]) for record in records)
    times = ROWS // steps + 1
    lists: dict[str, Values] = {}
    for name in records[0]:
        parts = [record[name] for record in records]
        if isinstance(parts[0], list):
            codes = [code for part in parts for code in part] * times
            lists[name] = codes[:ROWS]
        else:
            values = np.tile(np.concatenate(parts), times)
            lists[name] = values[: len(values) // (steps * times) * ROWS]
    lists["steps/is_last"] = np.arange(ROWS) == ROWS - 1
    with open(folder / "two_cameras-train.tfrecord-00000-of-00001", "wb") as file:
        for n in range(episodes):
            lists["steps/observation/state"][0] = n
            file.write(frame(written(**lists)))
    return root


def read_lerobot(place: Path) -> Iterator[Episode]:
    data, video = "data/chunk-000/file-000.parquet", f"videos/{CAMERA}/chunk-000/file-000.mp4"
    with av.open(str(place / video)) as container:
        container.streams.video[0].codec_context.thread_count = 1
        decoded = (frame.to_ndarray(format="rgb24") for frame in container.decode(video=0))
        for position, rows in enumerate(pa.parquet.ParquetFile(place / data).iter_batches(ROWS)):
            state, action = (
                rows[key].flatten().to_numpy().reshape(ROWS, -1) for key in ("observation.state", "action")
            )
            codes = rows["observation.images.wrist"].field("bytes").to_pylist()
            wrist = np.stack([np.asarray(Image.open(io.BytesIO(code))) for code in codes])
            frames = [np.stack(list(islice(decoded, ROWS))), wrist]
            ends = np.zeros(ROWS), False, True
            yield Episode(data, position, position * ROWS, action, *ends, frames, [state], ["stack the cubes"] * ROWS)


def read_rlds(place: Path) -> Iterator[Episode]:
    path = next(place.rglob("*.tfrecord-*"))
    for position, (_, data) in enumerate(Records(path)):
        lists = example(data)
        T = len(lists["steps/is_last"]) - 1  # no action follows the last step
        frames = [
            np.stack([np.asarray(Image.open(io.BytesIO(code))) for code in lists[f"steps/observation/{key}"][:T]])
            for key in ("image", "wrist_image")
        ]
        packed = np.frombuffer(b"".join(map(zlib.decompress, lists["steps/observation/packed"])), np.float32)
        real = {key: lists[f"steps/observation/{key}"] for key in ("joints/ragged_flat_values", "pose", "state")}
        real = {key: values.reshape(T + 1, -1)[:T] for key, values in real.items()}
        moving, gripper = (lists[f"steps/observation/{key}"][:T] for key in ("arm/moving", "gripper"))
        joints, pose, state = real.values()
        numbers = [moving, gripper + 2, joints, packed.reshape(T + 1, -1)[:T], pose, state]
        parts = [lists[f"steps/action/{key}"].reshape(T + 1, -1)[:T] for key in ("open_gripper", "world_vector")]
        reward = lists["steps/reward"].copy()
        reward[T - 1] += reward[T]
        ended = bool(lists["steps/is_terminal"][T])
        texts = [line.decode() for line in lists["steps/language_instruction"][:T]]
        action = np.concatenate(parts, axis=1)
        yield Episode(path.name, position, 0, action, reward[:T], ended, not ended, frames, numbers, texts)


SOURCES: dict[str, tuple[Callable[..., Path], Reader, int]] = {  # the last: timesteps of an episode
    "lerobot": (write_lerobot, read_lerobot, ROWS),
    "rlds": (write_rlds, read_rlds, ROWS - 1),
}


def bench_source(folder: Path, source: str) -> None:
    """Build against both loops."""
    write, read, length = SOURCES[source]
    place = write(folder / source)
    against_loop(source, folder, source, place, read, timesteps(place, source) // length, length)


def bench_loader(place: Path) -> None:
    """LeRobot's own loader on the same frames, where there is one."""
    python = os.environ.get("LEROBOT_PYTHON")
    if not python:
        print("etl: lerobot's own loader: set LEROBOT_PYTHON to an interpreter that has it", flush=True)
        return
    with one_core():
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        line = [python, "-c", LOADER, str(place)]
        done = subprocess.run(line, capture_output=True, text=True, env=environment | {"HF_HUB_OFFLINE": "1"})
    rate = float(done.stdout.split()[-1]) if done.returncode == 0 else None
    what = f"{rate:,.0f} timesteps/s" if rate else f"failed: {done.stderr.strip().splitlines()[-1][:160]}"
    print(f"etl: lerobot's own loader on the same frames: {what}", flush=True)


def bench_memory(folder: Path, source: str) -> None:
    """Peak memory of the whole command, from few episodes in a file to many."""
    peaks = []
    for episodes in MEMORY:
        place = SOURCES[source][0](folder / f"{source}-{episodes}", episodes)
        peaks.append(command("etl.build", "-i", place, "-o", folder / "memory", "--overwrite"))
        shutil.rmtree(place)
    shown, counts = ", ".join(f"{peak / 2**20:,.0f}" for peak in peaks), ", ".join(map(str, MEMORY))
    what = f"etl: {source} build, peak memory of {counts} episodes in one file"
    print(f"{what}: {shown} MiB, ratio {max(peaks) / min(peaks):.3f}", flush=True)


def run(folder: Path) -> None:
    """All of it, in a folder that may be filled."""
    for source in SOURCES:
        bench_source(folder, source)
        bench_memory(folder, source)
    bench_loader(folder / "lerobot")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        run(Path(name))
