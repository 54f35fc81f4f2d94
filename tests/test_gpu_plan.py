"""`benchmarks.gpu`: what counts as measured, what fits the time, what the tables say; what travels."""

import json
import sys
import tarfile
import time

import pytest

from benchmarks import carry, gpu
from benchmarks.gpu import FIGURES, Part, Worker, attention_of, done, known, plan, rehearsal, sorted_out
from benchmarks.gpu_control import CACHE_GIGABYTES, agent_of, fits
from benchmarks.gpu_results import RATE, tokens_per_second, training
from benchmarks.gpu_tables import written
from eval.provenance import NOTED, commit
from schemas.dataset import DatasetError
from shards.reader import Dataset
from trainer.model import PRESETS, Gato
from trainer.model.presets import ModelConfig

HERE = {"hardware": "H100", "data": ["a"]}
INSTALL = 15


def test_only_what_was_measured_here_on_these_data_is_kept(tmp_path, capsys):
    path = tmp_path / FIGURES
    lines = [
        {"part": "checks", "best_tflops": 0.4, "terabytes_per_second": 0.1} | HERE | {"hardware": "a CPU"},
        {"part": "bare loop 79m", "error": "out of memory"} | HERE,
        {"part": "train 79m ZeRO 1", "tokens_per_second": 1.0} | HERE | {"data": ["b"]},
        {"part": "train 364m ZeRO 1", "tokens_per_second": 1.0, "cut": True} | HERE,
        {"part": "checks", "rehearsal": True} | HERE,
        {"part": "control 79m", "error": "x"} | HERE,
        {"part": "control 79m"} | HERE,
    ]
    path.write_text("\n".join(map(json.dumps, lines)) + '\n\n{}\n{"part": "kernels 79m", "hardw')
    assert done(known(path), HERE) == {"control 79m"}
    assert done(known(path), HERE | {"rehearsal": True}) == {"checks"}
    assert capsys.readouterr().err.count("damaged") == 6
    assert done(known(tmp_path / "none"), HERE) == set()


def test_folders_are_told_apart_in_any_order(hopper, pong, tmp_path):
    assert sorted_out([pong, hopper]) == sorted_out([hopper, pong]) == ([str(hopper)], [str(pong)])
    names = [part.name for part in plan([str(hopper)], [str(pong)])]
    assert len(names) == len(set(names)) and "patches 79m" in names
    assert "patches 79m" not in [part.name for part in plan([str(hopper)], [])]
    with pytest.raises(DatasetError):
        sorted_out([tmp_path])


@pytest.mark.parametrize(
    ("minutes", "wanted"),
    [
        (4, ["checks", "train 1.18b ZeRO 1", "control 1.18b", "train 79m ZeRO 1", "GPT-2 1.18b ZeRO 1"]),
        (9, ["train 364m ZeRO 1", "bare loop 1.18b", "train 1.18b ZeRO 2", "train 1.18b ZeRO 3", "control 79m"]),
    ],
)
def test_what_is_wanted_most_fits_the_time(minutes, wanted):
    left, begun = 60 * minutes - INSTALL, []
    for part in plan(["c"], ["a"]):
        if part.seconds <= left:
            begun.append(part.name)
            left -= part.seconds
    assert begun[0] == "checks" and set(wanted) <= set(begun)


def test_a_rehearsal_is_every_part_at_tiny():
    parts = plan(["c"], ["a"])
    small = rehearsal(parts)
    assert [part.name for part in small] == [part.name for part in parts]
    assert {part.size for part in small} == {"tiny"} and all(part.arguments.get("micro", 0) <= 1 for part in small)


SAYS = "import time; print('figures ' + '{\"rate\": 1}', flush=True); "


@pytest.mark.process
@pytest.mark.parametrize(
    ("end", "expected"),
    [
        ("pass", {"rate": 1}),
        ("time.sleep(60)", {"rate": 1, "cut": True}),
        ("raise RuntimeError('no memory')", {"rate": 1}),
    ],
)
def test_a_part_that_is_cut_or_fails_leaves_what_it_had(monkeypatch, end, expected):
    popen = gpu.subprocess.Popen
    script = [sys.executable, "-c", SAYS + end]
    monkeypatch.setattr(gpu.subprocess, "Popen", lambda command, **options: popen(script, **options))
    begun = time.monotonic()
    found = Worker(Part("a", "train", "tiny", [], 1.0)).figures(5.0 if "sleep" in end else 50.0)
    assert time.monotonic() - begun < 50 and {key: found.get(key) for key in expected} == expected
    assert ("no memory" in found.get("error", "")) == ("raise" in end)


