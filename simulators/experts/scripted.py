"""Scripted experts: short programs that read what the agent reads and play well.

    frame (84, 84, 1) -> paddle and ball by their pixels -> where the ball will cross the paddle's line -> move there

A paddle's player is a deterministic function of the last few frames and its own last actions, so that a small
sequence model can imitate it. Pixel positions are those of `simulators`' frames: box-filtered 84x84.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence

import numpy as np

NOOP, FIRE, RIGHT, LEFT = range(4)  # minimal action sets of Pong and Breakout; RIGHT is up in Pong


class PaddleFollower:
    """Moves a paddle to where the ball will arrive. Subclasses find ball and paddle in a frame.

    `along` is the coordinate in which the paddle moves, `across` the one in which the ball approaches;
    both in pixels. `walls`: where the ball bounces along; `line`: where the paddle's face lies across.
    """

    algorithm = "scripted"
    walls: tuple[float, float]
    line: float
    increase: int  # action that raises the paddle's coordinate
    decrease: int
    glide: tuple[float, ...]  # pixels still to come from the last action, the one before, ...
    fine = 1.5  # distance to the target that is good enough while there is time
    coarse = 4.5  # and when the ball is about to arrive: the paddle's reach
    hurry = 5.0  # timesteps before arrival from which the paddle only makes sure of hitting
    memory = 6  # sightings of the ball since its last bounce that its speed is taken from
    rest: float | None = None  # where to wait while the ball recedes; None: stay level with it

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self._flight: deque[tuple[float, float]] = deque(maxlen=self.memory)
        self._moves: deque[int] = deque([0] * len(self.glide), maxlen=len(self.glide))
        self._target: float | None = None
        self._tolerance = self.coarse

    def locate(self, frame: np.ndarray) -> tuple[tuple[float, float] | None, float | None]:
        """((along, across) of the ball, along of the paddle's centre) in a frame (84, 84); None where not in sight."""
        raise NotImplementedError

    def aim(self, landing: float) -> float:
        """Target of the paddle's centre for a ball that lands at `landing`."""
        return landing

    def act(self, observation: Mapping[str, np.ndarray], rng: np.random.Generator) -> np.ndarray:
        """{"frame": uint8 (84, 84, 1)} -> action, int64 ()."""
        ball, paddle = self.locate(observation["frame"][..., 0])
        if ball is None:
            self._flight.clear()
        else:
            self._follow(ball)
        move = 0
        if ball is not None and paddle is not None and self._target is not None:
            arriving = paddle + sum(pixels * move for pixels, move in zip(self.glide, self._moves))
            if abs(self._target - arriving) > self._tolerance:
                move = 1 if self._target > arriving else -1
        self._moves.appendleft(move)
        if ball is None:
            return np.array(FIRE)
        return np.array({-1: self.decrease, 0: NOOP, 1: self.increase}[move])

    def _follow(self, ball: tuple[float, float]) -> None:
        """Add a sighting; move the target to where the ball will cross the paddle's line, bounces folded in."""
        flight = self._flight
        if len(flight) > 1:
            (a0, c0), (a1, c1) = flight[-2], flight[-1]
            if (a1 - a0) * (ball[0] - a1) < 0 or (c1 - c0) * (ball[1] - c1) < 0:
                # a bounce: what the ball did before says nothing about where it goes
                flight.clear()
        flight.append(ball)
        if len(flight) == 1:
            return
        along, across = ball
        steps = len(flight) - 1
        speed_along, speed_across = (along - flight[0][0]) / steps, (across - flight[0][1]) / steps
        if speed_across <= 0.2:
            self._target, self._tolerance = along if self.rest is None else self.rest, self.coarse
            return
        low, high = self.walls
        arrival = max(self.line - across, 0.0) / speed_across
        folded = (along + speed_along * arrival - low) % (2 * (high - low))
        landing = low + min(folded, 2 * (high - low) - folded)
        early = arrival > self.hurry
        self._target = self.aim(landing) if early else landing
        self._tolerance = self.fine if early else self.coarse


class Pong(PaddleFollower):
    """The right paddle (green); ball and frame lines are white.

    A steep return across the court beats the opponent, and the paddle's ends give one: balls that land high are
    met with the lower end, those that land in the lower middle with the upper end.
    """

    walls = (15.0, 76.0)
    line = 74.0
    increase, decrease = LEFT, RIGHT
    glide = (7.0, 2.2)
    coarse = 4.0
    hurry = 6.0
    rest = 45.0
    edge = 3.0  # pixels from the paddle's centre to where its end meets the ball

    TOP, BOTTOM, PADDLE_COLUMN, WHITE = 14, 77, 74, 155

    def aim(self, landing: float) -> float:
        if landing > 62.0:
            return landing
        return landing - self.edge if landing < 40.0 else landing + self.edge

    def locate(self, frame: np.ndarray) -> tuple[tuple[float, float] | None, float | None]:
        court = frame[self.TOP : self.BOTTOM]
        rows, columns = np.nonzero(court > self.WHITE)
        ball = (float(rows.mean()) + self.TOP, float(columns.mean())) if len(rows) else None
        paddle = np.flatnonzero((court[:, self.PADDLE_COLUMN] > 120) & (court[:, self.PADDLE_COLUMN] < self.WHITE))
        return ball, float(paddle.mean()) + self.TOP if len(paddle) else None


class Breakout(PaddleFollower):
    """The paddle at the bottom; the ball is followed only between bricks and paddle."""

    walls = (5.0, 79.0)
    line = 75.0
    increase, decrease = RIGHT, LEFT
    glide = (8.0, 0.5)
    coarse = 5.0
    hurry = np.inf

    TOP, BOTTOM, PADDLE_ROW, LEFT_WALL, RIGHT_WALL, LIT = 38, 75, 76, 5, 79, 40

    def locate(self, frame: np.ndarray) -> tuple[tuple[float, float] | None, float | None]:
        field = frame[self.TOP : self.BOTTOM, self.LEFT_WALL : self.RIGHT_WALL]
        rows, columns = np.nonzero(field > self.LIT)
        ball = (float(columns.mean()) + self.LEFT_WALL, float(rows.mean()) + self.TOP) if len(rows) else None
        paddle = np.flatnonzero(frame[self.PADDLE_ROW, self.LEFT_WALL : self.RIGHT_WALL] > self.LIT)
        return ball, float(paddle.mean()) + self.LEFT_WALL if len(paddle) else None


class Freeway:
    """Always up: the score is the number of crossings, and waiting for a gap costs more than being pushed back."""

    algorithm = "scripted"
    UP = 1

    def reset(self) -> None:
        """Nothing is kept between timesteps."""

    def act(self, observation: Mapping[str, np.ndarray], rng: np.random.Generator) -> np.ndarray:
        """{"frame": uint8 (84, 84, 1)} -> action, int64 ()."""
        return np.array(self.UP)


class Waypoints:
    """Steers a point through a maze: towards the next free cell on a shortest path to the goal, then to the goal."""

    algorithm = "scripted"
    PULL, DAMPING = 10.0, 1.0

    def __init__(self, maze: Sequence[Sequence[int | str]]):
        """`maze`: rows of cells, 1 is a wall; cells are 1 x 1 and the maze is centred on the origin."""
        self.wall = np.array([[cell == 1 for cell in row] for row in maze])

    def reset(self) -> None:
        """Nothing is kept between timesteps."""

    def act(self, observation: Mapping[str, np.ndarray], rng: np.random.Generator) -> np.ndarray:
        """{"achieved_goal": (2,), "desired_goal": (2,), "observation": (4,)} -> force (2,) float32 in [-1, 1]."""
        position, goal = observation["achieved_goal"], observation["desired_goal"]
        step = self._next(self._cell(position), self._cell(goal))
        target = goal if step is None else self._centre(step)
        force = self.PULL * (target - position) - self.DAMPING * observation["observation"][2:4]
        return np.clip(force, -1.0, 1.0).astype(np.float32)

    def _next(self, start: tuple[int, int], goal: tuple[int, int]) -> tuple[int, int] | None:
        """The cell behind `start` on a shortest path to `goal`, by breadth-first search from the goal; None there."""
        frontier, seen = deque([goal]), {goal}
        while frontier and start != goal:
            row, column = frontier.popleft()
            for near in ((row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)):
                if near == start:
                    return row, column
                if near not in seen and not self.wall[near]:
                    seen.add(near)
                    frontier.append(near)
        return None

    def _cell(self, place: np.ndarray) -> tuple[int, int]:
        rows, columns = self.wall.shape
        return int(np.floor(rows / 2 - place[1])), int(np.floor(place[0] + columns / 2))

    def _centre(self, cell: tuple[int, int]) -> np.ndarray:
        rows, columns = self.wall.shape
        return np.array([cell[1] + 0.5 - columns / 2, rows / 2 - cell[0] - 0.5])
