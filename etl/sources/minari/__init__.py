"""Minari datasets (minari.farama.org), where D4RL lives today: one dataset is one task.

ID/data/metadata.json    spaces, environment, reference returns
ID/data/main_data.hdf5   episode_N/: observations (T+1, ...), actions (T, ...), rewards, terminations, truncations (T,)
    -> one episode per group; the last observation, which no action follows, is left out

Dict and Tuple spaces are groups ('_index_0' for a tuple's first): their arrays become fields with keys such as
'achieved_goal' or 'a/0', in the order of the path. `scan` reads metadata and rewards; `read` opens one episode's
group at a time. How the bytes are read is in etl/sources/minari/disk.py; Minari's Arrow and Parquet files, one an
episode, are read by tables.py.

Invariant: a field is a function of its own space (`field`), its array of that and the stored rows (`values`).
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import gymnasium
import h5py
import numpy as np
from gymnasium import spaces

import simulators
from etl.sources import (
    ActionOptions,
    EpisodeRef,
    Known,
    LogWriter,
    Recognition,
    Rejection,
    SourceError,
    TaskScan,
    _catalogue,
    _hdf5,
    _recognition,
    by_task,
    environment_warnings,
)
from etl.sources._numbers import as_float32
from etl.sources._pictures import as_pictures
from etl.sources._ranges import action_spec
from etl.sources.minari import disk
from etl.sources.minari.disk import DATA, METADATA, TIMESTEP_VALUES, Leaf, damage
from etl.sources.minari.download import DEFAULT, address, d4rl_environments, download
from etl.sources.minari.episodes import all_actions, label_of, odd_flags, rejection, scan_episodes
from etl.sources.minari.tables import SUFFIXES, Episode, Tables
from etl.sources.minari.writer import MinariWriter
from schemas.episode import ActionSpec, EnvironmentSpec, EpisodeError, FieldSpec, RawEpisode, ScoreReference, TaskSpec
from schemas.layout import layout_of
from schemas.ranges import require
from simulators import spaces as rules
from simulators.registry import environment as environment_of_id
from simulators.registry import suite_of_id
from simulators.spaces import SpaceError

PASSIVE_WRAPPERS = {"OrderEnforcing", "PassiveEnvChecker", "RecordEpisodeStatistics", "RecordVideo", "TimeLimit"}


@dataclass(frozen=True)
class Options(ActionOptions):
    """Options for reading Minari datasets."""

    text_tokens: int = 16
    """Tokens of a text inside a timestep; longer ones are cut, and counted."""

    def check(self) -> None:
        super().check()
        require("text-tokens", self.text_tokens, 1, 2**15)


class Minari:
    """Source of Minari datasets. Subclasses override `field` and `values`."""

    name = "minari"
    default_dataset = DEFAULT
    options = Options
    writer: type[LogWriter] | None = MinariWriter

    def known(self, cache: Path) -> list[Known]:
        """D4RL's datasets, and whatever else was downloaded."""
        root = cache / "minari"
        cached = {disk.dataset_id(path): path for path in _datasets_below(root)} if root.is_dir() else {}
        table = dict.fromkeys(sorted(cached), "-") | d4rl_environments()
        return [Known(name, environment, address(name), cached.get(name)) for name, environment in table.items()]

    def recognise(self, input: Path) -> Recognition | None:
        """By a metadata.json with spaces. BabyAI's logs are left to the source that draws their pictures."""
        marks = disk.marks(input)
        if not marks:
            return None
        evidence, _ = marks[0]
        return Recognition(evidence, _recognition.LAYOUT if is_babyai(marks) else _recognition.MARK)

    def resolve(self, input: Path | None, dataset: str | None, cache: Path) -> list[Path]:
        """The main_data.hdf5 of each dataset at or below the input, sorted; `dataset` (an id such as
        D4RL/hopper/medium-v0) picks one. Without an input, `dataset` is downloaded. SourceError where there is none."""
        if input is None:
            return [download(dataset or self.default_dataset, cache / "minari")]
        found = _datasets_below(Path(os.path.abspath(input)))
        if not found:
            raise SourceError(
                f"{input}: no Minari dataset in it; give --input a folder that holds .../data/{METADATA} and {DATA}"
            )
        files = [p for p in found if dataset is None or dataset in (disk.dataset_id(p), task_name(p))]
        if not files:
            known = sorted(map(disk.dataset_id, found))
            raise SourceError(f"{input}: no dataset '{dataset}' in it{_catalogue.suggest(str(dataset), known)}")
        return files

    def scan(self, files: list[Path], options: Options) -> list[TaskScan]:
        """One TaskScan a dataset, by task name. SourceError where two datasets have one name."""
        named = by_task(files, task_name)
        wrong = _hdf5.tried(path for path in named.values() if path.name != METADATA)
        return [self._scan_dataset(name, path, wrong.get(path), options) for name, path in named.items()]

    def parts(self, file: str) -> list[Path]:
        """The HDF5 file, or that of an episode, and the dataset's metadata."""
        path = Path(file)
        return [path, (path.parent if path.suffix in SUFFIXES else path).with_name(METADATA)]

    def read(self, task: TaskSpec, refs: Iterable[EpisodeRef]) -> Iterator[RawEpisode | Rejection]:
        """Episodes in the order of refs: float32, integers from 0, images (T, H, W, C) uint8, text (T,) strings."""
        for path, group in groupby(refs, key=lambda ref: disk.dataset_of(ref.file)):
            try:
                about = disk.metadata(path)
                leaves, action = disk.observation_leaves(about), disk.space_of(about, "action_space")
                file = disk.opened(path)
            except EpisodeError as error:
                yield from (rejection(task.name, Path(ref.file), ref.position, ref.start, error) for ref in group)
                continue
            with file:
                for ref in group:
                    yield self._read_episode(file, task, leaves, action, ref)

    def field(self, key: str, space: spaces.Space) -> FieldSpec | None:
        """The field of one array of the observation; None leaves it out. SpaceError where nothing fits."""
        return rules.field(key, space)

    def values(self, spec: FieldSpec, space: spaces.Space, stored: np.ndarray) -> np.ndarray:
        """The (T, ...) array of one episode as RawEpisode takes it; `stored` has the space's shape and its kind of
        dtype, or is (T,) strings. EpisodeError where a value lies outside the space."""
        if spec.kind == "text":
            return stored
        if spec.kind == "image":
            return as_pictures(stored, spec.key, rules.picture_of(space))
        return as_float32(stored) if spec.kind == "continuous" else disk.integers(spec.key, space, stored)

    def action(
        self, space: spaces.Space, options: Options, pieces: Iterable[np.ndarray]
    ) -> tuple[ActionSpec, tuple[str, ...]]:
        """The action space, and warnings; `pieces`: all real-valued actions, where it does not say their range.
        SpaceError where it holds more than one array."""
        size = math.prod(rules.shape_of(space))
        if size > TIMESTEP_VALUES:
            raise EpisodeError("unsupported space", f"an action has {size} values; up to {TIMESTEP_VALUES} can be read")
        try:
            declared = rules.action(space)
        except SpaceError as error:
            if error.reason != "unbounded action":
                raise
            declared = None
        return (
            action_spec(size, options, declared, pieces) if rules.is_real(space) and size else (rules.action(space), ())
        )

    def environment(self, about: dict[str, Any], options: Options) -> tuple[EnvironmentSpec | None, int | None]:
        """Environment to play, and its time limit: the command line's, else the metadata's eval_env_spec, else its
        env_spec. The metadata's does not count where a wrapper changes what it takes or gives."""
        spec = _parsed(about.get("eval_env_spec") or about.get("env_spec"))
        given = environment_of_id(options.environment) if options.environment else None
        if not isinstance(spec, dict) or not isinstance(spec.get("id"), str):
            return given, suite_of_id(given.id).time_limit(given.id) if given else None
        id, steps = _id(spec), spec.get("max_episode_steps")
        limit = int(steps) if isinstance(steps, int | float) and steps >= 1 else suite_of_id(id).time_limit(id)
        wrappers = spec.get("additional_wrappers") or []
        if given or {w.get("name") if isinstance(w, dict) else str(w) for w in wrappers} - PASSIVE_WRAPPERS:
            return given, limit
        kwargs = spec.get("kwargs")
        kwargs = dict(kwargs) if isinstance(kwargs, dict) else {}
        kwargs.pop("render_mode", None)  # how it was watched
        return environment_of_id(id, kwargs), limit

    def _scan_dataset(self, name: str, path: Path, wrong: EpisodeError | None, options: Options) -> TaskScan:
        try:
            about = disk.metadata(path)
            if wrong is not None:
                raise wrong
            fields = self._fields(about, options)
            with damage("corrupt metadata"):
                moved = disk.space_of(about, "action_space")
                environment, limit = self.environment(about, options)
            with damage(), disk.opened(path) as file:
                refs, rejected = scan_episodes(file, name, path, about.get("total_episodes"))
                action, warnings = self.action(moved, options, all_actions(file, moved, refs))
                refs, more = odd_flags(file, refs, options.max_episode_steps or limit)
                warnings += more
            with damage("corrupt metadata"):
                score = _score(about, environment)
            limit = options.max_episode_steps or limit or max((ref.timesteps for ref in refs), default=1)
            task = TaskSpec(name, self.name, fields, action, environment, score, limit)
            with damage("unsupported space"):
                layout_of(task)
        except EpisodeError as error:
            return TaskScan(None, (), (rejection(name, path, -1, 0, error),))
        lines = (tuple(f"{name}: {line}" for line in own) for own in (warnings, environment_warnings(environment)))
        warnings, notes = lines
        return TaskScan(task, tuple(refs), tuple(rejected), warnings=warnings, notes=notes)

    def _fields(self, about: dict[str, Any], options: Options) -> tuple[FieldSpec, ...]:
        with damage("corrupt metadata"):
            specs = [self.field(leaf.key, leaf.space) for leaf in disk.observation_leaves(about)]
        fields = tuple(
            replace(spec, shape=(options.text_tokens,)) if spec.kind == "text" else spec for spec in specs if spec
        )
        width = sum(math.prod(spec.shape) for spec in fields if spec.kind != "image")
        if not fields or width > TIMESTEP_VALUES:
            detail = f"{len(fields)} fields of {width} values per timestep; up to {TIMESTEP_VALUES} can be read"
            raise EpisodeError("unsupported space", detail)
        return fields

    def _read_episode(
        self, file: h5py.File | Tables, task: TaskSpec, leaves: list[Leaf], action: spaces.Space, ref: EpisodeRef
    ) -> RawEpisode | Rejection:
        assert task.action is not None
        specs, T, size = {spec.key: spec for spec in task.observation}, ref.timesteps, task.action.size
        try:
            with damage():
                group = disk.episode_group(file, ref.position)
                if isinstance(group, Episode):
                    group.load()
                observation = {}
                for leaf in leaves:
                    if spec := specs.get(leaf.key):
                        path = ("observations", *disk.where(leaf))
                        stored = disk.rows_of(group, path, leaf.space, T, T + 1, math.prod(spec.shape))
                        observation[leaf.key] = self.values(spec, leaf.space, stored)
                stored = disk.rows_of(group, ("actions",), action, T, T, size)
                discrete = task.action.kind == "discrete"
                actions = disk.integers("action", action, stored) if discrete else as_float32(stored)
                return RawEpisode(
                    observation=observation,
                    action=actions.reshape((T,) if discrete and size == 1 else (T, size)),
                    reward=as_float32(disk.column(group, "rewards", T)),
                    terminated=bool(disk.column(group, "terminations", T)[T - 1]),
                    truncated=bool(disk.column(group, "truncations", T)[T - 1]),
                    file=label_of(task.name, Path(ref.file)),
                    position=ref.position,
                    row=ref.start,
                )
        except EpisodeError as error:
            return rejection(task.name, Path(ref.file), ref.position, ref.start, error)


