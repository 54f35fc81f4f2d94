"""Reading LeRobot, RLDS and Minari holds an episode, not the file: as tests/etl/test_reading_memory.py has it.

the benchmark's writers, and Minari's own -> 4 and 24 episodes in one dataset, 24 and 120 of Arrow's
    -> growth of the process's peak
"""

import pytest
from gymnasium import spaces

from benchmarks.formats import robots
from tests.etl import test_sources_minari as minari
from tests.etl.test_reading_memory import RESET, check

FEW, MANY = 4, 24
STEPS = {"lerobot": 24, "rlds": 120, "hdf5": 60, "arrow": 60, "parquet": 60}

pytestmark = [
    pytest.mark.process,  # for its seconds: it starts none
    pytest.mark.skipif(not RESET.exists(), reason="the kernel's peak cannot be set back here"),
    pytest.mark.filterwarnings("ignore::UserWarning:minari"),
]


@pytest.mark.parametrize("kind", STEPS)
def test_memory_is_that_of_an_episode(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(robots, "ROWS", STEPS[kind])

    def write(place, count):
        if kind in robots.SOURCES:
            return robots.SOURCES[kind][0](place / "dataset", count)
        monkeypatch.setenv("MINARI_DATASETS_PATH", str(place))
        pictures = spaces.Box(0, 255, (64, 64, 3), "u1")
        minari.write(pictures, episodes=count, steps=STEPS[kind], data_format=kind)

    name = kind if kind in robots.SOURCES else "minari"
    check(name, write, tmp_path, FEW, MANY, arrow=kind in ("lerobot", "arrow", "parquet"))
