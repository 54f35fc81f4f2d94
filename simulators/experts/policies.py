"""Which policy plays: the shipped expert of an environment, a file, or uniform random actions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import gymnasium
import numpy as np

from schemas.episode import ActionSpec
from simulators.experts import PolicyError, open_safetensors, perceptron, scripted
from simulators.experts.sb3 import StableBaselines

HERE = Path(__file__).resolve().parent
# beginning of a gymnasium id -> maker of its expert, given the simulator
EXPERTS: dict[str, Callable[[gymnasium.Env], Policy]] = {
    "Hopper-": lambda env: perceptron.load(HERE / "hopper.safetensors"),
    "ALE/Pong-": lambda env: scripted.Pong(),
    "ALE/Breakout-": lambda env: scripted.Breakout(),
    "ALE/Freeway-": lambda env: scripted.Freeway(),
    "PointMaze_": lambda env: scripted.Waypoints(env.spec.kwargs["maze_map"] if env.spec else []),
    "BabyAI-": lambda env: scripted.Bot(env),
}


class Policy(Protocol):
    """Plays one environment. `algorithm` names it in the log."""

    @property
    def algorithm(self) -> str: ...

    def reset(self) -> None: ...

    def act(self, observation: Mapping[str, np.ndarray], rng: np.random.Generator) -> np.ndarray: ...


class Random:
    """Uniform over the action space."""

    algorithm = "random"

    def __init__(self, action: ActionSpec):
        self.action = action

    def reset(self) -> None:
        """Nothing is kept between timesteps."""

    def act(self, observation: Mapping[str, np.ndarray], rng: np.random.Generator) -> np.ndarray:
        return noise_action(self.action, rng)


def noise_action(action: ActionSpec, rng: np.random.Generator) -> np.ndarray:
    """One uniformly random action."""
    if action.kind == "continuous":
        return rng.uniform(action.low, action.high).astype(np.float32)
    drawn = rng.integers(action.choices) + np.array(action.start)
    return drawn.reshape(() if action.size == 1 else action.size)


def load(
    name: str,
    env: gymnasium.Env,
    observation_size: int,
    action: ActionSpec,
    noise: float = 0.0,
    temperature: float = 1.0,
) -> Policy:
    """`name` is 'expert', 'random' or a policy file; it will play `env` with that much noise, and where it samples its
    actions at that temperature. PolicyError names what does not fit and the remedy."""
    environment, path = env.spec.id if env.spec else "", Path(name)
    recurrent = path.suffix == ".safetensors" and path.is_file() and _has_convolutions(path)
    if temperature != 1.0 and not recurrent:
        raise PolicyError(f"{name}: has no temperature, which A3C alone samples with; leave --temperature out")
    if name == "random":
        return Random(action)
    if name == "expert":
        for prefix, make in EXPERTS.items():
            if environment.startswith(prefix):
                expert = make(env)
                if noise and isinstance(expert, scripted.Bot):
                    raise PolicyError("the bot plans on its own actions and cannot follow others; leave --noise out")
                return expert
        known = ", ".join(f"{prefix}v*" for prefix in EXPERTS)
        raise PolicyError(f"no expert of {environment} is shipped (there are {known}); give --policy a file, or random")
    if not path.is_file():
        raise PolicyError(f"{name}: no such policy file; give one, or 'expert', or 'random'")
    if path.suffix == ".zip":
        policy: Any = StableBaselines(path)
    elif recurrent:
        from simulators.experts.a3c import A3C  # torch, which no other policy takes a second to start for

        policy = A3C(path, env, temperature)
    else:
        policy = perceptron.load(path)
    policy.check(observation_size, action.size, environment)
    return policy


def _has_convolutions(path: Path) -> bool:
    with open_safetensors(path) as file:
        return "conv1.weight" in file.keys()  # noqa: SIM118
