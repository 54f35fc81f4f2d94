"""Drivers for highway-env: value iteration over lanes and speeds, and a look ahead along the route at crossings.

    road with all vehicles -> times to collision by speed and lane (highway-env's own grid) -> best action now
    road with all vehicles -> places in the next seconds, each at its speed -> the fastest action that meets none

Invariant: an action is a function of the simulator's state, so that it may be played with noise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium
import numpy as np

HORIZON = 10.0  # seconds that lanes are planned for
DISCOUNT = 0.95  # per timestep
CRASH = 1.0  # what a collision costs at least
ROOM = 12.0  # metres free in a lane that is changed to, beside what is lost in a second at other speeds


class Lanes:
    """The best of left, right, faster, slower and nothing, on a road whose other vehicles keep their speeds."""

    algorithm = "value iteration"

    def __init__(self, env: gymnasium.Env):
        self.raw: Any = env.unwrapped

    def reset(self) -> None:
        """Nothing is kept between timesteps."""

    def act(self, observation: Mapping[str, np.ndarray], rng: np.random.Generator) -> np.ndarray:
        """-> action, int64 ()."""
        from highway_env.envs.common.finite_mdp import compute_ttc_grid

        raw, vehicle = self.raw, self.raw.vehicle
        grid = compute_ttc_grid(raw, 1.0 / raw.config["policy_frequency"], HORIZON)
        value = self._values(grid)
        speed, lane = int(vehicle.speed_index), min(int(vehicle.lane_index[2]), grid.shape[1] - 1)
        names = raw.action_type.actions_indexes
        after = {
            "IDLE": (speed, lane),
            "FASTER": (speed + 1, lane),
            "SLOWER": (speed - 1, lane),
            "LANE_LEFT": (speed, lane - 1),
            "LANE_RIGHT": (speed, lane + 1),
        }
        best, most = names["IDLE"], value[after["IDLE"]]
        for action in raw.get_available_actions():
            name = next(name for name, index in names.items() if index == action)
            place = after[name]
            if not all(0 <= index < size for index, size in zip(place, value.shape)):
                continue
            if name.startswith("LANE") and not self._free(place[1]):
                continue
            cost = raw.config.get("lane_change_reward", 0.0) if name.startswith("LANE") else 0.0
            if value[place] + cost > most + 1e-6:
                best, most = action, value[place] + cost
        return np.array(best)

    def _values(self, grid: np.ndarray) -> np.ndarray:
        """Value (speeds, lanes) one timestep ahead; `grid` (speeds, lanes, timesteps): probability of a collision."""
        speeds, lanes, steps = grid.shape
        config = self.raw.config
        right = config.get("goal_reward", config.get("right_lane_reward", 0.0) - config.get("left_lane_reward", 0.0))
        fast = np.linspace(0.0, 1.0, speeds)[:, None] * config.get("high_speed_reward", 0.4)
        gained = fast + right * np.linspace(0.0, 1.0, lanes)[None] + np.zeros((speeds, lanes))
        crash = min(config.get("collision_reward", -CRASH), -CRASH)
        value = np.zeros((speeds, lanes))
        for step in range(steps - 1, 0, -1):
            padded = np.pad(value, ((0, 0), (1, 1)), constant_values=-np.inf)
            change = config.get("lane_change_reward", 0.0)
            ahead = np.maximum(value, np.maximum(padded[:, :-2], padded[:, 2:]) + change)
            value = gained + crash * grid[..., step] + np.where(grid[..., step] < 1, DISCOUNT * ahead, 0.0)
        return value

    def _free(self, lane: int) -> bool:
        """True if there is room beside the vehicle in a lane of its road."""
        vehicle = self.raw.vehicle
        for other in self.raw.road.vehicles:
            if other is vehicle or other.lane_index[:2] != vehicle.lane_index[:2] or other.lane_index[2] != lane:
                continue
            gap, closing = vehicle.lane_distance_to(other), vehicle.speed - other.speed
            if abs(gap) < ROOM + max(0.0, closing if gap > 0 else -closing):
                return False
        return True


class Crossing:
    """The highest speed at which the vehicle meets no other that keeps its own."""

    algorithm = "scripted"
    TIMES = np.arange(0.2, 2.5, 0.2)  # seconds
    REACTION = 0.6  # seconds in which most of a change of speed happens
    LENGTH, WIDTH = 7.0, 2.8  # metres along and across the way within which two centres are too near

    def __init__(self, env: gymnasium.Env):
        self.raw: Any = env.unwrapped

    def reset(self) -> None:
        """Nothing is kept between timesteps."""

    def act(self, observation: Mapping[str, np.ndarray], rng: np.random.Generator) -> np.ndarray:
        """-> action, int64 ()."""
        vehicle, names = self.raw.vehicle, self.raw.action_type.actions_indexes
        others = [self._ways(other, other.speed)[0] for other in self.raw.road.vehicles if other is not vehicle]
        now = int(vehicle.speed_to_index(vehicle.speed))
        wanted = {"FASTER": now + 1, "IDLE": int(vehicle.speed_index), "SLOWER": now - 1}
        indexes = {name: int(np.clip(index, 0, len(vehicle.target_speeds) - 1)) for name, index in wanted.items()}
        for name in sorted(indexes, key=lambda name: (-indexes[name], name != "IDLE")):
            places, headings = self._ways(vehicle, float(vehicle.target_speeds[indexes[name]]))
            ahead = np.stack([np.cos(headings), np.sin(headings)], -1)
            if not any(self._meets(other - places, ahead) for other in others):
                return np.array(names[name])
        return np.array(names["SLOWER"])

    def _meets(self, away: np.ndarray, ahead: np.ndarray) -> bool:
        """True if another vehicle is ever too near; `away`: where it is, metres (T, 2); `ahead`: unit vector (T, 2)."""
        along = (away * ahead).sum(axis=1)
        across = away[:, 1] * ahead[:, 0] - away[:, 0] * ahead[:, 1]
        return bool(((np.abs(along) < self.LENGTH) & (np.abs(across) < self.WIDTH)).any())

    def _ways(self, vehicle: Any, speed: float) -> tuple[np.ndarray, np.ndarray]:
        """Places (T, 2), metres, and headings (T,) of a vehicle on its route at TIMES, when it goes over to `speed`."""
        gained = (vehicle.speed - speed) * self.REACTION * (1 - np.exp(-self.TIMES / self.REACTION))
        along = vehicle.lane.local_coordinates(vehicle.position)[0] + speed * self.TIMES + gained
        roads = vehicle.road.network.graph
        here, lane = vehicle.lane_index[:2], vehicle.lane_index[2]
        ways = [roads[start][end] for start, end, _ in getattr(vehicle, "route", None) or [] if (start, end) != here]
        lanes = [vehicle.lane, *(way[min(lane, len(way) - 1)] for way in ways)]
        places, headings = zip(*(_along(lanes, float(x)) for x in along))
        return np.array(places), np.array(headings)


def _along(lanes: Sequence[Any], distance: float) -> tuple[np.ndarray, float]:
    """Place (2,) and heading at a distance from the beginning of the first of several lanes that follow each other."""
    for lane in lanes[:-1]:
        if distance <= lane.length:
            return lane.position(distance, 0.0), lane.heading_at(distance)
        distance -= lane.length
    return lanes[-1].position(distance, 0.0), lanes[-1].heading_at(distance)
