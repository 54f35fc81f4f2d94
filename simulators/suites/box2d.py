"""Gymnasium's Box2D problems: LunarLander with the heuristic that comes with it, BipedalWalker and CarRacing to play.

    gymnasium.make -> {"observation": float32 (D,)}, a picture for CarRacing

Invariant: as in simulators/suites/gymnasium.py, which makes and draws them.
"""

from __future__ import annotations

from simulators.experts import classic
from simulators.suites.gymnasium import AnyGymnasium


class Box2D(AnyGymnasium):
    name = "box2d"
    extra = "box2d"
    module = "Box2D"
    distributions = ("gymnasium", "box2d")
    experts = {"LunarLander-": classic.lunar_lander, "LunarLanderContinuous-": classic.lunar_lander}

    def owns(self, id: str) -> bool:
        return id.startswith((*self.experts, "BipedalWalker-", "BipedalWalkerHardcore-", "CarRacing-"))


SUITE = Box2D()
