"""RLDS datasets as TensorFlow Datasets writes them (Open X-Embodiment), read without TensorFlow.

NAME/VERSION/features.json, dataset_info.json
NAME/VERSION/NAME-SPLIT.tfrecord-NNNNN-of-NNNNN    one record per episode: steps/observation/KEY, steps/action, ...
    -> fields KEY, language_instruction; an action of several arrays is one, in the order of their keys

Observation, action and reward of one row belong together. The last step (is_last) has no action that was taken: it is
left out. is_terminal there means that the environment ended the episode, else its limit did. Splits other than train
are held out, where there are several. Files are opened by etl/sources/_tfrecord.py, arrays made by features.py.

Invariant: nothing is lost without a word: a reward in the last step counts with the action before it, and is noted.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from etl.sources import EpisodeRef, _recognition
from etl.sources._arrays import KEYS, ArrayOptions, ArraySource, Column, Log, StoredEpisode, damage, path_of
from etl.sources._recognition import MARK, Recognition, all_files_below, files_below, json_of
from etl.sources._tfrecord import AGAIN, Records, example
from etl.sources.rlds.features import FLAT, LENGTHS, STEPS, Given, Leaf, leaves_of
from schemas.episode import EpisodeError

FEATURES, INFO = "features.json", "dataset_info.json"
OBSERVATION, ACTION, INSTRUCTION = "observation/", "action", "language_instruction"
MISSING_LISTED = 10_000  # records that dataset_info.json counts and the file lacks
EVERYTHING = "all"  # after KEYS: also arrays that are left out unless named
_FILE = re.compile(r"(?P<name>.+)-(?P<split>[^-.]+)\.tfrecord-(?P<index>\d{5})-of-(?P<count>\d{5})")


@dataclass(frozen=True)
class Options(ArrayOptions):
    """Options for reading RLDS datasets."""


class RLDS(ArraySource):
    """Source of RLDS datasets in TFRecord files (TFDS, Open X-Embodiment)."""

    name = "rlds"
    options = Options
    what = f"TFDS dataset with {FEATURES} and .tfrecord files"
    hub = "OWNER/NAME"
    fetch = "download it, such as gsutil -m cp -r gs://gresearch/robotics/NAME/VERSION FOLDER"

    def recognise(self, input: Path) -> Recognition | None:
        """By a features.json with steps, or the steps of the first record."""
        files = files_below(input)
        for path in [path for path in files if path.name == FEATURES][: _recognition.FEW]:
            try:
                leaves_of(json_of(path))
            except EpisodeError:
                continue
            return Recognition(f"{_recognition.below(input, path)} with steps", MARK)
        for path in [path for path in files if _FILE.fullmatch(path.name)][:1]:
            try:
                with Records(path) as records:
                    names = example(next(iter(records), (0, b""))[1])
            except (EpisodeError, OSError):
                return None
            if any(name.startswith(STEPS) for name in names):
                return Recognition(f"{_recognition.below(input, path)} holds {STEPS}*", MARK)
        return None

    def wanted(self, name: str) -> bool:
        base = name.rpartition("/")[2]
        return base in (FEATURES, INFO) or _FILE.fullmatch(base) is not None

    def below(self, folder: Path) -> list[Path]:
        return sorted(path for path in all_files_below(folder) if _FILE.fullmatch(path.name))

    def tasks(self, files: list[Path]) -> dict[str, list[Path]]:
        """A task per dataset: its name, or with the configuration where that makes the difference."""
        folders: dict[Path, list[Path]] = {}
        for path in sorted(path.absolute() for path in files):
            folders.setdefault(path.parent, []).append(path)
        names = [_name(folder) for folder in folders]
        named: dict[str, list[Path]] = {}
        for folder, own in zip(folders, names):
            name = own if names.count(own) == 1 else f"{own}-{folder.parent.name}-{folder.name}"
            named.setdefault(name, []).extend(folders[folder])
        return dict(sorted(named.items()))

    def place(self, path: Path, options: Options) -> str:
        return f"{path}{KEYS}{EVERYTHING}" if options.observation_keys else str(path)

    def open(self, place: str) -> Log:
        return _File(path_of(place), KEYS in place)

    def parts(self, file: str) -> list[Path]:
        """The file and what describes it."""
        path = path_of(file)
        return [path, *(path.with_name(name) for name in (FEATURES, INFO) if path.with_name(name).is_file())]


SOURCE = RLDS()


class _File(Log):
    """One TFRecord file."""

    def __init__(self, path: Path, everything: bool):
        self.leaves = _described(path.with_name(FEATURES))
        about = json_of(path.with_name(INFO))
        self.about: dict[str, Any] = about if isinstance(about, dict) else {}
        self.match = _FILE.fullmatch(path.name)
        keys = {leaf.key for leaf in self.leaves.values()}
        self.actions = [self.leaves[ACTION]] if ACTION in keys else _below(self.leaves, f"{ACTION}/")
        if not self.actions:
            raise EpisodeError("missing key", f"{FEATURES} has no steps/{ACTION}; {AGAIN}")
        if strings := [leaf.key for leaf in self.actions if leaf.kind != "number"]:
            raise EpisodeError("wrong dtype", f"'{strings[0]}' is no array of numbers")
        seen = [*_below(self.leaves, OBSERVATION), *(self.leaves[key] for key in (INSTRUCTION,) if key in keys)]
        odd = [leaf for leaf in seen if "embedding" in leaf.key or (leaf.kind != "text" and leaf.shape.count(-1) > 2)]
        self.observed = [leaf for leaf in seen if everything or leaf not in odd]
        self.notes = self._notes(path, [] if everything else odd)
        self.held_out = self._held_out(path)
        self.records = Records(path)

    def scan(self) -> Iterator[tuple[int, StoredEpisode | EpisodeError]]:
        """Numbers only, without checksums: pictures are neither copied nor decoded."""
        names = self._names([leaf for leaf in self.observed if leaf.kind != "picture"])
        position = 0
        while True:
            try:
                data = self.records.record(position, check=False)
            except EpisodeError as error:
                yield position, error
                return
            if data is None:
                break
            yield position, self._tried_record(data, names, pictures=False)
            position += 1
        expected = self._expected()
        for lost in range(position, min(expected, position + MISSING_LISTED)):
            yield lost, EpisodeError("missing record", f"{INFO} counts {expected} episodes in it; {AGAIN}")

    def read(self, refs: list[EpisodeRef]) -> Iterator[StoredEpisode | EpisodeError]:
        names = self._names(self.observed)
        for ref in refs:
            try:
                yield self._tried_record(self.records.wanted(ref.position), names, pictures=True)
            except EpisodeError as error:
                yield error

    def close(self) -> None:
        self.records.file.close()

    def _tried_record(self, data: bytes, names: set[str], pictures: bool) -> StoredEpisode | EpisodeError:
        try:
            with damage():
                return self._stored(Given(example(data, names)), pictures)
        except EpisodeError as error:
            return error

    def _stored(self, given: Given, pictures: bool) -> StoredEpisode:
        flag = next((key for key in ("is_last", "is_first") if key in self.leaves and given.has(key)), None)
        steps = len(given.numbers(self.leaves[flag] if flag else self.actions[0]))
        flat = [given.numbers(leaf, steps).reshape(steps, -1) for leaf in self.actions]
        action = flat[0] if len(flat) == 1 else np.concatenate([part.astype(np.float32) for part in flat], axis=1)
        last, terminal = self._flag(given, "is_last", steps), self._flag(given, "is_terminal", steps)
        T = steps - 1 if last else steps
        if T < 1:
            raise EpisodeError("empty", f"an episode of {steps} steps, which holds no action; {AGAIN}")
        observation: dict[str, Column] = {}
        for leaf in self.observed:
            key = leaf.key.removeprefix(OBSERVATION)
            if leaf.kind == "picture":
                observation[key] = given.pictures(leaf, steps) if pictures else _Blank(steps, leaf.shape)
            elif leaf.kind == "text":
                observation[key] = given.texts(leaf, steps)
            else:
                observation[key] = given.numbers(leaf, steps)
        rewards = self._rewards(given, steps, T)
        return StoredEpisode(T, observation, action, rewards, terminal, last and not terminal)

    def _rewards(self, given: Given, steps: int, T: int) -> np.ndarray | None:
        """(T,), with the last step's added to the one before."""
        leaf = self.leaves.get("reward")
        if leaf is None or not given.has("reward"):
            return None
        rewards: np.ndarray = given.numbers(leaf, steps).astype(np.float32)
        if rewards.size != steps:
            raise EpisodeError("wrong shape", f"a reward of {rewards.size // steps} values; {AGAIN}")
        rewards = rewards.reshape(steps)
        if steps > T and rewards[T] != 0 and np.isfinite(rewards[T]):
            rewards = np.append(rewards[: T - 1], rewards[T - 1] + rewards[T])
            line = "there are rewards in last steps, where RLDS has none; they count with the action before"
            if line not in self.notes:
                self.notes += (line,)
        return rewards[:T]

    def _flag(self, given: Given, key: str, steps: int) -> bool:
        """A flag of the last step; False where it is not there."""
        leaf = self.leaves.get(key)
        return bool(leaf and given.has(key) and given.numbers(leaf, steps).reshape(steps, -1)[-1].any())

    def _names(self, leaves: list[Leaf]) -> set[str]:
        keys = [leaf.key for leaf in (*leaves, *self.actions)] + ["reward", "is_first", "is_last", "is_terminal"]
        return {STEPS + key + end for key in keys for end in ("", FLAT, LENGTHS)}

    def _notes(self, path: Path, odd: list[Leaf]) -> tuple[str, ...]:
        lines = []
        if odd:
            names = ", ".join(leaf.key.removeprefix(OBSERVATION) for leaf in odd)
            lines.append(f"not read: {names}; --observation-keys names what to read")
        if len(self.actions) > 1:
            lines.append(f"an action is {', '.join(leaf.key for leaf in self.actions)}, in this order")
        if self.match:
            split, count = self.match["split"], int(self.match["count"])
            found = map(_FILE.fullmatch, (other.name for other in path.parent.iterdir()))
            here = sum(one is not None and one.group("name", "split") == (self.match["name"], split) for one in found)
            if here < count:
                lines.append(f"{here} of {count} files of split '{split}' are here")
        return tuple(lines)

    def _held_out(self, path: Path) -> Mapping[int, bool]:
        """All or none of the file, by its split, where there are others."""
        found = (_FILE.fullmatch(other.name) for other in path.parent.iterdir())
        splits = {match["split"] for match in found if match}
        if self.match is None or len(splits) < 2 or "train" not in splits:
            return {}
        return _All(self.match["split"] != "train")

    def _expected(self) -> int:
        """Records that dataset_info.json counts in this file; 0 where it does not say."""
        try:
            assert self.match is not None
            split = next(one for one in self.about["splits"] if one["name"] == self.match["split"])
            count = int(split["shardLengths"][int(self.match["index"])])
        except (LookupError, TypeError, ValueError, AssertionError, StopIteration):
            return 0
        return count


