"""Minigrid's symbolic view as a picture (arXiv 1810.08272 for BabyAI's levels).

(T, 7, 7, 3) uint8: object, colour, state of each cell the agent sees -> (T, 56, 56, 3) uint8, 8 x 8 pixels a cell

Logs hold the symbolic view, which is small and what Minari's datasets have; models see the picture that minigrid's
own tile drawing makes of it, so that two by two cells fill one patch of 16 x 16.

Invariant: the picture equals minigrid's RGBImgPartialObsWrapper of the same state, pixel by pixel.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from minigrid.core.grid import Grid
from minigrid.core.world_object import WorldObj

TILE = 8
UNSEEN = 0
FACING_UP = 3


def draw(views: np.ndarray) -> np.ndarray:
    """Symbolic views (T, W, H, 3) uint8, column first as minigrid has them, to pictures (T, 8 H, 8 W, 3) uint8.
    ValueError for cells that minigrid does not know."""
    T, W, H, _ = views.shape
    cells = views.transpose(0, 2, 1, 3).reshape(-1, 3)
    agent = np.zeros((T, H, W, 1), np.uint8)
    agent[:, H - 1, W // 2] = 1
    kinds, which = np.unique(np.concatenate([cells, agent.reshape(-1, 1)], axis=1), axis=0, return_inverse=True)
    tiles = np.stack([_tile(*map(int, kind)) for kind in kinds])
    grid = tiles[which.reshape(-1)].reshape(T, H, W, TILE, TILE, 3)
    return grid.transpose(0, 1, 3, 2, 4, 5).reshape(T, H * TILE, W * TILE, 3)


@cache
def _tile(kind: int, colour: int, state: int, agent: int) -> np.ndarray:
    """One cell's picture, uint8 (8, 8, 3); cells that are seen are lit."""
    try:
        thing = WorldObj.decode(kind, colour, state)
    except (KeyError, ValueError, AssertionError) as error:
        raise ValueError(f"minigrid has no cell ({kind}, {colour}, {state})") from error
    direction = FACING_UP if agent else None
    return Grid.render_tile(thing, agent_dir=direction, highlight=kind != UNSEEN, tile_size=TILE).astype(np.uint8)
