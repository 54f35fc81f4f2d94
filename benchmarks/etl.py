"""`python -m benchmarks.etl`: the build against its floor, two processes against one, memory against input.

logs (GATO_SHARED_DATA/{d4rl,dqn_replay}, else recorded here), made as long as published ones -> build, floor, ...

The floor of a build is a loop that only reads its source, with the plainest call there is for the format, and writes
the bytes that the build writes, made as durable. Rates are of the best of a few turns, one core for each side.

Invariant: both sides of a pair read the same files and write the same files, in this run.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
from rich.console import Console

from etl import build, sources
from etl.sources.atari.writer import ReplayWriter
from etl.sources.d4rl.writer import D4RLWriter
from schemas.dataset import Manifest
from schemas.files import atomic_write
from simulators import environment

SHARED = "GATO_SHARED_DATA"
REPEATS = 3
FILES, ROWS, TIMES = 4, 1_000_000, 4  # of D4RL: so many files of so many rows, under so many names
FRAMES = 240_000
FOLDERS = {"d4rl": "d4rl", "atari": "dqn_replay"}
BLOCK = 2**20
LONG_TIMES = 16  # names of a D4RL file where two processes are compared with one
EPISODES = (10, 100, 1000)
EPISODE_TIMESTEPS = 100


def pair(
    name: str,
    first: Callable[[], object],
    second: Callable[[], object],
    unit: str,
    amount: float,
    repeats: int,
    after: Callable[[], object] = lambda: None,
) -> tuple[float, float]:
    """Print `ratios` of both, `amount` of work each; returns their wall times. `after` each of them something is done
    that is not timed."""
    times = best_times((first, second), repeats, after)
    ratios(name, *times, unit, amount)
    return times[0].wall, times[1].wall


class Times(NamedTuple):
    """Least seconds of a few turns: on the wall, and of the processor, children's included."""

    wall: float
    processor: float


def best_times(works: Sequence[Callable[[], object]], repeats: int, after: Callable[[], object]) -> list[Times]:
    """Of works that take turns; `after` each something is done that is not timed."""
    best = [Times(float("inf"), float("inf"))] * len(works)
    for _ in range(repeats):
        for n, work in enumerate(works):
            begun, spent = time.perf_counter(), sum(os.times()[:4])
            work()
            wall, processor = time.perf_counter() - begun, sum(os.times()[:4]) - spent
            best[n] = Times(min(best[n].wall, wall), min(best[n].processor, processor))
            after()
    return best


def ratios(name: str, first: Times, second: Times, unit: str, amount: float) -> None:
    """Print the rates of both and their ratio, above 1 where the first is faster; beside it that of their processor
    times, which other work on the machine disturbs less."""
    rates = f"{amount / first.wall:,.4g} against {amount / second.wall:,.4g} {unit}"
    share = second.processor / first.processor if first.processor > 0 else 0.0
    processor = f"{share:.2f} by processor time" if share else "no processor time"
    print(f"{name}: {rates}, ratio {second.wall / first.wall:.2f} ({processor})", flush=True)


