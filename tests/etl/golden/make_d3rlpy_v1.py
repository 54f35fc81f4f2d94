"""Writes the d3rlpy v1 files of this folder by MDPDataset.dump of d3rlpy 1.1.1, which the project does not need.

    pip install "cython<3" "numpy<2" setuptools h5py structlog tensorboardX tqdm scipy
    pip install --no-deps --no-build-isolation d3rlpy==1.1.1; python make_d3rlpy_v1.py FOLDER

Its `dataset` is imported without the rest of the package, which asks for an old gym.

Invariant: the values are those of `rows`, which the tests make again.
"""

from __future__ import annotations

import importlib
import sys
import types
from importlib.util import find_spec
from pathlib import Path

import numpy as np

STOPS = (4, 10, 13)  # rows after each episode's last one
TERMINAL = 9  # the row in which the environment ended an episode


def rows(kind: str) -> dict[str, np.ndarray]:
    """Arrays of 13 rows, three episodes: `continuous`, or `pixels` (1, 32, 32) with one of four buttons."""
    rng = np.random.default_rng(0)
    observations = rng.normal(size=(13, 2)).astype(np.float32)
    actions = rng.uniform(-1, 1, (13, 2)).astype(np.float32)
    if kind == "pixels":
        observations, actions = rng.integers(0, 256, (13, 1, 32, 32), np.uint8), rng.integers(0, 4, 13)
    ends = np.isin(np.arange(13), np.array(STOPS) - 1).astype(np.float32)
    terminals = (np.arange(13) == TERMINAL).astype(np.float32)
    rewards = rng.normal(size=13).astype(np.float32)
    return {"observations": observations, "actions": actions, "rewards": rewards, "terminals": terminals, "ends": ends}


def main() -> None:
    spec = find_spec("d3rlpy")
    assert spec is not None and spec.submodule_search_locations
    package = types.ModuleType("d3rlpy")
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules["d3rlpy"] = package
    dataset = importlib.import_module("d3rlpy.dataset")
    for kind in ("continuous", "pixels"):
        own = rows(kind)
        flags = {"episode_terminals": own.pop("ends"), "discrete_action": kind == "pixels"}
        dataset.MDPDataset(**own, **flags).dump(str(Path(sys.argv[1]) / f"d3rlpy-v1-{kind}.h5"))


if __name__ == "__main__":
    main()
