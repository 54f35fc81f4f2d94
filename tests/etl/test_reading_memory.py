"""Reading a file holds an episode of it, not the file: peak memory with few and with many episodes in one file.

the benchmark's writers, few and many episodes of one size -> scan, read all -> growth of the process's peak

The peak is the kernel's own (VmHWM), set back before each measurement: what Python does not see counts too.
"""

import gc
import re
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest

from benchmarks.formats import sources as written
from etl import sources
from etl.sources import Rejection
from tests.etl import test_sources_rl_unplugged as rl_unplugged

RESET = Path("/proc/self/clear_refs")
FEW, MANY = 4, 24  # of pictures; of numbers twice and three times as many
SHARE = 0.3  # of the bytes that the further episodes have


def atari_episodes(folder, count):
    made = [rl_unplugged.game(n, 60, True) for n in range(count)]
    rl_unplugged.store(folder / "Pong" / "run_1-00000-of-00001", [
        rl_unplugged.written(observations=[rl_unplugged.png(p) for p in one["frames"][3:-1]],
                             actions=one["action"].tolist(), unclipped_rewards=one["reward"].tolist(),
                             discounts=one["discount"].tolist())
        for one in made
    ])  # fmt: skip


def transitions(folder, count):
    rows = [row for n in range(count) for row in rl_unplugged.transitions(rl_unplugged.game(n, 30, True), n)]
    rl_unplugged.store(folder / "Pong" / "run_1-00000-of-00001", rows)


OWN = {"rl_unplugged, Atari": atari_episodes, "rl_unplugged, transitions": transitions}


def status(key):
    return 1024 * int(re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def read_all(name, place):
    """Every episode of the only task; its payload in bytes, and the peak of memory above what was held before."""
    source = sources.load(name)
    gc.collect()
    RESET.write_text("5")
    before, payload, count = status("VmRSS"), 0, 0
    (scan,) = source.scan(source.resolve(place, None, place), source.options())
    for episode in sources.read(source, scan.task, scan.episodes):
        assert not isinstance(episode, Rejection)
        payload += episode.action.nbytes + sum(values.nbytes for values in episode.observation.values())
        count += 1
        del episode
    return count, payload, status("VmHWM") - before


def read_each(name, places):
    """`read_all` of each, in one fresh process, since what other tests left in Arrow's pool would be used again. The
    pool grows to some 20 MB before it reuses what it has: the second of three has to be large enough to fill it."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
        return [fresh.submit(read_all, name, place).result(120) for place in places]


def check(name, write, tmp_path, few, many, arrow=False):
    """`write(folder, count)` logs of `few` and of `many` episodes: reading them may differ by a share of what the
    others hold."""
    places = []
    for count in (few, many, 5 * many) if arrow else (few, few, many):  # the first one imports, and warms up
        places.append(place := tmp_path / f"{len(places)}")
        place.mkdir()
        write(place, count)
    found = read_each(name, places) if arrow else [read_all(name, place) for place in places]
    (_, few_bytes, least), (_, many_bytes, most) = found[1:]
    assert many_bytes > 4 * few_bytes and most - least < SHARE * (many_bytes - few_bytes) + 2**21, found


@pytest.mark.process  # measures the one it is in
@pytest.mark.skipif(not RESET.exists(), reason="the kernel's peak cannot be set back here")
@pytest.mark.parametrize("kind", [*written.FORMATS, *OWN])
def test_memory_is_that_of_an_episode(kind, tmp_path, monkeypatch):
    if kind in OWN:
        return check("rl_unplugged", OWN[kind], tmp_path, FEW, MANY)
    name, write, _ = written.FORMATS[kind]
    monkeypatch.setattr(written, "T", {"d3rlpy": 2000, "vintix": 2000, "imagetext": 200}.get(kind, 100))
    plain = kind in written.PLAIN

    def seeded(place, count):
        write(place, np.random.default_rng(0), count if plain else 4 * count)

    few, many = (2 * FEW, 3 * MANY) if plain else (FEW, MANY)
    check(name, seeded, tmp_path, few, many, arrow=kind in ("jat", "minari, Parquet"))
