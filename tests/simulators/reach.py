"""Environments of a user's own, as a user writes them: this module knows nothing of the project."""

import gymnasium
import numpy as np
from gymnasium import spaces


class Reach(gymnasium.Env):
    """A point in the plane and its target; bounds that differ between the dimensions; no render_mode."""

    observation_space = spaces.Box(-2, 2, (4,), np.float64)
    action_space = spaces.Box(np.array([-2, -0.5], np.float32), np.array([2, 1], np.float32))

    def __init__(self, pace=0.1):
        self.pace = pace

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place, self.target = self.np_random.uniform(-1, 1, (2, 2))
        return np.concatenate([self.place, self.target]), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        self.place = np.clip(self.place + self.pace * np.asarray(action, np.float64), -2, 2)
        far = float(np.linalg.norm(self.place - self.target))
        return np.concatenate([self.place, self.target]), -far, far < 0.1, False, {}


class Cameras(gymnasium.Env):
    """Two pictures of odd sizes, nested numbers, a tuple, a text; discrete actions that start at 1."""

    observation_space = spaces.Dict(
        {
            "camera": spaces.Dict(
                {"left": spaces.Box(0, 255, (20, 30, 3), np.uint8), "wrist": spaces.Box(0, 255, (12, 9, 1), np.uint8)}
            ),
            "arm": spaces.Tuple((spaces.Box(-1, 1, (2, 2), np.float32), spaces.Discrete(4, start=2))),
            "buttons": spaces.MultiBinary(3),
            "gears": spaces.MultiDiscrete([3, 7]),
            "task": spaces.Text(20),
        }
    )
    action_space = spaces.Discrete(3, start=1)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.level = 0
        self.left = np.zeros((20, 30, 3), np.uint8)  # the same buffer is returned at every step
        return self._see(), {}

    def _see(self):
        self.left[...] = self.np_random.integers(256)
        numbers = self.np_random.uniform(-1, 1, (2, 2)).astype(np.float32)
        return {
            "camera": {"left": self.left, "wrist": self.np_random.integers(0, 256, (12, 9, 1), np.uint8)},
            "arm": (numbers, np.int64(2 + self.level % 4)),
            "buttons": self.np_random.integers(0, 2, 3, np.int8),
            "gears": np.array([self.level % 3, self.level % 7]),
            "task": "press" if self.level % 2 else "turn",
        }

    def step(self, action):
        assert action in (1, 2, 3), action
        self.level += 1
        return self._see(), float(action), self.level == 12, False, {}


class Switches(gymnasium.Env):
    """A discrete observation, and several discrete actions of different sizes. Draws itself."""

    observation_space = spaces.Discrete(5, start=-1)
    action_space = spaces.MultiDiscrete([2, 4])
    metadata = {"render_modes": ["rgb_array"]}

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def render(self):
        return np.full((10, 14, 3), self.seen, np.uint8)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.seen = 0
        return np.int64(self.np_random.integers(5) - 1), {}

    def step(self, action):
        assert self.action_space.contains(np.asarray(action)), action
        self.seen += 1
        return np.int64(self.np_random.integers(5) - 1), float(action[1]), self.seen == 8, False, {}


gymnasium.register("Reach-v0", entry_point=Reach, max_episode_steps=40)
gymnasium.register("Cameras-v0", entry_point="reach:Cameras", max_episode_steps=50)
gymnasium.register("Switches-v0", entry_point=Switches)


def expert(env):
    """A policy of one's own: a function of the observation."""

    def act(observation):
        place, target = observation["observation"].reshape(2, 2)
        return 10 * (target - place)

    return act


class Presser:
    algorithm = "presser"

    def reset(self):
        self.count = 0

    def act(self, observation, rng):
        self.count += 1
        return 1 + self.count % 3


def presser(env):
    """The same as an object with `act`."""
    return Presser()


class Drawer:
    """Draws its actions, and takes a generator as a plain function too."""

    def act(self, observation):
        return [0.5, 0.5]

    def __call__(self, observation, rng):
        return rng.uniform(-0.5, 0.5, 2)


def without_rng(env):
    """An object whose `act` needs no generator."""
    return Drawer()


def with_rng(env):
    """A function that takes one."""
    return Drawer().__call__


def three(env):
    """A function of something else."""
    return lambda observation, rng, state: [0, 0]


def failing(env):
    """A policy with a mistake in it."""
    return lambda observation: observation["velocity"]


def silent(env):
    """A policy that forgets to return."""
    return lambda observation: None
