"""A short run of tests/fuzz over every source, always the same damaged logs; long runs are made by hand."""

import pytest

from tests.conftest import run


@pytest.mark.process
def test_damaged_logs_are_refused_and_nothing_worse(tmp_path):
    done = run("tests.fuzz", "--source", "all", "--cases", "10", "--output", tmp_path / "findings", check=False)
    assert done.returncode == 0, done.stdout + done.stderr