class _All(dict[int, bool]):
    """One answer for every position."""

    def __init__(self, answer: bool):
        super().__init__()
        self.answer = answer

    def get(self, position: int, default: Any = None) -> bool:
        return self.answer


class _Blank:
    """A picture column of which only the shape is known."""

    dtype = np.dtype(np.uint8)

    def __init__(self, steps: int, shape: tuple[int, ...]):
        if len(shape) != 3 or -1 in shape:
            raise EpisodeError("wrong shape", f"a picture of {shape}; {FEATURES} has to say its size")
        self.shape = (steps, *shape)

    def __getitem__(self, rows: slice) -> np.ndarray:
        return np.zeros((len(range(self.shape[0])[rows]), *self.shape[1:]), np.uint8)


def _below(leaves: Mapping[str, Leaf], prefix: str) -> list[Leaf]:
    return [leaf for key, leaf in leaves.items() if key.startswith(prefix)]


def _described(path: Path) -> dict[str, Leaf]:
    try:
        status = path.stat()
    except OSError:
        detail = f"no {FEATURES} beside it, which says what its arrays are; {AGAIN}"
        raise EpisodeError("missing file", detail) from None
    return _leaves(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=16)
def _leaves(path: Path, size: int, changed: int) -> dict[str, Leaf]:
    return {leaf.key: leaf for leaf in leaves_of(json_of(path))}


def _name(folder: Path) -> str:
    """By dataset_info.json, else by the folders."""
    about = json_of(folder / INFO)
    name = about.get("name") if isinstance(about, dict) else None
    if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+", name):
        name = folder.parent.name if re.fullmatch(r"\d+\.\d+\.\d+", folder.name) else folder.name
    return re.sub(r"[^\w.-]+", "-", name) or "rlds"
