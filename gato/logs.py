"""Own arrays to a log that `gato.build` reads: a Minari dataset, which carries the spaces of observations and actions.

    episodes of arrays + spaces (the environment's, or given) -> FOLDER/NAME/data/{metadata.json, main_data.hdf5}

Invariant: a log under its own name is complete, and its action bounds are the environment's or given, never assumed.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import string
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from importlib.metadata import version
from numbers import Integral
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from schemas.files import exclusive_name, replace_folder

NAME = re.compile(r"(?:[\w-]+/)*[\w-]+")


@dataclass(frozen=True)
class Episode:
    """One episode of T timesteps: action and reward t follow observation t.

    Attributes:
        observations: array (T, ...), or (T + 1, ...) with the last one, which no action follows; or a (nested) dict of
            such arrays; texts are lists of strings.
        actions: (T, ...), in the environment's own units.
        rewards: (T,).
        terminated: the environment ended the episode.
        truncated: its time limit did. Neither: the log was cut there.
    """

    observations: Any
    actions: Any
    rewards: Any
    terminated: bool = False
    truncated: bool = False


def write_logs(
    folder: str | os.PathLike[str],
    episodes: Iterable[Episode | Mapping[str, Any]],
    name: str,
    environment: str | None = None,
    *,
    environment_kwargs: Mapping[str, Any] | None = None,
    observation_space: gymnasium.Space | None = None,
    action_space: gymnasium.Space | None = None,
    max_episode_steps: int | None = None,
    reference_returns: tuple[float, float] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write episodes as a log, which `gato.build(FOLDER, OUTPUT)` turns into a dataset with one task.

    Args:
        folder: where logs are kept; the log is FOLDER/NAME.
        episodes: `Episode`s, or dicts with their attributes as keys.
        name: name of the task, of letters, digits, '-' and '_'; '/' between them makes a folder.
        environment: gymnasium id to play the task in later ('Hopper-v5', 'module:Id' for your own); without it the
            task can be trained on, and not played.
        environment_kwargs: arguments of the environment.
        observation_space, action_space: by default the environment's. Without both, observations of floats, of pictures
            (uint8, (T, H, W, C)) and of texts need no space; integers and actions do.
        max_episode_steps: time limit; by default the environment's, or the longest episode's.
        reference_returns: returns that a normalised score maps to 0 and 100.
        overwrite: replace a log of that name.

    Returns:
        The log's folder.

    Raises:
        TypeError: `episodes` is not a list of episodes.
        ValueError: an episode or a space does not fit, or another process writes this log; the message names the
            episode, the field and the remedy.
        OSError: it cannot be written.
    """
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ValueError(f"name {name!r}: use letters, digits, '-' and '_', and '/' between them for a folder")
    final = Path(folder).absolute() / name
    _require_free(final, overwrite)
    _check(observation_space, action_space, max_episode_steps, reference_returns)
    if isinstance(episodes, Episode | Mapping | str) or not isinstance(episodes, Iterable):
        raise TypeError(f"episodes is of type {type(episodes).__name__}; give a list of episodes, such as [episode]")
    listed = [one if isinstance(one, Episode) else _episode(number, one) for number, one in enumerate(episodes)]
    if not listed:
        raise ValueError("no episode given; give at least one")
    kwargs = dict(environment_kwargs or {})
    if environment is not None and (action_space is None or observation_space is None):
        observed, acted, limit = _environment(environment, kwargs)
        observation_space, action_space = observation_space or observed, action_space or acted
        max_episode_steps = max_episode_steps or limit
    if action_space is None:
        remedy = "give environment, or action_space such as gymnasium.spaces.Box(low, high) or Discrete(n)"
        raise ValueError(f"the range of actions is not known; {remedy}")
    if observation_space is None:
        observation_space = _inferred("observations", [episode.observations for episode in listed])
    buffers = [_checked(n, episode, observation_space, action_space) for n, episode in enumerate(listed)]
    about: dict[str, Any] = {"dataset_id": name, "minari_version": version("minari")}
    if environment is not None:
        spec: dict[str, Any] = {"id": environment, "max_episode_steps": max_episode_steps, "kwargs": kwargs}
        spec["additional_wrappers"] = []
        try:
            about["env_spec"] = json.dumps(spec)
        except TypeError as error:
            raise ValueError(f"environment_kwargs: {error}; give numbers, texts, lists and dicts") from None
    if reference_returns is not None:
        about["ref_min_score"], about["ref_max_score"] = map(float, reference_returns)
    with exclusive_name(final, "give another name"):
        _require_free(final, overwrite)
        _write(final, observation_space, action_space, about, buffers)
    return final


def _check(observed: Any, acted: Any, limit: Any, references: Any) -> None:
    """TypeError or ValueError for arguments that make no sense by themselves."""
    for name, space in (("observation_space", observed), ("action_space", acted)):
        if space is not None and not isinstance(space, gymnasium.Space):
            raise TypeError(f"{name}={space!r}: give a space, such as gymnasium.spaces.Box(-1, 1, (2,))")
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, Integral) or limit < 1):
        raise ValueError(f"max_episode_steps={limit!r}: give timesteps, 1 or more, or leave it out")
    if references is not None:
        try:
            low, high = map(float, references)
            sensible = -math.inf < low < high < math.inf
        except (TypeError, ValueError):
            sensible = False
        if not sensible:
            raise ValueError(f"reference_returns={references!r}: give two numbers, a low return and a higher one")


