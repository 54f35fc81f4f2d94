"""DQN-Replay logs of Atari games (arXiv 1907.04543): GAME/RUN/replay_logs/, one task per game and run.

$store$_{observation,action,reward,terminal}_ckpt.N.gz, gzipped .npy of N rows each, in lockstep
    -> episodes: rows up to and with one where terminal is set; what is left at the end is cut by the log

Observations are grey (N, H, W), 84x84 in DQN-Replay, or RGB (N, H, W, 3). `scan` reads terminals, actions and
rewards whole and the header of the observations; `read` streams the four files, one episode in memory at a time:
damage to the observations shows only there.

What the writer, Dopamine's replay buffer, leaves in the files:

- Each episode starts with three padding rows, all zero in every array. `read` leaves them out: the episode's
  `row` lies that much after its ref's `start`, and it has that many timesteps fewer.
- Rows from the write position on, `add_count` modulo N, were not written in this round: they are left over
  from the checkpoint before (in DQN-Replay one row, the last). They are no episode's. `invalid_range`, the rows
  around that position whose stack of frames would reach across it, gives it where `add_count` is missing.
- In DQN-Replay a terminal marks the time limit too: an episode of that many timesteps counts as truncated, and a longer
  stretch without a terminal is cut there. Later versions of Dopamine mark no terminal there, and keep its place in a
  pickled set, which is not read: the three rows of zeros show where the next episode begins. They are looked for where
  that set is, where a stretch exceeds the limit, and in small logs, since the frames must be read for it.

- A checkpoint after the first may begin inside an episode, which then has no padding rows: it counts as cut.

Invariant: checkpoints are separate logs; an episode never runs from one into the next.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path
from typing import Literal
from urllib.parse import quote

import numpy as np

from etl.fetch.download import fetch
from etl.sources import (
    STALE,
    EpisodeRef,
    Known,
    NoOptions,
    Recognition,
    Rejection,
    SourceError,
    TaskScan,
    _catalogue,
    _recognition,
)
from etl.sources._catalogue import Game
from etl.sources.atari.checkpoint import AGAIN, ARRAYS, STORE, Checkpoint, number_of, opened, parts
from etl.sources.atari.writer import ReplayWriter
from schemas.episode import ActionSpec, EpisodeError, FieldSpec, RawEpisode, TaskSpec
from schemas.layout import PATCH_SIZE
from schemas.ranges import require
from simulators.registry import environment

BUCKET = "https://storage.googleapis.com/atari-replay-datasets/dqn"
RUNS, CHECKPOINTS = 5, 50
RESIZED = (64, 80)
PADDING = 3  # frames in a stack, less one
TIME_LIMIT = 27_000  # actions, of four frames each: 30 minutes
SMALL = 2**28  # bytes of frames that are looked through in any case
BLOCK = 2**24


@dataclass(frozen=True)
class Options(NoOptions):
    """Options for reading DQN-Replay logs."""

    max_episode_steps: int | None = None
    """Time limit in actions; 27,000 where not given."""
    frames: Literal["80x64", "padded"] = "80x64"
    """Atari frames: filtered to 80x64 (20 patches), or kept at 84x84 and padded with zeros to 96x96 (36 patches)."""

    def check(self) -> None:
        if self.max_episode_steps is not None:
            require("max-episode-steps", self.max_episode_steps, 1, 2**30)


class Atari:
    """Source of DQN-Replay logs, the published ones or others in their layout."""

    name = "atari"
    default_dataset = "Pong/1"
    options = Options
    writer = ReplayWriter

    def known(self, cache: Path) -> list[Known]:
        """The games of DQN-Replay, run 1 of each, checkpoint 0; GAME/2 to GAME/5 are there too."""
        rows = []
        for game in _catalogue.games().values():
            path = f"{game.name}/1/replay_logs"
            file = cache / self.name / path / "$store$_action_ckpt.0.gz"
            where = f"{BUCKET}/{path}/"
            if game.dqn_replay:
                rows.append(
                    Known(f"{game.name}/1", f"ALE/{game.name}-v5", where, file.parent if file.is_file() else None)
                )
        return rows

    def recognise(self, input: Path) -> Recognition | None:
        """By the names that Dopamine gives its arrays."""
        found = [path for path in _recognition.files_below(input) if STORE.fullmatch(path.name)]
        return Recognition(_recognition.below(input, found[0]), _recognition.MARK) if found else None

    def resolve(self, input: Path | None, dataset: str | None, cache: Path) -> list[Path]:
        """The action file of each checkpoint at or below the input, by game, run and number; `dataset` (GAME/RUN or
        GAME/RUN/CHECKPOINT) picks among them. Without an input, `dataset` is downloaded, checkpoint 0 where it
        names none. SourceError where there is none."""
        if input is None:
            return [self._download(dataset or self.default_dataset, cache)]
        input = Path(os.path.abspath(input))
        below = [input] if input.is_file() else _recognition.all_files_below(input)
        found = {_action_file(p) for p in below if STORE.fullmatch(p.name)}
        if not found:
            raise SourceError(f"{input}: no $store$_*_ckpt.N.gz in it; give --input a folder GAME/RUN/replay_logs")
        files = [p for p in found if dataset is None or dataset in (_dataset(p), f"{_dataset(p)}/{number_of(p)}")]
        if not files:
            raise SourceError(f"{input}: no dataset '{dataset}' in it, but {', '.join(sorted(map(_dataset, found)))}")
        return sorted(files, key=_order)

    def scan(self, files: list[Path], options: Options) -> list[TaskScan]:
        """One TaskScan a game and run. SourceError where two folders hold the same game and run."""
        scans = []
        for dataset, group in groupby(sorted(map(_absolute, files), key=_order), key=_dataset):
            checkpoints = list(group)
            folders = sorted({str(p.parent) for p in checkpoints})
            if len(folders) > 1:
                raise SourceError(f"{folders[0]} and {folders[1]} are both {dataset}; rename one or leave it out")
            scans.append(_scan_run(checkpoints, options))
        return scans

    def parts(self, file: str) -> list[Path]:
        """The four arrays of a checkpoint."""
        return parts(Path(file))

    def read(self, task: TaskSpec, refs: Iterable[EpisodeRef]) -> Iterator[RawEpisode | Rejection]:
        """Episodes in the order of refs: observation {'frame': (T, H, W, C) uint8}, action (T,) int32, reward
        (T,) float32 as logged (clipped to [-1, 1] in DQN-Replay)."""
        for file, group in groupby(refs, key=lambda ref: ref.file):
            checkpoint = opened(Path(file))
            for ref in group:
                yield _read_episode(checkpoint, task, ref)

    def _download(self, dataset: str, cache: Path) -> Path:
        game, run, number = _parse(dataset)
        path = f"{game.name}/{run}/replay_logs"
        names = [f"$store$_{array}_ckpt.{number}.gz" for array in ARRAYS] + [f"add_count_ckpt.{number}.gz"]
        return [fetch(f"{BUCKET}/{path}/{quote(name)}", cache / self.name / path) for name in names][0]


SOURCE = Atari()


def _scan_run(files: list[Path], options: Options) -> TaskScan:
    game_name, run = _dataset(files[0]).split("/")
    name = f"{game_name.lower()}-run{run}"
    game = _catalogue.game(game_name)
    if game is None:
        known = [g.name for g in _catalogue.games().values()]
        detail = f"no Atari game '{game_name}'{_catalogue.suggest(game_name, known)} (folders are GAME/RUN/replay_logs)"
        return TaskScan(None, (), tuple(Rejection(name, _relative(p), -1, 0, "unknown game", detail) for p in files))
    refs: list[EpisodeRef] = []
    rejected: list[Rejection] = []
    frame: tuple[int, int, int] | None = None
    limit = options.max_episode_steps or TIME_LIMIT
    found = counted = 0
    for path in files:
        checkpoint = Checkpoint(path)
        try:
            rows = checkpoint.check()
            if checkpoint.frame != (frame or checkpoint.frame):
                raise EpisodeError("wrong shape", f"frames are {checkpoint.frame}, in the checkpoints before {frame}")
            actions = checkpoint["action"].rows(0, rows)  # to the end: the checksum
            rewards, terminals = checkpoint["reward"].rows(0, rows), checkpoint["terminal"].rows(0, rows)
            written = checkpoint.written(rows) if rows else 0
            if written == 0:
                raise EpisodeError("empty", f"no row was written; {AGAIN}")
            starts = _padded_starts(checkpoint, actions[:written], rewards, terminals, limit + PADDING)
        except EpisodeError as error:
            rejected.append(Rejection(name, _relative(path), -1, 0, error.reason, error.detail))
            continue
        finally:
            checkpoint.close()
        frame = checkpoint.frame
        if rows - written > 1:
            detail = f"rows {written} to {rows - 1} lie after the write position: left over from the checkpoint before"
            rejected.append(Rejection(name, _relative(path), -1, written, STALE, detail))
        bounds = _bounds(terminals[:written], limit + PADDING, starts)
        for n, (start, stop) in enumerate(bounds):
            total = float(rewards[start:stop].astype(np.float64).sum())
            refs.append(EpisodeRef(str(path), n, start, stop, total, "truncated" if stop in starts else ""))
        found, counted = found + len(starts), counted + _beyond(terminals[:written], bounds, starts)
    if frame is None:
        return TaskScan(None, (), tuple(rejected))
    task = TaskSpec(
        name,
        Atari.name,
        (_field(frame, options.frames),),
        ActionSpec.discrete(game.actions),
        environment(f"ALE/{game.name}-v5"),
        game.score,
        limit,
    )
    notes = (f"{name}: {found} of {len(refs)} episodes have no terminal: rows of zeros follow, as after a step limit",)
    line = f"{name}: {counted} of {len(refs)} episodes end by counting {limit:,} timesteps, without a terminal"
    warnings = (f"{line}; give --max-episode-steps if the limit is another",) if counted else ()
    return TaskScan(task, tuple(refs), tuple(rejected), warnings=warnings, notes=notes if found else ())


def _field(frame: tuple[int, int, int], fit: str) -> FieldSpec:
    if fit == "padded":
        height, width = (-(-side // PATCH_SIZE) * PATCH_SIZE for side in frame[:2])
        return FieldSpec("frame", "image", frame, resized=(height, width), fit="pad")
    return FieldSpec("frame", "image", frame, resized=RESIZED)


def _bounds(terminals: np.ndarray, limit: int, starts: frozenset[int] = frozenset()) -> list[tuple[int, int]]:
    """[start, stop) of each episode: a terminal ends one, and so do the next one's padding and the limit."""
    stops = sorted({*(int(row) + 1 for row in np.flatnonzero(terminals)), *starts})
    if not stops or stops[-1] < len(terminals):
        stops.append(len(terminals))
    stops = [row for start, stop in pairwise([0, *stops]) for row in [*range(start + limit, stop, limit), stop]]
    return list(pairwise([0, *stops]))


