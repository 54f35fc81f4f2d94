"""Policies of Stable-Baselines3 (`.zip`), played by that library.

Its files hold pickles: loading one runs code from it. Load only files that you trust.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from simulators.experts import PolicyError

ALGORITHMS = ("ppo", "sac", "td3", "a2c", "ddpg", "dqn")


class StableBaselines:
    """A model saved by `model.save(path)`; its algorithm is the one whose name the file name starts with."""

    def __init__(self, path: Path):
        try:
            import stable_baselines3
        except ImportError:
            raise PolicyError(f"{path}: needs stable-baselines3; pip install stable-baselines3") from None
        self.name = str(path)
        self.algorithm = next((a for a in ALGORITHMS if path.name.lower().startswith(a)), "")
        if not self.algorithm:
            raise PolicyError(
                f"{path}: name the file by its algorithm, one of {', '.join(ALGORITHMS)}, as in ppo-hopper.zip"
            )
        try:
            self.model = getattr(stable_baselines3, self.algorithm.upper()).load(path, device="cpu")
        except (OSError, ValueError, KeyError, BadZipFile) as error:
            raise PolicyError(f"{path}: not a Stable-Baselines3 model ({error})") from None

    def check(self, observation_size: int, action_size: int, environment: str) -> None:
        """PolicyError unless this policy's input fits the environment."""
        own = int(np.prod(self.model.observation_space.shape))
        if own != observation_size:
            raise PolicyError(
                f"{self.name}: input has size {own}, {environment} needs {observation_size}; use another one"
            )

    def reset(self) -> None:
        """Nothing is kept between timesteps."""

    def act(self, observation: Mapping[str, np.ndarray], rng: np.random.Generator) -> np.ndarray:
        """Arrays of one timestep -> action, deterministic."""
        flat = np.concatenate([np.ravel(observation[key]) for key in sorted(observation)])
        return self.model.predict(flat, deterministic=True)[0]
