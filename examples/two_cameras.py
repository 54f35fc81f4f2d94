"""A robot with two cameras and an instruction: recorded by LeRobot's own writer, built, trained, played.

    python examples/two_cameras.py data/two-balls/logs 600      # needs `pip install lerobot mujoco`, and no Gato
    python -m etl.build --input data/two-balls/logs --environment examples.two_cameras:TwoBalls-v0 \\
        --text-tokens 8 --output data/two-balls/shards
    deepspeed --num_gpus 1 trainer/main.py --recipe tiny-tokens --steps 400 --optimiser.decay-steps 400 \\
        --optimiser.warmup-steps 30 --optimiser.matrices muon --data.stream.sequence-length 280 \\
        --data.folders data/two-balls/shards --run.output runs/two-balls
    python -m eval.compare --gato runs/two-balls/export --datasets data/two-balls/shards \\
        --models random gato behaviour --episodes 100 --output results/two-balls

A gripper slides over a table with a red and a blue ball, each on another of four spots. Only the cameras show where the
balls are, and only the instruction says which one to touch; touching the other one ends the episode without reward.
MuJoCo renders the pictures (MUJOCO_GL=egl on a machine without a screen).
"""

import os
import string
import sys

os.environ.setdefault("MUJOCO_GL", "egl")

import gymnasium
import mujoco
import numpy as np
from gymnasium import spaces

SPOTS = np.array([(x, y) for x in (-0.6, 0.6) for y in (-0.6, 0.6)])
COLOURS, REACH, FPS = ("red", "blue"), 0.2, 10
MODEL = """
<mujoco><option timestep="0.02" integrator="implicitfast"/>
<visual><global offwidth="256" offheight="256"/><quality shadowsize="0" offsamples="0"/></visual><worldbody>
  <light pos="0 0 3" dir="0 0 -1" diffuse=".5 .5 .5" castshadow="false"/>
  <geom type="plane" size="1.2 1.2 0.1" rgba=".75 .75 .7 1"/>
  <camera name="front" pos="0 0 2.6" fovy="50"/>
  <body name="gripper" pos="0 0 0.1">
    <joint name="x" type="slide" axis="1 0 0" range="-1 1" limited="true" damping="1"/>
    <joint name="y" type="slide" axis="0 1 0" range="-1 1" limited="true" damping="1"/>
    <geom type="box" size=".08 .08 .08" mass="1" rgba=".1 .1 .1 1" contype="0" conaffinity="0"/>
    <camera name="wrist" pos="0 0 1.2" fovy="50"/>
  </body>
  <body name="red" mocap="true"><geom type="sphere" size=".14" rgba="1 0 0 1" contype="0" conaffinity="0"/></body>
  <body name="blue" mocap="true"><geom type="sphere" size=".14" rgba="0 0 1 1" contype="0" conaffinity="0"/></body>
</worldbody><actuator><velocity joint="x" kv="20"/><velocity joint="y" kv="20"/></actuator></mujoco>
"""


class TwoBalls(gymnasium.Env):
    """Reward 1 where the gripper touches the ball that the instruction names."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": FPS}
    observation_space = spaces.Dict(
        {
            "images": spaces.Dict(
                {"front": spaces.Box(0, 255, (64, 64, 3), np.uint8), "wrist": spaces.Box(0, 255, (32, 32, 3), np.uint8)}
            ),
            "state": spaces.Box(-np.inf, np.inf, (4,), np.float32),
            "task": spaces.Text(32, charset=string.ascii_lowercase + " "),
        }
    )
    action_space = spaces.Box(-1, 1, (2,), np.float32)  # velocity

    def __init__(self, render_mode=None):
        self.render_mode = render_mode
        self.model = mujoco.MjModel.from_xml_string(MODEL)
        self.data = mujoco.MjData(self.model)
        self.renderers = {}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)  # seeds self.np_random
        mujoco.mj_resetData(self.model, self.data)
        self.colour = int(self.np_random.integers(2))
        chosen = self.np_random.permutation(4)[:2]
        self.balls = SPOTS[chosen] + self.np_random.uniform(-0.1, 0.1, (2, 2))
        self.data.mocap_pos[:] = np.column_stack([self.balls, np.full(2, 0.14)])
        self.data.qpos[:] = self.np_random.uniform(-0.2, 0.2, 2)
        mujoco.mj_forward(self.model, self.data)
        return self._observe(), {}

    def step(self, action):
        self.data.ctrl[:] = np.clip(action, -1, 1)
        mujoco.mj_step(self.model, self.data, 5)
        touched = np.linalg.norm(self.balls - self.data.qpos, axis=1) < REACH
        reward = float(touched[self.colour])
        return self._observe(), reward, bool(touched.any()), False, {"is_success": bool(reward)}

    def render(self):
        """The camera above, uint8 (256, 256, 3)."""
        return self._camera("front", 256)

    def close(self):
        for renderer in self.renderers.values():
            renderer.close()
        self.renderers = {}

    def _observe(self):
        return {
            "images": {"front": self._camera("front", 64), "wrist": self._camera("wrist", 32)},
            "state": np.concatenate([self.data.qpos, self.data.qvel]).astype(np.float32),
            "task": f"touch the {COLOURS[self.colour]} ball",
        }

    def _camera(self, name, side):
        if side not in self.renderers:
            self.renderers[side] = mujoco.Renderer(self.model, side, side)
        self.renderers[side].update_scene(self.data, camera=name)
        return self.renderers[side].render()


def expert(env, random, noise=0.3):
    """Straight to the ball, with noise that shows how to come back on the way."""
    towards = env.balls[env.colour] - env.data.qpos
    return np.clip(towards / np.linalg.norm(towards) + noise * random.normal(size=2), -1, 1).astype(np.float32)


def record(folder, episodes):
    """Episodes of the expert as a LeRobot dataset: one camera as video, one as pictures."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    sides = ["height", "width", "channels"]
    features = {
        "observation.images.front": {"dtype": "video", "shape": (64, 64, 3), "names": sides},
        "observation.images.wrist": {"dtype": "image", "shape": (32, 32, 3), "names": sides},
        "observation.state": {"dtype": "float32", "shape": (4,), "names": ["x", "y", "dx", "dy"]},
        "action": {"dtype": "float32", "shape": (2,), "names": ["dx", "dy"]},
        "next.reward": {"dtype": "float32", "shape": (1,), "names": None},
        "next.done": {"dtype": "bool", "shape": (1,), "names": None},
        "next.success": {"dtype": "bool", "shape": (1,), "names": None},
    }
    dataset = LeRobotDataset.create("own/two-balls", FPS, features, root=folder, robot_type="gripper")
    env, random = gymnasium.make("TwoBalls-v0"), np.random.default_rng(0)
    for episode in range(episodes):
        observation, _ = env.reset(seed=episode)
        ended = False
        while not ended:
            action = expert(env.unwrapped, random)
            following, reward, terminated, truncated, _ = env.step(action)
            ended = terminated or truncated
            frame = {f"observation.images.{name}": picture for name, picture in observation["images"].items()}
            frame |= {"observation.state": observation["state"], "action": action, "task": observation["task"]}
            frame |= {"next.reward": np.array([reward], np.float32), "next.done": np.array([ended])}
            dataset.add_frame(frame | {"next.success": np.array([bool(reward)])})
            observation = following
        dataset.save_episode()
    dataset.finalize()


gymnasium.register("TwoBalls-v0", entry_point=f"{__name__}:TwoBalls", max_episode_steps=40)

if __name__ == "__main__":
    record(sys.argv[1], int(sys.argv[2]))
