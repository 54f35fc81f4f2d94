"""`python -m simulators.scores`: returns of random play and of the shipped expert, which normalise every task's score.

    suites -> ids with an expert -> episodes of random play and of the expert -> simulators/suites/scores.json
    scores.json -> Suite.reference, and how long etl.record will take

Invariant: a row is a function of the id, the number of episodes, the seed and the packages that it names; the seconds
alone are of the machine.
"""

from __future__ import annotations

import json
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from multiprocessing import get_context
from pathlib import Path

import gymnasium
import numpy as np
import tyro
from rich.console import Console

import simulators
from schemas.episode import ScoreReference
from schemas.files import write_rows
from schemas.ranges import require
from simulators.policy import EpisodeRng, NoisyPolicy, Policy
from simulators.registry import all_suites
from simulators.rollout import reset_seed, rollout

PATH = Path(__file__).resolve().parent / "suites" / "scores.json"


@dataclass(frozen=True)
class Score:
    """Measurements of one task: mean returns, and of the expert's episodes the mean length, the share with a
    return above zero, and the processor seconds."""

    random: float
    expert: float
    positive: float
    timesteps: float
    seconds: float
    episodes: int
    seed: int
    versions: dict[str, str]

    def reference(self) -> ScoreReference | None:
        """0 is random play and 100 the expert; None where the expert is no better."""
        return ScoreReference("expert", self.random, self.expert) if self.random < self.expert else None


@cache
def table() -> dict[str, Score]:
    """Measurements by id."""
    return {id: Score(**row) for id, row in json.loads(PATH.read_text("utf-8")).items()} if PATH.is_file() else {}


def reference(id: str) -> ScoreReference | None:
    """Returns of random play and of the expert of an id, None where they were not measured."""
    return table()[id].reference() if id in table() else None


@dataclass(frozen=True)
class Options:
    """Measure random play and the shipped expert; tasks that were measured before are left alone."""

    suite: str | None = None
    """One suite; all that are installed where not given."""
    episodes: int = 100
    seed: int = 0
    workers: int = 1
    overwrite: bool = False
    """Measure again what was measured before."""


def measure(id: str, episodes: int, seed: int) -> Score:
    """Play both policies, their actions clipped to their range. SimulatorError or PolicyError as the simulator's and
    the expert's makers."""
    from simulators.experts import policies

    spec = simulators.environment_spec(id)
    env = simulators.make(spec)
    action = simulators.action_spec(env)
    suite = simulators.suite_named(spec.suite)
    found = {}
    for name in ("random", "expert"):
        begun = time.process_time()
        played = [
            _play(env, NoisyPolicy(policies.load(name, env), action, 0.0), reset_seed(seed, n)) for n in range(episodes)
        ]
        found[name] = np.array(played), (time.process_time() - begun) / episodes
    env.close()
    (random, _), (expert, seconds) = found["random"], found["expert"]
    versions = {name: metadata.version(name) for name in suite.distributions}
    return Score(
        random=round(float(random[:, 0].mean()), 4),
        expert=round(float(expert[:, 0].mean()), 4),
        positive=float((expert[:, 0] > 0).mean()),
        timesteps=round(float(expert[:, 1].mean()), 1),
        seconds=round(seconds, 4),
        episodes=episodes,
        seed=seed,
        versions=versions,
    )


def _play(env: gymnasium.Env, policy: Policy, seed: int) -> tuple[float, int]:
    """Return and length of one episode. Raises what the simulator raises."""
    total, timesteps = 0.0, 0
    for step in rollout(policy, [env], [seed], EpisodeRng.seeded(0, [seed])):
        if step.error is not None:
            raise step.error
        total, timesteps = total + step.reward, timesteps + 1
    return total, timesteps


def main() -> int:
    options = tyro.cli(Options, prog="python -m simulators.scores")
    console = Console(stderr=True)
    try:
        for name, least in (("episodes", 1), ("seed", 0), ("workers", 1)):
            require(name, getattr(options, name), least, 2**31)
        suites = [simulators.suite_named(options.suite)] if options.suite else list(all_suites().values())
    except (ValueError, simulators.SimulatorError) as error:
        console.print(f"error: {error}", highlight=False)
        return 1
    rows = dict(table())
    todo = []
    for suite in suites:
        try:
            todo += [id for id in suite.tasks() if options.overwrite or id not in rows]
        except simulators.SimulatorError as error:
            console.print(f"left out: {error}", highlight=False)
    failed = 0
    with ProcessPoolExecutor(options.workers, get_context("spawn")) as pool:
        jobs = {pool.submit(measure, id, options.episodes, options.seed): id for id in todo}
        for done, job in enumerate(as_completed(jobs), 1):
            id = jobs[job]
            if job.exception() is not None:
                failed += 1
                console.print(f"{id}: {type(job.exception()).__name__}: {job.exception()}", highlight=False)
                continue
            rows[id] = job.result()
            write_rows(PATH, rows)
            console.print(f"{done}/{len(todo)} {id}: {rows[id].random:g} {rows[id].expert:g}", highlight=False)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