def test_later_parts_attend_by_the_kernels_that_the_checks_chose():
    line = {"part": "checks", "hardware": "H100", "attention, 16 heads of 128": {"chosen": "cudnn"}}
    assert attention_of([line], "H100") == "=flash,128=cudnn"
    assert attention_of([line], "a CPU") == attention_of([], "H100") == "=flash"


def test_ratios_are_of_equal_sides_and_both_shares_of_the_peak_are_printed():
    rate = {"tflops": 1.0, "executed_tflops": 0.5, "step_ms": 1.0, "micro_batch": 8, "form": "plain"} | HERE
    rate |= {"mfu": 0.5, "executed_mfu": 0.45}
    found = {"train 79m ZeRO 1": 300.0, "bare loop 79m": 200.0, "GPT-2 79m ZeRO 1": 100.0}
    found |= {"train 79m ZeRO 1, micro-batch 1": 900.0, "train 79m ZeRO 3, offload": 900.0}
    text = written([{"part": name, "tokens_per_second": rate_} | rate for name, rate_ in found.items()])
    rows = {row.split(" | ")[0].lstrip("| "): row.split(" | ") for row in text.splitlines() if row.startswith("| ")}
    assert rows["train 79m ZeRO 1"][5:7] == ["50.0", "45.0"] and rows["train 79m ZeRO 1"][9:11] == ["3.00", "1.50"]
    assert rows["train 79m ZeRO 1, micro-batch 1"][9:11] == rows["train 79m ZeRO 3, offload"][9:11] == ["", ""]
    assert "rehearsal" not in text and "rehearsal" in written([rate | {"part": "checks", "rehearsal": True}])


def test_the_cache_of_many_environments_is_bounded(hopper):
    dataset = Dataset(hopper)
    small = ModelConfig(blocks=2, heads=2, width=32, feed_forward=64, head_size=16, patch_channels=16)
    agent = agent_of("tiny", dataset, 0, Gato(small, dataset.manifest.vocabulary), "plain")
    each = 2 * 2 * 2 * 16 * len(agent.slot) * 4
    assert fits(agent, int(CACHE_GIGABYTES * 1e9) // each) and not fits(agent, int(CACHE_GIGABYTES * 1e9) // each + 1)
    agent.reset(1)
    assert sum(x.numel() * 4 for pair in agent.cache.blocks for x in pair) == each
    assert PRESETS["1.18b"].blocks * 2 * 2048 * 1024 * 2 * 64 < CACHE_GIGABYTES * 1e9


def test_a_copy_without_git_knows_its_commit(tmp_path):
    assert commit(tmp_path) == ""
    (tmp_path / NOTED).parent.mkdir()
    (tmp_path / NOTED).write_text("abc1234\n")
    assert commit(tmp_path) == "abc1234"


def test_what_travels_unpacks_to_the_same_bytes(hopper, tmp_path, monkeypatch):
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    (wheels / "a.whl").write_bytes(b"a")
    size = carry.carry(tmp_path / "carried", [hopper], None, wheels)
    assert size < carry.LIMIT_MB and (tmp_path / "carried" / "commit").is_file()
    with tarfile.open(tmp_path / "carried" / "shards" / "hopper.tar.xz") as file:
        file.extractall(tmp_path / "there", filter="data")
    assert Dataset(tmp_path / "there" / "hopper").manifest.fingerprint == Dataset(hopper).manifest.fingerprint
    monkeypatch.setattr(carry, "LIMIT_MB", 1e-6)
    with pytest.raises(SystemExit, match="may travel"):
        carry.carry(tmp_path / "carried", [hopper], None, wheels)


def test_the_results_run_trains_for_as_long_as_the_machine_allows(tmp_path):
    assert tokens_per_second(tmp_path) == RATE
    line = {"part": "train 79m ZeRO 1", "tokens_per_second": 1e6} | HERE
    (tmp_path / FIGURES).write_text(json.dumps(line) + "\n" + json.dumps(line | {"rehearsal": True}) + "\n")
    assert tokens_per_second(tmp_path) == 1e6
    slow, fast = (
        int(command[command.index("--steps") + 1])
        for command in (training(["x"], tmp_path, 270.0, rate, False) for rate in (RATE, 1e6))
    )
    assert fast == pytest.approx(2 * slow, abs=2) and slow * 64 * 1024 < 270 * RATE
