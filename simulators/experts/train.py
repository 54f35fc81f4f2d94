"""Train a continuous-control expert by PPO and export it as a perceptron file.

    stable-baselines3 PPO on normalised observations -> every `evaluate_every` timesteps: fold the running mean and
    variance into our perceptron, play it -> keep the best -> play that one on other seeds -> safetensors

The file holds what the shipped experts hold: weights in float32 and a header that says algorithm, environment,
timesteps, return over ten episodes, commit and licence.

Invariant: the exported perceptron, not the training policy, is what was scored.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
import tyro
from gymnasium.wrappers import FlattenObservation
from rich.console import Console

import simulators
from simulators import plugins
from simulators.experts import PolicyError
from simulators.experts.perceptron import VARIANCE_EPSILON, Perceptron, load, save_safetensors
from simulators.policy import NoisyPolicy, OnePlayer
from simulators.rollout import rollout

CLIP = 10.0
Wrap = Callable[[gymnasium.Env], gymnasium.Env]


@dataclass
class TrainOptions:
    """Train an expert by PPO and write it as a small safetensors file that etl.record plays."""

    environment: str = "Hopper-v4"
    """gymnasium id of a body with continuous actions, MODULE:Id for one of your own"""
    imports: plugins.Imports = ()
    """module to import first, which registers environments or suites"""
    timesteps: int = 1_000_000
    """environment steps of training; the best checkpoint on the way is kept"""
    output: Path = Path("data/experts/hopper.safetensors")
    """file to write"""
    seed: int = 0
    evaluate_every: int = 50_000
    """timesteps between scored checkpoints"""
    until: float | None = None
    """end where a checkpoint's mean return reaches this"""
    width: int = 64
    """units in each of the two hidden layers"""
    activation: str = "tanh"
    """tanh or relu"""
    learning_rate: float = 3e-4
    """falls linearly to zero"""
    copies: int = 8
    """simulators that play side by side"""
    rollout: int = 2048
    """timesteps between updates, all copies together"""
    minibatch: int = 128
    epochs: int = 10
    discount: float = 0.99
    gae: float = 0.95
    """λ of the generalised advantage estimate"""
    entropy: float = 0.0
    """weight of the entropy bonus"""
    log_std: float = 0.0
    """initial log standard deviation of the exploration noise"""


