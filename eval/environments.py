"""Playing episodes: one policy, one task, a batch of simulators that start together.

seeds -> simulators -> simulators.rollout -> returns, timesteps and endings; pictures of the first episode

An environment that fails ends its own episode with an error; the others go on. A picture that cannot be drawn ends the
film alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

import simulators
from schemas.episode import TaskSpec
from simulators.policy import EpisodeRng, Policy
from simulators.rollout import Step, rollout

ENDLESS = 100  # times the longest logged episode: then one that only a goal ends is given up


@dataclass
class Played:
    """One episode: raw return, timesteps, how it ended, pictures where asked for."""

    seed: int
    episode_return: float = 0.0
    timesteps: int = 0
    ending: str = ""
    error: str = ""
    seconds: float = 0.0
    frames: list[np.ndarray] = field(default_factory=list)

    def add(self, step: Step) -> None:
        """Count one more timestep, or the error in its place."""
        if step.error is not None:
            where = "" if step.action is not None else " at reset"
            self.ending, self.error = "error", f"{type(step.error).__name__}{where}: {step.error}"
            return
        self.episode_return += step.reward
        self.timesteps += 1
        self.ending = "terminated" if step.terminated else "truncated" if step.truncated else ""


class Film:
    """Pictures of one simulator, one every `every` timesteps, up to `most`."""

    def __init__(self, most: int, every: int):
        self.most, self.every, self.timestep = most, every, 0
        self.frames: list[np.ndarray] = []

    def take(self, env: simulators.gymnasium.Env) -> None:
        if self.timestep % self.every == 0 and len(self.frames) < self.most:
            try:
                self.frames.append(simulators.frame(env))
            except Exception:  # drawing may raise anything, and no return depends on it
                self.most = 0
        self.timestep += 1


def play(
    policy: Policy,
    task: TaskSpec,
    seeds: list[int],
    step_limit: int | None = None,
    policy_seed: int = 0,
    film: int = 0,
    film_every: int = 1,
    progress: Callable[[int, int], None] = lambda timesteps, active: None,
) -> list[Played]:
    """One episode per seed, all at once, of at most `step_limit` timesteps; where that is None and the environment has
    no limit of its own, of ENDLESS times the log's longest. `film`: how many pictures of the first episode to keep, one
    every `film_every` timesteps. SimulatorError where the simulator cannot be made at all or its spaces differ from
    the task's."""
    assert task.environment is not None
    played = [Played(seed) for seed in seeds]
    begun = time.monotonic()
    render = bool(film) and simulators.suite_named(task.environment.suite).renders
    environments = [simulators.make(task.environment, render=render and n == 0) for n in range(len(seeds))]
    pictures = Film(film, film_every)
    try:
        _check_spaces(task, environments[0])
        if step_limit is None and (environments[0].spec is None or environments[0].spec.max_episode_steps is None):
            step_limit = ENDLESS * task.max_episode_steps
        rng = EpisodeRng.seeded(policy_seed, seeds)
        steps = rollout(
            policy, environments, seeds, rng, lambda row, env: pictures.take(env) if row == 0 else None, step_limit
        )
        latest = -1  # row of the step before: where it does not rise, a timestep is over
        for step in steps:
            if step.row <= latest:
                progress(max(one.timesteps for one in played), sum(not one.ending for one in played))
            latest = step.row
            one = played[step.row]
            one.add(step)
            if not one.ending and step_limit is not None and one.timesteps >= step_limit:
                one.ending = "step limit"
            if one.ending:
                one.seconds = time.monotonic() - begun
        played[0].frames = pictures.frames
    finally:
        for environment in environments:
            environment.close()
    return played


def _check_spaces(task: TaskSpec, environment: simulators.gymnasium.Env) -> None:
    fields, action = simulators.observation_fields(environment), simulators.action_spec(environment)
    have, wanted = (
        {s.key: (s.kind, s.kind == "text" or s.shape) for s in specs} for specs in (fields, task.observation)
    )
    kinds = [(spec.kind, spec.size, spec.choices, spec.start) for spec in (action, task.action) if spec is not None]
    if have != wanted or kinds[0] != kinds[1]:
        raise simulators.SimulatorError(
            f"task '{task.name}': logged with observations {wanted} and actions {kinds[1]}, but "
            f"{task.environment.id if task.environment else '?'} has {have} and {kinds[0]}; "
            "rebuild the dataset with --environment naming the right one, or with --rename OLD=NEW where only "
            "the names of fields differ"
        )
