"""Gymnasium's classic control and toy texts, each with an expert: feedback rules, or value iteration.

    gymnasium.make -> {"observation": float32 (D,)} or {"observation": a number}

Invariant: as in simulators/suites/gymnasium.py, which makes and draws them.
"""

from __future__ import annotations

from simulators.experts import classic
from simulators.experts.classic import Rule
from simulators.suites.gymnasium import AnyGymnasium


class Classic(AnyGymnasium):
    name = "classic"
    experts = {
        "Acrobot-": lambda env: Rule(classic.acrobot),
        "CartPole-": lambda env: Rule(classic.cart_pole),
        "CliffWalking-": classic.value_iteration,
        "FrozenLake-": classic.value_iteration,
        "FrozenLake8x8-": classic.value_iteration,
        "MountainCar-": lambda env: Rule(classic.mountain_car),
        "MountainCarContinuous-": lambda env: Rule(classic.mountain_car_continuous),
        "Pendulum-": lambda env: Rule(classic.pendulum),
        "Taxi-": classic.value_iteration,
    }

    def owns(self, id: str) -> bool:
        return id.startswith(tuple(self.experts))


SUITE = Classic()
