"""Experts of OGBench: its own oracles for one cube, button, drawer or window, chained to a task's goal, and a way
through its mazes.

    simulator's state -> plan: the next thing to move and where -> ogbench's Markov oracle for it -> action (5,)

An oracle ends when its thing is where it should be and the gripper is over it; then the next one is planned. Cubes that
stand where others should go are put aside first, buttons unlock what has to move, and a puzzle's buttons are the
solution of a linear system over two values.

Invariant: an action is a function of the simulator's state and of the thing in hand, so that it may be played with
noise.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from itertools import product
from typing import Any

import gymnasium
import numpy as np

Info = dict[str, Any]
Subgoal = tuple[str, Info]
"""Kind of thing ('cube', 'button', 'drawer', 'window') and what its oracle reads of the target."""
CUBE = 0.04  # metres, its edge
PLACED = 0.025  # metres; a task asks for 0.04
ROOM = 0.075  # metres between cubes' centres that a gripper needs
TABLE = 0.02  # height of a cube's centre that lies on it


class Arm:
    """`plan`: the environment and its state -> the next subgoal, None where nothing is left to do."""

    algorithm = "scripted"

    def __init__(self, env: gymnasium.Env, plan: Callable[[Any, Info], Subgoal | None]):
        self.raw: Any = env.unwrapped
        self.plan = plan
        self.makers = _makers(env)

    def reset(self) -> None:
        """Another episode has begun."""
        self.oracle: Any = None

    def act(self, observation: Mapping[str, np.ndarray], rng: np.random.Generator) -> np.ndarray:
        """-> action, float32 (5,) in [-1, 1]: where the gripper moves to, turns to, and closes."""
        info = self.raw.compute_ob_info()
        if self.oracle is None or self.oracle.done:
            found = self.plan(self.raw, info)
            if found is None:
                return np.zeros(5, np.float32)
            kind, self.target = found
            self.oracle = self.makers[kind]()
            self.oracle.reset(None, info | self.target)
            # it would wander off to a random place in the end
            self.oracle._final_pos = self.target["above"]
            self.oracle._final_yaw = info["proprio/effector_yaw"][0]
        return self.oracle.select_action(None, info | self.target).astype(np.float32)


def _makers(env: gymnasium.Env) -> dict[str, Callable[[], Any]]:
    """Maker of the oracle of each kind of thing."""
    from ogbench.manipspace.oracles.markov.button_markov import ButtonMarkovOracle
    from ogbench.manipspace.oracles.markov.cube_markov import CubeMarkovOracle
    from ogbench.manipspace.oracles.markov.drawer_markov import DrawerMarkovOracle
    from ogbench.manipspace.oracles.markov.window_markov import WindowMarkovOracle

    return {
        "cube": lambda: CubeMarkovOracle(env=env),
        "button": lambda: ButtonMarkovOracle(env=env, gripper_always_closed=True),
        "drawer": lambda: DrawerMarkovOracle(env=env),
        "window": lambda: WindowMarkovOracle(env=env),
    }


def move_cube(n: int, place: np.ndarray) -> Subgoal:
    """Put cube `n` at `place` (3,)."""
    return "cube", {
        "privileged/target_block": n,
        "privileged/target_block_pos": place,
        "privileged/target_block_yaw": np.zeros(1),
        "above": np.array([*place[:2], place[2] + 0.18]),
    }


def press(raw: Any, info: Info, n: int) -> Subgoal:
    """Press button `n` once."""
    top = raw.data.site_xpos[raw._button_site_ids[n]].copy()
    return "button", {
        "privileged/target_button": n,
        "privileged/target_button_state": 1 - info[f"privileged/button_{n}_state"],
        "privileged/target_button_top_pos": top,
        "above": np.array([*top[:2], 0.19]),
    }


def stack_cubes(raw: Any, info: Info) -> Subgoal | None:
    """The nearest cube whose place is free and supported; where there is none, one out of the others' way."""
    goals = raw.data.mocap_pos[raw._cube_target_mocap_ids]
    places = np.array([info[f"privileged/block_{n}_pos"] for n in range(len(goals))])
    wrong = [n for n in range(len(goals)) if np.linalg.norm(places[n] - goals[n]) > PLACED]
    if not wrong:
        return None
    apart = np.linalg.norm(places[:, None, :2] - places[None, :, :2], axis=-1)
    higher = places[:, None, 2] > places[None, :, 2] + CUBE / 2
    bare = [n for n in range(len(goals)) if not (higher[:, n] & (apart[:, n] < 0.75 * CUBE)).any()]
    gripper = info["proprio/effector_pos"][:2]
    nearest = sorted(bare, key=lambda n: float(np.linalg.norm(places[n, :2] - gripper)))
    for n in nearest:
        if n in wrong and _ready(n, goals, places, wrong):
            return move_cube(n, goals[n])
    for n in nearest:
        if n in wrong or any(_near(places[n], goals[m]) for m in wrong if m != n):
            return move_cube(n, _aside(n, goals, places))
    return None


