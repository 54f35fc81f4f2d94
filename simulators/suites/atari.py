"""Atari games of the Arcade Learning Environment, ids ALE/GAME-v5, in the convention of the DQN-Replay logs.

    screens (210, 160) grey -> four emulator frames per action -> maximum of the last two -> box filter -> {"frame"}

Sticky actions with probability 0.25; frames are uint8 (84, 84, 1). They differ from DQN-Replay's in the filter's
treatment of pixels that two output pixels share: OpenCV splits them, Pillow gives them to one. Pillow's filter is
integer arithmetic, so a frame has the same bytes on every processor. Episodes are whole (a lost life ends none), up to
108,000 emulator frames, rewards unclipped.

Invariant: an episode is a function of the reset's seed and the actions.
"""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from PIL import Image

from schemas.episode import EnvironmentSpec, FieldSpec
from simulators.experts import scripted
from simulators.suite import Suite

FRAME_SIZE = (84, 84)
RESIZED_FRAME = (64, 80)
FRAMES_PER_ACTION = 4
MAX_STEPS = 27_000
NOOP_MAX = 30


class Atari(Suite):
    """`kwargs` of its own: `noop_max` (30), the most no-op frames at a reset, and `max_episode_steps` (27,000
    actions); all else goes to gymnasium.make."""

    name = "atari"
    module = "ale_py"
    extra = "atari"
    distributions = ("ale-py",)
    recorded_as = "atari"
    film_every = 4
    sees_screen = True
    experts = {
        "ALE/Pong-": lambda env: scripted.Pong(),
        "ALE/Breakout-": lambda env: scripted.Breakout(),
        "ALE/Freeway-": lambda env: scripted.Freeway(),
    }

    def owns(self, id: str) -> bool:
        return id.startswith("ALE/")

    def clips_rewards(self, source: str) -> bool:
        return source == self.recorded_as

    def register(self) -> None:
        super().register()
        ale_py = importlib.import_module(self.module)
        ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)

    def build(self, environment: EnvironmentSpec, render: bool) -> gymnasium.Env:
        return super().build(replace(environment, kwargs=_split(environment)[0]), render)

    def observe(self, raw: gymnasium.Env, environment: EnvironmentSpec) -> gymnasium.Env:
        own = _split(environment)[1]
        return gymnasium.wrappers.TimeLimit(Frames(raw, own["noop_max"]), own["max_episode_steps"])

    def fields(self, env: gymnasium.Env) -> tuple[FieldSpec, ...]:
        return (FieldSpec("frame", "image", (*FRAME_SIZE, 1), resized=RESIZED_FRAME),)

    def settings(self, environment: EnvironmentSpec) -> dict[str, Any]:
        self.register()
        kwargs, own = _split(environment)
        fixed = {"frameskip": FRAMES_PER_ACTION, "ends_on_life_loss": False, "rewards": "unclipped"}
        return {name: kwargs[name] for name in sorted(set(kwargs) - {"obs_type", "frameskip"})} | own | fixed

    def picture(self, env: gymnasium.Env) -> np.ndarray:
        """The emulator's colour screen, uint8 (210, 160, 3)."""
        emulator: Any = env.unwrapped
        return emulator.ale.getScreenRGB()

    def log_name(self, id: str) -> tuple[str, str]:
        """The game as the Arcade Learning Environment spells it."""
        game, _, version = id.removeprefix("ALE/").rpartition("-")
        return game, version


SUITE = Atari()


def _split(environment: EnvironmentSpec) -> tuple[dict[str, Any], dict[str, Any]]:
    """kwargs of gymnasium.make, and those of our own wrappers, defaults filled in."""
    kwargs = dict(environment.kwargs)
    own = {"max_episode_steps": MAX_STEPS, "noop_max": NOOP_MAX}
    own |= {name: kwargs.pop(name) for name in own if name in kwargs}
    defaults = {"repeat_action_probability": 0.25, "full_action_space": False, "max_num_frames_per_episode": 0}
    return defaults | kwargs | {"obs_type": "grayscale", "frameskip": 1}, own


class Frames(gymnasium.Wrapper):
    """Four frames per action, maximum of the last two grey screens, 84x84; rewards summed, not clipped.

    A reset plays 0 to `noop_max` no-ops, their number drawn from the reset's seed. FIRE is the agent's business.
    """

    def __init__(self, env: gymnasium.Env, noop_max: int):
        super().__init__(env)
        self.noop_max = noop_max
        self.observation_space = spaces.Dict({"frame": spaces.Box(0, 255, (*FRAME_SIZE, 1), np.uint8)})
        self._generator = np.random.default_rng()

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        if seed is not None:
            self._generator = np.random.default_rng(seed)
        screen, info = self.env.reset(seed=seed, options=options)
        for _ in range(int(self._generator.integers(self.noop_max + 1))):
            screen, _, terminated, truncated, info = self.env.step(0)
            if terminated or truncated:
                screen, info = self.env.reset()
        return self._frame(screen), info

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        gained, screens = 0.0, []
        for _ in range(FRAMES_PER_ACTION):
            screen, reward, terminated, truncated, info = self.env.step(int(action))
            screens.append(screen)
            gained += float(reward)
            if terminated or truncated:
                break
        return self._frame(np.maximum.reduce(screens[-2:])), gained, bool(terminated), bool(truncated), info

    def _frame(self, screen: np.ndarray) -> dict[str, np.ndarray]:
        small = Image.fromarray(screen).resize(FRAME_SIZE[::-1], Image.Resampling.BOX)
        return {"frame": np.asarray(small)[..., None]}