def train(
    options: TrainOptions,
    console: Console,
    watch: Wrap = lambda env: env,
    inner: Wrap | None = None,
) -> dict[str, str]:
    """Train, keep the best checkpoint at `options.output`, return its header. `watch` wraps each simulator that is
    learned in; `inner` as of `simulators.make`."""
    try:
        from stable_baselines3 import PPO
        from stable_baselines3.common.callbacks import BaseCallback
        from stable_baselines3.common.monitor import Monitor
        from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
    except ImportError:
        raise PolicyError("training an expert needs stable-baselines3; pip install 'gato-open[sb3]'") from None
    torch.set_num_threads(1)
    plugins.load(options.imports)
    spec = simulators.environment_spec(options.environment)
    env = simulators.make(spec)
    require_continuous(env)
    env.close()
    body = DummyVecEnv(
        [lambda: Monitor(FlattenObservation(watch(simulators.make(spec, inner=inner))))] * options.copies
    )
    world = VecNormalize(body, gamma=options.discount, clip_obs=CLIP, epsilon=VARIANCE_EPSILON)
    agent = PPO(
        "MlpPolicy",
        world,
        learning_rate=lambda remaining: options.learning_rate * remaining,
        n_steps=options.rollout // options.copies,
        batch_size=options.minibatch,
        n_epochs=options.epochs,
        gamma=options.discount,
        gae_lambda=options.gae,
        ent_coef=options.entropy,
        policy_kwargs={
            "net_arch": [options.width, options.width],
            "activation_fn": {"tanh": torch.nn.Tanh, "relu": torch.nn.ReLU}[options.activation],
            "log_std_init": options.log_std,
        },
        seed=options.seed,
        device="cpu",
    )
    best = -np.inf
    header: dict[str, str] = {}

    class Checkpoint(BaseCallback):
        """Scores the policy as it would be exported; keeps it where it beats all before it."""

        ended = False

        def _on_step(self) -> bool:
            return not self.ended

        def _on_rollout_end(self) -> None:
            nonlocal best, header
            before = self.num_timesteps - options.rollout
            if self.num_timesteps // options.evaluate_every == before // options.evaluate_every:
                return
            tensors = export(agent, world)
            returns = play(_perceptron(tensors, options.activation), options.environment, 1000, 10, options.timesteps)
            # the lower half decides: an expert that sometimes falls is worth less than its mean says
            score = float(np.mean(np.sort(returns)[: len(returns) // 2]) + np.mean(returns))
            console.print(f"{self.num_timesteps:>9,} steps: return {np.mean(returns):.0f} ± {np.std(returns):.0f}")
            self.ended = options.until is not None and float(np.mean(returns)) >= options.until
            if score > best:
                best = score
                header = _header(options, self.num_timesteps)
                save_safetensors(options.output, tensors, header)

    agent.learn(options.timesteps, callback=Checkpoint())
    if not header:
        raise PolicyError(f"--timesteps {options.timesteps} ends before the first checkpoint; lower --evaluate-every")
    best_policy = load(options.output)
    returns = play(best_policy, options.environment, 2000, 10, options.timesteps)
    header |= {"return_mean": f"{np.mean(returns):.1f}", "return_std": f"{np.std(returns):.1f}", "episodes": "10"}
    tensors = {f"layers.{n}.weight": weight for n, weight in enumerate(best_policy.weights)}
    tensors |= {f"layers.{n}.bias": bias for n, bias in enumerate(best_policy.biases)}
    tensors |= {"observation.mean": best_policy.mean, "observation.variance": best_policy.std**2 - VARIANCE_EPSILON}
    save_safetensors(options.output, tensors, header)
    return header


def require_continuous(env: gymnasium.Env) -> None:
    """PolicyError unless its actions are continuous, as a perceptron's are."""
    if simulators.action_spec(env).kind != "continuous":
        name = env.get_wrapper_attr("environment").id
        raise PolicyError(f"{name}: its actions are discrete; experts are trained for continuous ones alone")


def export(agent: Any, world: Any) -> dict[str, np.ndarray]:
    """The deterministic actor of a stable-baselines3 PPO and the running statistics of its VecNormalize, as the
    tensors of our perceptron file, float32."""
    modules = [m for m in agent.policy.mlp_extractor.policy_net if isinstance(m, torch.nn.Linear)]
    tensors = {"observation.mean": world.obs_rms.mean, "observation.variance": world.obs_rms.var}
    for n, module in enumerate([*modules, agent.policy.action_net]):
        tensors[f"layers.{n}.weight"] = module.weight.detach().numpy()
        tensors[f"layers.{n}.bias"] = module.bias.detach().numpy()
    return {key: np.array(value, np.float32) for key, value in tensors.items()}


def play(policy: Perceptron, environment: str, seed: int, episodes: int, longest: int | None = None) -> np.ndarray:
    """Raw returns (episodes,) of a policy on seeds `seed`, `seed` + 1, ..., its actions clipped to their range as
    etl.record clips them. SimulatorError where the simulator fails, or an episode has no end in `longest` timesteps."""
    world = simulators.make(simulators.environment_spec(environment))
    player = NoisyPolicy(OnePlayer(policy), simulators.action_spec(world), 0.0)
    rng = np.random.default_rng(seed)
    returns = np.zeros(episodes)
    for n in range(episodes):
        ended = False
        for step in rollout(player, [world], [seed + n], rng, step_limit=longest):
            if step.error is not None:
                problem = f"{type(step.error).__name__}: {step.error}"
                raise simulators.SimulatorError(f"{environment}: seed {seed + n}: {problem}") from step.error
            returns[n] += step.reward
            ended = step.ended
        if not ended:
            raise simulators.SimulatorError(
                f"{environment}: an episode has no end within the {longest} --timesteps; register it with "
                "max_episode_steps"
            )
    world.close()
    return returns


def _perceptron(tensors: dict[str, np.ndarray], activation: str) -> Perceptron:
    layers = range(sum(key.endswith("weight") for key in tensors))
    return Perceptron(
        name="checkpoint",
        weights=[tensors[f"layers.{n}.weight"].astype(np.float64) for n in layers],
        biases=[tensors[f"layers.{n}.bias"].astype(np.float64) for n in layers],
        mean=tensors["observation.mean"].astype(np.float64),
        std=np.sqrt(tensors["observation.variance"].astype(np.float64) + VARIANCE_EPSILON),
        clip=CLIP,
        hidden_activation=activation,
    )


def _header(options: TrainOptions, timesteps: int) -> dict[str, str]:
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    return {
        "algorithm": "ppo",
        "environment": options.environment,
        "hidden_activation": options.activation,
        "output_activation": "none",
        "observation_clip": f"{CLIP:g}",
        "timesteps": str(timesteps),
        "seed": str(options.seed),
        "licence": "MIT",
        "commit": git.stdout.strip() or "unknown",
    } | {f"version.{package}": version for package, version in simulators.versions().items()}


def main() -> None:
    console = Console()
    options = tyro.cli(TrainOptions, prog="python -m simulators.experts.train")
    try:
        header = train(options, console)
    except (PolicyError, plugins.PluginError, simulators.SimulatorError) as error:
        console.print(f"[red]error:[/red] {error}", highlight=False)
        raise SystemExit(2) from None
    console.print(f"{options.output}: return {header['return_mean']} ± {header['return_std']} over 10 episodes")


if __name__ == "__main__":
    main()
