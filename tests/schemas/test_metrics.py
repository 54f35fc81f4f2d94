"""metrics.jsonl line by line: what is written is read, a line that a kill cut is left out, a damaged one is named."""

import json

import pytest

from schemas.metrics import MetricsLine, read_lines


def test_lines_survive_and_a_cut_one_is_left_out(tmp_path):
    lines = [MetricsLine(n, n * 100, n / 3, {"train/loss": 1 / (n + 1), "data/sequences/a": n}) for n in range(3)]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(line.to_json() + "\n" for line in lines) + '{"step": 3, "tok')
    assert list(read_lines(path)) == lines
    assert list(json.loads(lines[1].to_json())) == ["step", "tokens", "seconds", "train/loss", "data/sequences/a"]
    assert list(read_lines(tmp_path / "none.jsonl")) == []


@pytest.mark.parametrize("text", ["{", "[1]", '{"tokens": 1}', '{"step": "1"}'])
def test_a_damaged_line_is_named(tmp_path, text):
    path = tmp_path / "metrics.jsonl"
    path.write_text(MetricsLine(0, 0, 0.0).to_json() + f"\n{text}\n")
    with pytest.raises(ValueError, match=r"metrics.jsonl: line 2: .*; remove this line"):
        list(read_lines(path))
