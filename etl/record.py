"""`python -m etl.record`: logs from the real simulators, in the formats users have.

policy + simulator -> steps (simulators/rollout.py) -> the writer of a log format: D4RL's for a plain vector and
continuous actions, the suite's own where it names one (Atari: DQN-Replay), Minari's for all else

The logged action is the one that was played, noise included. Rows go to disk as they come,
under a temporary name; the file gets its name when it is whole.

Invariant: the recorded arrays are a function of the arguments alone.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from rich.console import Console
from rich.progress import Progress

import simulators
from etl import sources
from schemas.episode import EnvironmentSpec
from schemas.files import disk_fault, exclusive_name, require_folder
from schemas.ranges import require
from schemas.terminal import command, status_of
from simulators import plugins
from simulators.experts import policies
from simulators.policy import NoisyPolicy, Policy
from simulators.rollout import Step, reset_seed, rollout

DEFAULT = "Hopper-v4"
DEFAULT_STEPS = 20_000
CLIPPED = 0.01  # share of a policy's action values beyond their range that is worth a word


@dataclass(frozen=True)
class Options:
    """Record a log of a policy's play in a real simulator."""

    environment: Annotated[str | None, tyro.conf.arg(aliases=["-e"])] = None
    """gymnasium id with version, e.g. Hopper-v4 (the default) or ALE/Pong-v5; MODULE:Id for one of your own."""
    policy: str = "expert"
    """expert (shipped), random, a policy file (.safetensors, .npz, or a Stable-Baselines3 .zip that you trust), or
    MODULE:FUNCTION of your own: FUNCTION(env) returns a function observation -> action, or an object with
    act(observation) or act(observation, rng)."""
    imports: plugins.Imports = ()
    """Module to import first, which registers environments or suites; may be given several times."""
    steps: int | None = None
    """Timesteps, 20,000 where --episodes is not given either. A last episode may take a tenth more to end, and is cut
    there otherwise, as in real logs."""
    episodes: int | None = None
    """Whole episodes. With --steps too: at least so many of both, and the last episode is whole."""
    workers: int = 1
    """Processes of --suite, one per log."""
    noise: float = 0.0
    """Standard deviation of Gaussian action noise; for discrete actions the probability of a random one."""
    temperature: float = 1.0
    """Of policies that sample their actions (A3C): what their logits are divided by; less is less noise."""
    seed: int = 0
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """Folder; data/logs/{d4rl,dqn_replay,minari,babyai} where not given. With --suite, the folder of these four, and of
    recorded.json, which lists the logs."""
    level: str | None = None
    """Level in the file name of D4RL and Minari logs: expert, medium, ...; the policy's kind where not given."""
    run: int = 1
    """Run number in the folder name of Atari logs."""
    suite: str | None = None
    """Instead of --environment: every task of this suite whose expert is shipped, or of all suites ("all")."""
    overwrite: bool = False
    """Replace a log that is already there."""


def play(options: Options, env: Any, policy: Policy) -> Iterator[Step]:
    """Timesteps without end, episode after episode; a function of the options. Raises what the simulator raises."""
    suite = env.get_wrapper_attr("suite")
    rng = np.random.default_rng(options.seed)
    for episode in range(sys.maxsize):
        seed = reset_seed(options.seed, episode)
        for step in rollout(policy, [env], [seed], rng, before=lambda row, env: suite.state(env)):
            if step.error is not None:
                problem = f"{type(step.error).__name__}: {step.error}"
                raise simulators.SimulatorError(
                    f"{options.environment or DEFAULT}: episode {episode}: {problem}"
                ) from step.error
            yield step


@dataclass(frozen=True)
class Recorded:
    """A log that was written: where, how long, and the returns of its whole episodes, unclipped."""

    path: Path
    timesteps: int
    returns: list[float]
    cut: bool
    """Its end cut the last episode."""
    clipped: float = 0.0
    """Share of the policy's action values that lay beyond the action space."""

    def __str__(self) -> str:
        mean = f"{np.mean(self.returns):.1f} ± {np.std(self.returns):.1f}" if self.returns else "-"
        cut = ", the last one cut by the log's end" if self.cut else ""
        line = f"{self.timesteps} timesteps, {len(self.returns)} whole episodes{cut}, return {mean} (unclipped)"
        if self.clipped > CLIPPED:
            line += f"; {self.clipped:.0%} of the policy's action values lay beyond the action space and were clipped"
        return line


class AlreadyThere(ValueError):
    """A log of this name is there."""


