"""`python -m etl.record`: logs from the real simulators, in the formats users have.

policy + simulator -> timesteps -> D4RL's HDF5 layout, or for Atari the DQN-Replay layout

The logged action is the one that was played, noise included. Rows go to disk as they
come, under a temporary name; the file gets its name when it is whole.

Invariant: the recorded arrays are a function of the arguments alone.
"""

from __future__ import annotations

import gzip
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Protocol

import h5py
import numpy as np
import tyro
from rich.console import Console
from rich.progress import Progress

from etl import simulators
from etl.experts import PolicyError, policies
from schemas.files import sync_folder

CHUNK = 4096
ATARI_ARRAYS = {"observation": np.uint8, "action": np.int32, "reward": np.float32, "terminal": np.uint8}


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
    seed: int = 0
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """Folder; data/logs/d4rl or data/logs/dqn_replay where not given."""
    level: str | None = None
    """Level in the file name of D4RL logs: expert, medium, ...; the policy's kind where not given."""
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


class Columns(Protocol):
    """Named columns that grow on disk under a temporary name; `close` gives them their name, `discard` removes
    them."""

    def append(self, row: dict[str, Any]) -> None: ...

    def close(self) -> None: ...

    def discard(self) -> None: ...


class Hdf5Log:
    """D4RL's layout: one growing dataset a key, attribute env_id, metadata as datasets."""

    def __init__(self, path: Path, environment: str, algorithm: str):
        self.path, self.temporary = path, path.with_name(f".{path.name}.{os.getpid()}.tmp")
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = h5py.File(self.temporary, "w", track_order=False)
        self.file.attrs["env_id"] = environment
        self.file["metadata/algorithm"] = algorithm
        self.rows: dict[str, list] = {}

    def append(self, row: dict[str, Any]) -> None:
        for key, value in row.items():
            self.rows.setdefault(key, []).append(value)
        if len(self.rows["rewards"]) >= CHUNK:
            self.flush()

    def flush(self) -> None:
        for key, values in self.rows.items():
            block = np.stack(values)
            if key not in self.file:
                shape = block.shape[1:]
                self.file.create_dataset(
                    key, (0, *shape), block.dtype, maxshape=(None, *shape), chunks=(CHUNK, *shape), compression="gzip",
                    compression_opts=1,
                )  # fmt: skip
            dataset = self.file[key]
            dataset.resize(len(dataset) + len(block), axis=0)
            dataset[-len(block) :] = block
            values.clear()

    def close(self) -> None:
        self.flush()
        self.file.close()
        os.replace(self.temporary, self.path)
        sync_folder(self.path.parent)

    def discard(self) -> None:
        self.file.close()
        self.temporary.unlink(missing_ok=True)


class ReplayLog:
    """The DQN-Replay layout: gzipped .npy files in lockstep. Rows are spooled raw and packed at the end, when
    their number is known."""

    def __init__(self, folder: Path):
        self.folder, self.temporary = folder, folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
        shutil.rmtree(self.temporary, ignore_errors=True)
        self.temporary.mkdir(parents=True)
        self.spools = {name: open(self.temporary / f"{name}.raw", "w+b") for name in ATARI_ARRAYS}  # noqa: SIM115
        self.count = 0

    def append(self, row: dict[str, Any]) -> None:
        for name, dtype in ATARI_ARRAYS.items():
            self.spools[name].write(np.asarray(row[name], dtype).tobytes())
        self.count += 1

    def close(self) -> None:
        for name, dtype in ATARI_ARRAYS.items():
            shape = (self.count, 84, 84) if name == "observation" else (self.count,)
            self._pack(f"$store$_{name}_ckpt.0.gz", np.dtype(dtype), shape, self.spools[name])
            self.spools[name].close()
            (self.temporary / f"{name}.raw").unlink()
        for name, value in (("add_count", np.array(self.count)), ("invalid_range", np.zeros(5, np.int64))):
            with self._gzip(f"{name}_ckpt.0.gz") as packed:
                np.lib.format.write_array(packed, value)
        shutil.rmtree(self.folder, ignore_errors=True)
        os.replace(self.temporary, self.folder)
        sync_folder(self.folder.parent)

    def discard(self) -> None:
        for spool in self.spools.values():
            spool.close()
        shutil.rmtree(self.temporary, ignore_errors=True)

    def _pack(self, name: str, dtype: np.dtype, shape: tuple[int, ...], spool: Any) -> None:
        spool.seek(0)
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        with self._gzip(name) as packed:
            np.lib.format.write_array_header_1_0(packed, header)
            shutil.copyfileobj(spool, packed)

    def _gzip(self, name: str) -> gzip.GzipFile:
        return gzip.GzipFile(self.temporary / name, "wb", compresslevel=1, mtime=0)


