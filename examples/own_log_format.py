"""A log format of your own: a folder of .npz files, one per episode, read by a source that `--import` registers.

    python -m examples.own_log_format data/npz/logs/reach      # writes 40 episodes to try it with
    python -m etl.build --import examples.own_log_format --source npz-episodes --input data/npz/logs \\
        --output data/npz/shards --action-limit 2 --environment examples.own_environment:CameraReach-v0

Each folder is a task. A file holds `action` (T, A), `reward` (T,), `terminated` (), and the observations under any
other names: floats (T, N), or pictures, uint8 (T, H, W, C); row t is what the action t was chosen from.

Invariant: `scan` reads the observations of one file per task, to stay fast; `read` holds one episode at a time.
"""

import sys
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

import simulators
from etl import sources
from etl.sources import EpisodeRef, Known, LogOptions, LogWriter, Recognition, Rejection, SourceError, TaskScan
from schemas.episode import ActionSpec, FieldSpec, RawEpisode, TaskSpec

OTHERS = {"action", "reward", "terminated"}
UNREADABLE = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error)  # of damaged files


@dataclass(frozen=True)
class Options(LogOptions):
    """Options for reading these logs; --environment and --max-episode-steps are LogOptions'."""

    action_limit: float = 1.0
    """Actions lie in [-LIMIT, LIMIT], which the files do not say."""

    def check(self) -> None:
        super().check()
        if not 0 < self.action_limit < np.inf:
            raise ValueError(f"--action-limit {self.action_limit}: give a positive number")


class NpzEpisodes:
    """Source of folders of .npz episodes."""

    name = "npz-episodes"
    default_dataset = ""
    options = Options
    writer: type[LogWriter] | None = None  # etl.record writes no such logs

    def known(self, cache: Path) -> list[Known]:
        """None can be downloaded by name."""
        return []

    def recognise(self, input: Path) -> Recognition | None:
        """By the ending, which says little (0 of 0, 1 and 2): without --source, one that knows more is taken."""
        found = sorted(input.rglob("*.npz"))
        return Recognition(f"{len(found)} .npz files", certainty=0) if found else None

    def resolve(self, input: Path | None, dataset: str | None, cache: Path) -> list[Path]:
        """All files below the input folder. SourceError where there is none."""
        if input is None or dataset is not None:
            raise SourceError(f"source {self.name} downloads nothing; give --input a folder, and no --dataset")
        if files := sorted(input.rglob("*.npz")):
            return files
        raise SourceError(f"{input}: no .npz file in it; give --input the folder of the episodes")

    def scan(self, files: list[Path], options: Options) -> list[TaskScan]:
        """One TaskScan per folder."""
        folders = sorted({path.parent for path in files})
        return [_scan_folder(folder, [path for path in files if path.parent == folder], options) for folder in folders]

    def parts(self, file: str) -> list[Path]:
        """The file itself."""
        return [Path(file)]

    def read(self, task: TaskSpec, refs: Iterable[EpisodeRef]) -> Iterator[RawEpisode | Rejection]:
        """One episode or rejection per ref, in order."""
        for ref in refs:
            try:
                with np.load(ref.file) as arrays:
                    yield RawEpisode(
                        observation={field.key: _unified(arrays[field.key]) for field in task.observation},
                        action=_unified(arrays["action"]),
                        reward=_unified(arrays["reward"]),
                        terminated=bool(arrays["terminated"]),
                        truncated=not arrays["terminated"],
                        file=Path(ref.file).name,
                        position=ref.position,
                    )
            except UNREADABLE as error:
                yield _rejection(task.name, ref.file, ref.position, error)


SOURCE = NpzEpisodes()
sources.register(SOURCE)  # a package would name SOURCE in its entry points instead


def _scan_folder(folder: Path, files: list[Path], options: Options) -> TaskScan:
    refs: list[EpisodeRef] = []
    rejected: list[Rejection] = []
    task = None
    for position, path in enumerate(files):
        try:
            with np.load(path) as arrays:
                reward = arrays["reward"]
                task = task or _task(folder.name, arrays, options)
            refs.append(EpisodeRef(str(path), position, 0, len(reward), float(reward.sum())))
        except UNREADABLE as error:
            rejected.append(_rejection(folder.name, str(path), position, error))
    if task is not None:
        limit = options.max_episode_steps or max(ref.timesteps for ref in refs)
        task = replace(task, max_episode_steps=limit)
    environment = task.environment if task else None
    return TaskScan(task, tuple(refs), tuple(rejected), warnings=sources.environment_warnings(environment))


def _task(name: str, arrays: np.lib.npyio.NpzFile, options: Options) -> TaskSpec:
    """What a folder's first readable episode says; the others must fit it, which etl.sources.read checks."""
    fields = []
    for key in sorted(set(arrays.files) - OTHERS):
        values = arrays[key]
        fields.append(FieldSpec(key, "image" if values.dtype == np.uint8 else "continuous", values.shape[1:]))
    limit, size = options.action_limit, arrays["action"].shape[1]
    environment = simulators.environment(options.environment) if options.environment else None
    return TaskSpec(name, SOURCE.name, tuple(fields), ActionSpec.continuous(-limit, limit, size), environment)


def _unified(values: np.ndarray) -> np.ndarray:
    """Floats as float32; pictures as they are."""
    return values if values.dtype == np.uint8 else values.astype(np.float32)


def _rejection(task: str, file: str, position: int, error: Exception) -> Rejection:
    return Rejection(task, Path(file).name, position, 0, "unreadable", f"{error}; write the file again")


def write_episodes(folder: Path, count: int) -> None:
    """Episodes of the example environment and its expert, as your own logger might write them."""
    from examples.own_environment import expert

    env = simulators.make(simulators.environment("examples.own_environment:CameraReach-v0"))
    act = expert(env)
    folder.mkdir(parents=True, exist_ok=True)
    for episode in range(count):
        rows, ended = [], False
        observation, _ = env.reset(seed=episode)
        while not ended:
            action = act(observation)
            following, reward, terminated, truncated, _ = env.step(action)
            rows.append(observation | {"action": action, "reward": reward})
            observation, ended = following, terminated or truncated
        arrays: dict[str, Any] = {key: np.stack([row[key] for row in rows]) for key in rows[0]}
        arrays["terminated"] = terminated
        np.savez_compressed(folder / f"{episode:04}.npz", **arrays)


if __name__ == "__main__":
    write_episodes(Path(sys.argv[1]), 40)
    print(f"{sys.argv[1]}: 40 episodes")
