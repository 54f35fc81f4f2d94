"""`python -m benchmarks.scale`: what a stream costs as datasets, shards and episodes grow.

a dataset of 1,000 shards, under 1,000 names -> opened in a fresh process: seconds, memory
an index of 1e3 ... 1e7 rows over the same few shards -> time of a sequence

Invariant: every folder is one that `shards.verify` passes; only the bytes of shards and tables are shared between them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

from schemas.dataset import INDEX_NAME, MANIFEST_NAME
from shards.folder import Folder
from shards.stream import Stream, StreamConfig
from shards.writer import write_table
from tests.shards.made import Task, make

DATASETS, SHARDS, EPISODES = 1000, 1000, 10
ROWS = (10**3, 10**4, 10**5, 10**6, 10**7)
BATCH, SECONDS = 128, 3.0

OPEN = """
import resource, sys, time
from pathlib import Path
from shards.stream import Stream, StreamConfig, find_datasets
import psutil
before = psutil.Process().memory_info().rss
begun = time.perf_counter()
folders = find_datasets(sys.argv[1])
found = time.perf_counter()
stream = Stream(folders, StreamConfig(), 0)
opened = time.perf_counter()
after = psutil.Process().memory_info().rss
stream.batch(0, 32)
first = time.perf_counter()
total = psutil.Process().memory_info().rss
print(found - begun, opened - found, first - opened, before, after, total, len(stream.tasks))
"""


def open_many(folder: Path) -> None:
    """Seconds and memory of opening 1,000 datasets of 1,000 shards each."""
    task = Task("task-0000", (20,) * (SHARDS * EPISODES), held_out=(3, 7))
    first = make(folder / "0000", [task], shards=SHARDS)
    manifest = (first / MANIFEST_NAME).read_text()
    names = [path.name for path in first.iterdir() if path.name != MANIFEST_NAME]
    for number in range(1, DATASETS):
        other = folder / f"{number:04d}"
        other.mkdir()
        for name in names:
            os.link(first / name, other / name)
        (other / MANIFEST_NAME).write_text(manifest.replace("task-0000", f"task-{number:04d}"))
    for turn in ("first", "again", "again"):
        done = subprocess.run([sys.executable, "-c", OPEN, folder], capture_output=True, text=True, check=True)
        found, opened, batch, *memory, tasks = map(float, done.stdout.split())
        before, after, total = (value / 2**20 for value in memory)
        print(
            f"{tasks:,.0f} datasets x {SHARDS:,} shards, {turn}: found in {found:.2f} s, opened in {opened:.2f} s, "
            f"first batch in {batch:.2f} s; {before:.0f} MiB before, {after:.0f} opened, {total:.0f} with a batch",
            flush=True,
        )


def grow(folder: Path) -> None:
    """Time of a sequence against rows of the index."""
    few = make(folder / "few", [Task("task", (100,) * 1000, observation=11, action=3)], shards=4)
    with pa.memory_map(str(few / INDEX_NAME)) as source:
        table = pa.ipc.open_file(source).read_all()
    manifest = json.loads((few / MANIFEST_NAME).read_text())
    for rows in ROWS:
        times = rows // table.num_rows
        columns = {
            name: np.tile(table.column(name).to_numpy(zero_copy_only=False), times) for name in table.column_names
        }
        columns["episode"] = columns["split_episode"] = np.arange(rows)
        columns["split_stop"] = np.cumsum(columns["timesteps"], dtype=np.int64)
        other = folder / f"{rows}"
        other.mkdir()
        for name in few.iterdir():
            if name.name not in (MANIFEST_NAME, INDEX_NAME):
                os.link(name, other / name.name)
        digest = write_table(Folder(other), INDEX_NAME, pa.table(columns, schema=table.schema))
        del columns
        about = manifest["tasks"][0] | {"episodes": rows, "rows": rows, "timesteps": 100 * rows}
        changed = manifest | {"tasks": [about], "index": vars(digest)}
        (other / MANIFEST_NAME).write_text(json.dumps(changed))
        begun = time.perf_counter()
        stream = Stream([other], StreamConfig(), 0, verify="size")
        opened = time.perf_counter() - begun
        for n in range(3):
            stream.batch(n * BATCH, BATCH)
        best, first = float("inf"), 10**6
        end = time.perf_counter() + SECONDS
        while time.perf_counter() < end:
            begun = time.perf_counter()
            for _ in range(10):
                stream.batch(first, BATCH)
                first += BATCH
            best = min(best, (time.perf_counter() - begun) / (10 * BATCH))
        (other / INDEX_NAME).unlink()
        print(f"index of {rows:,} rows: opened in {1e3 * opened:.1f} ms, {1e6 * best:.1f} us a sequence", flush=True)


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        open_many(Path(name) / "many")
        grow(Path(name) / "grown")


if __name__ == "__main__":
    main()
