"""`python -m etl.record`: logs from the real simulators, in the formats users have.

policy + simulator -> timesteps -> D4RL's HDF5 layout; for Atari the DQN-Replay layout; where an observation has
several fields (PointMaze, BabyAI) Minari's, written by the minari package

The logged action is the one that was played, noise included. Rows go to disk as they
come, under a temporary name; the file gets its name when it is whole.

Invariant: the recorded arrays are a function of the arguments alone.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from rich.console import Console
from rich.progress import Progress

import simulators
from etl.logs import Columns, Hdf5Log, MinariLog, ReplayLog
from simulators.experts import PolicyError, policies


@dataclass(frozen=True)
class Options:
    """Record a log of a policy's play in a real simulator."""

    environment: Annotated[str, tyro.conf.arg(aliases=["-e"])] = "Hopper-v4"
    """gymnasium id with version, e.g. Hopper-v4 or ALE/Pong-v5."""
    policy: str = "expert"
    """expert (shipped), random, or a policy file: .safetensors, .npz, or a Stable-Baselines3 .zip that you trust."""
    steps: int = 20_000
    """Timesteps. A last episode may take a tenth more to end, and is cut there otherwise, as in real logs."""
    noise: float = 0.0
    """Standard deviation of Gaussian action noise; for discrete actions the probability of a random one."""
    temperature: float = 1.0
    """Of policies that sample their actions (A3C): what their logits are divided by; less is less noise."""
    seed: int = 0
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """Folder; data/logs/d4rl, data/logs/dqn_replay or data/logs/minari where not given."""
    level: str | None = None
    """Level in the file name of D4RL and Minari logs: expert, medium, ...; the policy's kind where not given."""
    run: int = 1
    """Run number in the folder name of Atari logs."""
    overwrite: bool = False
    """Replace a log that is already there."""


@dataclass
class Step:
    """One timestep as it was played, and what came of it. `raw`: extra arrays to log."""

    observation: dict[str, np.ndarray]
    action: np.ndarray
    reward: float
    terminated: bool
    truncated: bool
    following: dict[str, np.ndarray]
    raw: dict[str, np.ndarray]


def play(options: Options, env: Any, policy: policies.Policy) -> Iterator[Step]:
    """Timesteps without end, episode after episode; a function of the options."""
    rng = np.random.default_rng(options.seed)
    action_spec = simulators.action_spec(env)
    for episode in range(sys.maxsize):
        observation, _ = env.reset(seed=options.seed * 1_000_003 + episode)
        policy.reset()
        ended = False
        while not ended:
            action = policy.act(observation, rng)
            if action_spec.kind == "continuous":
                noise = rng.normal(0.0, options.noise, action_spec.size) if options.noise else 0.0
                action = np.clip(action + noise, action_spec.low, action_spec.high).astype(np.float32)
            elif options.noise and rng.random() < options.noise:
                action = policies.noise_action(action_spec, rng)
            raw = _state(env)
            following, reward, terminated, truncated, _ = env.step(action)
            yield Step(observation, action, reward, terminated, truncated and not terminated, following, raw)
            observation, ended = following, terminated or truncated


def _state(env: Any) -> dict[str, np.ndarray]:
    data = getattr(env.unwrapped, "data", None)
    return {} if data is None else {"infos/qpos": data.qpos.copy(), "infos/qvel": data.qvel.copy()}


def record(options: Options, console: Console) -> Path:
    """Play and write the log; returns its path. SimulatorError or PolicyError say what does not fit."""
    if options.steps < 1 or options.noise < 0 or not options.temperature > 0:
        raise ValueError("--steps must be at least 1, --noise not negative and --temperature positive")
    spec = simulators.environment_spec(options.environment)
    env = simulators.make(spec)
    fields = simulators.observation_fields(env)
    size = sum(int(np.prod(field.shape)) for field in fields)

    def player() -> policies.Policy:
        action = simulators.action_spec(env)
        return policies.load(options.policy, env, size, action, options.noise, options.temperature)

    policy = player()
    atari, plain = spec.suite == "atari", [field.key for field in fields] == ["observation"]
    path = _path(options, "atari" if atari else "plain" if plain else "minari")
    if path.exists() and not options.overwrite:
        raise ValueError(
            f"{path}: already there; give another --output, --level or --run, or --overwrite to replace it"
        )
    log: Columns
    if atari or plain:
        log = ReplayLog(path) if atari else Hdf5Log(path, options.environment, policy.algorithm)
    else:
        log = collected = MinariLog(path.parents[1], "/".join(path.parts[-2:]), policy.algorithm)
        env.close()
        env = simulators.make(spec, inner=collected.wrap)
        policy = player()
    returns, running, done = [], 0.0, 0
    try:
        with Progress(console=console) as progress:
            bar = progress.add_task(options.environment, total=options.steps)
            for step in play(options, env, policy):
                done += 1
                running += step.reward
                ended = step.terminated or step.truncated
                last = (done >= options.steps and ended) or done >= options.steps + options.steps // 10
                log.append(_atari_row(step) if atari else _d4rl_row(step) if plain else _minari_row(step))
                if ended:
                    returns.append(running)
                    running = 0.0
                progress.update(bar, completed=done)
                if last:
                    break
        log.close()
    finally:
        env.close()
        log.discard()
    mean = f"{np.mean(returns):.1f} ± {np.std(returns):.1f}" if returns else "-"
    cut = "" if ended else ", the last one cut by the log's end"
    console.print(
        f"{path}: {done} timesteps, {len(returns)} whole episodes{cut}, return {mean} (unclipped)", highlight=False
    )
    return path


def _path(options: Options, layout: str) -> Path:
    if layout == "atari":
        game = options.environment.removeprefix("ALE/").rsplit("-", 1)[0]
        return (options.output or Path("data/logs/dqn_replay")) / game / str(options.run) / "replay_logs"
    body, version = options.environment.rsplit("-", 1)
    level = options.level or (options.policy if options.policy in ("expert", "random") else Path(options.policy).stem)
    if layout == "minari":
        return (options.output or Path("data/logs/minari")) / body.lower() / f"{level}-{version}"
    return (options.output or Path("data/logs/d4rl")) / f"{body.lower()}-{level}-{version}.hdf5"


def _d4rl_row(step: Step) -> dict[str, Any]:
    return {
        "observations": step.observation["observation"].reshape(-1),
        "actions": step.action,
        "rewards": np.float32(step.reward),
        "terminals": step.terminated,
        "timeouts": step.truncated,
        "next_observations": step.following["observation"].reshape(-1),
        **step.raw,
    }


def _atari_row(step: Step) -> dict[str, Any]:
    frame = step.observation["frame"][..., 0]
    terminal = step.terminated or step.truncated
    return {"observation": frame, "action": step.action, "reward": np.clip(step.reward, -1, 1), "terminal": terminal}


def _minari_row(step: Step) -> dict[str, Any]:
    ended = {"terminated": step.terminated, "truncated": step.truncated}
    return {"action": step.action, "reward": np.float32(step.reward), **ended}


def main() -> int:
    options = tyro.cli(Options, prog="python -m etl.record")
    console = Console(stderr=True, width=None if sys.stderr.isatty() else 140)
    try:
        record(options, console)
    except (simulators.SimulatorError, PolicyError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: nothing was recorded", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