SOURCE = Minari()


def is_babyai(marks: list[tuple[str, dict[str, Any]]]) -> bool:
    """True if all of `disk.marks` are logs of BabyAI's levels or of minigrid's other environments."""
    return bool(marks) and all(re.search("BabyAI-|MiniGrid-", json.dumps(about)) for _, about in marks)


def task_name(path: Path) -> str:
    """D4RL/hopper/medium-v0 -> D4RL-hopper-medium-v0."""
    return disk.dataset_id(path).replace("/", "-")


def _datasets_below(root: Path) -> list[Path]:
    """`disk.place` of every folder 'data' that holds one or a metadata.json, hidden folders and links to folders left
    out. `root` may be such a folder, whatever its name, or the file itself."""
    if root.is_file():
        return [disk.place(root.parent)] if root.name in (DATA, METADATA) else []
    found = []
    for folder, below, files in os.walk(root):
        below[:] = [name for name in below if not name.startswith(".")]
        if (Path(folder).name == "data" or Path(folder) == root) and {METADATA, DATA} & set(files):
            found.append(disk.place(Path(folder)))
            below.clear()
    return sorted(found)


def _id(spec: dict[str, Any]) -> str:
    """The id in a metadata's environment; where gymnasium does not know it, with the module that its entry point
    names, which may register it."""
    id, entry = spec["id"], spec.get("entry_point")
    known = ":" in id or id in gymnasium.registry or suite_of_id(id).time_limit(id) is not None
    if known or suite_of_id(id) is not suite_of_id("") or not isinstance(entry, str) or ":" not in entry:
        return id
    return f"{entry.split(':')[0]}:{id}"


def _parsed(text: Any) -> Any:
    try:
        return json.loads(text) if isinstance(text, str) else text
    except (ValueError, RecursionError):
        return None


def _score(about: dict[str, Any], environment: EnvironmentSpec | None) -> ScoreReference | None:
    low, high = about.get("ref_min_score"), about.get("ref_max_score")
    if isinstance(low, int | float) and isinstance(high, int | float) and -math.inf < low < high < math.inf:
        return ScoreReference("d4rl", float(low), float(high))
    return simulators.reference(environment) if environment else None
