"""`python -m etl.replay`: the log of a policy in training, as D4RL's medium-replay is one.

PPO learns in the simulator (simulators/experts/train.py) -> every episode that ended, in the order of the ends -> the
log format that etl.record writes too

Invariant: a log holds whole episodes as the simulator had them: observations and rewards before they are normalised for
the learner, actions as they were played, exploration included.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import gymnasium
import numpy as np
import tyro
from rich.console import Console

import simulators
from etl import sources
from etl.record import DEFAULT, Recorded, writer_of
from schemas.files import atomic_write, disk_fault, exclusive_name, require_folder
from schemas.ranges import require
from schemas.terminal import command, status_of
from simulators import plugins
from simulators.experts.train import TrainOptions, require_continuous, train
from simulators.rollout import Step, require_finite


@dataclass(frozen=True)
class Options:
    """Record what a policy does while it learns, by PPO."""

    environment: Annotated[str, tyro.conf.arg(aliases=["-e"])] = DEFAULT
    """gymnasium id of a body with continuous actions; MODULE:Id for one of your own."""
    imports: plugins.Imports = ()
    """Module to import first, which registers environments or suites; may be given several times."""
    timesteps: int = 300_000
    """Environment steps of training."""
    until: float | None = None
    """End earlier, where the policy's mean return over ten episodes without exploration reaches this."""
    every: int = 1
    """Keep one of so many episodes."""
    seed: int = 0
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """Folder; data/logs/d4rl where not given."""
    level: str = "medium-replay"
    """Level in the file's name."""
    policy: Path | None = None
    """File for the best policy, which etl.record plays; kept nowhere where not given."""
    overwrite: bool = False
    """Replace a log that is already there."""


class Watched(gymnasium.Wrapper):
    """Hands over each episode of an environment once it has ended. SimulatorError where the simulator fails."""

    def __init__(self, env: gymnasium.Env, ended: Callable[[list[Step]], None]):
        super().__init__(env)
        self.ended, self.suite = ended, env.get_wrapper_attr("suite")
        self.steps: list[Step] = []

    def reset(self, **options: Any) -> tuple[Any, dict]:
        self.steps = []
        with self._named():
            self.seen, about = super().reset(**options)
            require_finite(self.seen)
        return self.seen, about

    def step(self, action: Any) -> Any:
        seen, before = self.seen, self.suite.state(self.env)
        with self._named():
            result = super().step(action)
            self.seen, reward, terminated, truncated, _ = result
            require_finite(self.seen, float(reward))
        played = np.array(action, np.float32)
        step = Step(0, seen, played, float(reward), bool(terminated), bool(truncated), self.seen, before=before)
        self.steps.append(step)
        if step.ended:
            self.ended(self.steps)
        return result

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # a simulator may raise anything
            id = self.get_wrapper_attr("environment").id
            problem = f"{type(error).__name__}: {error}"
            raise simulators.SimulatorError(f"{id}: timestep {len(self.steps)} of an episode: {problem}") from error


def check(options: Options) -> None:
    """ValueError names an option whose value makes no sense."""
    require("timesteps", options.timesteps, TrainOptions.rollout, 2**40)
    require("every", options.every, 1, 2**40)
    require("seed", options.seed, 0, 2**31)
    if options.until is not None:
        require("until", options.until, -1e38, 1e38)
    if options.policy is not None:
        _check_policy(options.policy, options.overwrite)
    if options.output is not None:
        require_folder("output", options.output)


def _check_policy(path: Path, overwrite: bool) -> None:
    """ValueError where the best policy cannot be written to `path`; here and not after the training."""
    if path.suffix != ".safetensors":
        raise ValueError(f"--policy {path}: give a name that ends in .safetensors, as etl.record reads it")
    if path.is_dir():
        raise ValueError(f"--policy {path}: is a folder; give a file in it")
    if path.exists() and not overwrite:
        raise ValueError(f"--policy {path}: already there; give another name, or --overwrite to replace it")
    require_folder("policy", path.parent)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path.parent):
        pass


def replay(options: Options, console: Console) -> Recorded:
    """Train and write the log, under options that `check` let pass. SimulatorError or PolicyError say what does not
    fit."""
    spec = simulators.environment_spec(options.environment)
    env = simulators.make(spec)
    try:
        require_continuous(env)
        writer = writer_of(env)
    finally:
        env.close()
    if writer is not sources.load("d4rl").writer:  # others look at their simulator, and here copies share one writer
        raise ValueError(f"{spec.id}: only observations of one plain vector are replayed; play it with etl.record")
    name = simulators.suite_named(spec.suite).log_name(spec.id)
    path = writer.path(options.output or Path(writer.folder), name, options.level, 1)
    with exclusive_name(path, "give another --output or --level"), tempfile.TemporaryDirectory() as scratch:
        if path.exists() and not options.overwrite:
            raise ValueError(f"{path}: already there; give another --output or --level, or --overwrite to replace it")
        log = writer(path, spec, "ppo")
        try:
            best = Path(scratch) / "policy.safetensors"
            done = _written(options, log, best, path, console)
            if options.policy is not None:
                with atomic_write(options.policy) as file:
                    file.write(best.read_bytes())
            log.close()
        finally:
            log.discard()
    console.print(f"{path}: {done}", highlight=False)
    return done


def _written(options: Options, log: sources.LogWriter, policy: Path, path: Path, console: Console) -> Recorded:
    """Train; every `every`-th episode goes into the log."""
    returns: list[float] = []
    ended = rows = 0

    def keep(steps: list[Step]) -> None:
        nonlocal ended, rows
        ended += 1
        if ended % options.every == 0:
            for step in steps:
                log.append(step)
            rows += len(steps)
            returns.append(sum(step.reward for step in steps))

    learner = TrainOptions(
        environment=options.environment,
        imports=options.imports,
        timesteps=options.timesteps,
        output=policy,
        seed=options.seed,
        evaluate_every=max(TrainOptions.rollout, min(TrainOptions.evaluate_every, options.timesteps // 4)),
        until=options.until,
    )
    train(learner, console, lambda env: Watched(env, keep), log.wrap)
    if not returns:
        raise ValueError(f"{path}: no episode to keep; give more --timesteps, or a smaller --every")
    return Recorded(path, rows, returns, cut=False)


@command
def main() -> int:
    options = tyro.cli(Options, prog="python -m etl.replay")
    console = Console(stderr=True, width=None if sys.stderr.isatty() else 140)
    try:
        check(options)
        plugins.load(options.imports)
        replay(options, console)
    except (simulators.SimulatorError, ValueError, OSError) as error:
        print(f"error: {disk_fault(error, options.output or 'data/logs') or error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as interrupt:
        print("interrupted: nothing was recorded", file=sys.stderr)
        return status_of(interrupt)
    return 0


if __name__ == "__main__":
    sys.exit(main())
