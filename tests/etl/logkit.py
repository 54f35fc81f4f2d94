"""What the tests of log sources share: read all episodes, compare them with what was recorded, build twice."""

from __future__ import annotations

import io
from pathlib import Path

import h5py
import numpy as np
from rich.console import Console

from etl import sources
from etl.build import Options, beam_flags, build
from etl.building.plan import BuildConfig
from etl.sources import Rejection, TaskScan
from etl.tokenizers.continuous import compand
from etl.tokenizers.text import DEFAULT_MODEL, TextTokenizer
from etl.tokenizers.timestep import TimestepTokenizer
from schemas.episode import RawEpisode
from schemas.vocabulary import DISJOINT

TEXT = TextTokenizer(DEFAULT_MODEL, DISJOINT)


def write_d4rl(path: Path, arrays: dict, env_id: str | None = None, without=()) -> None:
    """Arrays as D4RL's files hold them."""
    with h5py.File(path, "w") as file:
        for key, values in arrays.items():
            if key not in without:
                packs = np.ndim(values) and np.size(values)
                file.create_dataset(key, data=values, compression="gzip" if packs else None)
        if env_id:
            file.attrs["env_id"] = env_id


def scans_of(name: str, place: Path, **options) -> list[TaskScan]:
    source = sources.load(name)
    return source.scan(source.resolve(place, None, place), source.options(**options))


def episodes_of(name: str, place: Path, **options) -> tuple[TaskScan, list[RawEpisode | Rejection]]:
    """The only task at a place, and what reading each of its episodes gives."""
    (scan,) = scans_of(name, place, **options)
    if scan.task is None:
        return scan, []
    found = list(sources.read(sources.load(name), scan.task, scan.episodes))
    assert len(found) == len(scan.episodes)
    return scan, found


def same(scan: TaskScan, found: RawEpisode | Rejection, observation: dict, action, reward=None) -> None:
    """The episode holds what was recorded: numbers to half a bin after a way through tokens, pictures to the byte."""
    assert isinstance(found, RawEpisode), found
    task = scan.task
    assert set(found.observation) == set(observation) == {spec.key for spec in task.observation}
    tokenizer = TimestepTokenizer(task, DISJOINT, TEXT)
    tokens = tokenizer.encode_observation(found.observation).tokens
    decoded = tokenizer.decode_observation(tokens)
    half = 1.0001 / DISJOINT.bins
    for spec in task.observation:
        wanted = np.asarray(observation[spec.key])
        got = found.observation[spec.key]
        if spec.kind == "continuous":
            assert got.shape == wanted.shape and np.array_equal(got, wanted.astype(np.float32))
            clipped = np.clip(wanted, -DISJOINT.scale, DISJOINT.scale)
            assert np.abs(compand(decoded[spec.key], DISJOINT) - compand(clipped, DISJOINT)).max() <= half
        elif spec.kind == "text":
            assert got.tolist() == np.broadcast_to(wanted, got.shape).tolist()
        else:
            assert np.array_equal(got, wanted)
    taken = np.asarray(action)
    back = tokenizer.decode_action(tokenizer.encode_action(found.action)[0])
    if task.action.kind == "discrete":
        assert np.array_equal(back, taken.reshape(back.shape))
    else:
        taken = taken.reshape(len(taken), -1)
        low, high = np.array(task.action.low), np.array(task.action.high)
        assert (np.abs(back - np.clip(taken, low, high)) <= half * (high - low) / 2 + 1e-6).all()
    assert np.array_equal(found.reward, np.zeros(len(taken)) if reward is None else np.float32(reward))


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("shard-*"))}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def build_here(name: str, place: Path, output: Path, workers: int = 1, megabytes: float = 0.05, **options):
    """A build as the command does it; its bytes."""
    config = BuildConfig(shard_megabytes=megabytes)
    kind = sources.load(name).options(**options)
    given = Options(name, str(place), str(output), config=config, scan=kind, workers=workers, max_rejected_share=1.0)
    build(given, beam_flags([], workers), Console(file=io.StringIO()))
    return contents(output)


def reversed_scan(name: str, place: Path, **options) -> list[TaskScan]:
    """The scan of the same files, named in the other order."""
    source = sources.load(name)
    return source.scan(source.resolve(place, None, place)[::-1], source.options(**options))
