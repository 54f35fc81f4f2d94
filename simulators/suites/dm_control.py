"""The DeepMind Control Suite (arXiv 1801.00690), to be played, and as the environments of others' logs.

    'dm_control/cheetah-run-v0' -> dm_control's suite -> observations {key: float32 (D,)}, as in RL Unplugged's logs

A reward lies in [0, 1] and an episode has 1,000 timesteps, so that a return of 1,000 is the most there is. No expert is
shipped.

Invariant: an episode is a function of its seed and the actions, whatever was played before in the same simulator.
"""

from __future__ import annotations

import warnings
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from schemas.episode import EnvironmentSpec
from simulators import opengl, pictures
from simulators.suites.mujoco import MuJoCo

PREFIX = "dm_control/"
TIME_LIMIT = 1000
ENDLESS = "lqr-"


class DMControl(MuJoCo):
    name = "dm_control"
    module = "dm_control"
    extra = "dm-control"
    distributions = ("dm-control", "mujoco")
    experts = {}

    def owns(self, id: str) -> bool:
        return id.startswith(PREFIX)

    def time_limit(self, id: str) -> int | None:
        return TIME_LIMIT if self.owns(id) and not id.startswith(PREFIX + ENDLESS) else None

    def action_range(self, id: str) -> tuple[float, float] | None:
        return None  # the joints' own

    def register(self) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*DISPLAY.*")  # its renderer's, which is not used
            super().register()
            tasks = opengl.import_module("dm_control.suite").ALL_TASKS
        for domain, task in tasks:
            if (id := f"{PREFIX}{domain}-{task}-v0") not in gymnasium.registry:
                gymnasium.register(id, f"{__name__}:Control", kwargs={"domain": domain, "task": task})

    def settings(self, environment: EnvironmentSpec) -> dict[str, Any]:
        return super().settings(environment) | {"max_episode_steps": self.time_limit(environment.id)}

    def picture(self, env: gymnasium.Env) -> np.ndarray:
        raw: Any = env.unwrapped
        return pictures.draw(raw.model, raw.data)


SUITE = DMControl()


class Control(gymnasium.Env):
    """One task of the suite as gymnasium has them; an observation is flattened to a vector per key."""

    metadata = {"render_modes": ["rgb_array"]}

    def __init__(self, domain: str, task: str, render_mode: str | None = None):
        from dm_control import suite

        self.render_mode = render_mode
        self.env: Any = suite.load(domain, task, task_kwargs={"random": 0})
        fields = self.env.observation_spec().items()
        self.observation_space = spaces.Dict(
            {key: spaces.Box(-np.inf, np.inf, (int(np.prod(field.shape)),), np.float32) for key, field in fields}
        )
        action = self.env.action_spec()
        low, high = (np.broadcast_to(bound, action.shape) for bound in (action.minimum, action.maximum))
        self.action_space = spaces.Box(low.astype(np.float32), high.astype(np.float32), dtype=np.float32)

    @property
    def model(self) -> Any:
        return self.env.physics.model.ptr

    @property
    def data(self) -> Any:
        return self.env.physics.data.ptr

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        if seed is not None:
            self.env.task._random = np.random.RandomState(np.random.MT19937(seed))  # it has no public way to say so
        return self._fields(self.env.reset().observation), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        after = self.env.step(np.asarray(action, np.float64))
        ended = after.last()
        terminated = bool(ended and after.discount == 0)
        return self._fields(after.observation), float(after.reward), terminated, bool(ended) and not terminated, {}

    def close(self) -> None:
        self.env.close()

    def _fields(self, observation: Any) -> dict[str, np.ndarray]:
        return {key: np.array(value, np.float32).reshape(-1) for key, value in observation.items()}
