"""`python -m benchmarks.baselines`: what planning with Trajectory Transformer costs.

one plan at full context, the paper's model and search for Hopper but a quarter of its beams: with the attention
cache / without it, by turns; then the search of a small budget for eight environments: as one batch / one by one

Invariant: both sides of a ratio choose the same actions, or the run fails. Rates are of processor seconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from eval.baselines.trajectory_transformer.model import TrajectoryTransformer
from eval.baselines.trajectory_transformer.planning import Policy
from eval.baselines.trajectory_transformer.tokens import Config, Discretiser
from schemas.episode import ActionSpec, EnvironmentSpec, FieldSpec, TaskSpec

BEAMS, ENVIRONMENTS, REPEATS = 32, 8, 2
OBSERVATIONS, ACTIONS = 11, 3
TASK = TaskSpec(
    "hopper",
    "d4rl",
    (FieldSpec("observation", "continuous", (OBSERVATIONS,)),),
    ActionSpec.continuous(-1.0, 1.0, ACTIONS),
    EnvironmentSpec("mujoco", "Hopper-v4"),
)


def planner(config: Config, cached: bool) -> Policy:
    """A policy whose weights were not trained: they do not change what a plan costs."""
    torch.manual_seed(0)
    model = TrajectoryTransformer(config, OBSERVATIONS, ACTIONS)
    torch.nn.init.normal_(model.head)  # far from uniform predictions, so that a fault would change an action
    rows = np.random.default_rng(0).normal(size=(1000, model.dimensions))
    return Policy(model, Discretiser.fit(rows, config), TASK, cached)


def prefixes(config: Config, environments: int) -> torch.Tensor:
    """Tokens (E, T) of a full context: whole transitions, then the observation to act on."""
    length = (config.context - 1) * (OBSERVATIONS + ACTIONS + 2) + OBSERVATIONS
    return torch.from_numpy(np.random.default_rng(1).integers(config.bins, size=(environments, length)))


def compare(name: str, sides: tuple[Callable[[], torch.Tensor], Callable[[], torch.Tensor]], plans: int) -> float:
    """Print plans a processor second of both sides, run by turns, best of REPEATS; returns their ratio."""
    best = [float("inf"), float("inf")]
    for _ in range(REPEATS):
        chosen = []
        for n, side in enumerate(sides):
            begun = time.process_time()
            chosen.append(side())
            best[n] = min(best[n], time.process_time() - begun)
        if not torch.equal(*chosen):
            raise AssertionError(f"{name}: the two sides chose {chosen}")
    ratio = best[1] / best[0]
    print(f"{name}: {plans / best[0]:,.4g} against {plans / best[1]:,.4g} plans/s, ratio {ratio:.2f}", flush=True)
    return ratio


def run() -> None:
    config = replace(Config.paper(TASK), beams=BEAMS)
    prefix = prefixes(config, 1)

    def plan(cached: bool) -> Callable[[], torch.Tensor]:
        policy = planner(config, cached)
        return lambda: policy.plan(prefix, np.random.default_rng(2))

    shape = f"{BEAMS} beams, horizon {config.horizon}, context {config.context}"
    compare(f"TT: cached / not, {shape}", (plan(True), plan(False)), 1)

    small = replace(Config.cpu(TASK), k_act=1)  # no draws: a batch shares one generator, single plans do not
    policy, many = planner(small, True), prefixes(small, ENVIRONMENTS)

    def together() -> torch.Tensor:
        return policy.plan(many, np.random.default_rng(2))

    def single() -> torch.Tensor:
        return torch.cat([policy.plan(one[None], np.random.default_rng(2)) for one in many])

    compare(f"TT: {ENVIRONMENTS} environments as one batch / one by one", (together, single), ENVIRONMENTS)


if __name__ == "__main__":
    run()
