"""Meta-World's 50 manipulation tasks (arXiv 1910.10897) with one Sawyer arm, and the scripted expert of each.

    'Meta-World/reach-v3' -> metaworld's own class with its goal in view -> {"observation": float32 (39,)}

Goal and objects lie elsewhere in every episode, drawn from the episode's seed. An episode lasts 200 timesteps, in which
nearly all scripts succeed, and does not end at success, so that its return grows with the time spent there.

Invariant: an episode is a function of its seed, whatever was played before in the same simulator.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gymnasium
import numpy as np

from simulators import pictures
from simulators.suite import Suite

PREFIX = "Meta-World/"
TIME_LIMIT = 200


class MetaWorld(Suite):
    name = "metaworld"
    module = "metaworld"
    extra = "metaworld"
    distributions = ("metaworld", "mujoco", "gymnasium")
    experts = {PREFIX: lambda env: Script(env)}

    def owns(self, id: str) -> bool:
        return id.startswith(PREFIX)

    def time_limit(self, id: str) -> int | None:
        return TIME_LIMIT if self.owns(id) else None

    def action_range(self, id: str) -> tuple[float, float] | None:
        return (-1.0, 1.0) if self.owns(id) else None

    def register(self) -> None:
        super().register()
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS

        for name in ALL_V3_ENVIRONMENTS:
            if PREFIX + name not in gymnasium.registry:
                where = f"{__name__}:Sawyer"
                gymnasium.register(PREFIX + name, where, max_episode_steps=TIME_LIMIT, kwargs={"task": name})

    def picture(self, env: gymnasium.Env) -> np.ndarray:
        raw: Any = env.unwrapped
        return pictures.draw(raw.model, raw.data)


SUITE = MetaWorld()


class Sawyer(gymnasium.Env):
    """One of metaworld's tasks as gymnasium has them: `reset(seed=...)` decides goal and objects."""

    metadata = {"render_modes": ["rgb_array"]}

    def __init__(self, task: str, render_mode: str | None = None):
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE

        self.task, self.render_mode = task, render_mode
        make: Any = ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE[f"{task}-goal-observable"]
        self.env = make(seed=0)
        self.env._freeze_rand_vec, self.env.seeded_rand_vec = False, True  # it has no public way to say so
        self.start = self.env.get_env_state()
        self.model, self.data, self.action_space = self.env.model, self.env.data, self.env.action_space
        space: Any = self.env.observation_space
        low, high = (np.asarray(bound, np.float32) for bound in (space.low, space.high))
        self.observation_space = gymnasium.spaces.Box(low, high, dtype=np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        if seed is not None:
            self.env.seed(seed)
        self.env.set_env_state(self.start)
        observation, info = self.env.reset()
        return np.asarray(observation, np.float32), info

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self.env.step(np.asarray(action, np.float32))
        return np.asarray(observation, np.float32), float(reward), bool(terminated), bool(truncated), info

    def close(self) -> None:
        self.env.close()


class Script:
    """metaworld's own expert of a task. Its actions reach beyond ±1; they are clipped as the simulator clips them."""

    algorithm = "scripted"

    def __init__(self, env: gymnasium.Env):
        from metaworld.policies import ENV_POLICY_MAP

        task: Any = env.unwrapped
        self.make: Any = ENV_POLICY_MAP[task.task]

    def reset(self) -> None:
        self.policy = self.make()

    def act(self, observation: Mapping[str, np.ndarray], rng: np.random.Generator) -> np.ndarray:
        """{"observation": float32 (39,)} -> action, float32 (4,) in [-1, 1]."""
        action = self.policy.get_action(np.asarray(observation["observation"], np.float64))
        return np.clip(action, -1.0, 1.0).astype(np.float32)
