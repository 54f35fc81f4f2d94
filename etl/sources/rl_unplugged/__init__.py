"""RL Unplugged (arXiv 2006.13888): gzip TFRecord files PREFIX-NNNNN-of-NNNNN; those of one prefix are one task.

Atari transitions   GAME/run_R: o_t and o_tp1 of four PNGs each, a_t, r_t, d_t, episode_id; an example a transition
Atari episodes      atari_episodes_ordered: observations (PNGs), actions, unclipped_rewards, discounts; one an episode
control episodes    dm_control_suite_episodes: observation/KEY, action, reward, discount, step_type; one an episode
control sequences   dm_control_suite, dm_locomotion: the same keys, overlapping sequences of 2 or 40 steps

Transitions are put together by episode_id, in the order of the file, each o_t being the o_tp1 before it; of a stack
of frames the newest is read. Control episodes pair an action with the reward one row on, and end with an observation
that no action follows (TFDS's rlu_control_suite realigns them so). In sequences an action's reward is in its own row
(deepmind-research/rl_unplugged/dm_control_suite.py reads them so). They are pieces of episodes, cut at both ends; those
of 2 steps, which hold one action, are refused.

Invariant: an episode holds successive timesteps, or is rejected; memory is that of an episode and of 16 bytes a record.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from etl.sources import EpisodeRef, _pictures
from etl.sources._arrays import ArraySource, Column, Log, StoredEpisode, damage
from etl.sources._recognition import MARK, Recognition, all_files_below, below, files_below
from etl.sources._tfrecord import AGAIN, Records, Values, example
from schemas.episode import EpisodeError

TRANSITION = {"o_t", "a_t", "r_t", "d_t", "episode_id"}
ATARI = {"observations", "actions", "unclipped_rewards", "discounts"}
CONTROL = {"action", "reward", "discount", "step_type"}
OBSERVATION = "observation/"
LAST = 2  # dm_env's step_type
MOST_RECORDS = 2**26
LONGEST = 2**17  # transitions of an episode
FRAME = "frame"
_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}")


class RLUnplugged(ArraySource):
    """Source of RL Unplugged's TFRecord files (Atari, dm_control)."""

    name = "rl_unplugged"
    what = "file such as run_1-00000-of-00100"
    fetch = "download from gs://rl_unplugged, such as gsutil cp -r gs://rl_unplugged/atari_episodes_ordered/Pong"

    def recognise(self, input: Path) -> Recognition | None:
        """By the features of the first example."""
        for path in [path for path in files_below(input) if _prefix(path)][:2]:
            try:
                with Records(path) as records:
                    names = set(example(next(iter(records), (0, b""))[1]))
            except (EpisodeError, OSError):
                continue
            for kind, keys in (("transitions", TRANSITION), ("episodes", ATARI), ("sequences", CONTROL)):
                if keys <= names:
                    return Recognition(f"{below(input, path)} holds {kind} of {', '.join(sorted(keys))}", MARK)
        return None

    def below(self, folder: Path) -> list[Path]:
        return sorted(path for path in all_files_below(folder) if _prefix(path))

    def tasks(self, files: list[Path]) -> dict[str, list[Path]]:
        """A task per folder and prefix: Pong-run_1, cartpole_swingup-train."""
        named: dict[str, list[Path]] = {}
        for path in sorted(map(Path, files)):
            named.setdefault(f"{path.absolute().parent.name}-{_prefix(path) or path.stem}", []).append(path)
        return dict(sorted(named.items()))

    def open(self, place: str) -> Log:
        """The log, open already where this thread read it last."""
        path, held = Path(place), getattr(_thread, "log", None)
        _thread.log = None
        if held is not None and held.records.is_of(path):
            return held
        if held is not None:
            held.records.file.close()
        records = Records(path)
        try:
            return _log_of(records)
        except BaseException:
            records.file.close()
            raise


SOURCE = RLUnplugged()
_thread = threading.local()


def _log_of(records: Records) -> Log:
    """By the features of the first example."""
    first = records.record(0)
    if first is None:
        raise EpisodeError("empty", f"no record in it; {AGAIN}")
    names = set(example(first))
    if names >= TRANSITION:
        return _Transitions(records)
    for kind, keys in ((_Atari, ATARI), (_Control, CONTROL)):
        if keys <= names:
            return kind(records)
    known = " or ".join(", ".join(sorted(keys)) for keys in (TRANSITION, ATARI, CONTROL))
    raise EpisodeError("missing key", f"an example of {', '.join(sorted(names)[:8])}; expected {known}")


