"""An environment of your own with two cameras, and its expert: from recording to the table without a change to Gato.

    python -m etl.record --environment examples.own_environment:CameraReach-v0 \\
        --policy examples.own_environment:expert --steps 2000 --output data/reach/logs
    python -m etl.build --source minari --input data/reach/logs --output data/reach/shards
    deepspeed trainer/main.py --recipe tiny --steps 200 --optimiser.decay-steps 200 --optimiser.warmup-steps 20 \\
        --data.folders data/reach/shards --run.output runs/reach
    python -m eval.compare --gato runs/reach/export --datasets data/reach/shards --models random gato behaviour \\
        --episodes 5 --output results/reach

Nothing here imports Gato: the environment is an ordinary one of gymnasium. To make it yours, change the two spaces,
`reset`, `step` and the expert; `render` is only needed for the pictures in the report.
"""

import gymnasium
import numpy as np
from gymnasium import spaces

SPAN = 1.5  # the cameras see [-SPAN, SPAN] in both directions
STEP_SECONDS = 0.1


class CameraReach(gymnasium.Env):
    """A point that is pushed towards a goal, which only the cameras show."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}
    observation_space = spaces.Dict(
        {
            "arm": spaces.Dict({"position": spaces.Box(-SPAN, SPAN, (2,)), "velocity": spaces.Box(-2, 2, (2,))}),
            "camera": spaces.Dict(
                {"above": spaces.Box(0, 255, (32, 48, 3), np.uint8), "wrist": spaces.Box(0, 255, (20, 20, 1), np.uint8)}
            ),
        }
    )
    action_space = spaces.Box(-2, 2, (2,))  # acceleration; Gato plays it in these units

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)  # seeds self.np_random
        self.position, self.velocity = np.zeros(2, np.float32), np.zeros(2, np.float32)
        self.goal = self.np_random.uniform(-1, 1, 2).astype(np.float32)
        return self._observe(), {}

    def step(self, action):
        self.velocity = np.clip(self.velocity + STEP_SECONDS * np.asarray(action, np.float32), -2, 2)
        self.position = np.clip(self.position + STEP_SECONDS * self.velocity, -SPAN, SPAN)
        distance = float(np.linalg.norm(self.position - self.goal))
        return self._observe(), -distance, distance < 0.05, False, {}

    def render(self):
        """The camera above, four times as large: uint8 (128, 192, 3)."""
        return self._camera(128, 192, np.zeros(2), SPAN)

    def _observe(self):
        above = self._camera(32, 48, np.zeros(2), SPAN)
        wrist = self._camera(20, 20, self.position, 0.5).max(axis=2, keepdims=True)
        arm = {"position": self.position.copy(), "velocity": self.velocity.copy()}
        return {"arm": arm, "camera": {"above": above, "wrist": wrist}}

    def _camera(self, height, width, centre, span):
        """What is within `span` of `centre`: the goal is green, the point red."""
        y, x = np.meshgrid(np.linspace(-span, span, height), np.linspace(-span, span, width), indexing="ij")
        picture = np.zeros((height, width, 3), np.uint8)
        for channel, place in ((0, self.position), (1, self.goal)):
            near = np.hypot(x + centre[0] - place[0], y + centre[1] - place[1]) < 0.15
            picture[near, channel] = 255
        return picture


def expert(env):
    """The function that --policy names: it gets the environment and returns a function of the observation.

    It may look at what observations do not hold, as the goal here; the log keeps observations and actions only.
    """
    reach = env.unwrapped

    def act(observation):  # {"arm/position": (2,), "arm/velocity": (2,), "camera/above": ..., "camera/wrist": ...}
        push = 4 * (reach.goal - observation["arm/position"]) - 3 * observation["arm/velocity"]
        return np.clip(push, -2, 2)

    return act


gymnasium.register("CameraReach-v0", entry_point="examples.own_environment:CameraReach", max_episode_steps=50)
