"""Convolutions and a GRU from a file: the emulator's colour screen -> a sampled action of an Atari game.

    screen (210, 160, 3) -> rows 35:195, grey, stretched to 0..255, 80x80 -> 4 convolutions -> GRU -> softmax

The networks of greydanus/baby-a3c as `.safetensors`, which cannot run code: `convN.*` for N of 1 to 4 (32 channels,
3x3, stride 2, ELU), `gru.*` (800 -> 256), `actor_linear.*` (256 -> actions).

Invariant: an action is a function of the episode's screens and draws up to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import gymnasium
import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from simulators.experts import PolicyError, open_safetensors

ROWS, SIDE, CHANNELS, MEMORY = slice(35, 195), 80, 32, 256
FLAT = CHANNELS * 5 * 5


class A3C:
    """Plays the Atari simulator `env` (of simulators.make), whose screen it reads; its logits are divided by
    `temperature`. PolicyError names the file and what is wrong in it."""

    algorithm = "a3c"

    def __init__(self, path: Path, env: gymnasium.Env, temperature: float = 1.0):
        with open_safetensors(path) as file:
            self.weights = {key: torch.from_numpy(file.get_tensor(key)) for key in file.keys()}  # noqa: SIM118
        self.name, self.env, self.temperature = str(path), env, temperature
        self.suite = env.get_wrapper_attr("suite")
        self.actions = len(self.weights.get("actor_linear.weight", ()))
        shapes: dict[str, tuple[int, ...]] = {f"conv{n}.bias": (CHANNELS,) for n in range(1, 5)}
        shapes |= {f"conv{n}.weight": (CHANNELS, 1 if n == 1 else CHANNELS, 3, 3) for n in range(1, 5)}
        shapes |= {"gru.weight_ih": (3 * MEMORY, FLAT), "gru.weight_hh": (3 * MEMORY, MEMORY)}
        shapes |= {"gru.bias_ih": (3 * MEMORY,), "gru.bias_hh": (3 * MEMORY,)}
        shapes |= {"actor_linear.weight": (self.actions, MEMORY), "actor_linear.bias": (self.actions,)}
        for name, shape in shapes.items():
            if name not in self.weights:
                raise PolicyError(f"{path}: no field '{name}', so no policy of baby-a3c; export it again")
            if (found := tuple(self.weights[name].shape)) != shape:
                raise PolicyError(f"{path}: field '{name}' has shape {found}, must be {shape}; export it again")
        self.gru = torch.nn.GRUCell(FLAT, MEMORY)
        self.gru.load_state_dict({k.removeprefix("gru."): v for k, v in self.weights.items() if k.startswith("gru.")})
        self.reset()

    def check(self, observation_size: int, action_size: int, environment: str) -> None:
        """PolicyError unless `environment` is an Atari game with as many actions as the policy has."""
        if not self.suite.sees_screen:
            raise PolicyError(f"{self.name}: plays Atari games, not {environment}; give another --policy")
        needed = int(self.env.action_space.n)  # type: ignore[attr-defined]
        if self.actions != needed:
            has = f"has {self.actions} actions, {environment} needs {needed}"
            raise PolicyError(f"{self.name}: {has}; name the game it plays")

    def reset(self) -> None:
        self.memory = torch.zeros(1, MEMORY)

    @torch.inference_mode()
    def act(self, observation: Mapping[str, np.ndarray], rng: np.random.Generator) -> np.ndarray:
        """The simulator's current screen -> action, int64 ()."""
        red, green, blue = np.moveaxis(self.suite.picture(self.env)[ROWS], 2, 0)
        grey = (np.add(red, green, dtype=np.uint16) + blue) / 3  # as .mean(2), in a sixth of its time
        grey = ((grey - grey.min()) * 255.0 / max(np.ptp(grey), 1e-9) + 0.5).astype(np.uint8)
        small = Image.fromarray(grey).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
        x = torch.from_numpy(np.asarray(small, np.float32) / 255)[None, None]
        for n in range(1, 5):
            x = F.elu(F.conv2d(x, self.weights[f"conv{n}.weight"], self.weights[f"conv{n}.bias"], 2, 1))
        self.memory = self.gru(x.reshape(1, -1), self.memory)
        logits = self.memory @ self.weights["actor_linear.weight"].T + self.weights["actor_linear.bias"]
        odds = (logits[0].double() / self.temperature).softmax(0).numpy()
        return np.array(rng.choice(len(odds), p=odds / odds.sum()))
