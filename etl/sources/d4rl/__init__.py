"""D4RL's HDF5 logs (arXiv 2004.07219): one file, one task.

observations (N, D), actions (N, A) or (N,), rewards (N,) or (N, 1), terminals (N,), timeouts (N,) if any
    -> episodes: rows up to and with one where terminals or timeouts is set

Without `timeouts` a trajectory ends at a terminal, and where `episode_terminals` (d3rlpy 1.x) or next_observations
show it, or at the time limit; etl/sources/_oddities.py decides. Rows after the last end are an episode too, cut by the
log. The mazes' `infos/goal` (N, G), which their observations leave out, is a field of its own, before `observation`;
the kitchen's goal is a part of its observations; other `infos` and `metadata` are not read. Rows of bytes are
flattened pictures. Numbered files of one episode each are one task. `scan` reads flags, rewards and shapes, and
observations where the flags leave a doubt; `read` slices one episode at a time. How the bytes are read, and what
becomes of damaged ones, is in etl/sources/_hdf5.

Invariant: the episodes of a file are disjoint, in order, and cover all its rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Literal

import numpy as np

import simulators
from etl.fetch.download import fetch
from etl.sources import (
    ActionOptions,
    EpisodeRef,
    Known,
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
from etl.sources._hdf5 import Rows, damage
from etl.sources._numbers import as_float32
from etl.sources._pictures import as_pictures, flattened_shapes, image_field, picture_layout
from etl.sources._series import merged, numbered
from etl.sources.d4rl.actions import action_space
from etl.sources.d4rl.log import REQUIRED, Log
from etl.sources.d4rl.writer import D4RLWriter
from schemas.episode import EnvironmentSpec, EpisodeError, FieldSpec, RawEpisode, TaskSpec
from simulators.registry import environment as environment_of_id
from simulators.registry import suite_of_id

SUFFIXES = (".hdf5", ".h5")
CARLA = (48, 48, 3)  # of D4RL's own rows of bytes
FLATTENED = 1024  # numbers in a row from which it is rather a picture


@dataclass(frozen=True)
class Options(ActionOptions):
    """Options for reading D4RL logs."""

    picture_shape: tuple[int, ...] = ()
    """Height, width and channels of the pictures that the rows of `observations` are, flattened."""
    files: Literal["auto", "tasks"] = "auto"
    """auto: numbered files of one episode each (episode_0.hdf5, episode_1.hdf5) are one task; tasks: each is one."""

    def check(self) -> None:
        super().check()
        shape = self.picture_shape
        if shape and (len(shape) != 3 or picture_layout(shape, np.uint8) is None):
            raise ValueError(f"--picture-shape {shape}: give height, width and channels, such as 48 48 3")


class D4RL:
    """Source of D4RL HDF5 files, D4RL's own or written in its layout."""

    name = "d4rl"
    default_dataset = "hopper-medium-v2"
    options = Options
    writer = D4RLWriter

    def known(self, cache: Path) -> list[Known]:
        """D4RL's own datasets."""
        rows = []
        for one in _catalogue.d4rl_datasets().values():
            file = cache / self.name / one.url.rsplit("/", 1)[-1]
            environment = one.environment.id if one.environment else "-"
            rows.append(Known(one.id, environment, one.url, file if file.is_file() else None))
        return rows

    def recognise(self, input: Path) -> Recognition | None:
        """By the keys of an HDF5 file."""
        for path in _recognition.first_with(_recognition.files_below(input), *SUFFIXES):
            nested = _recognition.hdf5_keys(path, REQUIRED[0])  # a group of arrays, which source hdf5 reads
            if set(REQUIRED) <= set(_recognition.hdf5_keys(path)) and not nested:
                where = _recognition.below(input, path)
                return Recognition(f"{where} has keys {', '.join(REQUIRED)}", _recognition.LAYOUT)
        return None

    def resolve(self, input: Path | None, dataset: str | None, cache: Path) -> list[Path]:
        """The input file, or all HDF5 files below the input folder (`dataset` picks one of them), sorted;
        without an input, `dataset` is downloaded. SourceError where there is none."""
        if input is None:
            return [self._download(dataset or self.default_dataset, cache)]
        below = _recognition.all_files_below(input)
        found = [input] if input.is_file() else sorted(p for p in below if p.suffix.lower() in SUFFIXES)
        if not found:
            raise SourceError(f"{input}: no .hdf5 file in it; give --input a folder of D4RL logs, or leave it out")
        files = [p for p in found if dataset is None or task_name(p) == dataset]
        if not files:
            names = [task_name(p) for p in found]
            raise SourceError(f"{input}: no dataset '{dataset}' in it{_catalogue.suggest(str(dataset), names)}")
        return files

    def scan(self, files: list[Path], options: Options) -> list[TaskScan]:
        """One TaskScan a file or numbered series of files, by task name. SourceError where two have one name."""
        files = sorted({Path(path) for path in files})
        wrong = _hdf5.tried(files)

        def scanned(name: str, path: Path) -> TaskScan:
            if path in wrong:
                return TaskScan(None, (), (_rejection(name, EpisodeRef(str(path), -1, 0, 0), wrong[path]),))
            return _scan_file(name, path, options)

        series = numbered(files) if options.files == "auto" else {}
        scans, alone = [], set(files)
        for name, paths in series.items():
            one = merged(name, {path: scanned(name, path) for path in paths})
            if one is not None:
                scans.append(one)
                alone -= set(paths)
        scans += [scanned(name, path) for name, path in by_task(alone, task_name).items()]
        return sorted(scans, key=_name_of)

    def parts(self, file: str) -> list[Path]:
        """The file itself."""
        return [Path(file)]

    def read(self, task: TaskSpec, refs: Iterable[EpisodeRef]) -> Iterator[RawEpisode | Rejection]:
        """Episodes in the order of refs: observation {'observation': (T, D)} float32, for mazes also 'goal' (T, G),
        action (T, A) float32."""
        for file, group in groupby(refs, key=lambda ref: ref.file):
            try:
                log = Log(Path(file))
            except EpisodeError as error:
                yield from (_rejection(task.name, ref, error) for ref in group)
                continue
            with log.file:
                for ref in group:
                    yield _read_episode(log, task, ref)

    def _download(self, dataset: str, cache: Path) -> Path:
        known = _catalogue.d4rl_datasets()
        if dataset not in known:
            raise SourceError(f"unknown D4RL dataset '{dataset}'{_catalogue.suggest(dataset, known)}")
        return fetch(known[dataset].url, cache / self.name)


