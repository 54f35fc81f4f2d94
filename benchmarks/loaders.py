"""`PEERS-PYTHON benchmarks/loaders.py SAMPLES WORK`: other projects' data loaders on samples assembled beforehand.

PEERS-PYTHON is a virtual environment's with loaders.txt installed; nothing of ours is imported here.
SAMPLES holds tokens.npy int32 (N, 1024) and, for images, patches.npy uint8 (N, M, 16, 16, C).
Each peer writes them once in its own format below WORK (not timed, kept) and reads them back, shuffled by its own
means, in batches that the caller owns: torch tensors, of grain numpy arrays. One JSON object per line comes out:
first_batch_seconds from constructing the loader to the first batch, in a fresh process, imports done before;
samples_per_second of the best of the full passes that fill --seconds, the first of which does not count;
exact whether one pass gave every sample once (of both fields, by checksum). The page cache is warm throughout.

Invariant: a peer that is missing or fails costs a line with its error, nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import json
import math
import shutil
import subprocess
import sys
import time
import types
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, default_collate

FIELDS = "tokens", "patches"
SHARD, SHARDS = 256 << 20, 8  # bytes per shard at most, and so many shards at least, for the workers to share
BUFFER = 1000  # samples in a shuffle buffer
SEED = 0

Arrays = dict[str, np.ndarray]
Batch = dict[str, Any]


class Samples:
    """The arrays of a folder; picklable, and opened again in each process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        paths = {name: folder / f"{name}.npy" for name in FIELDS}
        self.arrays: Arrays = {name: np.load(path, mmap_mode="r") for name, path in paths.items() if path.exists()}
        self.count = len(self.arrays["tokens"])
        self.shard_bytes = min(SHARD, sum(array.nbytes for array in self.arrays.values()) // SHARDS + 1)

    def __reduce__(self) -> tuple[type[Samples], tuple[Path]]:
        return Samples, (self.folder,)

    def __getitem__(self, index: int | slice) -> Arrays:
        return {name: np.array(array[index]) for name, array in self.arrays.items()}

    def __iter__(self) -> Iterator[Arrays]:
        return (self[index] for index in range(self.count))

    def tensors(self, index: int) -> dict[str, torch.Tensor]:
        return {name: torch.from_numpy(array) for name, array in self[index].items()}


class Peer:
    package = module = "numpy"

    def __init__(self, batch: int, workers: int) -> None:
        self.batch, self.workers = batch, workers
        self.options: dict[str, Any] = {"num_workers": workers, "persistent_workers": workers > 0}
        self.lib = importlib.import_module(self.module)

    def write(self, samples: Samples, folder: Path) -> None: ...

    def load(self, samples: Samples, folder: Path) -> Iterable[Batch]:
        """Iterating it makes one pass; more than once is fine."""
        raise NotImplementedError


class Passes:
    def __init__(self, start: Callable[[], Iterator[Batch]]) -> None:
        self.start = start

    def __iter__(self) -> Iterator[Batch]:
        return self.start()


class Memmap(Peer):
    """A yardstick: in order, into the same buffers again."""

    def __init__(self, batch: int, workers: int) -> None:
        super().__init__(batch, workers=0)

    def load(self, samples: Samples, folder: Path) -> Iterable[Batch]:
        buffers = {name: np.empty((self.batch, *a.shape[1:]), a.dtype) for name, a in samples.arrays.items()}
        return Passes(lambda: self.blocks(samples, buffers))

    def blocks(self, samples: Samples, buffers: Arrays) -> Iterator[Batch]:
        for start in range(0, samples.count, self.batch):
            size = min(self.batch, samples.count - start)
            for name, buffer in buffers.items():
                np.copyto(buffer[:size], samples.arrays[name][start : start + size])
            yield {name: buffer[:size] for name, buffer in buffers.items()}


class WebDataset(Peer):
    package = module = "webdataset"

    def write(self, samples: Samples, folder: Path) -> None:
        self.tar(({f"{name}.npy": array for name, array in entry.items()} for entry in samples), samples, folder)

    def tar(self, entries: Iterable[dict[str, Any]], samples: Samples, folder: Path) -> None:
        limits = {"maxcount": samples.count, "maxsize": samples.shard_bytes}
        with self.lib.ShardWriter(f"{folder}/%06d.tar", verbose=0, **limits) as sink:
            for index, entry in enumerate(entries):
                sink.write({"__key__": f"{index:09d}"} | entry)

    def load(self, samples: Samples, folder: Path) -> Iterable[Batch]:
        data = self.decoded(folder, BUFFER).map(lambda entry: {name: entry[f"{name}.npy"] for name in samples.arrays})
        data = data.batched(self.batch, collation_fn=default_collate)
        return self.lib.WebLoader(data, batch_size=None, **self.options)

    def decoded(self, folder: Path, buffer: int) -> Any:
        shards = sorted(map(str, folder.glob("*.tar")))
        return self.lib.WebDataset(shards, shardshuffle=len(shards), seed=SEED).shuffle(buffer).decode()


class WebDatasetBlocks(WebDataset):
    """A batch is a member, so the same samples meet in every pass."""

    def write(self, samples: Samples, folder: Path) -> None:
        blocks = (samples[start : start + self.batch] for start in range(0, samples.count, self.batch))
        self.tar(({f"{name}.npy": array for name, array in block.items()} for block in blocks), samples, folder)

    def load(self, samples: Samples, folder: Path) -> Iterable[Batch]:
        data = self.decoded(folder, max(1, BUFFER // self.batch))
        data = data.map(lambda entry: {name: torch.from_numpy(entry[f"{name}.npy"]) for name in samples.arrays})
        return self.lib.WebLoader(data, batch_size=None, **self.options)


class Mosaic(Peer):
    package, module = "mosaicml-streaming", "streaming"

    def __init__(self, batch: int, workers: int) -> None:
        # Its image data sets, unused here, import torchvision, whose wheel on the index wants CUDA's torch.
        sys.modules["streaming.vision"] = types.ModuleType("streaming.vision")
        super().__init__(batch, workers)

    def write(self, samples: Samples, folder: Path) -> None:
        columns = {
            name: f"ndarray:{array.dtype}:{','.join(map(str, array.shape[1:]))}"
            for name, array in samples.arrays.items()
        }
        with self.lib.MDSWriter(out=str(folder), columns=columns, size_limit=samples.shard_bytes) as sink:
            for entry in samples:
                sink.write(entry)

    def load(self, samples: Samples, folder: Path) -> Iterable[Batch]:
        data = self.lib.StreamingDataset(local=str(folder), shuffle=True, shuffle_seed=SEED, batch_size=self.batch)
        return DataLoader(data, self.batch, **self.options)


class MosaicLocal(Mosaic):
    """The same files as a map-style data set, which PyTorch's sampler shuffles."""

    def load(self, samples: Samples, folder: Path) -> Iterable[Batch]:
        return DataLoader(self.lib.LocalDataset(str(folder)), self.batch, shuffle=True, **self.options)


class LitData(Peer):
    package = module = "litdata"

    def write(self, samples: Samples, folder: Path) -> None:
        inputs, limit = list(range(samples.count)), min(samples.shard_bytes, 64 << 20)  # 64 MB: its documentation's
        self.lib.optimize(
            samples.tensors, inputs, str(folder), chunk_bytes=limit, num_workers=1, reorder_files=False, verbose=False
        )

    def load(self, samples: Samples, folder: Path) -> Iterable[Batch]:
        # Decoded one by one: by windows of 256, its default, it read 1.8 (images) to 7 times slower here.
        data = self.lib.StreamingDataset(str(folder), shuffle=True, drop_last=False, seed=SEED, batch_decode=0)
        return self.lib.StreamingDataLoader(data, batch_size=self.batch, **self.options)


class Grain(Peer):
    package = module = "grain"

    def write(self, samples: Samples, folder: Path) -> None:
        from array_record.python.array_record_module import ArrayRecordWriter

        shards = math.ceil(sum(array.nbytes for array in samples.arrays.values()) / samples.shard_bytes)
        for shard in range(shards):
            sink = ArrayRecordWriter(f"{folder}/{shard:06d}.array_record", "group_size:1,uncompressed")
            for index in range(samples.count * shard // shards, samples.count * (shard + 1) // shards):
                sink.write(b"".join(array.tobytes() for array in samples[index].values()))
            sink.close()

    def load(self, samples: Samples, folder: Path) -> Iterable[Batch]:
        layout, start = {}, 0
        for name, array in samples.arrays.items():
            layout[name] = array.dtype, array.shape[1:], start
            start += array[0].nbytes

        def parse(record: bytes) -> Arrays:
            return {
                name: np.frombuffer(record, dtype, math.prod(shape), offset).reshape(shape)
                for name, (dtype, shape, offset) in layout.items()
            }

        source = self.lib.sources.ArrayRecordDataSource(sorted(map(str, folder.glob("*.array_record"))))
        data = self.lib.MapDataset.source(source).shuffle(SEED).map(parse).batch(self.batch).repeat()
        threads = min(1, self.workers)  # as its documentation asks for data in memory; more were no faster
        endless = data.to_iter_dataset(self.lib.ReadOptions(num_threads=threads, prefetch_buffer_size=threads))
        if self.workers:
            processes = self.lib.MultiprocessingOptions(num_workers=self.workers, per_worker_buffer_size=2)
            endless = endless.mp_prefetch(processes)
        batches = iter(endless)  # one iterator, as each starts its processes again
        return Passes(lambda: islice(batches, math.ceil(samples.count / self.batch)))


class Energon(Peer):
    package, module = "megatron-energon", "megatron.energon"

    def write(self, samples: Samples, folder: Path) -> None:
        entries = ({f"{name}.bin": array.tobytes() for name, array in entry.items()} for entry in samples)
        WebDataset(self.batch, 0).tar(entries, samples, folder)
        shards = sorted(path.name for path in folder.glob("*.tar"))
        self.lib.BaseWebdatasetFactory.prepare_dataset(folder, shards, split_parts_ratio=[("train", 1.0)], workers=1)
        (folder / ".nv-meta" / "dataset.yaml").write_text("__module__: megatron.energon\n__class__: CrudeWebdataset\n")

    def load(self, samples: Samples, folder: Path) -> Iterable[Batch]:
        lib = self.lib

        @lib.stateless
        def cook(entry: dict[str, Any]) -> dict[str, Any]:
            return lib.basic_sample_keys(entry) | {
                name: np.frombuffer(entry[f"{name}.bin"], array.dtype).reshape(array.shape[1:])
                for name, array in samples.arrays.items()
            }

        class Encoder(lib.TaskEncoder):  # type: ignore[name-defined]
            decoder = None  # bytes go to the cooker as they are
            cookers = [lib.Cooker(cook)]

            @lib.stateless
            def batch(self, entries: list[dict[str, Any]]) -> Batch:
                return default_collate([{name: entry[name] for name in samples.arrays} for entry in entries])

        data = lib.get_train_dataset(
            folder,
            worker_config=lib.WorkerConfig(rank=0, world_size=1, num_workers=self.workers, seed_offset=SEED),
            batch_size=self.batch,
            shuffle_buffer_size=BUFFER,
            max_samples_per_sequence=100,
            task_encoder=Encoder(),
            repeat=False,
        )
        return lib.get_loader(data)


PEERS: dict[str, type[Peer]] = {
    "memmap": Memmap,
    "webdataset": WebDataset,
    "webdataset blocks": WebDatasetBlocks,
    "mosaicml-streaming": Mosaic,
    "mosaicml-streaming local": MosaicLocal,
    "litdata": LitData,
    "grain": Grain,
    "energon": Energon,
}


def checksums(batch: Batch) -> list[int]:
    sums = [0] * len(batch["tokens"])
    for name in FIELDS:
        if name in batch:
            sums = [
                zlib.crc32(np.ascontiguousarray(sample).data, old) for sample, old in zip(np.asarray(batch[name]), sums)
            ]
    return sums


def read(name: str, samples: Samples, folder: Path, batch: int, workers: int, seconds: float) -> dict[str, Any]:
    peer = PEERS[name](batch, workers)
    files = [path for path in folder.rglob("*") if path.is_file()] or list(samples.folder.glob("*.npy"))
    stored = sum(len(path.read_bytes()) for path in files)  # which also warms the page cache
    start = time.perf_counter()
    loader = peer.load(samples, folder)
    batches = iter(loader)
    first = next(batches)
    first_seconds = time.perf_counter() - start
    seen = Counter(checksums(first))
    for more in batches:
        seen.update(checksums(more))
    wanted = Counter(crc for i in range(0, samples.count, batch) for crc in checksums(samples[i : i + batch]))
    rates: list[float] = []
    begun = time.perf_counter()
    while len(rates) < 2 or time.perf_counter() - begun < seconds:
        start, count = time.perf_counter(), 0
        for more in loader:
            count += len(more["tokens"])
        rates.append(count / (time.perf_counter() - start))
    return {
        "peer": name,
        "version": importlib.metadata.version(peer.package),
        "workers": peer.workers,
        "samples_per_second": round(max(rates[1:]), 1),
        "first_batch_seconds": round(first_seconds, 4),
        "bytes_per_sample": round(stored / samples.count, 1),
        "exact": seen == wanted,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("samples", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--peers", default=",".join(PEERS))
    parser.add_argument("--step", choices=["write", "read"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        samples = Samples(args.samples)
        warnings.filterwarnings("ignore")
        with contextlib.redirect_stdout(sys.stderr):
            if args.step == "write":
                PEERS[args.peers](args.batch, 0).write(samples, args.work)
            else:
                result = read(args.peers, samples, args.work, args.batch, args.workers, args.seconds)
        if args.step == "read":
            print(json.dumps(result), flush=True)
        return
    for name in args.peers.split(","):
        print(json.dumps(measure(name, args)), flush=True)


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Both steps, each in a process of its own."""
    folder = args.work.absolute() / name.replace(" ", "-")
    common = [sys.executable, __file__, str(args.samples.absolute())]
    options = [f"--peers={name}", f"--batch={args.batch}", f"--seconds={args.seconds}", f"--workers={args.workers}"]

    def step(kind: str, target: Path) -> str:
        command = [*common, str(target), f"--step={kind}", *options]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
            raise RuntimeError(lines[-1])
        return done.stdout.strip().splitlines()[-1] if kind == "read" else ""

    try:
        if not folder.exists():
            partial = folder.with_name(folder.name + ".partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            step("write", partial)
            partial.rename(folder)
        return json.loads(step("read", folder))
    except (RuntimeError, IndexError, ValueError) as error:
        return {"peer": name, "error": str(error)}


if __name__ == "__main__":
    main()
