"""`benchmarks.gpu` goes on where it was: what counts as measured, and what the tables say."""

import json

import pytest

from benchmarks.gpu import FIGURES, done, known, plan, sorted_out
from benchmarks.gpu_tables import written
from schemas.dataset import DatasetError

HERE = {"hardware": "H100", "data": ["a"]}


def test_only_what_was_measured_here_on_these_data_is_kept(tmp_path, capsys):
    path = tmp_path / FIGURES
    lines = [
        {"part": "ceilings", "tflops": 0.4, "terabytes_per_second": 0.1} | HERE | {"hardware": "a CPU"},
        {"part": "bare loop 79m", "error": "out of memory"} | HERE,
        {"part": "train 79m ZeRO 1", "tokens_per_second": 1.0} | HERE | {"data": ["b"]},
        {"part": "control 79m", "error": "x"} | HERE,
        {"part": "control 79m"} | HERE,
    ]
    path.write_text("\n".join(map(json.dumps, lines)) + '\n\n{}\n{"part": "kernels 79m", "hardw')
    assert done(known(path), HERE) == {"control 79m"}
    assert capsys.readouterr().err.count("damaged") == 3
    assert done(known(tmp_path / "none"), HERE) == set()


def test_folders_are_told_apart_in_any_order(hopper, pong, tmp_path):
    assert sorted_out([pong, hopper]) == sorted_out([hopper, pong]) == ([str(hopper)], [str(pong)])
    names = [part[0] for part in plan(["364m", "79m"], [str(hopper)], [str(pong)])]
    assert len(names) == len(set(names)) and "patches 79m" in names
    assert "patches 79m" not in [part[0] for part in plan(["364m", "79m"], [str(hopper)], [])]
    with pytest.raises(DatasetError):
        sorted_out([tmp_path])


def test_ratios_are_of_equal_sides():
    rate = {"tflops": 1.0, "step_ms": 1.0, "micro_batch": 8, "form": "plain"} | HERE
    found = {"train 79m ZeRO 1": 300.0, "bare loop 79m": 200.0, "GPT-2 79m ZeRO 1": 100.0}
    found |= {"train 79m ZeRO 1, micro-batch 1": 900.0, "train 79m ZeRO 3, offload": 900.0}
    text = written([{"part": name, "tokens_per_second": rate_} | rate for name, rate_ in found.items()])
    rows = {row.split(" | ")[0].lstrip("| "): row.split(" | ") for row in text.splitlines() if row.startswith("| ")}
    assert rows["train 79m ZeRO 1"][7:9] == ["3.00", "1.50"]
    assert rows["train 79m ZeRO 1, micro-batch 1"][7:9] == rows["train 79m ZeRO 3, offload"][7:9] == ["", ""]