class _File(Log):
    """A log that its thread keeps open for the next shard, so that gzip is unpacked once for all of them."""

    def __init__(self, records: Records):
        self.records = records

    def close(self) -> None:
        _thread.log = self


class _Episodes(_File):
    """A file of an episode per record."""

    keys: set[str] = set()

    def scan(self) -> Iterator[tuple[int, StoredEpisode | EpisodeError]]:
        """A record that is damaged ends its file: where the next one begins is not known."""
        for position in count():
            try:
                data = self.records.record(position)
            except EpisodeError as error:
                yield position, error
                return
            if data is None:
                return
            yield position, self._tried_record(data)

    def read(self, refs: list[EpisodeRef]) -> Iterator[StoredEpisode | EpisodeError]:
        for ref in refs:
            try:
                yield self._tried_record(self.records.wanted(ref.position))
            except EpisodeError as error:
                yield error

    def _tried_record(self, data: bytes) -> StoredEpisode | EpisodeError:
        try:
            with damage():
                given = example(data)
                if missing := sorted(self.keys - set(given)):
                    raise EpisodeError("missing key", f"no '{missing[0]}' in an example; {AGAIN}")
                return self.stored(given)
        except EpisodeError as error:
            return error

    def stored(self, given: dict[str, Values]) -> StoredEpisode:
        raise NotImplementedError


class _Atari(_Episodes):
    """Whole episodes of Atari."""

    keys = ATARI

    def stored(self, given: dict[str, Values]) -> StoredEpisode:
        action, reward, discount = (_numbers(given, key) for key in ("actions", "unclipped_rewards", "discounts"))
        T = len(action)
        frames = _Pngs(given["observations"], "observations")
        for key, values in (("observations", frames), ("unclipped_rewards", reward), ("discounts", discount)):
            if values.shape[0] != T:
                raise EpisodeError("wrong length", f"'{key}' has {values.shape[0]} timesteps, 'actions' {T}; {AGAIN}")
        terminated = bool(T and discount[-1] == 0)
        return StoredEpisode(T, {FRAME: frames}, action, reward, terminated, not terminated)


class _Control(_Episodes):
    """Episodes, or sequences out of them, of the control suite and dm_locomotion."""

    keys = CONTROL

    def stored(self, given: dict[str, Values]) -> StoredEpisode:
        rows = len(_numbers(given, "discount"))
        whole = "episode_id" in given
        if not whole and rows == 2:
            raise EpisodeError("single transitions", "its examples are shuffled transitions, which make no episode; "
                               " download dm_control_suite_episodes")  # fmt: skip
        T = rows - 1
        if T < 1:
            raise EpisodeError("empty", f"an example of {rows} timesteps; {AGAIN}")
        observation: dict[str, Column] = {}
        for key in sorted(key for key in given if key.startswith(OBSERVATION)):
            observation[key.removeprefix(OBSERVATION)] = _array(given[key], rows, key)
        reward, discount, step_type = (_array(_numbers(given, key), rows, key) for key in
                                       ("reward", "discount", "step_type"))  # fmt: skip
        ended = step_type[-1] == LAST
        after = 1 if whole else 0  # rows between an action and what came of it
        terminated = bool(ended and discount[T - 1 + after] == 0)
        if not whole:
            self.notes = ("its examples are overlapping pieces of episodes, read as pieces that are cut; "
                             "dm_control_suite_episodes holds whole ones",)  # fmt: skip
        cut = bool(ended) and not terminated
        return StoredEpisode(T, observation, _array(given["action"], rows, "action"), reward[after:], terminated, cut)


