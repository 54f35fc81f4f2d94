"""Remote datasets: fetched once, verified, bounded, shared; what a bad network does to them."""

import contextlib
import http.server
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections import Counter
from dataclasses import fields

import numpy as np
import pytest

from schemas.dataset import DatasetError
from shards import cache
from shards.cache import CacheConfig
from shards.folder import Folder
from shards.loader import Loader
from shards.reader import BadShard, Dataset, Store
from shards.stream import Stream, StreamConfig, find_datasets
from tests import warm
from tests.shards.made import Task, make

pytest.importorskip("aiohttp")

CONFIG = StreamConfig(sequence_length=40, mixture_block=8)
SET = StreamConfig(sequence_length=40, mixture_block=8, working_set=2)
TASK = Task("body", tuple(range(20, 60)), held_out=(3,))
SHARDS = 8


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder. `faults`: name -> what its next requests meet, one each: a status, 'stall', 'cut', 'flip'."""

    daemon_threads = True

    def __init__(self, root):
        super().__init__(("127.0.0.1", 0), Handler)
        self.root, self.faults, self.asked, self.released = root, {}, Counter(), threading.Event()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        path = self.server.root / self.path.strip("/")
        if not path.is_file():
            return self.send_error(404)
        fault = None
        if body:
            self.server.asked[path.name] += 1
            faults = self.server.faults.get(path.name, [])
            fault = faults.pop(0) if faults else None
        if isinstance(fault, int):
            return self.send_error(fault)
        data = bytearray(path.read_bytes())
        if fault == "flip":
            data[len(data) // 2] ^= 1
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if not body:
            return
        if fault == "stall":
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            self.server.released.wait(30)
        elif fault == "cut":
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_WR)
        else:
            self.wfile.write(data)

    def log_message(self, *arguments):
        pass

    def handle(self):
        with contextlib.suppress(ConnectionError):
            super().handle()


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "FIRST_PAUSE", 0.02)
    make(tmp_path / "site" / "made", [TASK], piece=16, shards=SHARDS)
    server = Server(tmp_path / "site")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.released.set()
    server.shutdown()


@pytest.fixture
def local(server):
    return Stream([server.root / "made"], CONFIG, 0)


def config(tmp_path, **how):
    return CacheConfig(**{"folder": tmp_path / "cache", "attempts": 3, "stall_seconds": 1.0} | how)


def stream(server, tmp_path, stream_config=CONFIG, on_bad_shard="stop", **how):
    store = Store(config(tmp_path, **how))
    return Stream([f"{server.url}/made"], stream_config, 0, on_bad_shard=on_bad_shard, store=store)


def same(a, b):
    return all(np.array_equal(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))


def shard_bytes(server):
    return [path.stat().st_size for path in sorted((server.root / "made").glob("shard-*"))]


def held(tmp_path):
    return sum(path.stat().st_size for path in (tmp_path / "cache").iterdir() if not path.name.startswith("."))


def test_the_same_sequences_and_each_file_once(server, local, tmp_path):
    remote = stream(server, tmp_path)
    assert remote.fingerprint == local.fingerprint
    assert server.asked.total() == 1, "opening reads the manifest alone"
    assert same(remote.batch(0, 64), local.batch(0, 64))
    again = stream(server, tmp_path)
    assert same(again.batch(0, 64), local.batch(0, 64))
    assert {name: n for name, n in server.asked.items() if n > 1} == {"dataset.json": 2}
    assert remote.store.cache.counts.hits == 0
    counts = again.store.cache.counts
    assert (counts.misses, counts.hits) == (0, SHARDS + 2)
    assert not [p.name for p in (tmp_path / "cache").iterdir() if p.name.endswith(".tmp")]


FAULTS = {
    "server errors": [500, 503],
    "a stall": ["stall"],
    "a connection that ends early": ["cut", "cut"],
    "bytes that changed": ["flip"],
}


@pytest.mark.process  # waits
@pytest.mark.parametrize("what", FAULTS)
def test_what_passes_is_outlasted(server, local, tmp_path, what):
    for name in ("shard-000003.tar", "index.arrow", "dataset.json"):
        server.faults[name] = list(FAULTS[what]) if (name, what) != ("dataset.json", "bytes that changed") else []
    remote = stream(server, tmp_path, stall_seconds=0.5)
    assert same(remote.batch(0, 64), local.batch(0, 64))
    assert remote.store.cache.counts.retries >= 2 * len(FAULTS[what])


LASTING = {
    "server errors": ([500] * 9, DatasetError, "3 attempts"),
    "a stall": (["stall"] * 9, DatasetError, "no byte came for 0.3 s .3 attempts"),
    "gone": ([404] * 9, BadShard, "upload it again"),
    "forbidden": ([403] * 9, DatasetError, "403|Forbidden"),
    "bytes that changed": (["flip"] * 9, BadShard, "sha256 differs .3 attempts"),
}


@pytest.mark.parametrize("what", LASTING)
def test_what_lasts_is_named(server, tmp_path, what):
    faults, kind, message = LASTING[what]
    remote = stream(server, tmp_path, stall_seconds=0.3)
    server.faults["shard-000003.tar"] = list(faults)
    with pytest.raises(kind, match=f"shard-000003.tar.*{message}") as caught:
        remote.batch(0, 64)
    assert "\n" not in str(caught.value)
    server.faults.clear()
    assert remote.batch(0, 64).tokens.shape == (64, 40), "a later try may succeed"


def test_a_remote_bad_shard_can_be_skipped(server, tmp_path):
    server.faults["shard-000003.tar"] = ["flip"] * 99
    remote = stream(server, tmp_path, on_bad_shard="skip")
    assert remote.batch(0, 64).tokens.shape == (64, 40)
    assert list(remote.datasets[0].bad) == [3]
    assert server.asked["shard-000003.tar"] == 3, "and is not asked for again"


def test_an_unreachable_store_is_one_line(tmp_path):
    with pytest.raises(DatasetError, match=r"dataset.json: .*3 attempts.; check the store and the network"):
        Dataset("http://127.0.0.1:9/made", store=Store(config(tmp_path)))


def test_no_manifest_is_no_dataset(server, tmp_path):
    with pytest.raises(DatasetError, match="no dataset.json"):
        Dataset(f"{server.url}/other", store=Store(config(tmp_path)))


def test_a_bounded_cache_holds_a_working_set(server, tmp_path):
    """Room for five of eight shards and the tables: every sequence comes, and the limit holds at every moment."""
    tables = sum((server.root / "made" / name).stat().st_size for name in ("index.arrow", "shards.arrow"))
    limit = tables + 5 * max(shard_bytes(server))
    whole = Stream([server.root / "made"], SET, 0)
    remote = stream(server, tmp_path, SET, gigabytes=limit / 1e9)
    most = 0
    for first in range(0, 8 * 40, 8):
        assert same(remote.batch(first, 8), whole.batch(first, 8))
        most = max(most, held(tmp_path))
    counts = remote.store.cache.counts
    assert most <= limit and counts.evicted > 0
    # a working set serves many sequences: far fewer fetches than sequences
    assert counts.misses < 80


def test_a_cache_that_cannot_serve_is_refused_at_once(server, tmp_path):
    biggest = max(shard_bytes(server))
    with pytest.raises(DatasetError, match="--data.stream.working-set"):
        stream(server, tmp_path, gigabytes=3 * biggest / 1e9)
    with pytest.raises(DatasetError, match="alone, .* raise --data.cache.gigabytes"):
        stream(server, tmp_path, SET, gigabytes=100 / 1e9).batch(0, 8)


def test_a_full_cache_says_who_uses_it(server, tmp_path):
    tables = sum((server.root / "made" / name).stat().st_size for name in ("index.arrow", "shards.arrow"))
    room = (tables + sum(shard_bytes(server)[2:]) + 1000) / 1e9
    other = stream(server, tmp_path, SET, gigabytes=room)
    for number in range(2, SHARDS):
        other.datasets[0].mapped(number)
    remote = stream(server, tmp_path, SET, gigabytes=room, stall_seconds=0.5)
    with pytest.raises(DatasetError, match="what it holds is in use; raise --data.cache.gigabytes"):
        remote.batch(0, 64)
    while other.store.maps.drop_oldest():
        pass
    assert remote.batch(0, 64).tokens.shape == (64, 40)


def test_a_full_disk_is_said(server, tmp_path, monkeypatch):
    remote = stream(server, tmp_path)

    def full(source, target, **how):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(remote.datasets[0].place.store, "get_file", full)
    with pytest.raises(DatasetError, match="No space left on device; free some of the disk"):
        remote.batch(0, 8)


def batches(url, folder, count, results, n):
    store = Store(CacheConfig(folder=folder, attempts=3, stall_seconds=5.0))
    remote = Stream([url], CONFIG, 0, store=store)
    found = [remote.batch(8 * i, 8).tokens.copy() for i in range(count)]
    results.put((n, np.concatenate(found), store.cache.counts.misses))


@pytest.mark.process
def test_processes_share_a_cache(server, local, tmp_path):
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    args = (f"{server.url}/made", tmp_path / "cache", 8, results)
    workers = [context.Process(target=batches, args=(*args, n)) for n in range(4)]
    for worker in workers:
        worker.start()
    found = [results.get(timeout=120) for _ in workers]
    for worker in workers:
        worker.join()
    wanted = local.batch(0, 64).tokens
    assert all(np.array_equal(tokens, wanted) for _, tokens, _ in found)
    assert sum(misses for _, _, misses in found) == SHARDS + 2, "each file was fetched by one of them"
    assert max(n for name, n in server.asked.items() if name != "dataset.json") == 1


@pytest.mark.process
def test_a_killed_download_leaves_no_trouble(server, local, tmp_path):
    server.faults["shard-000000.tar"] = ["stall"]
    code = (
        "import sys; from pathlib import Path; from shards.cache import CacheConfig; from shards.reader import *\n"
        "Dataset(sys.argv[1], store=Store(CacheConfig(folder=Path(sys.argv[2])))).mapped(0)"
    )
    victim = warm.Popen([sys.executable, "-c", code, f"{server.url}/made", str(tmp_path / "cache")])
    cache = tmp_path / "cache"
    deadline = time.monotonic() + 60
    while not [p for p in cache.glob(".*.tmp") if p.stat().st_size > 1000] and time.monotonic() < deadline:
        time.sleep(0.05)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    assert list(cache.glob(".*.tmp")), "it was killed in the middle"
    remote = stream(server, tmp_path)
    assert same(remote.batch(0, 64), local.batch(0, 64))
    assert not list(cache.glob(".*.tmp"))


def test_the_loader_fetches_ahead(server, local, tmp_path):
    remote = stream(server, tmp_path)
    loader = Loader(remote, 0, 8, 8, threads=0)
    deadline = time.monotonic() + 30
    while remote.store.cache.counts.misses < 5 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert remote.store.cache.counts.misses >= 5, "before any batch was asked for"
    assert same(next(loader)[0], local.batch(0, 8))
    metrics = loader.metrics()
    loader.close()
    assert metrics["cache/misses"] >= 5 and metrics["cache/bytes"] > 0


def test_find_datasets_in_a_store(server, tmp_path):
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(str(server.root / "made"), "/all/made", recursive=True)
    try:
        assert find_datasets("memory://all") == ["memory://all/made"]
        assert find_datasets("memory://all/made") == ["memory://all/made"]
        found = Stream(find_datasets("memory://all"), CONFIG, 0, store=Store(config(tmp_path)))
        assert same(found.batch(0, 8), Stream([server.root / "made"], CONFIG, 0).batch(0, 8))
        assert Folder("memory://all/made").read("dataset.json")
    finally:
        memory.rm("/all", recursive=True)


def test_what_else_lies_in_the_cache_folder_is_left_alone(server, local, tmp_path):
    cache = tmp_path / "cache"
    (cache / "thesis").mkdir(parents=True)
    others = [cache / "thesis.pdf", cache / "thesis" / "a", cache / ".a.1.tmp", cache / ("a" * 63)]
    for path in others:
        path.write_bytes(b"x" * 100_000)
        os.utime(path, (0, 0))
    limit = sum(shard_bytes(server)[3:]) + 20_000
    remote = stream(server, tmp_path, SET, gigabytes=limit / 1e9)
    for first in range(0, 160, 8):
        remote.batch(first, 8)
    assert remote.store.cache.counts.evicted > 0 and all(path.stat().st_size == 100_000 for path in others)


@pytest.mark.process
def test_a_copy_that_was_damaged_here_is_fetched_again(server, local, tmp_path):
    stream(server, tmp_path).batch(0, 64)
    for path in (tmp_path / "cache").iterdir():
        if len(path.name) == 64:
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 1
            path.write_bytes(data)
    verified = verify_remote(server, tmp_path)
    assert "whole" in verified.stdout and verified.returncode == 0
    again = stream(server, tmp_path)
    assert same(again.batch(0, 64), local.batch(0, 64)) and again.store.cache.counts.misses == 0


def verify_remote(server, tmp_path):
    (tmp_path / "home" / "gato").mkdir(parents=True)
    (tmp_path / "cache").rename(tmp_path / "home" / "gato" / "shards")
    (tmp_path / "cache").symlink_to(tmp_path / "home" / "gato" / "shards")
    command = [sys.executable, "-m", "shards.verify", "--full", f"{server.url}/made"]
    return warm.run(command, env=os.environ | {"XDG_CACHE_HOME": str(tmp_path / "home")})


def test_a_cache_folder_that_cannot_be_one_is_named(server, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DatasetError, match="file: cannot hold the cache .*--data.cache.folder"):
        stream(server, tmp_path, folder=tmp_path / "file").batch(0, 8)
