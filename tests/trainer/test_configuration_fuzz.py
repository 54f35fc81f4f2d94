"""Damaged configurations of runs and of DeepSpeed give a plan or one line: some cases here, more by its command."""

from tests.fuzz.configuration import Options, fuzz


def test_random_configurations(tmp_path):
    outcomes = fuzz(Options(minutes=1.0, cases=60, seed=7, output=tmp_path))
    assert outcomes["plan"] and outcomes["refused"] and not outcomes["finding"], list(tmp_path.iterdir())
