"""BabyAI's levels, made of minigrid (arXiv 1810.08272): partial view as a picture, facing, and the mission's text.

    (T, 7, 7, 3) uint8: object, colour, state of each cell the agent sees -> (T, 56, 56, 3) uint8, 8 x 8 pixels per cell

Logs hold the symbolic view, which is small and what Minari's datasets have; models see the picture that minigrid's
own tile drawing makes of it, so that two by two cells fill one patch of 16 x 16. A level counts as solved where its
return is above zero.

Invariant: the picture equals minigrid's RGBImgPartialObsWrapper of the same state, pixel by pixel.
"""

from __future__ import annotations

import io
import string
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import replace
from functools import cache
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from schemas.episode import EnvironmentSpec, FieldSpec, ScoreReference
from simulators.suite import Suite

TILE = 8
UNSEEN = 0
FACING_UP = 3
UNSOLVED = ("Carrying", "KeyInBox", "OrderN2Debug", "OrderN4Debug")


class Minigrid(Suite):
    name = "minigrid"
    module = "minigrid"
    extra = "minigrid"
    recorded_as = "babyai"
    distributions = ("minigrid",)
    experts = {"BabyAI-": lambda env: Bot(env)}

    def owns(self, id: str) -> bool:
        return id.startswith("BabyAI-")

    def tasks(self) -> tuple[str, ...]:
        """Without the levels that the bot cannot solve, or in less than half of the episodes."""
        return tuple(id for id in super().tasks() if not any(name in id for name in UNSOLVED))

    def observe(self, raw: gymnasium.Env, environment: EnvironmentSpec) -> gymnasium.Env:
        return GridFields(raw)

    def fields(self, env: gymnasium.Env) -> tuple[FieldSpec, ...]:
        fields = super().fields(env)
        return tuple(replace(field, fit="pad") if field.kind == "image" else field for field in fields)

    def score(self, episode_return: float, reference: ScoreReference | None) -> tuple[float, str]:
        """100 or 0 for solved or not: nothing but that is rewarded."""
        return 100.0 * (episode_return > 0), "success"

    def picture(self, env: gymnasium.Env) -> np.ndarray:
        level: Any = env.unwrapped
        return level.get_frame(tile_size=24)


SUITE = Minigrid()


class Bot:
    """BabyAI's own expert (minigrid's bot). It reads the simulator's state, not the observation, and plans again
    after each action of its own. Where its plan fails, or searches without end, as both may in levels of locked rooms,
    it moves at random once and another bot takes over; after `TRIES` of them it waits."""

    algorithm = "bot"
    reads_state = True
    MOVES = (0, 1, 2)  # left, right, forward
    WAIT = 6  # minigrid's "done", which does nothing
    SEARCHES = 200  # of one plan; plans that succeed need a few
    TRIES = 10

    def __init__(self, env: gymnasium.Env):
        self.env = env

    def reset(self) -> None:
        """A new level lies in the simulator."""
        self.tries = 0
        self._start()

    def _start(self) -> None:
        from minigrid.utils.baby_ai_bot import BabyAIBot

        self.tries += 1
        self.bot: Any = BabyAIBot(self.env.unwrapped)
        bot: Any = self.bot
        search = bot._breadth_first_search

        def bounded(*arguments: Any, **named: Any) -> Any:
            if bot.bfs_counter >= self.limit:
                raise ValueError(f"no plan after {self.SEARCHES} searches")
            return search(*arguments, **named)

        bot._breadth_first_search = bounded

    def act(self, observation: Mapping[str, np.ndarray], rng: np.random.Generator) -> np.ndarray:
        """-> action, int64 ()."""
        if self.tries > self.TRIES:
            return np.array(self.WAIT)
        try:
            self.limit = self.bot.bfs_counter + self.SEARCHES
            return np.array(int(self.bot.replan()))
        except (AssertionError, ValueError, IndexError):
            self._start()
            return np.array(self.MOVES[int(rng.integers(len(self.MOVES)))])


class GridFields(gymnasium.Wrapper):
    """Minigrid's partial view drawn as a picture, the facing and the mission's text."""

    def __init__(self, env: gymnasium.Env):
        super().__init__(env)
        assert isinstance(env.observation_space, spaces.Dict)
        width, height, _ = env.observation_space["image"].shape or ()
        picture = (height * TILE, width * TILE, 3)
        self.observation_space = spaces.Dict(
            {
                "direction": spaces.Discrete(4),
                "image": spaces.Box(0, 255, picture, np.uint8),
                "mission": spaces.Text(1024, charset=string.printable),
            }
        )

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        with redirect_stdout(io.StringIO()):  # minigrid prints each level that it draws and throws away
            observation, info = self.env.reset(seed=seed, options=options)
        return self._fields(observation), info

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self.env.step(int(action))
        return self._fields(observation), float(reward), bool(terminated), bool(truncated), info

    def _fields(self, observation: Any) -> dict[str, Any]:
        view = np.asarray(observation["image"], np.uint8)
        return {
            "direction": np.asarray(observation["direction"], np.int64),
            "image": draw(view[None])[0],
            "mission": np.asarray(str(observation["mission"])),
        }


def draw(views: np.ndarray) -> np.ndarray:
    """Symbolic views (T, W, H, 3) uint8, column first as minigrid has them, to pictures (T, 8 H, 8 W, 3) uint8.
    ValueError for cells that minigrid does not know."""
    T, W, H, _ = views.shape
    cells = views.transpose(0, 2, 1, 3).astype(np.uint32)
    looks = cells @ np.array([1 << 17, 1 << 9, 1 << 1], np.uint32)  # (T, H, W): one number per look is found fastest
    looks[:, H - 1, W // 2] += 1
    different, which = np.unique(looks, return_inverse=True)
    tiles = np.stack([_tile(look >> 17, look >> 9 & 255, look >> 1 & 255, look & 1) for look in different.tolist()])
    grid = tiles[which.reshape(-1)].reshape(T, H, W, TILE, TILE, 3)
    return grid.transpose(0, 1, 3, 2, 4, 5).reshape(T, H * TILE, W * TILE, 3)


@cache
def _tile(kind: int, colour: int, state: int, agent: int) -> np.ndarray:
    """One cell's picture, uint8 (8, 8, 3); cells that are seen are lit."""
    from minigrid.core.grid import Grid
    from minigrid.core.world_object import WorldObj

    try:
        thing = WorldObj.decode(kind, colour, state)
    except (KeyError, ValueError, AssertionError) as error:
        raise ValueError(f"minigrid has no cell ({kind}, {colour}, {state})") from error
    direction = FACING_UP if agent else None
    return Grid.render_tile(thing, agent_dir=direction, highlight=kind != UNSEEN, tile_size=TILE).astype(np.uint8)
