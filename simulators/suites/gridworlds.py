"""MiniGrid's own problems, ids MiniGrid-NAME-vN, with a planner; BabyAI's levels are the suite `minigrid`.

    as simulators/suites/minigrid.py

Left without an expert are Playground, which asks for nothing, and the WFC mazes, whose patterns minigrid's wheel lacks.

Invariant: as there.
"""

from __future__ import annotations

from functools import partial

from simulators.experts.grid import MISSIONS, GridPlanner
from simulators.suites.minigrid import Minigrid

PREFIX = "MiniGrid-"


class Gridworlds(Minigrid):
    name = "gridworlds"
    experts = {PREFIX + name: partial(GridPlanner, mission=mission) for name, mission in MISSIONS.items()}

    def owns(self, id: str) -> bool:
        return id.startswith(PREFIX)


SUITE = Gridworlds()