@contextmanager
def one_core():
    """This process on one core; child processes are not measured in here."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(allowed)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


def command(*arguments: str | Path) -> int:
    """Run a module; peak memory of its process in bytes. RuntimeError with its last words where it fails."""
    with tempfile.TemporaryFile() as words:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        line = [sys.executable, "-m", *map(str, arguments)]
        process, peak = subprocess.Popen(line, env=environment, stdout=subprocess.DEVNULL, stderr=words), 0
        while process.poll() is None:
            peak = max(peak, _peak(process.pid))  # getrusage's would hold what this process had when it forked
            time.sleep(0.02)
        if process.returncode:
            words.seek(0)
            raise RuntimeError(f"{' '.join(line)}: {words.read().decode(errors='replace')[-2000:]}")
    return peak


def _peak(process: int) -> int:
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    found = re.search(r"VmHWM:\s+(\d+) kB", status)  # none once it has ended
    return int(found[1]) * 1024 if found else 0


def logs(folder: Path, source: str) -> Path:
    """A folder of logs: the shared ones, or two recorded here."""
    shared = os.environ.get(SHARED)
    if shared:
        return Path(shared).resolve() / FOLDERS[source]
    environments = {"d4rl": ("Hopper-v4", "40000"), "atari": ("ALE/Freeway-v5", "12000")}
    environment, steps = environments[source]
    command("etl.record", "-e", environment, "--steps", steps, "--noise", "0.1", "-o", folder / FOLDERS[source])
    return folder / FOLDERS[source]


def lengthen(place: Path, into: Path) -> Path:
    """D4RL logs of D4RL's own size, packed as D4RL packs them: the rows of a log again and again, up to a million,
    with rewards that differ a little, so that no episode is a copy."""
    into.mkdir(parents=True)
    for path in sorted(place.rglob("*.hdf5"))[:FILES]:
        with h5py.File(path) as file, h5py.File(into / path.name, "w") as long:
            times = -(-ROWS // len(file["rewards"]))
            for key in ("observations", "actions", "rewards", "terminals", "timeouts"):
                values = np.tile(file[key][:], (times, *[1] * (file[key].ndim - 1)))
                if key == "rewards":
                    values += np.repeat(np.arange(times, dtype=np.float32), len(file[key])) / 1024
                elif key == "timeouts":
                    values[len(file[key]) - 1 :: len(file[key])] = True
                long.create_dataset(key, data=values, compression="gzip")
            long.attrs.update(file.attrs)
    return into


def multiply(place: Path, into: Path, source: str, times: int) -> Path:
    """The logs of `place` under so many names each, as links: every copy is a task of its own."""
    for n in range(times):
        for path in sorted(p for p in place.rglob("*") if p.is_file()):
            if source == "d4rl":
                link = into / f"{path.stem}-{n}{path.suffix}"
            else:
                game, run, *rest = path.relative_to(place).parts
                link = into / game / str(int(run) + 100 * n) / Path(*rest)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path)
    return into


def timesteps(place: Path, source: str) -> int:
    """Timesteps that the logs hold."""
    known = sources.load(source)
    scans = known.scan(known.resolve(place, None, place), known.options())
    return sum(ref.timesteps for scan in scans for ref in scan.episodes)


def build_once(source: str, place: Path, output: Path) -> Manifest:
    """What `python -m etl.build` does, in this process: imports are not in it, the start of Beam's pipeline is."""
    options = build.Options(source=source, input=str(place), output=str(output))
    return build.build(options, build.beam_flags([], 1), Console(file=io.StringIO()))


def read_d4rl(place: Path) -> None:
    """Episode by episode, as a build must whose memory does not grow with its input."""
    for path in sorted(place.rglob("*.hdf5")):
        with h5py.File(path) as file:
            columns = [file[key] for key in ("observations", "actions", "rewards")]
            ends = np.flatnonzero(file["terminals"][:] | file["timeouts"][:]) + 1
            for start, stop in pairwise([0, *ends.tolist(), len(columns[0])]):
                for column in columns:
                    np.asarray(column[start:stop], np.float32)


def read_d4rl_columns(place: Path) -> None:
    """Whole columns at once, which holds a file in memory."""
    for path in sorted(place.rglob("*.hdf5")):
        with h5py.File(path) as file:
            for key in ("observations", "actions", "rewards", "terminals", "timeouts"):
                np.asarray(file[key][:], np.float32)


def read_atari(place: Path) -> None:
    for path in sorted(place.rglob("$store$_*.gz")):
        with gzip.open(path) as file:
            while file.read(BLOCK):
                pass


FLOORS: dict[str, dict[str, Callable[[Path], None]]] = {
    "d4rl": {"episodes": read_d4rl, "whole columns": read_d4rl_columns},
    "atari": {"a stream": read_atari},
}


