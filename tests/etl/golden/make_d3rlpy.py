"""Writes the d3rlpy files of this folder by d3rlpy itself, which the project does not need.

    pip install d3rlpy==2.8.1 (with torch for CPUs); python make_d3rlpy.py FOLDER

Invariant: the values are those of `episodes`, which the tests make again.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

LENGTHS = ((5, True), (7, False), (4, True))


def episodes(kind: str) -> list[dict[str, object]]:
    """Arrays of three episodes: continuous torques in [-2, 2], discrete buttons with pictures, or tuples."""
    rng = np.random.default_rng(0)
    found: list[dict[str, object]] = []
    for T, terminated in LENGTHS:
        observations: object = rng.normal(size=(T, 3)).astype(np.float32)
        actions = rng.uniform(-2, 2, (T, 1)).astype(np.float32)
        if kind == "pixels":
            observations = rng.integers(0, 256, (T, 3, 32, 32), np.uint8)
            actions = rng.integers(0, 4, (T, 1))
        if kind == "tuples":
            observations = (observations, rng.normal(size=(T, 2)).astype(np.float32))
        rewards = rng.normal(size=(T, 1)).astype(np.float32)
        found.append({"observations": observations, "actions": actions, "rewards": rewards, "terminated": terminated})
    return found


def main() -> None:
    from d3rlpy.dataset import Episode, dump

    for kind in ("continuous", "pixels", "tuples"):
        with open(Path(sys.argv[1]) / f"d3rlpy-{kind}.h5", "w+b") as file:
            made = [one | {"observations": list(one["observations"])} if kind == "tuples" else one
                    for one in episodes(kind)]  # fmt: skip
            dump([Episode(**one) for one in made], file)


if __name__ == "__main__":
    main()
