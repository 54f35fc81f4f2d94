"""Reading LeRobot, RLDS and Minari holds an episode, not the file: as tests/etl/test_reading_memory.py has it.

the benchmark's writers, and Minari's own -> 4 and 24 episodes in one dataset, 24 and 96 of Arrow's
    -> growth of the process's peak
"""

import pytest
from gymnasium import spaces

from benchmarks.formats import robots
from tests.etl import test_sources_minari as minari
from tests.etl.test_reading_memory import RESET, SHARE, read_all, read_each

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
    places = []
    arrow = kind in ("lerobot", "arrow", "parquet")
    for count in (FEW, MANY, 4 * MANY) if arrow else (FEW, FEW, MANY):  # the first one imports, and warms up
        places.append(place := tmp_path / f"{len(places)}")
        place.mkdir()
        if kind in robots.SOURCES:
            name = kind
            robots.SOURCES[kind][0](place / "dataset", count)
        else:
            name = "minari"
            monkeypatch.setenv("MINARI_DATASETS_PATH", str(place))
            pictures = spaces.Box(0, 255, (64, 64, 3), "u1")
            minari.write(pictures, episodes=count, steps=STEPS[kind], data_format=kind)
    found = read_each(name, places) if arrow else [read_all(name, place) for place in places]
    (_, few, least), (_, many, most) = found[1:]
    assert many >= 4 * few and most - least < SHARE * (many - few) + 2**21, found
