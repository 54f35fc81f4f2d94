"""Muon beside torch's own, and in runs."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import nn

from schemas.vocabulary import DISJOINT
from tests.trainer.launch import errors, losses, train
from trainer.config import OptimiserConfig
from trainer.engine import zero_config
from trainer.model import Gato, ModelConfig
from trainer.optimiser import hidden_matrices, make_optimiser, orthogonalised, smooth_functions
from trainer.recipes import RECIPES

MUON = ("--optimiser.matrices", "muon")


@pytest.mark.parametrize("shape", [(12, 40), (40, 12), (16, 16)])
def test_orthogonalised_has_the_singular_vectors_and_about_equal_values(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    values = u.T @ orthogonalised(matrix) @ v.T
    assert values.diagonal().min() > 0.6 and values.diagonal().max() < 1.3
    assert (values - values.diagonal().diag()).abs().max() < 1e-4


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.table = nn.Embedding(9, 8)
        self.blocks = nn.ModuleList([nn.Linear(8, 24, bias=False), nn.LayerNorm(24), nn.Linear(24, 3, bias=False)])

    def forward(self, x):
        for block in self.blocks:
            x = block(x) if x.dtype.is_floating_point else block(self.table(x))
        return x


def test_muon_steps_as_torchs_does_and_the_rest_as_adamw():
    config = OptimiserConfig(matrices="muon", peak_lr=1e-3, start_lr=1e-3)
    ours, theirs = Net(), Net()
    matrices = hidden_matrices(theirs)
    rest = [p for p in theirs.parameters() if all(p is not matrix for matrix in matrices)]
    assert len(matrices) == 2
    sides = [(ours, [make_optimiser(ours, config)])]
    adamw = torch.optim.AdamW(
        [
            {"params": [p for p in rest if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=1e-3, betas=(0.9, 0.95),
    )  # fmt: skip
    sides.append((theirs, [torch.optim.Muon(matrices, lr=config.muon_peak_lr, weight_decay=0.1), adamw]))
    begun = [p.detach().clone() for p in ours.parameters()]
    for step in range(4):
        inputs = torch.randint(9, (16,), generator=torch.Generator().manual_seed(step))
        for net, optimisers in sides:
            net(inputs).square().sum().backward()
            for optimiser in optimisers:
                optimiser.step()
                optimiser.zero_grad()
    for (name, mine), other, first in zip(ours.named_parameters(), theirs.parameters(), begun):
        moved = (other.detach() - first).norm()
        # torch iterates in bfloat16, of eight bits
        assert moved > 0 and (mine.detach() - other.detach()).norm() < 0.1 * moved, name


def test_muon_takes_hidden_matrices_and_turns_kernels_into_them():
    model = Gato(ModelConfig(blocks=1, heads=2, width=32, feed_forward=64, head_size=16, patch_channels=16), DISJOINT)
    found = {name for name, p in model.named_parameters() if any(p is one for one in hidden_matrices(model))}
    patches = {f"patches.{name}.weight" for name in ("conv_1", "conv_2", "skip", "out")}
    assert patches < found and all(name.startswith("blocks.0.") for name in found - patches)
    optimiser = make_optimiser(model, OptimiserConfig(matrices="muon", peak_lr=1.0, start_lr=1.0, muon_peak_lr=1.0))
    kernel = model.patches.conv_1.weight
    before, kernel.grad = kernel.detach().clone(), torch.randn(kernel.shape, generator=torch.Generator().manual_seed(0))
    optimiser.step()
    values = torch.linalg.svdvals((before * 0.9 - kernel.detach()).flatten(1))
    assert values.min() > 0.6 and values.max() < 1.3


@pytest.mark.process
def test_muon_resumes_bit_for_bit_at_any_world_size_and_refuses_cut_up_matrices(hopper, tmp_path):
    train(tmp_path / "whole", [hopper], *MUON, processes=2)
    train(tmp_path / "parts", [hopper], *MUON, processes=2, steps=4)
    assert "resuming at step 4" in train(tmp_path / "parts", [hopper], *MUON, processes=2).stdout
    train(tmp_path / "one", [hopper], *MUON)
    train(tmp_path / "adamw", [hopper])
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts") != losses(tmp_path / "adamw")
    assert losses(tmp_path / "whole") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    whole, parts = (load_file(tmp_path / name / "export" / "weights.safetensors") for name in ("whole", "parts"))
    assert all(np.array_equal(whole[name], parts[name]) for name in whole)
    refused = train(tmp_path / "cut", [hopper], *MUON, "--deepspeed", "zero1_cpu", check=False)
    assert refused.returncode and "matrices" in errors(refused)[0]
    with pytest.raises(ValueError, match="--optimiser.matrices muon"):  # a dry run asks for the same
        zero_config(replace(RECIPES["tiny"], deepspeed="zero1"), 1)


def test_smooth_bins_move_along_their_functions_and_the_rest_as_with_adamw():
    model = Gato(ModelConfig(blocks=1, heads=2, width=32, feed_forward=64, head_size=16, patch_channels=16), DISJOINT)
    table, config = model.initialise(0).tokens.weight, OptimiserConfig(bins="smooth", peak_lr=1e-2, start_lr=1e-2)
    before, optimiser = table.detach().clone(), make_optimiser(model, config)
    gradient = torch.zeros_like(table)
    gradient[33024 + 300] = 1.0  # of one bin of an action
    gradient[34048] = -1.0  # the separator's
    for _ in range(2):
        table.grad = gradient.clone()
        optimiser.step()
    moved = (table.detach() - before * 0.999**2)[33024:34048]
    functions, moved = smooth_functions(1024).double(), moved.double()
    along = functions @ torch.linalg.lstsq(functions, moved).solution
    assert (moved - along).norm() < 0.05 * along.norm()  # the remainder is the own bin's
    assert moved[290:311].mean() < -0.02 and moved[300].mean() < moved[[298, 302]].mean()  # its neighbours follow
    assert torch.equal(table[:32000], before[:32000]) and torch.equal(table[34049:], before[34049:])
    assert torch.allclose(table[34048], before[34048] * 0.999**2 + 0.02, atol=1e-4)
    gradient[5] = 1.0  # of a piece of text
    table.grad = gradient
    optimiser.step()
    assert (table[5] < before[5]).all()


@pytest.mark.process
def test_smooth_bins_resume_bit_for_bit(hopper, tmp_path):
    smooth = ("--optimiser.bins", "smooth", "--model.sequence", "timesteps", *MUON)
    train(tmp_path / "whole", [hopper], *smooth)
    train(tmp_path / "parts", [hopper], *smooth, steps=4)
    train(tmp_path / "parts", [hopper], *smooth)
    whole, parts = (load_file(tmp_path / name / "export" / "weights.safetensors") for name in ("whole", "parts"))
    assert all(np.array_equal(whole[name], parts[name]) for name in whole)
    refused = train(tmp_path / "cut", [hopper], "--optimiser.bins", "smooth", "--deepspeed", "zero1_cpu", check=False)
    assert refused.returncode and "smooth" in errors(refused)[0]