def check(options: Options) -> None:
    """ValueError names the first option whose value makes no sense, or that does not go with another."""
    if options.suite is not None and options.environment is not None:
        raise ValueError("--environment and --suite together; give one of them")
    if options.output is not None:
        require_folder("output", options.output)
    for name, value, least, most in (
        ("steps", options.steps, 1, 2**40), ("episodes", options.episodes, 1, 2**40),
        ("noise", options.noise, 0, 1e6), ("temperature", options.temperature, 1e-9, 1e6),
        ("seed", options.seed, 0, 2**40), ("run", options.run, 0, 2**40), ("workers", options.workers, 1, 4096),
    ):  # fmt: skip
        if value is not None:
            require(name, value, least, most)
    if options.level is not None and not re.fullmatch(r"[^/\\\0]+", options.level):
        raise ValueError(f"--level {options.level!r}: it is a part of a file name; give a word such as medium")


def record(options: Options, console: Console, parent: Path | None = None) -> Recorded:
    """Play and write the log, into `options.output` or the format's own folder (of its name within `parent`), under
    options that `check` let pass. SimulatorError or PolicyError say what does not fit."""
    spec = simulators.environment_spec(options.environment or DEFAULT)
    env = simulators.make(spec)
    try:
        policy = policies.load(options.policy, env, options.noise, options.temperature)
        if simulators.action_spec(env).kind == "discrete":
            require("noise", options.noise, 0, 1)  # a probability
        writer = writer_of(env)
    finally:
        env.close()
    suite = simulators.suite_named(spec.suite)
    folder = options.output or (parent / Path(writer.folder).name if parent else Path(writer.folder))
    path = writer.path(folder, suite.log_name(spec.id), _level(options), options.run)
    with exclusive_name(path, "give another --output, --level or --run"):
        if path.exists() and not options.overwrite:
            raise AlreadyThere(
                f"{path}: already there; give another --output, --level or --run, or --overwrite to replace it"
            )
        done = _recorded(options, spec, writer(path, spec, policy.algorithm), console, path)
    console.print(f"{path}: {done}", highlight=False)
    return done


def _recorded(
    options: Options, spec: EnvironmentSpec, log: sources.LogWriter, console: Console, path: Path
) -> Recorded:
    """Play into the log, which is removed again unless all goes well."""
    try:
        with closing(simulators.make(spec, inner=log.wrap)) as env:
            policy = policies.load(options.policy, env, options.noise, options.temperature)
            noisy = NoisyPolicy(policy, simulators.action_spec(env), options.noise)
            done = replace(_write(options, env, noisy, log, console, path), clipped=noisy.clipped_share)
            log.close()
        return done
    finally:
        log.discard()


def _write(options: Options, env: Any, policy: Any, log: sources.LogWriter, console: Console, path: Path) -> Recorded:
    """Write the steps of all episodes to the log."""
    returns: list[float] = []
    running, done, ended = 0.0, 0, False
    episodes, steps = options.episodes or 0, options.steps or (0 if options.episodes else DEFAULT_STEPS)
    with Progress(console=console) as progress:
        bar = progress.add_task(options.environment or DEFAULT, total=steps or episodes)
        for step in play(options, env, policy):
            done += 1
            running += step.reward
            ended = step.ended
            log.append(step)
            if ended:
                returns.append(running)
                running = 0.0
            progress.update(bar, completed=done if steps else len(returns))
            if ended and len(returns) >= episodes and done >= steps:
                break
            if not episodes and done >= steps + steps // 10:
                break
    return Recorded(path, done, returns, cut=not ended)


def writer_of(env: Any) -> type[sources.LogWriter]:
    """The log format for what an environment gives and takes."""
    spec: EnvironmentSpec = env.get_wrapper_attr("environment")
    fields, action = simulators.observation_fields(env), simulators.action_spec(env)
    plain = [(field.key, field.kind, len(field.shape)) for field in fields] == [("observation", "continuous", 1)]
    vectors = plain and action.kind == "continuous" and len(env.action_space.shape) == 1
    name = simulators.suite_named(spec.suite).recorded_as or ("d4rl" if vectors else "minari")
    writer = sources.load(name).writer
    if writer is None:
        raise ValueError(f"{spec.id}: its suite is recorded as '{name}', and that source writes no logs")
    return writer


def _level(options: Options) -> str:
    return options.level or Path(options.policy.rpartition(":")[2]).stem


@command
def main() -> int:
    options = tyro.cli(Options, prog="python -m etl.record")
    console = Console(stderr=True, width=None if sys.stderr.isatty() else 140)
    try:
        check(options)
        plugins.load(options.imports)
        if options.suite is None:
            record(options, console)
        else:
            from etl.recording import record_suites

            return 1 if record_suites(options, console) else 0
    except (simulators.SimulatorError, ValueError, OSError) as error:
        print(f"error: {disk_fault(error, options.output or 'data/logs') or error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as interrupt:
        kept = "the same command keeps the logs that are whole" if options.suite else "nothing was recorded"
        print(f"interrupted: {kept}", file=sys.stderr)
        return status_of(interrupt)
    return 0


if __name__ == "__main__":
    sys.exit(main())