def bench_floor(folder: Path, place: Path, source: str) -> None:
    """Build against its floor."""
    if source == "d4rl":
        many = multiply(lengthen(place, folder / "d4rl-long"), folder / "d4rl-many", source, TIMES)
    else:
        many = multiply(place, folder / "atari-many", source, -(-FRAMES // timesteps(place, source)))
    reads = {f"etl: {source} build / read {what} and write only": read for what, read in FLOORS[source].items()}
    against_floor(folder, source, many, reads, timesteps(many, source))


def against_floor(folder: Path, source: str, place: Path, reads: dict[str, Callable[[Path], None]], count: int) -> None:
    """The build of the logs at `place`, `count` timesteps, against each of `reads` (by the pair's name), which reads
    them and writes what the build writes. One core; `folder` is for what both write. The floor leaves out the sha256
    that a manifest has of each file, which no build can: a second ratio adds the time of hashing the same bytes."""
    output, bare = folder / f"{source}-shards", folder / "floor"
    build_once(source, place, output)
    contents = {path.name: path.read_bytes() for path in output.iterdir() if path.is_file()}

    def build() -> None:
        shutil.rmtree(output, ignore_errors=True)
        build_once(source, place, output)

    def floor(read: Callable[[Path], None]) -> None:
        shutil.rmtree(bare, ignore_errors=True)
        read(place)
        for name, data in contents.items():
            with atomic_write(bare / name) as file:
                file.write(data)

    with one_core():
        begun = time.process_time()  # of the wall, other work would be in it
        for data in contents.values():
            hashlib.sha256(data)
        hashing = time.process_time() - begun
        for name, read in reads.items():
            first, second = pair(name, build, partial(floor, read), "timesteps/s", count, REPEATS)
            print(f"{name}, and hash: ratio {(second + hashing) / first:.2f}", flush=True)
    for path in (output, bare):
        shutil.rmtree(path)


def bench_processes(folder: Path) -> None:
    """The whole command with two processes against one."""
    many = multiply(folder / "d4rl-long", folder / "d4rl-longest", "d4rl", LONG_TIMES)
    output = folder / "long-shards"
    arguments = ("etl.build", "--source", "d4rl", "-i", many, "-o", output, "--workers")
    pair(
        "etl: d4rl build, 2 processes / 1",
        lambda: command(*arguments, "2"),
        lambda: command(*arguments, "1"),
        "timesteps/s",
        timesteps(many, "d4rl"),
        REPEATS,
        after=lambda: shutil.rmtree(output),
    )


def bench_memory(folder: Path, source: str) -> None:
    """Peak memory of the whole command, from few episodes to many of the same length."""
    peaks = []
    for episodes in EPISODES:
        place = folder / f"{source}-{episodes}"
        {"d4rl": write_d4rl, "atari": write_atari}[source](place, episodes)
        peaks.append(command("etl.build", "--source", source, "-i", place, "-o", place / "shards"))
        shutil.rmtree(place)
    shown = ", ".join(f"{peak / 2**20:,.0f}" for peak in peaks)
    counts = ", ".join(map(str, EPISODES))
    print(
        f"etl: {source} build, peak memory of {counts} episodes: {shown} MiB, ratio {max(peaks) / min(peaks):.3f}",
        flush=True,
    )


def write_d4rl(place: Path, episodes: int) -> None:
    log = D4RLWriter(place / "hopper-random-v4.hdf5", environment("Hopper-v4"), "random")
    rng = np.random.default_rng(0)
    for _ in range(episodes):
        observations = rng.normal(size=(EPISODE_TIMESTEPS, 11)).astype(np.float32)
        actions = rng.uniform(-1, 1, (EPISODE_TIMESTEPS, 3)).astype(np.float32)
        for t in range(EPISODE_TIMESTEPS):
            row = {"observations": observations[t], "actions": actions[t], "rewards": np.float32(t)}
            log.add(row | {"terminals": np.bool_(False), "timeouts": np.bool_(t + 1 == EPISODE_TIMESTEPS)})
    log.close()


def write_atari(place: Path, episodes: int) -> None:
    log = ReplayWriter(place / "Pong" / "1" / "replay_logs")
    rng = np.random.default_rng(0)
    frame = rng.integers(1, 256, (84, 84), dtype=np.uint8)
    for _ in range(episodes):
        for t in range(EPISODE_TIMESTEPS):
            frame[rng.integers(84)] = rng.integers(1, 256)
            last = t + 1 == EPISODE_TIMESTEPS
            log.add({"observation": frame, "action": t % 6, "reward": 0.0, "terminal": last})
    log.close()


def run(folder: Path) -> None:
    """All of them; `folder` is for scratch files, some 12 GB."""
    places = {source: logs(folder, source) for source in FOLDERS}
    for source, place in places.items():
        bench_floor(folder, place, source)
    bench_processes(folder)
    for source in FOLDERS:
        bench_memory(folder, source)


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        run(Path(name))


if __name__ == "__main__":
    main()
