"""The estimate of a run against live tensors of real engines, and against figures worked out by hand."""

import json
import os
import sys
from dataclasses import replace

import pytest

from schemas.vocabulary import DISJOINT
from tests.trainer.launch import finish, launcher
from tests.trainer.memory import CONFIG, SEQUENCES
from trainer.dry_run import activations, estimate, head_bytes
from trainer.model import PRESETS
from trainer.recipes import RECIPES


def measured(data, deepspeed, processes=2) -> dict:
    done = finish([*launcher(processes), "tests/trainer/memory.py", ",".join(map(str, data)), deepspeed])
    assert done.returncode == 0, done.stdout + done.stderr
    line = next(line for line in done.stdout.splitlines() if "measured {" in line)
    return json.loads(line[line.index("{") :])


@pytest.mark.parametrize("name", ["zero0_cpu", "zero1_cpu", "zero2", "zero3_cpu"])
@pytest.mark.process
def test_memory_is_what_an_engine_holds(hopper, pong, name):
    found = measured([hopper, pong], name)
    config = replace(CONFIG, deepspeed=name)
    memory = estimate(config, DISJOINT, 2).memory[name[4]]
    for kind in ("parameters", "gradients", "optimiser"):
        assert getattr(memory, kind) == pytest.approx(found[kind], rel=0.03), (kind, found)
    e = 4 if name.endswith("_cpu") else 2
    live = activations(config.model, SEQUENCES, 120, found["patches"], found["supervised"], e, found["masked"])
    rows = head_bytes(replace(config.loss, chunk=1), DISJOINT, config.model.width, 1, e, text=False)
    assert found["patches"] > 0
    assert live + rows == pytest.approx(found["activations"], rel=0.15), (live, rows, found)


def test_figures_of_the_papers_run():
    found = estimate(RECIPES["1.18b"], DISJOINT, 8)
    assert found.counts["total"] == 1_283_053_856 and found.tokens_per_step == 512 * 1024
    assert found.required_rate() == pytest.approx(512 * 1024 * 1e6 / (4 * 86400))
    assert found.days(1e5) == pytest.approx(512 * 1024 * 1e6 / 1e5 / 86400)
    assert found.flops_per_token == pytest.approx(8.27e9, rel=0.01)
    assert found.memory["1"].optimiser == pytest.approx(12 * found.counts["total"] / 8, rel=1e-6)
    assert found.memory["3"].device < found.memory["2"].device <= found.memory["1"].device < found.memory["0"].device
    assert found.memory["3 + offload"].device < found.memory["3"].device
    assert all(estimate(replace(RECIPES["1.18b"], model=PRESETS[p]), DISJOINT, 1).counts["total"] for p in PRESETS)


@pytest.mark.process
def test_the_command_needs_no_process_group():
    arguments = [sys.executable, "trainer/main.py", "--dry-run", "--recipe", "364m", "--world", "4", "--tflops", "100"]
    done = finish(arguments, env=os.environ | {"COLUMNS": "160"})
    assert done.returncode == 0, done.stderr
    assert all(words in done.stdout for words in ("396,030,240", "3 + offload", "not measured", "of 100 TFLOP/s"))