class _Transitions(_File):
    """A file of an example per transition."""

    def __init__(self, records: Records):
        super().__init__(records)
        places, episodes = [], []
        try:
            for at, data in records:
                found = _numbers(example(data, {"episode_id"}), "episode_id")
                if len(found) != 1:
                    raise EpisodeError("wrong shape", f"'episode_id' has {len(found)} values; {AGAIN}")
                places.append(at)
                episodes.append(int(found[0]))
                if len(places) > MOST_RECORDS:
                    raise EpisodeError("too large", f"more than {MOST_RECORDS} records; split the file")
        except EpisodeError as error:
            self.broken: EpisodeError | None = error
        else:
            self.broken = None
        ids = np.array(episodes, np.int64)
        order = np.argsort(ids, kind="stable")
        self.places = np.array(places, np.int64)[order]
        edges = np.flatnonzero(np.diff(ids[order], prepend=ids[order][:1] - 1)).tolist() if len(ids) else []
        self.bounds = list(zip(edges, [*edges[1:], len(ids)]))

    def scan(self) -> Iterator[tuple[int, StoredEpisode | EpisodeError]]:
        yield from super().scan()
        if self.broken is not None:  # what follows the damage is lost
            yield len(self.bounds), self.broken

    def positions(self) -> Iterable[int]:
        return range(len(self.bounds))

    def episode(self, position: int) -> StoredEpisode:
        start, stop = self.bounds[position]
        if stop - start > LONGEST:
            raise EpisodeError("too large", f"{stop - start} transitions of one episode_id; split the file")
        frames: list[bytes] = []
        numbers: dict[str, list[Any]] = {"a_t": [], "r_t": [], "d_t": []}
        after: list[bytes] | None = None
        for n, at in enumerate(self.places[start:stop].tolist()):
            given = example(self.records.read(at), {"o_t", "o_tp1", *numbers})
            now = _codes(given, "o_t")
            if after is not None and now != after:
                raise EpisodeError("out of order", f"transition {n} does not follow the one before it; sort the "
                                   "examples of an episode by time")  # fmt: skip
            after = _codes(given, "o_tp1") if "o_tp1" in given else None
            frames.append(now[-1])
            for key, values in numbers.items():
                found = _numbers(given, key)
                if len(found) != 1:
                    raise EpisodeError("wrong shape", f"'{key}' has {len(found)} values; {AGAIN}")
                values.append(found[0])
        action, reward, discount = (np.array(values) for values in numbers.values())
        T, terminated = stop - start, bool(discount[-1] == 0)
        damaged = self.broken is not None and position + 1 == len(self.bounds)  # its end may be lost
        pictures = _Pngs(frames, "o_t")
        return StoredEpisode(T, {FRAME: pictures}, action, reward, terminated, not terminated and not damaged, start)


class _Pngs:
    """One coded picture per timestep."""

    def __init__(self, codes: Values, name: str):
        if isinstance(codes, np.ndarray):
            raise EpisodeError("wrong dtype", f"'{name}' holds numbers, expected coded pictures; {AGAIN}")
        self.codes, self.name = codes, name
        self.picture = _pictures.size_of(codes[0], name) if codes else (1, 1, 1)
        self.shape, self.dtype = (len(codes), *self.picture), np.dtype(np.uint8)

    def __getitem__(self, rows: slice, /) -> np.ndarray:
        codes = self.codes[rows]
        return _pictures.decode_all(codes, len(codes), self.name, self.picture)


def _array(values: Values, rows: int, key: str) -> np.ndarray:
    """(rows, ...) of a flat list, or of raw pictures. EpisodeError where they are not as many for each row."""
    if isinstance(values, list):
        if len(values) != rows or len({len(code) for code in values}) > 1:
            raise EpisodeError("wrong length", f"'{key}' has {len(values)} values for {rows} timesteps; {AGAIN}")
        flat = np.frombuffer(b"".join(values), np.uint8).reshape(rows, -1)
        shapes = _pictures.flattened_shapes(flat.shape[1])
        return flat.reshape(rows, *shapes[0]) if shapes else flat
    if len(values) % rows:
        raise EpisodeError("wrong length", f"'{key}' has {len(values)} values for {rows} timesteps; {AGAIN}")
    width = len(values) // rows
    return values.reshape(rows) if width == 1 and key in CONTROL - {"action"} else values.reshape(rows, width)


def _numbers(given: dict[str, Values], key: str) -> np.ndarray:
    values = given.get(key)
    if not isinstance(values, np.ndarray):
        why = "is not in an example" if values is None else "holds no numbers"
        raise EpisodeError("missing key" if values is None else "wrong dtype", f"'{key}' {why}; {AGAIN}")
    return values


def _codes(given: dict[str, Values], key: str) -> list[bytes]:
    values = given.get(key)
    if not isinstance(values, list) or not values:
        raise EpisodeError("wrong dtype", f"'{key}' holds no coded pictures; {AGAIN}")
    return values


def _prefix(path: Path) -> str | None:
    """run_1 of run_1-00000-of-00100."""
    match = _SHARD.fullmatch(path.name)
    return match[1] if match else None
