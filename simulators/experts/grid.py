"""A planner for MiniGrid's problems: the simulator's whole grid -> the next action.

    mission -> poses to reach and an action there -> cheapest route, doors and things in the way at a price
    -> the first of them is dealt with first: opened, its key fetched, carried away -> actions until the grid changes

Unlike an agent, which sees 7 x 7 cells, it knows where everything is. It looks at what a mission asks to remember.

Invariant: an action is a function of the simulator's state, so that it may be played with noise.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from heapq import heappop, heappush
from itertools import count, islice
from math import inf
from typing import Any

import gymnasium
import numpy as np

Cell = tuple[int, int]
Pose = tuple[int, int, int]  # column, row, heading
Plan = list[tuple[Pose, int]]  # where to do what
LEFT, RIGHT, FORWARD, PICK_UP, DROP, TOGGLE, DONE = range(7)
STEPS = ((1, 0), (0, 1), (-1, 0), (0, -1))  # of the four headings
CLOSED, IN_THE_WAY, LOCKED = 1.0, 20.0, 40.0  # prices in timesteps, of which only their order matters
PLACES = 16  # tried for a thing that is put down


class GridPlanner:
    """Plays one environment of minigrid. `mission` plans from the planner's view of the state."""

    algorithm = "planner"

    def __init__(self, env: gymnasium.Env, mission: Callable[[GridPlanner], Plan]):
        self.level: Any = env.unwrapped
        self.mission, self.has_hands = mission, getattr(env.action_space, "n", 0) > FORWARD + 1

    def reset(self) -> None:
        """A new grid lies in the simulator."""
        self.plan: Plan = []
        self.planned_with: Any = None  # what was in hand then
        self.seen = False  # what the mission asks to remember
        self.opening: list[Cell] = []  # locked doors whose keys are being fetched, the next one last

    def act(self, observation: Mapping[str, np.ndarray], rng: np.random.Generator) -> np.ndarray:
        """-> action, int64 ()."""
        if not self.plan or self.plan[0][0] != self.pose or self.planned_with is not self.level.carrying:
            self.planned_with = self.level.carrying
            self.plan = self.mission(self) or [(self.pose, LEFT)]  # no way now: wait
            if not self.has_hands:  # what lies in the way moves by itself
                del self.plan[1:]
        return np.array(self.plan.pop(0)[1])

    @property
    def pose(self) -> Pose:
        column, row = map(int, self.level.agent_pos)
        return column, row, int(self.level.agent_dir)

    def at(self, cell: Cell) -> Any:
        """The thing in a cell, None where it is empty. A cell outside of the grid is a wall's."""
        grid = self.level.grid
        return grid.get(*cell) if 0 <= cell[0] < grid.width and 0 <= cell[1] < grid.height else grid.get(0, 0)

    def cells(self, wanted: Callable[[Any], bool]) -> list[Cell]:
        """Cells of the wanted things."""
        grid = self.level.grid
        found = (n for n, thing in enumerate(grid.grid) if thing is not None and wanted(thing))
        return [(n % grid.width, n // grid.width) for n in found]

    def price(self, cell: Cell) -> float:
        """Of entering a cell, beside the step."""
        thing = self.at(cell)
        if cell == getattr(self.level, "failure_pos", None):
            return inf
        if thing is None or (thing.can_overlap() and thing.type != "lava"):
            return 0.0
        if not self.has_hands or cell in self.opening:
            return inf
        if thing.type == "door":
            return CLOSED if self.opens(thing) else LOCKED
        return IN_THE_WAY if thing.can_pickup() else inf

    def opens(self, door: Any) -> bool:
        """True if a toggle would open the door now."""
        held = self.level.carrying
        return not door.is_locked or (held is not None and (held.type, held.color) == ("key", door.color))

    def explore(self, start: Pose, price: Callable[[Cell], float]) -> Iterator[tuple[float, Pose, Any]]:
        """Poses in the order of their cost from `start`, each with its trail: (trail, pose, action) or None."""
        order, done = count(), set()
        frontier: list[tuple[float, int, Pose, Any]] = [(0.0, 0, start, None)]
        while frontier:
            cost, _, pose, trail = heappop(frontier)
            if pose in done:
                continue
            done.add(pose)
            yield cost, pose, trail
            column, row, heading = pose
            toll = price(ahead(pose))
            if toll < inf:
                heappush(frontier, (cost + 1 + toll, next(order), (*ahead(pose), heading), (trail, pose, FORWARD)))
            for turn, action in ((-1, LEFT), (1, RIGHT)):
                turned = (column, row, (heading + turn) % 4)
                heappush(frontier, (cost + 1, next(order), turned, (trail, pose, action)))

    def go(self, goals: Collection[Pose], action: int) -> Plan:
        """Towards the nearest of some poses and an action there, as far as the grid stays as it is."""
        found = ((end, trail) for _, end, trail in self.explore(self.pose, self.price) if end in goals)
        end, trail = next(found, (None, None))
        if end is None:
            return []
        plan = unrolled(trail)
        for n, (pose, move) in enumerate(plan):
            cell = ahead(pose)
            if move != FORWARD or not self.price(cell):
                continue
            if (thing := self.at(cell)).type == "door":
                return [*plan[:n], (pose, TOGGLE)] if self.opens(thing) else self.fetch_key(cell)
            return self.put_down(goals) if self.level.carrying else [*plan[:n], (pose, PICK_UP)]
        return [*plan, (end, action)]

    def fetch_key(self, door: Cell) -> Plan:
        """Towards a locked door's key, without going through that door."""
        self.opening.append(door)
        plan = self.take(lambda thing: (thing.type, thing.color) == ("key", self.at(door).color))
        self.opening.pop()
        return plan

    def open(self, wanted: Callable[[Any], bool]) -> Plan:
        """Towards opening a door."""
        (cell,) = self.cells(wanted)
        return self.go(facing([cell]), TOGGLE) if self.opens(self.at(cell)) else self.fetch_key(cell)

    def take(self, wanted: Callable[[Any], bool]) -> Plan:
        """Towards having a thing in hand; it may lie in a box."""
        poses = facing(self.cells(wanted))
        if not poses:
            boxes = facing(self.cells(lambda thing: thing.contains is not None and wanted(thing.contains)))
            return self.go(boxes, TOGGLE) if boxes else self.put_down([])
        plan = self.go(poses, PICK_UP)
        arrives = bool(plan) and plan[-1][0] in poses
        return self.put_down(poses) if arrives and self.level.carrying else plan

    def put_down(self, goals: Collection[Pose]) -> Plan:
        """Towards a free hand: of the nearest places for the thing, the best on the way to `goals` and the doors."""
        errands = [goals, *(facing([door]) for door in reversed(self.opening))]
        best: tuple[float, Plan] = (inf, [])
        clear = (found for found in self.explore(self.pose, lambda cell: inf if self.price(cell) else 0.0))
        empty = (found for found in clear if self.at(ahead(found[1])) is None)
        for cost, pose, trail in islice(empty, PLACES):
            filled = ahead(pose)
            total, end = cost, pose
            for poses in errands:
                onward = self.explore(end, lambda cell: IN_THE_WAY if cell == filled else self.price(cell))  # noqa: B023
                further, end = next(((cost, end) for cost, end, _ in onward if end in poses), (LOCKED, end))
                total += further
            if total < best[0]:
                best = total, [*unrolled(trail), (pose, DROP)]
        return best[1]


def ahead(pose: Pose) -> Cell:
    column, row, heading = pose
    return column + STEPS[heading][0], row + STEPS[heading][1]


def facing(cells: Collection[Cell]) -> set[Pose]:
    """Poses that have one of the cells ahead."""
    return {(x - dx, y - dy, heading) for x, y in cells for heading, (dx, dy) in enumerate(STEPS)}


def unrolled(trail: Any) -> Plan:
    plan: Plan = []
    while trail is not None:
        trail, pose, action = trail
        plan.append((pose, action))
    return plan[::-1]


def reach_goal(planner: GridPlanner) -> Plan:
    """Enter the goal square."""
    return planner.go(facing(planner.cells(lambda thing: thing.type == "goal")), FORWARD)


def pick_up(planner: GridPlanner) -> Plan:
    """Pick up the one thing that is asked for."""
    return planner.take(lambda thing: thing is planner.level.obj)


def fetch(planner: GridPlanner) -> Plan:
    """Pick up any thing of the kind and colour that is asked for."""
    wanted = planner.level.targetType, planner.level.targetColor
    return planner.take(lambda thing: (thing.type, thing.color) == wanted)


def go_to(planner: GridPlanner) -> Plan:
    """Say that it is done beside the target."""
    column, row = map(int, planner.level.target_pos)
    return planner.go(facing([(column, row)]), DONE)


def put_near(planner: GridPlanner) -> Plan:
    """Put a thing into one of the eight cells around another."""
    level = planner.level
    if level.carrying is None:
        return planner.take(lambda thing: (thing.type, thing.color) == (level.move_type, level.moveColor))
    column, row = map(int, level.target_pos)
    around = [(column + x, row + y) for x in (-1, 0, 1) for y in (-1, 0, 1)]
    return planner.go(facing([cell for cell in around if planner.at(cell) is None]), DROP)


def unlock(planner: GridPlanner) -> Plan:
    """Open the locked door."""
    return planner.open(lambda thing: thing is planner.level.door)


def red_then_blue(planner: GridPlanner) -> Plan:
    """Open the red door, then the blue one."""
    level = planner.level
    return planner.open(lambda thing: thing is (level.blue_door if level.red_door.is_open else level.red_door))


def remember(planner: GridPlanner) -> Plan:
    """Look at the thing in the first room, then go where its like lies."""
    level = planner.level
    middle = level.height // 2
    planner.seen = planner.seen or level.agent_sees(1, middle - 1)
    if not planner.seen:
        return planner.go({(2, middle, 2)}, DONE)[:1]
    return planner.go(facing([level.success_pos]), FORWARD)


MISSIONS: dict[str, Callable[[GridPlanner], Plan]] = {
    "BlockedUnlockPickup": pick_up,
    "DistShift": reach_goal,
    "DoorKey": reach_goal,
    "Dynamic-Obstacles": reach_goal,
    "Empty": reach_goal,
    "Fetch": fetch,
    "FourRooms": reach_goal,
    "GoToDoor": go_to,
    "GoToObject": go_to,
    "KeyCorridor": pick_up,
    "LavaCrossing": reach_goal,
    "LavaGap": reach_goal,
    "LockedRoom": reach_goal,
    "Memory": remember,
    "MultiRoom": reach_goal,
    "ObstructedMaze": pick_up,
    "PutNear": put_near,
    "RedBlueDoors": red_then_blue,
    "SimpleCrossing": reach_goal,
    "Unlock-": unlock,
    "UnlockPickup": pick_up,
}
"""Beginning of an environment's name -> what it asks for."""
