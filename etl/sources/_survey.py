"""Common properties of a task's episodes, found by looking at each once: fields, actions, bounds, time limit.

files of a task -> Survey.add: refs and rejections, ranges of actions and integers -> Survey.finish: TaskScan

Fields are those of the first usable episode. Integers become discrete where their values fit the vocabulary.
The range of continuous actions is etl/sources/_ranges.py's to decide.

Invariant: the result does not depend on the order in which files are named.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium import spaces

import simulators
from etl.sources import EpisodeRef, Rejection, TaskScan, _pictures, _ranges, environment_warnings
from etl.sources._arrays import TIMESTEP_VALUES, ArraySource, Column, Log, StoredEpisode, damage, rejection, rows_of
from etl.sources._hdf5 import AGAIN
from etl.sources._numbers import float32
from schemas.episode import ActionSpec, EnvironmentSpec, EpisodeError, FieldSpec, TaskSpec
from schemas.layout import layout_of
from simulators import spaces as rules
from simulators.registry import environment as environment_of_id
from simulators.registry import suite_of_id
from simulators.spaces import CHOICES, SpaceError

SAID = 0.001  # share of action values beyond [-1, 1] that is worth a word


class Range:
    """Values of each dimension over many rows: lowest, highest, how many lie beyond [-1, 1]."""

    def __init__(self) -> None:
        self.low = self.high = np.empty(0)
        self.values = self.beyond = 0
        self.integer = self.whole = True

    def add(self, values: np.ndarray, name: str) -> None:
        """values: (T, ...) numbers. EpisodeError where they are none, or the dimensions differ from those before."""
        if values.dtype.kind not in "fiub":
            raise EpisodeError("wrong dtype", f"'{name}' is {values.dtype}, expected numbers; {AGAIN}")
        # (D, T): numpy is six times slower along short rows
        own = values.dtype if values.dtype.kind == "f" else np.float64
        flat = np.ascontiguousarray(values.reshape(len(values), -1).T, own)
        if len(self.low) not in (0, len(flat)):
            raise EpisodeError("wrong shape", f"'{name}' has {len(flat)} values, {len(self.low)} before; {AGAIN}")
        if not len(self.low):
            self.low, self.high = np.full(len(flat), np.inf), np.full(len(flat), -np.inf)
        self.integer &= values.dtype.kind in "iub"
        low, high = flat.min(axis=1, initial=np.inf), flat.max(axis=1, initial=-np.inf)
        if not (np.isfinite(low).all() and np.isfinite(high).all()):
            finite = np.isfinite(flat)
            low = np.where(finite, flat, np.inf).min(axis=1, initial=np.inf)
            high = np.where(finite, flat, -np.inf).max(axis=1, initial=-np.inf)
            flat = flat[finite]
        self.low, self.high = np.minimum(self.low, low), np.maximum(self.high, high)
        self.values += flat.size
        if low.min(initial=0) < -_ranges.ROUNDING or high.max(initial=0) > _ranges.ROUNDING:
            self.beyond += int(np.count_nonzero(np.abs(flat) > _ranges.ROUNDING))
        self.whole = self.whole and bool((flat == np.rint(flat)).all())

    @property
    def seen(self) -> _ranges.Seen:
        return _ranges.Seen(self.low, self.high, self.values, self.beyond, self.whole)


class Survey:
    """One task while its files are looked at."""

    def __init__(self, name: str, source: str, options: Any):
        self.name, self.source, self.options = name, source, options
        self.refs: list[EpisodeRef] = []
        self.rejected: list[Rejection] = []
        self.fields: dict[str, FieldSpec] | None = None
        self.ranges: dict[str, Range] = {}
        self.actions = Range()
        self.environment: EnvironmentSpec | None = None
        self.limit: int | None = None
        self.rewarded = False
        self.warnings: dict[str, None] = {}
        self.notes: dict[str, None] = {}

    def add(self, source: ArraySource, path: Path, wrong: EpisodeError | None = None) -> None:
        """Look at every episode of a file; `wrong`: why it must not be opened."""
        label = source.label(path)
        place = source.place(path, self.options)
        try:
            if wrong is not None:
                raise wrong
            with damage():
                log = source.open(place)
        except EpisodeError as error:
            self.rejected.append(rejection(self.name, label, -1, 0, error))
            return
        try:
            with damage():
                self._add(log, place, label)
        except EpisodeError as error:
            self.rejected.append(rejection(self.name, label, -1, 0, error))
        finally:
            log.close()

    def _add(self, log: Log, place: str, label: str) -> None:
        self.environment = self.environment or log.environment
        self.limit = max(self.limit or 0, log.max_episode_steps or 0) or None
        for position, stored in log.scan():
            row = 0
            try:
                if isinstance(stored, EpisodeError):
                    raise stored
                row = stored.start
                with damage():
                    total = self._episode(stored)
            except EpisodeError as error:
                self.rejected.append(rejection(self.name, label, position, row, error))
                continue
            self.refs.append(
                EpisodeRef(place, position, row, row + stored.timesteps, total, held_out=log.held_out.get(position))
            )
        self.warnings |= dict.fromkeys(log.warnings)
        self.notes |= dict.fromkeys(log.notes)

    def _episode(self, stored: StoredEpisode) -> float | None:
        """Takes an episode's part in ranges; its return."""
        T = stored.timesteps
        if T < 1:
            raise EpisodeError("empty", "no timestep")
        if self.fields is None:
            self.fields = self._fields(stored)
        for key, seen in self.ranges.items():
            if key in stored.observation:
                seen.add(rows_of(stored.observation[key], key, T), key)
        if not self.options.action_low or stored.action.dtype.kind in "iub":
            self.actions.add(rows_of(stored.action, "action", T), "action")
        elif not len(self.actions.low):
            self.actions.add(rows_of(stored.action, "action", 1), "action")
        if stored.reward is None:
            return None
        self.rewarded = True
        rewards = float32(rows_of(stored.reward, "reward", T), "reward")
        if rewards.size != T:
            raise EpisodeError("wrong shape", f"'reward' is {rewards.shape}, expected {(T,)}")
        with np.errstate(invalid="ignore"):
            total = float(rewards.sum(dtype=np.float64))
        return total if math.isfinite(total) else None

    def _fields(self, stored: StoredEpisode) -> dict[str, FieldSpec]:
        wanted = self.options.observation_keys
        keys = [*stored.observation, *stored.texts]
        if missing := sorted(set(wanted) - set(keys)):
            raise EpisodeError("missing key", f"no observation {', '.join(missing)}; there are {', '.join(keys)}: "
                               "give --observation-keys some of them")  # fmt: skip
        fields: dict[str, FieldSpec] = {}
        for key in wanted or keys:
            if key in stored.texts:
                fields[key] = FieldSpec(key, "text", (self.options.text_tokens,))
            elif (spec := self._field(key, stored.observation[key], stored.timesteps)) is not None:
                fields[key] = spec
        if not fields:
            raise EpisodeError("missing key", f"no observation in it; {AGAIN}")
        return fields

    def _field(self, key: str, column: Column, T: int) -> FieldSpec:
        shape, dtype = tuple(column.shape[1:]), column.dtype
        if dtype.kind in "USO":
            return FieldSpec(key, "text", (self.options.text_tokens,))
        if math.prod(shape) == 0 or dtype.kind not in "fiub":
            raise EpisodeError("wrong dtype", f"'{key}' is {dtype} {shape} a timestep; name others by "
                               "--observation-keys")  # fmt: skip
        picture = _pictures.picture_layout(shape, dtype, 0, 255)
        if picture is not None and dtype.kind == "f":  # of floats, only values can tell
            try:
                _pictures.as_pictures(rows_of(column, key, min(T, 64)), key)
            except EpisodeError as error:
                picture = None
                line = f"'{key}' has the shape of pictures and is read as {math.prod(shape):,} numbers: {error.detail}"
                self.warnings[line] = None
        if picture is not None:
            return rules.field(key, spaces.Box(0, 255, picture.shape, np.uint8))
        if math.prod(shape) > TIMESTEP_VALUES:
            raise EpisodeError("wrong shape", f"'{key}' has {math.prod(shape)} values per timestep and is no picture; "
                               "leave it out by --observation-keys")  # fmt: skip
        if dtype.kind == "b":
            return FieldSpec(key, "discrete", shape, (2,))
        if dtype.kind in "iu":
            self.ranges[key] = Range()
        return FieldSpec(key, "continuous", shape)

    def finish(self) -> TaskScan:
        """The task and its episodes; a task of none where nothing can be used."""
        rejected, warnings = tuple(self.rejected), list(self.warnings)
        try:
            if self.fields is None or not self.refs:
                raise EpisodeError("empty", f"no usable episode; {AGAIN}")
            action, more = self._action()
            fields = tuple(self._numbers(spec, warnings) for spec in self.fields.values())
            environment = self._environment()
            longest = max(ref.timesteps for ref in self.refs)
            limit = self.options.max_episode_steps or self.limit
            if limit is None and environment is not None:
                limit = suite_of_id(environment.id).time_limit(environment.id)
            score = simulators.reference(environment) if environment else None
            task = TaskSpec(self.name, self.source, fields, action, environment, score, limit or longest)
            layout_of(task)
        except (EpisodeError, ValueError) as error:
            if rejected and self.fields is None:
                return TaskScan(None, (), rejected)
            wrong = error if isinstance(error, EpisodeError) else EpisodeError("unsupported space", str(error))
            return TaskScan(None, (), (*rejected, rejection(self.name, self.name, -1, 0, wrong)))
        notes = [*self.notes, *environment_warnings(environment)]
        if not self.rewarded:
            notes.append("it has no rewards: all returns are 0, and filters by return do not apply")
        lines = (tuple(f"{self.name}: {line}" for line in own) for own in ([*warnings, *more], notes))
        return TaskScan(task, tuple(self.refs), rejected, 0, *lines)

    def _numbers(self, spec: FieldSpec, warnings: list[str]) -> FieldSpec:
        """Integers that fit the vocabulary are discrete."""
        seen = self.ranges.get(spec.key)
        if seen is None or not len(seen.low):
            return spec
        low, high = min(0, int(seen.low.min())), int(seen.high.max())
        if high - low < CHOICES:
            return replace(spec, kind="discrete", choices=(high - low + 1,), start=(low,))
        warnings.append(f"'{spec.key}' holds integers from {low} to {high}, more than {CHOICES}: they are read as real "
                        "numbers, of which large ones share tokens")  # fmt: skip
        return spec

    def _environment(self) -> EnvironmentSpec | None:
        return environment_of_id(self.options.environment) if self.options.environment else self.environment

    def _action(self) -> tuple[ActionSpec, tuple[str, ...]]:
        seen, size = self.actions, len(self.actions.low)
        if not 0 < size <= TIMESTEP_VALUES:
            raise EpisodeError("wrong shape", f"an action has {size} values; 1 to {TIMESTEP_VALUES} can be read")
        environment = self._environment()
        own = _of_environment(environment) if environment else None
        kind = "discrete" if seen.integer else "continuous"
        other = _ranges.unlike(kind, size, own, environment.id if environment else "")
        if seen.integer:
            if own is not None and own.kind == "discrete" and own.size == size:
                return own, ()
            start = np.minimum(seen.low, 0).astype(np.int64)
            choices = seen.high.astype(np.int64) - start + 1
            if choices.max() > CHOICES:
                raise EpisodeError("too many choices", f"actions span [{seen.low.min():g}, {seen.high.max():g}]: there "
                                   f"are ids for {CHOICES}; record real-valued actions as float32")  # fmt: skip
            return ActionSpec.discrete(tuple(map(int, choices)), tuple(map(int, start)), size), other
        if bounds := _ranges.given_bounds(self.options, size):
            return ActionSpec.continuous(*bounds, size), other
        by_log = self.options.action_bounds == "log"
        if own is not None and own.kind == "continuous" and own.size == size and not by_log:
            return own, ()
        if not np.isfinite([seen.low, seen.high]).all():
            raise EpisodeError("not finite", f"a dimension of the actions holds no number; {AGAIN}")
        found = seen.seen
        few = found.beyond <= _ranges.FEW * found.values
        warnings = () if by_log or (few and found.share < SAID) else (_ranges.warning(found, clipped=few),)
        low, high = ((-1.0,), (1.0,)) if few and not by_log else found.bounds
        return ActionSpec.continuous(low, high, size), (*other, *warnings)


def _of_environment(environment: EnvironmentSpec) -> ActionSpec | None:
    """The environment's own action space; None where it cannot be made here."""
    try:
        env = simulators.make(environment)
    except (simulators.SimulatorError, SpaceError):
        return None
    try:
        return simulators.action_spec(env)
    except (simulators.SimulatorError, SpaceError):
        return None
    finally:
        env.close()