def _near(one: np.ndarray, other: np.ndarray) -> bool:
    return bool(np.linalg.norm(one[:2] - other[:2]) < CUBE)


def _ready(n: int, goals: np.ndarray, places: np.ndarray, wrong: list[int]) -> bool:
    """True if cube `n` can be put to its place now: all below is there, and nothing else is."""
    for m in range(len(goals)):
        if m == n:
            continue
        below = goals[m][2] < goals[n][2] - CUBE / 2 and _near(goals[m], goals[n])
        if (below and m in wrong) or (not below and _near(places[m], goals[n])):
            return False
    return True


def _aside(n: int, goals: np.ndarray, places: np.ndarray) -> np.ndarray:
    """A place on the table with the most room around it, and of those with enough, the nearest."""
    grid = np.array(list(product(np.linspace(0.31, 0.54, 8), np.linspace(-0.29, 0.29, 16))))
    others = np.concatenate([goals, np.delete(places, n, axis=0)])[:, :2]
    room = np.linalg.norm(grid[:, None] - others[None], axis=-1).min(axis=1)
    way = np.linalg.norm(grid - places[n, :2], axis=-1)
    best = min(range(len(grid)), key=lambda k: (-min(room[k], ROOM), way[k]))
    return np.array([*grid[best], TABLE])


def lights_out(raw: Any, info: Info) -> Subgoal | None:
    """The nearest of the buttons that are to be pressed."""
    rows, columns = raw._num_rows, raw._num_cols
    wrong = (raw._cur_button_states != raw._target_button_states).reshape(rows, columns)
    presses = solve_lights_out(wrong)
    tops = raw.data.site_xpos[raw._button_site_ids]
    gripper = info["proprio/effector_pos"]
    todo = sorted(np.flatnonzero(presses), key=lambda n: float(np.linalg.norm(tops[n, :2] - gripper[:2])))
    return press(raw, info, int(todo[0])) if todo else None


def solve_lights_out(wrong: np.ndarray) -> np.ndarray:
    """The fewest buttons whose presses, each of which flips itself and its neighbours, flip exactly `wrong`.

    Args:
        wrong: bool (rows, columns).

    Returns:
        bool (rows, columns). None at all where there is no solution.
    """
    rows, columns = wrong.shape
    best = None
    for first in product((False, True), repeat=columns):  # the first row decides all others
        left, presses = wrong.copy(), np.zeros_like(wrong)
        for row in range(rows):
            presses[row] = first if row == 0 else left[row - 1]
            padded = np.pad(presses[row], 1)
            left[row] ^= presses[row] ^ padded[:-2] ^ padded[2:]
            if row:
                left[row - 1] ^= presses[row]
            if row + 1 < rows:
                left[row + 1] ^= presses[row]
        if not left.any() and (best is None or presses.sum() < best.sum()):
            best = presses
    return np.zeros_like(wrong) if best is None else best


