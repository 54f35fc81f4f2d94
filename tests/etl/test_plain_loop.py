"""A build writes what a plain loop of NumPy and tarfile writes, which shares no code with it (benchmarks/formats).

logs of each format -> etl.build -> shards, index, shards.arrow;    the same logs -> loop.py -> the same bytes
"""

import numpy as np
import pytest

from benchmarks.etl import build_once
from benchmarks.formats import robots, sources
from benchmarks.formats.loop import require_equal, write

FEW = 12


@pytest.mark.parametrize("name", [*sources.FORMATS, *robots.SOURCES])
def test_a_build_writes_the_bytes_of_a_plain_loop(name, tmp_path):
    logs, built, looped = (tmp_path / one for one in ("logs", "built", "looped"))
    logs.mkdir()
    if name in robots.SOURCES:
        source, (make, read, timesteps) = name, robots.SOURCES[name]
        make(logs, 2)
    else:
        source, make, read = sources.FORMATS[name]
        make(logs, np.random.default_rng(0), FEW)
        timesteps = sources.timesteps_of(name)
    task = build_once(source, logs, built).tasks[0]
    looped.mkdir()
    write(task.spec, looped, read(logs), task.episodes, timesteps)
    contents = {path.name: path.read_bytes() for path in built.iterdir()}
    require_equal(looped, contents)
    with pytest.raises(ValueError, match="shard-000000.tar: not the bytes"):
        require_equal(looped, contents | {"shard-000000.tar": contents["shard-000000.tar"][:-1]})