SOURCE = D4RL()


def task_name(path: Path) -> str:
    """D4RL's id where the file has the name of its download or of the id ('hopper_medium-v2.hdf5' is
    'hopper-medium-v2'), else the file's stem."""
    return _downloads().get(path.stem, path.stem)


def _name_of(scan: TaskScan) -> str:
    return scan.task.name if scan.task else scan.rejected[0].task


def _scan_file(name: str, path: Path, options: Options) -> TaskScan:
    known = _catalogue.d4rl_datasets().get(name)
    try:
        log = Log(path)
        with log.file, damage():
            environment = _environment(log.environment(), known.environment if known else None, options)
            limit = options.max_episode_steps or (known.max_episode_steps if known else None)
            if limit is None and environment is not None:
                limit = suite_of_id(environment.id).time_limit(environment.id)
            shape = options.picture_shape or (CARLA if known and name.startswith("carla") else ())
            fields, warnings = _fields(log, shape)
            ends = log.split(limit)
            totals = log.totals(ends.bounds)
            action, more = action_space(log.arrays["actions"], log.file.attrs, environment, options, known is not None)
    except EpisodeError as error:
        return TaskScan(None, (), (_rejection(name, EpisodeRef(str(path), -1, 0, 0), error),))
    score = simulators.reference(environment) if environment else None
    if known and environment == known.environment:
        score = known.score
    longest = max(stop - start for start, stop in ends.bounds)
    task = TaskSpec(name, D4RL.name, fields, action, environment, score, limit or longest)
    each = zip(ends.bounds, totals, ends.ends)
    return TaskScan(
        task,
        tuple(EpisodeRef(str(path), n, *bound, total, end) for n, (bound, total, end) in enumerate(each)),
        warnings=tuple(f"{name}: {line}" for line in (*ends.warnings, *warnings, *more)),
        notes=tuple(f"{name}: {line}" for line in (*ends.notes, *environment_warnings(environment))),
    )