def record(options: Options, console: Console) -> Path:
    """Play and write the log; returns its path. SimulatorError or PolicyError say what does not fit."""
    if options.steps < 1 or options.noise < 0:
        raise ValueError("--steps must be at least 1 and --noise not negative")
    spec = simulators.environment_spec(options.environment)
    env = simulators.make(spec)
    fields = simulators.observation_fields(env)
    size = sum(int(np.prod(field.shape)) for field in fields)
    policy = policies.load(options.policy, options.environment, size, simulators.action_spec(env))
    path = _path(options, spec.suite)
    if path.exists() and not options.overwrite:
        raise ValueError(
            f"{path}: already there; give another --output, --level or --run, or --overwrite to replace it"
        )
    atari = spec.suite == "atari"
    log: Columns = ReplayLog(path) if atari else Hdf5Log(path, options.environment, policy.algorithm)
    returns, running, done = [], 0.0, 0
    try:
        with Progress(console=console) as progress:
            bar = progress.add_task(options.environment, total=options.steps)
            for step in play(options, env, policy):
                done += 1
                running += step.reward
                ended = step.terminated or step.truncated
                last = (done >= options.steps and ended) or done >= options.steps + options.steps // 10
                log.append(_atari_row(step) if atari else _d4rl_row(step))
                if ended:
                    returns.append(running)
                    running = 0.0
                progress.update(bar, completed=done)
                if last:
                    break
        log.close()
    except BaseException:
        log.discard()
        raise
    finally:
        env.close()
    mean = f"{np.mean(returns):.1f} ± {np.std(returns):.1f}" if returns else "-"
    cut = "" if ended else ", the last one cut by the log's end"
    console.print(
        f"{path}: {done} timesteps, {len(returns)} whole episodes{cut}, return {mean} (unclipped)", highlight=False
    )
    return path


def _path(options: Options, suite: str) -> Path:
    if suite == "atari":
        game = options.environment.removeprefix("ALE/").rsplit("-", 1)[0]
        return (options.output or Path("data/logs/dqn_replay")) / game / str(options.run) / "replay_logs"
    body, version = options.environment.rsplit("-", 1)
    level = options.level or (options.policy if options.policy in ("expert", "random") else Path(options.policy).stem)
    return (options.output or Path("data/logs/d4rl")) / f"{body.lower()}-{level}-{version}.hdf5"


def _d4rl_row(step: Step) -> dict[str, Any]:
    def flat(observation: dict[str, np.ndarray]) -> np.ndarray:
        return np.concatenate([np.ravel(observation[key]) for key in sorted(observation)]).astype(np.float32)

    return {
        "observations": flat(step.observation),
        "actions": step.action,
        "rewards": np.float32(step.reward),
        "terminals": step.terminated,
        "timeouts": step.truncated,
        "next_observations": flat(step.following),
        **step.raw,
    }


def _atari_row(step: Step) -> dict[str, Any]:
    frame = step.observation["frame"][..., 0]
    terminal = step.terminated or step.truncated
    return {"observation": frame, "action": step.action, "reward": np.clip(step.reward, -1, 1), "terminal": terminal}


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
