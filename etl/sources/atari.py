"""DQN-Replay logs of Atari games (arXiv 1907.04543): GAME/RUN/replay_logs/, one task a game and run.

$store$_{observation,action,reward,terminal}_ckpt.N.gz, gzipped .npy of N rows each, in lockstep
    -> episodes: rows up to and with one where terminal is set; what is left at the end is cut by the log

`scan` reads terminals, actions and rewards whole and the header of the observations; `read` runs once through the
four files, forwards, one episode in memory at a time: damage to the observations shows only there.

What the writer, Dopamine's replay buffer, leaves in the files:

- Each episode starts with three padding rows, all zero in every array. `read` leaves them out: the episode's
  `row` lies that much behind its ref's `start`, and it has that many timesteps fewer.
- Rows at and behind the write position, `add_count` modulo N, were not written in this round: they are left over
  from the checkpoint before (in DQN-Replay one row, the last). They are no episode's. `invalid_range` holds the
  rows whose stack of frames would reach across that position, and is not needed.
- A terminal marks the time limit too: an episode of that many timesteps counts as truncated.

Invariant: checkpoints are separate logs; an episode never runs from one into the next.
"""

from __future__ import annotations

import gzip
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from itertools import groupby, pairwise
from pathlib import Path
from urllib.parse import quote

import numpy as np

from etl.download import fetch
from etl.sources import EpisodeRef, Rejection, ScanOptions, SourceError, TaskScan, _catalogue
from etl.sources._catalogue import Game
from schemas.episode import ActionSpec, EnvironmentSpec, EpisodeError, FieldSpec, RawEpisode, TaskSpec

BUCKET = "https://storage.googleapis.com/atari-replay-datasets/dqn"
RUNS, CHECKPOINTS = 5, 50
ARRAYS = ("action", "reward", "terminal", "observation")
FRAME = (84, 84)
RESIZED = (64, 80)
PADDING = 3  # frames in a stack, less one
TIME_LIMIT = 27_000  # actions, of four frames each: 30 minutes
PIECE = 2**20
_STORE = re.compile(r"\$store\$_(?:action|reward|terminal|observation)_ckpt\.(\d+)\.gz")
_AGAIN = "download it again"


class Atari:
    """Source of DQN-Replay logs, the published ones or others in their layout."""

    name = "atari"
    default_dataset = "Pong/1"

    def resolve(self, input: Path | None, dataset: str | None, cache: Path) -> list[Path]:
        """The action file of each checkpoint at or below the input, by game, run and number; `dataset` (GAME/RUN or
        GAME/RUN/CHECKPOINT) picks among them. Without an input, `dataset` is downloaded, checkpoint 0 where it
        names none. SourceError where there is none."""
        if input is None:
            return [self._download(dataset or self.default_dataset, cache)]
        input = Path(os.path.abspath(input))
        found = {
            _action_file(p) for p in ([input] if input.is_file() else input.rglob("*")) if _STORE.fullmatch(p.name)
        }
        if not found:
            raise SourceError(f"{input}: no $store$_*_ckpt.N.gz in it; give --input a folder GAME/RUN/replay_logs")
        files = [p for p in found if dataset is None or dataset in (_dataset(p), f"{_dataset(p)}/{_number(p)}")]
        if not files:
            raise SourceError(f"{input}: no dataset '{dataset}' in it, but {', '.join(sorted(map(_dataset, found)))}")
        return sorted(files, key=_order)

    def scan(self, files: list[Path], options: ScanOptions) -> list[TaskScan]:
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
        return [Path(file.replace("_action_", f"_{array}_")) for array in ARRAYS]

    def read(self, task: TaskSpec, refs: Iterable[EpisodeRef]) -> Iterator[RawEpisode | Rejection]:
        """Episodes in the order of refs: observation {'frame': (T, 84, 84, 1) uint8}, action (T,) int32, reward
        (T,) float32 as logged (clipped to [-1, 1] in DQN-Replay)."""
        for file, group in groupby(refs, key=lambda ref: ref.file):
            checkpoint = _Checkpoint(Path(file))
            try:
                for ref in group:
                    yield _read_episode(checkpoint, task, ref)
            finally:
                checkpoint.close()

    def _download(self, dataset: str, cache: Path) -> Path:
        game, run, number = _parse(dataset)
        path = f"{game.name}/{run}/replay_logs"
        names = [f"$store$_{array}_ckpt.{number}.gz" for array in ARRAYS] + [f"add_count_ckpt.{number}.gz"]
        return [fetch(f"{BUCKET}/{path}/{quote(name)}", cache / self.name / path) for name in names][0]