def _fields(log: Log, shape: tuple[int, ...]) -> tuple[tuple[FieldSpec, ...], tuple[str, ...]]:
    """Fields of the observation, and warnings. `shape`: of flattened pictures, () where the rows are none."""
    rows = log.arrays["observations"]
    size = math.prod(rows.shape[1:])
    fields = {key: FieldSpec(key, "continuous", own.shape[1:]) for key, own in log.fields.items()}
    layout = log.layout(shape)
    warnings: tuple[str, ...] = ()
    if shape and len(rows.shape) == 2 and math.prod(shape) != size:
        raise EpisodeError("wrong shape", f"--picture-shape {shape} has {math.prod(shape)} values, a row {size}")
    if layout is not None:
        fields["observation"] = image_field("observation", layout.shape)
    elif size > FLATTENED or rows.dtype == np.uint8:
        squares = [" ".join(map(str, one)) for one in flattened_shapes(size)]
        remedy = f"--picture-shape {' or '.join(squares) if squares else 'H W C'} if they are flattened pictures"
        line = f"a row of 'observations' is {size:,} numbers of {rows.dtype}, each a token; give {remedy}"
        if rows.dtype == np.uint8:
            raise EpisodeError("wrong dtype", f"{line}, or record numbers as float32")
        warnings = (line,)
    return tuple(field for _, field in sorted(fields.items())), warnings


def _environment(own: str | None, known: EnvironmentSpec | None, options: Options) -> EnvironmentSpec | None:
    """The command line's, else the file's, else the catalogue's."""
    if options.environment or own:
        return environment_of_id(options.environment or own or "")
    return known


def _read_episode(log: Log, task: TaskSpec, ref: EpisodeRef) -> RawEpisode | Rejection:
    specs = {spec.key: spec for spec in task.observation}

    def values(key: str, array: Rows) -> np.ndarray:
        spec, rows = specs[key], array[ref.start : ref.stop]
        return as_pictures(rows, key, log.layout(spec.shape)) if spec.kind == "image" else as_float32(rows, copy=False)

    last = slice(ref.stop - 1, ref.stop)
    try:
        with damage():
            return RawEpisode(
                observation={key: values(key, array) for key, array in log.fields.items() if key in specs},
                action=log.actions(ref, task),
                reward=as_float32(log.arrays["rewards"][ref.start : ref.stop], copy=False).reshape(-1),
                terminated=bool(log.flags("terminals", last)),
                truncated=bool(log.flags("timeouts", last)),  # `end` of the ref counts more
                file=log.path.name,
                position=ref.position,
                row=ref.start,
            )
    except EpisodeError as error:
        return _rejection(task.name, ref, error)


def _rejection(task: str, ref: EpisodeRef, error: EpisodeError) -> Rejection:
    return Rejection(task, Path(ref.file).name, ref.position, ref.start, error.reason, error.detail)


@cache
def _downloads() -> dict[str, str]:
    """File stem -> dataset id, for the names of D4RL's downloads."""
    return {Path(dataset.url).stem: dataset.id for dataset in _catalogue.d4rl_datasets().values()}
