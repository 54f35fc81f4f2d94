"""gymnasium-robotics: Adroit hands, Fetch arms, the kitchen, and point and ant mazes.

    gymnasium.make -> {"achieved_goal", "desired_goal", "observation": float32 (D,)}, or one vector for the hands

Invariant: as in simulators/suites/mujoco.py, whose tables hold these ids too.
"""

from __future__ import annotations

from simulators.experts import fetch, scripted
from simulators.suites.mujoco import MuJoCo


class Robotics(MuJoCo):
    name = "robotics"
    module = "gymnasium_robotics"
    extra = "robotics"
    distributions = ("gymnasium-robotics", "mujoco")
    experts = {
        "FetchPickAndPlace": lambda env: fetch.Controller(fetch.pick_and_place),
        "FetchPush": lambda env: fetch.Controller(fetch.push),
        "FetchReach": lambda env: fetch.Controller(fetch.reach),
        "PointMaze_": lambda env: scripted.Waypoints(env.spec.kwargs["maze_map"] if env.spec else []),
    }


SUITE = Robotics()
