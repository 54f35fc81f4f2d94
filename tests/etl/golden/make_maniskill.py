"""Writes the ManiSkill trajectories of this folder by ManiSkill's own RecordEpisode, which the project does not need.

    pip install mani_skill==3.0.1 (with torch for CPUs); python make_maniskill.py FOLDER

Its simulator needs a GPU to draw: an environment of given values takes its place, batched as ManiSkill's are.

Invariant: the values are those of `episodes`, which the tests make again.
"""

from __future__ import annotations

import sys
from typing import Any

import gymnasium
import numpy as np

ENDS = ((5, "terminated"), (7, "truncated"), (4, ""))  # the last one is left in the middle
LIMIT = 7
NAME = "trajectory.rgb.pd_joint_delta_pos.physx_cpu"


def episodes() -> list[dict[str, np.ndarray]]:
    """qpos (T + 1, 9), rgb (T + 1, 32, 32, 3), actions (T, 8) in [-1, 1] and rewards (T,) of each episode."""
    rng = np.random.default_rng(0)
    return [
        {
            "qpos": rng.normal(size=(T + 1, 9)).astype(np.float32),
            "rgb": rng.integers(0, 256, (T + 1, 4, 4, 3), np.uint8).repeat(8, axis=1).repeat(8, axis=2),
            "actions": rng.uniform(-1, 1, (T, 8)).astype(np.float32),
            "rewards": rng.normal(size=T).astype(np.float32),
        }
        for T, _ in ENDS
    ]


class Written(gymnasium.Env[Any, Any]):
    """What RecordEpisode asks of a ManiSkill environment of one scene; plays `episodes` one after the other."""

    num_envs, control_mode, _episode_seed = 1, "pd_joint_delta_pos", np.zeros(1, int)

    def __init__(self) -> None:
        self.action_space = self.single_action_space = gymnasium.spaces.Box(-1, 1, (8,), np.float32)
        self.observation_space = gymnasium.spaces.Dict()
        self.number, self.t = -1, 0
        self.spec = gymnasium.envs.registration.EnvSpec("PickCube-v1", max_episode_steps=LIMIT)
        self.spec.kwargs = {"obs_mode": "rgb", "control_mode": self.control_mode, "sim_backend": "physx_cpu"}

    def reset(self, *, seed: Any = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        self.number, self.t = self.number + 1, 0
        self.own, (self.T, self.end) = episodes()[self.number], ENDS[self.number]
        return self._seen(), {"reconfigure": False}

    def step(self, action: Any) -> Any:
        import torch

        self.t += 1
        last = self.t == self.T
        flags = [torch.tensor([last and self.end == name]) for name in ("terminated", "truncated")]
        return self._seen(), torch.tensor(self.own["rewards"][self.t - 1 : self.t]), *flags, {"success": flags[0]}

    def get_state_dict(self) -> dict[str, Any]:
        import torch

        return {"actors": {"cube": torch.zeros(1, 13)}}

    def _seen(self) -> dict[str, Any]:
        import torch

        rows = {key: torch.from_numpy(self.own[key][self.t : self.t + 1]) for key in ("qpos", "rgb")}
        return {"agent": {"qpos": rows["qpos"]}, "sensor_data": {"base_camera": {"rgb": rows["rgb"]}}}


def main() -> None:
    from mani_skill.utils.wrappers import RecordEpisode

    env = RecordEpisode(Written(), sys.argv[1], trajectory_name=NAME, save_video=False)
    for one in episodes():
        env.reset()
        for action in one["actions"]:
            env.step(action)
    env.flush_trajectory()
    env.close()


if __name__ == "__main__":
    main()
