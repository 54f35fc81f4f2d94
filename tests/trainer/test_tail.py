"""The end of a step: one norm, gradients as one tensor, and the same weights as DeepSpeed makes."""

import json

import pytest
import torch

from tests.trainer.launch import ROOT, finish, launcher
from trainer.tail import flat_gradient


def test_gradients_are_flattened_converted_and_padded_in_one_go():
    parts = [torch.randn(3, 2, dtype=torch.bfloat16), torch.randn(5, dtype=torch.bfloat16)]
    flat = flat_gradient(parts, torch.full((13,), torch.nan))
    assert flat.dtype == torch.float32 and not flat[11:].any()
    assert torch.equal(flat[:11], torch.cat([part.flatten() for part in parts]).float())
    one = torch.randn(2, 2)
    assert flat_gradient([one], torch.empty(4)).data_ptr() == one.data_ptr()


@pytest.mark.process
@pytest.mark.parametrize(("stage", "processes"), [(1, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("lower", [False, True])
def test_a_step_ends_as_deepspeed_ends_it_without_waiting(hopper, tmp_path, stage, processes, lower):
    config = {"zero_optimization": {"stage": stage}, "zero_allow_untested_optimizer": True}
    path = tmp_path / ("bf16.json" if lower else "float.json")
    path.write_text(json.dumps(config | ({"bf16": {"enabled": True}} if lower else {})))
    script = [str(ROOT / "tests" / "trainer" / "tail.py"), str(hopper), str(path)]
    done = finish([*launcher(processes), *script])
    assert done.stdout.count("the same end of a step") == processes, done.stdout + done.stderr
