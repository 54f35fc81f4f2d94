"""highway-env: driving on highways, merges, roundabouts and crossings, and parking.

    gymnasium.make -> {"observation": float32 (vehicles, 5 or 7)}, presence, place and speed of the nearest vehicles,
                      or (speeds, lanes, seconds), times to collision

Actions are changes of lane and speed, one per second. Experts drive where they were seen to be clearly better than
random play; all other ids are there to be played.

Invariant: an episode is a function of its seed and the actions.
"""

from __future__ import annotations

import re

import gymnasium
import numpy as np

from simulators.experts import driving
from simulators.suite import Suite

OF_OURS = re.compile(
    r"(highway|highway-fast|exit|intersection|intersection-multi-agent|lane-keeping|merge|merge-generic|parking"
    r"|parking-ActionRepeat|parking-parked|racetrack|racetrack-large|racetrack-oval|roundabout|roundabout-generic"
    r"|two-way|u-turn)-v\d+"
)


class Highway(Suite):
    name = "highway"
    module = "highway_env"
    extra = "highway"
    distributions = ("highway-env", "gymnasium")
    renders = True
    experts = {
        "exit-v": driving.Lanes,
        "intersection-v": driving.Crossing,
        "two-way-v": driving.Lanes,
    }

    def owns(self, id: str) -> bool:
        return OF_OURS.fullmatch(id) is not None

    def picture(self, env: gymnasium.Env) -> np.ndarray:
        picture = super().picture(env)
        viewer = env.unwrapped.viewer  # type: ignore[attr-defined]
        if not viewer.enabled:  # under SDL_VIDEODRIVER=dummy highway-env draws nothing, though it could
            viewer.enabled = True
            picture = super().picture(env)
        return picture


SUITE = Highway()