OPEN, SHUT = -0.16, 0.0  # of the drawer
NEARLY = 0.02  # metres, of drawer and window; a task asks for 0.04
IN_DRAWER = np.array([0.33, -0.24, 0.066])  # centre of the open drawer


def arrange_scene(raw: Any, info: Info) -> Subgoal | None:
    """Cube first, the drawer opened for it where it belongs there; drawer and window, unlocked; the locks last."""
    cube, goal = info["privileged/block_0_pos"], raw.data.mocap_pos[raw._cube_target_mocap_ids[0]]
    drawer, window = info["privileged/drawer_pos"][0], info["privileged/window_pos"][0]
    states, wanted = raw._cur_button_states, raw._target_button_states
    drawer_goal, window_goal = raw._target_drawer_pos, raw._target_window_pos
    if goal[2] > CUBE:  # in the drawer, whose floor is the one higher place
        if not raw._is_in_drawer(cube):
            if abs(drawer - OPEN) > NEARLY:
                return _slide(raw, info, "drawer", OPEN) if states[0] else press(raw, info, 0)
            return move_cube(0, IN_DRAWER)
    elif np.linalg.norm(cube - goal) > PLACED:
        return move_cube(0, goal)
    if abs(drawer - drawer_goal) > NEARLY:
        return _slide(raw, info, "drawer", drawer_goal) if states[0] else press(raw, info, 0)
    if abs(window - window_goal) > NEARLY:
        return _slide(raw, info, "window", window_goal) if states[1] else press(raw, info, 1)
    todo = [n for n in range(len(states)) if states[n] != wanted[n]]
    return press(raw, info, todo[0]) if todo else None


def _slide(raw: Any, info: Info, what: str, place: float) -> Subgoal:
    """Move drawer or window to `place` on its rail."""
    handle = info[f"privileged/{what}_handle_pos"]
    axis, sign = (1, -1.0) if what == "drawer" else (0, 1.0)
    target = handle.copy()
    target[axis] += sign * (place - info[f"privileged/{what}_pos"][0])
    return what, {
        f"privileged/target_{what}_handle_pos": target,
        "above": np.array([*target[:2], 0.22 if what == "drawer" else 0.31]),
    }


class Maze:
    """Steers the point through one of ogbench's mazes, around its teleporters, on a shortest path to the goal."""

    algorithm = "scripted"
    STEP = 0.2  # metres that a full action moves

    def __init__(self, env: gymnasium.Env):
        self.raw: Any = env.unwrapped

    def reset(self) -> None:
        """Nothing is kept between timesteps."""

    def act(self, observation: Mapping[str, np.ndarray], rng: np.random.Generator) -> np.ndarray:
        """{"observation": (2,)} -> move, float32 (2,) in [-1, 1]."""
        place, goal = np.asarray(observation["observation"], np.float64), self.raw.cur_goal_xy
        start, end = self.raw.xy_to_ij(place), self.raw.xy_to_ij(goal)
        target = goal if start == end else np.array(self.raw.ij_to_xy(self._next(start, end)))
        return np.clip((target - place) / self.STEP, -1.0, 1.0).astype(np.float32)

    def _next(self, start: tuple[int, int], goal: tuple[int, int]) -> tuple[int, int]:
        """The cell after `start` on a shortest path, by breadth-first search from the goal."""
        closed = self.raw.maze_map == 1
        for cell in (self.raw._teleport_info or {}).get("teleport_in_ijs", ()):
            closed[cell] = True
        frontier, seen = deque([goal]), {goal}
        while frontier:
            row, column = frontier.popleft()
            for near in ((row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)):
                if near == start:
                    return row, column
                if near not in seen and not closed[near]:
                    seen.add(near)
                    frontier.append(near)
        return start