def _beyond(terminals: np.ndarray, bounds: list[tuple[int, int]], starts: frozenset[int]) -> int:
    """How many episodes only the limit ended."""
    return sum(not terminals[stop - 1] and stop not in starts for _, stop in bounds[:-1])


def _padded_starts(
    checkpoint: Checkpoint, actions: np.ndarray, rewards: np.ndarray, terminals: np.ndarray, limit: int
) -> frozenset[int]:
    """First rows of the paddings that no terminal precedes. Frames are read only where such a padding may be missed
    otherwise; damage among them shows when their episodes are read."""
    frames, rows = checkpoint["observation"], len(actions)
    ends = np.flatnonzero(np.append(terminals[: rows - 1], 1))
    looked = checkpoint.marks_limits() or rows * frames.row_bytes <= SMALL or np.diff(ends, prepend=-1).max() > limit
    blank = (actions == 0) & (rewards[:rows] == 0) & (terminals[:rows] == 0)
    if not looked or not blank.any():
        return frozenset()
    step = max(1, BLOCK // frames.row_bytes)
    try:
        for start in range(0, rows, step):
            block = frames.rows(start, min(start + step, rows))
            blank[start : start + step] &= ~block.reshape(len(block), -1).any(axis=1)
    except EpisodeError:
        blank[start:] = False
    edges = np.flatnonzero(np.diff(np.concatenate([[False], blank, [False]]).astype(np.int8)))
    runs = edges.reshape(-1, 2)
    first = runs[(runs[:, 1] - runs[:, 0] == PADDING) & (runs[:, 0] > 0), 0]
    return frozenset(int(row) for row in first if not terminals[row - 1])


def _read_episode(checkpoint: Checkpoint, task: TaskSpec, ref: EpisodeRef) -> RawEpisode | Rejection:
    try:
        action, reward, terminal, frames = (checkpoint[array].rows(ref.start, ref.stop) for array in ARRAYS)
        padding = 0
        while padding < min(PADDING, len(frames)) and not (action[padding] or reward[padding] or frames[padding].any()):
            padding += 1
        ended = bool(terminal[-1])
        limit_reached = ref.timesteps - padding >= task.max_episode_steps  # with a terminal at it, or cut there
        if ref.position == 0 and padding == 0 and number_of(Path(ref.file)) > 0:
            ended = limit_reached = False  # its beginning is in the checkpoint before
        return RawEpisode(
            observation={"frame": frames[padding:].reshape(-1, *checkpoint.frame)},
            action=action[padding:],
            reward=reward[padding:].astype(np.float32),
            terminated=ended and not limit_reached,
            truncated=limit_reached,
            file=_relative(Path(ref.file)),
            position=ref.position,
            row=ref.start + padding,
        )
    except EpisodeError as error:
        return Rejection(task.name, _relative(Path(ref.file)), ref.position, ref.start, error.reason, error.detail)


def _parse(dataset: str) -> tuple[Game, int, int]:
    """'Pong/1' or 'Pong/1/0' -> game, run, checkpoint."""
    logged = [game.name for game in _catalogue.games().values() if game.dqn_replay]
    match = re.fullmatch(r"(\w+)/(\d+)(?:/(\d+))?", dataset)
    game = _catalogue.game(match[1] if match else dataset)
    if game is None or not game.dqn_replay:
        name = dataset.split("/")[0]
        raise SourceError(
            f"DQN-Replay has no game '{name}'{_catalogue.suggest(name, logged)} (a dataset is GAME/RUN, such as Pong/1)"
        )
    run, number = (int(match[2]), int(match[3] or 0)) if match else (0, 0)
    if not (1 <= run <= RUNS and number < CHECKPOINTS):
        raise SourceError(
            f"DQN-Replay has no '{dataset}'; give GAME/RUN or GAME/RUN/CHECKPOINT "
            f"with run 1 to {RUNS} and checkpoint 0 to {CHECKPOINTS - 1}"
        )
    return game, run, number


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(path))


def _action_file(store: Path) -> Path:
    return store.with_name(f"$store$_action_ckpt.{number_of(store)}.gz")


def _run_folder(store: Path) -> Path:
    return store.parent.parent if store.parent.name == "replay_logs" else store.parent


def _dataset(store: Path) -> str:
    """GAME/RUN, from the folders' names, the game as gymnasium spells it."""
    run = _run_folder(store)
    game = _catalogue.game(run.parent.name)
    return f"{game.name if game else run.parent.name}/{run.name}"


def _relative(store: Path) -> str:
    """GAME/RUN/replay_logs/NAME."""
    return str(store.relative_to(_run_folder(store).parents[1]))


def _order(store: Path) -> tuple[str, str, int, str]:
    game, run = _dataset(store).split("/")
    return game, run, number_of(store), str(store)
