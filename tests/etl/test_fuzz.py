"""A short run of tests/fuzz over every source, always the same damaged logs: long ones are run by hand."""

import pytest

from etl import sources
from tests.conftest import run
from tests.fuzz import seeds

CASES = {"atari": 600, "d4rl": 400, "minari": 400, "babyai": 400, "text": 800}


@pytest.mark.parametrize("source", sources.names())
def test_damaged_logs_are_refused_not_fatal(source, tmp_path):
    if source not in seeds.SEEDS:
        pytest.skip(f"tests/fuzz/seeds.py has no seed for {source}")
    done = run(
        "tests.fuzz",
        "--source",
        source,
        "--cases",
        str(CASES.get(source, 200)),
        "--output",
        tmp_path / "findings",
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