def _require_free(final: Path, overwrite: bool) -> None:
    if final.exists() and not overwrite:
        raise ValueError(f"{final}: already there; give another name, or overwrite=True")


def _write(
    final: Path, observed: gymnasium.Space, acted: gymnasium.Space, about: dict[str, Any], episodes: list[Any]
) -> None:
    """A Minari dataset of these spaces, metadata and buffers of episodes."""
    from minari.dataset.minari_storage import MinariStorage

    temporary = final.parent / f".{final.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    (temporary / "data").mkdir(parents=True)
    try:
        storage = MinariStorage.new(temporary / "data", observed, acted, None, "hdf5", jpeg_encoding=False)
        storage.update_metadata(about)
        storage.update_episodes(episodes)
        replace_folder(temporary, final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _episode(number: int, given: Mapping[str, Any]) -> Episode:
    if not isinstance(given, Mapping):
        kind = type(given).__name__
        raise TypeError(f"episode {number} is of type {kind}; give a list of episodes, each a dict or a gato.Episode")
    known = {field.name for field in fields(Episode)}
    if strange := sorted(set(given) - known):
        raise ValueError(f"episode {number}: unknown key '{strange[0]}'; keys: {', '.join(sorted(known))}")
    if missing := sorted({"observations", "actions", "rewards"} - set(given)):
        raise ValueError(f"episode {number}: no '{missing[0]}'")
    return Episode(**given)


def _environment(id: str, kwargs: dict[str, Any]) -> tuple[gymnasium.Space, gymnasium.Space, int | None]:
    """Observation space, action space and time limit of an environment, whose package may be the user's own."""
    import simulators

    try:
        with suppress(simulators.SimulatorError):  # gymnasium's own message says more of an id like module:Id
            simulators.environment_spec(id)  # imports the package that registers the id
        env = gymnasium.make(id, disable_env_checker=True, **kwargs)
    except Exception as error:  # an environment's constructor may raise anything
        remedy = "correct the id, or give observation_space and action_space"
        raise ValueError(f"environment '{id}': {type(error).__name__}: {error}; {remedy}") from error
    limit = env.spec.max_episode_steps if env.spec else None
    env.close()
    return env.observation_space, env.action_space, limit


def _inferred(name: str, values: list[Any]) -> gymnasium.Space:
    """The space of observations of all episodes, where it follows from their arrays."""
    if isinstance(values[0], Mapping):
        keys = set(values[0])
        for number, one in enumerate(values):
            given = set(one) if isinstance(one, Mapping) else set()
            if odd := sorted(given ^ keys):
                problem = "is missing" if odd[0] in keys else "is not in episode 0"
                raise ValueError(f"episode {number}: {name}/{odd[0]} {problem}; give all episodes the same fields")
        return spaces.Dict({key: _inferred(f"{name}/{key}", [one[key] for one in values]) for key in sorted(keys)})
    first = _array(f"episode 0: {name}", values[0])
    if first.dtype.kind == "U":
        for number, one in enumerate(values):
            if isinstance(one, Mapping) or _array(f"episode {number}: {name}", one).dtype.kind != "U":
                raise ValueError(f"episode {number}: {name}: not texts, as in episode 0; give a list of strings")
        return spaces.Text(max(len(text) for one in values for text in one) or 1, charset=string.printable)
    if first.dtype.kind == "f":
        return spaces.Box(-np.inf, np.inf, first.shape[1:], np.float32)
    if first.dtype == np.uint8 and first.ndim == 4:
        return spaces.Box(0, 255, first.shape[1:], np.uint8)
    raise ValueError(
        f"{name}: {first.dtype} {first.shape}: how many values these take is not known; give observation_space"
    )


def _checked(number: int, episode: Episode, observation_space: gymnasium.Space, action_space: gymnasium.Space) -> Any:
    """The episode as Minari's buffer. ValueError names what does not fit."""
    from minari.data_collector import EpisodeBuffer

    where = f"episode {number}"
    for name in ("terminated", "truncated"):
        flag = getattr(episode, name)
        if np.ndim(flag) or flag not in (0, 1):
            raise ValueError(f"{where}: {name}={flag!r}; give True or False, for its last timestep")
    rewards = _array(f"{where}: rewards", episode.rewards)
    if rewards.ndim != 1 or len(rewards) == 0:
        raise ValueError(f"{where}: rewards are {rewards.shape}, expected (T,) with T of at least 1")
    if rewards.dtype.kind not in "fiub":
        raise ValueError(f"{where}: rewards are {rewards.dtype}; convert them to floats")
    rewards, T = _finite(f"{where}: rewards", rewards, np.float32), len(rewards)
    return EpisodeBuffer(
        observations=_columns(f"{where}: observations", episode.observations, observation_space, T + 1),
        actions=_columns(f"{where}: actions", episode.actions, action_space, T),
        rewards=list(rewards),
        terminations=[False] * (T - 1) + [bool(episode.terminated)],
        truncations=[False] * (T - 1) + [bool(episode.truncated)],
    )


def _columns(name: str, values: Any, space: gymnasium.Space, rows: int) -> Any:
    """Arrays of one episode, nested as the space is, of `rows` rows. One row may be missing at the end: the observation
    that no action follows."""
    if isinstance(space, spaces.Dict):
        if not isinstance(values, Mapping) or set(values) != set(space.spaces):
            given = sorted(values) if isinstance(values, Mapping) else type(values).__name__
            raise ValueError(f"{name}: {given}, expected a dict with the keys {sorted(space.spaces)}")
        return {key: _columns(f"{name}/{key}", values[key], part, rows) for key, part in space.spaces.items()}
    if isinstance(space, spaces.Tuple):
        if len(values) != len(space.spaces):
            raise ValueError(f"{name}: {len(values)} parts, expected {len(space.spaces)}")
        return tuple(_columns(f"{name}/{n}", one, part, rows) for n, (one, part) in enumerate(zip(values, space)))
    if isinstance(space, spaces.Text):
        texts = [str(text) for text in values]
        return _padded(name, texts, rows, lambda: [*texts, texts[-1]])
    array = _array(name, values)
    shape = tuple(space.shape or ())
    assert space.dtype is not None
    if array.ndim == 0 or (array.shape[1:] != shape and array.shape[1:] != (*shape, 1)):
        raise ValueError(f"{name}: shape {array.shape}, expected (T, {', '.join(map(str, shape))})")
    array = array.reshape(len(array), *shape)
    if array.dtype.kind not in "fiub" or (array.dtype.kind == "f" and space.dtype.kind != "f"):
        raise ValueError(f"{name}: {array.dtype}, the space's are {space.dtype}; convert them")
    _within(name, array, space)
    array = _finite(name, array, space.dtype)
    return _padded(name, array, rows, lambda: np.concatenate([array, array[-1:]]))


def _array(name: str, values: Any) -> np.ndarray:
    try:
        return np.asarray(values)
    except ValueError as error:  # rows of different lengths
        raise ValueError(f"{name}: {error}; give one array, its rows of one shape") from None


def _finite(name: str, array: np.ndarray, dtype: Any) -> np.ndarray:
    """The array as `dtype`, which must hold its values. A float's NaN and infinity are refused."""
    with np.errstate(over="ignore"):
        converted = array.astype(dtype)
    if (bad := np.argwhere(~np.isfinite(converted))).size:
        raise ValueError(
            f"{name}: timestep {bad[0][0]}: NaN or infinity as {converted.dtype}; correct it, or leave the episode out"
        )
    return converted


def _within(name: str, array: np.ndarray, space: gymnasium.Space) -> None:
    """ValueError for the first value outside the space, by more than the rounding of a float."""
    low, high = _bounds(name, space)
    slack: Any = 0
    if array.dtype.kind == "f":
        ends = np.abs(np.stack([low, high]).astype(np.float64))
        scale = np.where(np.isfinite(ends), ends, 0.0).max(0)
        slack = max(1e-6, 2 * float(np.finfo(space.dtype).eps)) * np.where(scale > 0, scale, 1.0)
    if (bad := np.argwhere((array < low - slack) | (array > high + slack))).size:
        row, *place = bad[0].tolist()
        least, most = (end[tuple(place)] for end in (low, high))
        which = f", value {place[0] if len(place) == 1 else tuple(place)}" if place else ""
        raise ValueError(
            f"{name}: timestep {row}{which}: {array[tuple(bad[0])]} is outside [{least}, {most}]; correct it, or give "
            "a space that holds all values"
        )


def _bounds(name: str, space: gymnasium.Space) -> tuple[np.ndarray, np.ndarray]:
    """The least and the greatest value of each dimension, both of the space's shape; infinite where there is none."""
    if isinstance(space, spaces.Box):
        return (space.low, space.high) if space.dtype.kind == "f" else (_integers(space.low), _integers(space.high))
    if isinstance(space, spaces.Discrete):
        return _integers(space.start), _integers(space.start + space.n - 1)
    if isinstance(space, spaces.MultiDiscrete):
        return _integers(space.start), _integers(space.start + space.nvec - 1)
    if isinstance(space, spaces.MultiBinary):
        return np.zeros(space.shape, np.int64), np.ones(space.shape, np.int64)
    raise ValueError(f"{name}: {space} is not a space of arrays; use Box, Discrete, MultiDiscrete or MultiBinary")


def _integers(values: Any) -> np.ndarray:
    return np.asarray(values, np.int64)


def _padded(name: str, values: Any, rows: int, repeat_last: Any) -> Any:
    if len(values) == rows:
        return values
    if len(values) == rows - 1 and rows > 1 and "observations" in name:
        return repeat_last()
    raise ValueError(f"{name}: {len(values)} rows, expected one per reward")