SOURCE = Atari()


class _Rows:
    """A gzipped .npy, read forwards: shape and dtype first, then ranges of rows. EpisodeError says what is wrong."""

    def __init__(self, path: Path):
        self.path, self.row = path, 0
        self.error: EpisodeError | None = None
        try:
            self.file = gzip.GzipFile(path, "rb")
        except OSError as error:
            raise EpisodeError("missing file", f"{path.name} cannot be opened ({error.strerror}); {_AGAIN}") from error
        try:
            self.shape, self.dtype = self._header()
        except EpisodeError:
            self.file.close()
            raise

    def _header(self) -> tuple[tuple[int, ...], np.dtype]:
        try:
            version = np.lib.format.read_magic(self.file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, column_major, dtype = read(self.file)
        except (OSError, EOFError, zlib.error) as error:
            raise self._corrupt(error) from error
        except ValueError as error:
            raise EpisodeError("not npy", f"{self.path.name} holds no .npy array ({error}); {_AGAIN}") from error
        if dtype.hasobject or (column_major and len(shape) > 1):
            raise EpisodeError("not npy", f"{self.path.name} holds {dtype} in an order or form that is not read")
        return shape, dtype

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) as (stop - start, ...); start must not lie before the last stop."""
        if self.error is not None:
            raise self.error
        if start < self.row:
            raise ValueError(f"{self.path.name}: row {start} asked for behind row {self.row}")
        out = np.empty((stop - start, *self.shape[1:]), self.dtype)
        try:
            skip = (start - self.row) * int(np.prod(self.shape[1:])) * self.dtype.itemsize
            while skip:
                skip -= self._piece(self.file.read(min(skip, PIECE)), start)
            view = out.data.cast("B") if out.size else memoryview(b"")
            while view:
                count = self.file.readinto(view[:PIECE])
                view = view[self._piece(view[:count], stop) :]
            self.row = stop
            if stop == self.shape[0] and self.file.read(1):  # at the end, this is what checks the checksum
                raise OSError("bytes behind the last row")
        except (OSError, EOFError, zlib.error) as error:
            self.error = self._corrupt(error)
            raise self.error from error
        return out

    def _piece(self, piece: bytes | memoryview, row: int) -> int:
        if not len(piece):
            raise EOFError(f"ends before row {row} of {self.shape[0]}")
        return len(piece)

    def _corrupt(self, error: Exception) -> EpisodeError:
        return EpisodeError("corrupt gzip", f"{self.path.name}: {error}; {_AGAIN}")

    def close(self) -> None:
        self.file.close()


class _Checkpoint:
    """The arrays of one checkpoint, opened at first use and then read forwards."""

    def __init__(self, action_file: Path):
        self.action_file = action_file
        self.opened: dict[str, _Rows] = {}

    def __getitem__(self, array: str) -> _Rows:
        if array not in self.opened:
            self.opened[array] = _Rows(_sibling(self.action_file, f"$store$_{array}"))
        return self.opened[array]

    def check(self) -> int:
        """Rows of each array. EpisodeError where arrays do not fit together."""
        rows = self["action"].shape[:1]
        kinds = {"action": "iu", "reward": "f", "terminal": "iub", "observation": "u"}
        for array in ARRAYS:
            shape, dtype = self[array].shape, self[array].dtype
            if dtype.kind not in kinds[array] or (array == "observation" and dtype != np.uint8):
                raise EpisodeError("wrong dtype", f"{self[array].path.name} is {dtype}")
            expected = (*rows, *FRAME) if array == "observation" else rows
            if shape[1:] != expected[1:] or not rows:
                raise EpisodeError("wrong shape", f"{self[array].path.name} is {shape}, expected {expected}")
            if shape != expected:
                raise EpisodeError(
                    "wrong length", f"{self[array].path.name} has {shape[0]} rows, actions {rows[0]}; {_AGAIN}"
                )
        return rows[0]

    def written(self, rows: int) -> int:
        """Rows in front of the write position: all where the log has no add_count."""
        path = _sibling(self.action_file, "add_count")
        if not path.is_file():
            return rows
        count = _Rows(path)
        try:
            if count.shape not in ((), (1,)) or count.dtype.kind not in "iu":
                raise EpisodeError("wrong shape", f"{path.name} is {count.dtype} {count.shape}, expected one integer")
            value = int(np.frombuffer(count.file.read(), count.dtype)[0])
        except (OSError, EOFError, zlib.error, ValueError, IndexError) as error:
            raise EpisodeError("corrupt gzip", f"{path.name}: {error}; {_AGAIN}") from error
        finally:
            count.close()
        return value if value < rows else value % rows or rows

    def close(self) -> None:
        for array in self.opened.values():
            array.close()


def _scan_run(files: list[Path], options: ScanOptions) -> TaskScan:
    game_name, run = _dataset(files[0]).split("/")
    name = f"{game_name.lower()}-run{run}"
    game = _catalogue.game(game_name)
    if game is None:
        known = [g.name for g in _catalogue.games().values()]
        detail = f"no Atari game '{game_name}'{_catalogue.suggest(game_name, known)} (folders are GAME/RUN/replay_logs)"
        return TaskScan(None, (), tuple(Rejection(name, _relative(p), -1, 0, "unknown game", detail) for p in files))
    task = TaskSpec(
        name,
        Atari.name,
        (FieldSpec("frame", "image", (*FRAME, 1), resized=RESIZED),),
        ActionSpec("discrete", 1, choices=game.actions),
        EnvironmentSpec("atari", f"ALE/{game.name}-v5"),
        game.score,
        options.max_episode_steps or TIME_LIMIT,
    )
    refs: list[EpisodeRef] = []
    rejected: list[Rejection] = []
    for path in files:
        checkpoint = _Checkpoint(path)
        try:
            rows = checkpoint.check()
            for array in ("action", "reward"):
                checkpoint[array].rows(0, rows)  # to the end: the checksum
            terminals = checkpoint["terminal"].rows(0, rows)
            written = checkpoint.written(rows)
            if written == 0:
                raise EpisodeError("empty", f"no row was written; {_AGAIN}")
        except EpisodeError as error:
            rejected.append(Rejection(name, _relative(path), -1, 0, error.reason, error.detail))
            continue
        finally:
            checkpoint.close()
        if rows - written > 1:
            detail = f"rows {written} to {rows - 1} lie behind the write position: left over from the checkpoint before"
            rejected.append(Rejection(name, _relative(path), -1, written, "stale rows", detail))
        stops = [int(row) + 1 for row in np.flatnonzero(terminals[:written])]
        if not stops or stops[-1] < written:
            stops.append(written)
        refs += [EpisodeRef(str(path), n, *bounds) for n, bounds in enumerate(pairwise([0, *stops]))]
    return TaskScan(task, tuple(refs), tuple(rejected))


def _read_episode(checkpoint: _Checkpoint, task: TaskSpec, ref: EpisodeRef) -> RawEpisode | Rejection:
    try:
        action, reward, terminal, frames = (checkpoint[array].rows(ref.start, ref.stop) for array in ARRAYS)
        padding = 0
        while padding < min(PADDING, len(frames)) and not (action[padding] or reward[padding] or frames[padding].any()):
            padding += 1
        ended = bool(terminal[-1])
        limit_reached = ref.timesteps - padding >= task.max_episode_steps
        episode = RawEpisode(
            observation={"frame": frames[padding:, ..., None]},
            action=action[padding:],
            reward=reward[padding:].astype(np.float32),
            terminated=ended and not limit_reached,
            truncated=ended and limit_reached,
            file=_relative(Path(ref.file)),
            position=ref.position,
            row=ref.start + padding,
        )
        episode.check(task)
    except EpisodeError as error:
        return Rejection(task.name, _relative(Path(ref.file)), ref.position, ref.start, error.reason, error.detail)
    return episode


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
    return store.with_name(f"$store$_action_ckpt.{_number(store)}.gz")


def _sibling(action_file: Path, stem: str) -> Path:
    return action_file.with_name(f"{stem}_ckpt.{_number(action_file)}.gz")


def _number(store: Path) -> int:
    match = _STORE.fullmatch(store.name)
    if match is None:
        raise SourceError(f"{store}: not a $store$_*_ckpt.N.gz of DQN-Replay; give one, or a folder of them")
    return int(match[1])


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
    return game, run, _number(store), str(store)
