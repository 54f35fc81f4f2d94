"""Exported models as agents in your own loop.

    load(name, folder or URL) -> Model -> agent(task) -> Agent: reset, then observation -> act -> action, ...

Invariant: an agent acts as python -m eval.compare plays it with the same seed, and what it cannot use is a ValueError
that says what to change, never a wrong action.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import fields
from difflib import get_close_matches
from numbers import Integral
from operator import index
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eval.agents import AgentConfig, GatoAgent, agent_alone, agent_for
from eval.baselines import device as default_device
from eval.exports import find_export
from gato.observations import Observations
from schemas.ranges import typed
from schemas.task import TaskSpec
from shards.reader import Dataset
from simulators.policy import EpisodeRng
from trainer.model import Gato
from trainer.model.export import ExportInfo, load_export


def load(place: str | os.PathLike[str], device: str | torch.device | None = None) -> Model:
    """Load an exported model.

    Args:
        place: a shipped name ("tiny"), the folder of an export or of a training run, or an export's URL (any that
            fsspec reads: s3://bucket/export, https://...). A folder whose name is a shipped one is written "./tiny".
        device: where it computes; by default a GPU if there is one.

    Returns:
        The model. Its weights have the sha256 that model.json names.

    Raises:
        TypeError: `place` is not a name or path.
        ValueError: no such model (the message lists the shipped names), one that is damaged or of another format, or a
            device that is not there.
        OSError: a file cannot be read.

    Example:
        >>> model = gato.load("tiny")
        >>> model.tasks
        ('halfcheetah-medium-v4', 'hopper-medium-v4')
    """
    if not isinstance(place, str | os.PathLike):
        raise TypeError(f"load({place!r}): give a shipped name such as 'tiny', a folder or a URL")
    where = _device(device) if device is not None else default_device()
    folder = find_export(place if isinstance(place, str) else Path(place))
    network, info = load_export(folder)
    return Model(network.to(where), info, folder)


class Model:
    """An exported model in evaluation mode. Made by `load`.

    Attributes:
        tasks: names of the tasks that it was trained on.
        folder: the export on this machine.
    """

    def __init__(self, network: Gato, info: ExportInfo, folder: Path):
        self.network, self.info, self.folder = network, info, folder

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(task.name for task in self.info.tasks)

    def __repr__(self) -> str:
        return f"Model({str(self.folder)!r}, tasks={list(self.tasks)})"

    def agent(self, task: str | None = None, *, dataset: str | os.PathLike[str] | None = None, **options: Any) -> Agent:
        """An agent for one task.

        Args:
            task: a task's name, or the environment's id; not needed where the model has a single task.
            dataset: folder or URL of the task's dataset, from which prompts and the text tokenizer are taken. Only
                needed for prompts that were not shipped, and for the tokenizer where the weights are from before
                2026-11-29.
            options: of eval.agents.AgentConfig: decoding="sample", temperature=0.5, prompt="end", window="exact", ...

        Raises:
            ValueError: an unknown task or option, or a task that cannot be played without `dataset`.

        Example:
            >>> agent = gato.load("tiny").agent("hopper-expert-v4", decoding="greedy")
        """
        spec, config = self._task(task), _config(options)
        seed = self.info.training.seed
        if dataset is not None:
            data = Dataset(os.fspath(dataset))
            numbers = [n for n, one in enumerate(data.manifest.tasks) if one.spec.name == spec.name]
            if not numbers:
                known = ", ".join(one.spec.name for one in data.manifest.tasks)
                raise ValueError(f"{dataset}: holds no task '{spec.name}', but {known}; give the dataset of the task")
            self.info.require_data(data.manifest, spec, str(dataset), str(self.folder))
            return Agent(agent_for(self.network, self.info, data, numbers[0], config), spec, seed)
        return Agent(agent_alone(self.network, self.info, self.folder, spec, config), spec, seed)

    def _task(self, wanted: str | None) -> TaskSpec:
        tasks = [task for task in self.info.tasks if task.action is not None]
        known = ", ".join(task.name for task in tasks) or "none that acts"
        if wanted is None:
            if len(tasks) != 1:
                raise ValueError(f"the model has {len(tasks)} tasks; name one: {known}")
            return tasks[0]
        found = [task for task in tasks if task.name == wanted]
        found = found or [task for task in tasks if task.environment is not None and task.environment.id == wanted]
        if not found:
            raise ValueError(f"unknown task '{wanted}'; the model was trained on {known}")
        if len(found) > 1:
            names = ", ".join(task.name for task in found)
            raise ValueError(f"several tasks are played in '{wanted}': {names}; name the task")
        return found[0]


class Agent:
    """Acts in one environment, or in a batch of environments that start together. Made by `Model.agent`.

    Attributes:
        task: what it plays: fields of the observation, action space, environment.

    Example:
        >>> env = gymnasium.make("Hopper-v4")
        >>> observation, _ = env.reset(seed=0)
        >>> agent.reset(seed=0)
        >>> ended = False
        >>> while not ended:
        ...     observation, reward, terminated, truncated, _ = env.step(agent.act(observation))
        ...     ended = terminated or truncated
    """

    def __init__(self, player: GatoAgent, task: TaskSpec, policy_seed: int):
        self.task = task
        self._player, self._policy_seed = player, policy_seed
        self._observations = Observations(task)
        self._batch: int | None = None
        self._rows = 0
        self._active = np.zeros(0, bool)
        self._rng = EpisodeRng([])

    def reset(self, batch: int | None = None, seed: int | Sequence[int] = 0) -> None:
        """Forget the past: new episodes begin. Call it whenever the environment is reset.

        Args:
            batch: number of environments, which start together; None for a single one without a batch dimension.
            seed: of sampled actions: one per environment, or the first one's, the others counting up from it.

        Raises:
            TypeError: a batch or a seed that is not an integer.
            ValueError: a batch below 1, a seed below 0, or seeds that are not one per environment.
        """
        if batch is not None and (isinstance(batch, bool) or not isinstance(batch, Integral)):
            raise TypeError(f"reset(batch={batch!r}): give the number of environments, an integer of 1 or more")
        rows = 1 if batch is None else int(batch)
        if rows < 1:
            raise ValueError(f"reset(batch={batch}): give the number of environments, 1 or more")
        try:
            seeds = (
                [index(seed) + n for n in range(rows)] if isinstance(seed, int | Integral) else [index(s) for s in seed]
            )
        except TypeError:
            raise TypeError(f"reset(seed={seed!r}): give an integer, or one for each environment") from None
        if min(seeds, default=0) < 0:
            raise ValueError(f"reset(seed={seed!r}): give a seed of 0 or more")
        if len(seeds) != rows:
            raise ValueError(f"reset: {len(seeds)} seeds for {rows} environments; give one each, or a single number")
        self._player.reset(rows)
        self._batch, self._rows = None if batch is None else rows, rows
        self._active = np.ones(rows, bool)
        self._rng = EpisodeRng.seeded(self._policy_seed, seeds)

    def act(self, observation: Any, reward: Any = None, active: Any = None) -> Any:
        """The next action.

        Args:
            observation: as the environment returns it: an array, or a dict or nested dict of arrays, float for
                continuous fields, integers for discrete ones, uint8 (H, W, C) for pictures. After reset(batch=B) each
                array has a leading dimension B.
            reward: of the step before, a number or (B,). Gato does not look at it; other agents may.
            active: (B,) bool, the environments whose episode still runs, where some have ended before others. An
                ended one stays out until the next reset; its observation is ignored, and its action is zero.

        Returns:
            What env.step takes: int for Discrete, int64 (A,) for MultiDiscrete, float32 (A,) for Box, flat where the
            Box has more dimensions. After reset(batch=B): (B,) or (B, A).

        Raises:
            ValueError: act before reset; a single observation after reset(batch=B), or the reverse; a key that is
                missing or unknown; a wrong shape or dtype; a value that is not finite or not in its range.
        """
        if self._rows == 0:
            raise ValueError("act before reset; call agent.reset(), or agent.reset(batch=B) for B environments, first")
        running = self._active if active is None else self._narrowed(active)
        arrays = self._observations.check(observation, self._batch, running)
        rewards = self._per_row("reward", 0.0 if reward is None else reward, np.float32)
        self._active = running
        actions = self._player.act(arrays, rewards, running.copy(), self._rng.of(running))
        if self._batch is not None:
            return actions
        return int(actions[0]) if actions.ndim == 1 else actions[0]

    def _narrowed(self, given: Any) -> np.ndarray:
        if np.asarray(given).dtype != bool:
            raise ValueError(f"active={given!r}: give True for each environment whose episode runs, else False")
        active = self._per_row("active", given, bool)
        if again := np.flatnonzero(active & ~self._active).tolist():
            raise ValueError(f"active: episode {again[0]} had ended; all start together again with agent.reset()")
        if not active.any():
            raise ValueError("active: every episode has ended; call agent.reset()")
        return active

    def _per_row(self, name: str, value: Any, dtype: Any) -> np.ndarray:
        try:
            array = np.asarray(value, dtype)
        except (ValueError, TypeError):
            raise ValueError(f"{name}={value!r}: give a number, or one for each environment") from None
        if array.shape not in ((), (self._rows,)):
            raise ValueError(f"{name} has shape {array.shape}; give a number, or an array of shape ({self._rows},)")
        return np.broadcast_to(array, (self._rows,)).copy()


def _device(wanted: str | torch.device) -> torch.device:
    try:
        torch.zeros(1).to(wanted).item()
        return torch.device(wanted)
    except (RuntimeError, AssertionError, TypeError) as error:  # as torch has them
        why = str(error).splitlines()[0].split(" at start")[0].split(", but expected")[0]
        raise ValueError(f"device {wanted!r} cannot be used here ({why}); give 'cpu', or leave it out") from None


def _config(options: dict[str, Any]) -> AgentConfig:
    known = [field.name for field in fields(AgentConfig)]
    for name in options:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            raise ValueError(f"unknown option '{name}'; {f'perhaps {near[0]}' if near else f'known: {known}'}")
    config = typed(AgentConfig, options)
    config.check()
    return config
