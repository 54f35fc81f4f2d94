"""AdamW, with Muon for the matrices between hidden vectors: one optimiser whose states have AdamW's names.

    gradient -> momentum (`exp_avg`) -> nearest semi-orthogonal matrix -> step of a rate of its own

Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) is not in the paper. Tables, norms, the patch embedder's
first convolution and everything else stay with AdamW, whose `exp_avg_sq` is kept for all, zero where Muon steps, so
that checkpoints know one form.

Invariant: a matrix is updated as one, so parameters must not be partitioned (ZeRO 0).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from trainer.config import OptimiserConfig

MOMENTUM = 0.95
# of x, x^3 and x^5: five turns bring singular values from (0, 1] near 1, quickly rather than exactly (see there)
QUINTIC = (3.4445, -4.7750, 2.0315)
TURNS = 5


def orthogonalised(matrix: Tensor) -> Tensor:
    """About U V^T of matrix (m, n) = U S V^T, by Newton-Schulz iterations in the matrix's own type."""
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / (x.norm() + 1e-7)
    a, b, c = QUINTIC
    for _ in range(TURNS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """What Muon is for: the matrices of the blocks and, but for the first, of the patch embedder, a convolution's
    kernel as (out, rest). Under AdamW the embedder's wide last one outgrows what differs between patches."""
    inner = ("blocks.", "patches.conv", "patches.skip", "patches.out")
    return [p for name, p in model.named_parameters() if name.startswith(inner) and p.ndim >= 2]


class MuonAdamW(torch.optim.AdamW):
    """AdamW whose groups with `muon` > 0 step by Muon, at `muon` times their rate."""

    def __init__(self, groups: list[dict[str, Any]], **settings: Any):
        super().__init__([{"muon": 0.0} | group for group in groups], **settings)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["muon"]]
        try:
            result = super().step(closure)
        finally:
            self.param_groups = groups
        for group in groups:
            for p in group["params"] if group["muon"] else ():
                if p.grad is not None:
                    self._step(p, group["muon"] * group["lr"], group["weight_decay"])
        return result

    def _step(self, p: Tensor, rate: float, weight_decay: float) -> None:
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            state |= {key: torch.zeros_like(p) for key in ("exp_avg", "exp_avg_sq")}
        assert p.grad is not None
        state["step"] += 1
        momentum = state["exp_avg"].lerp_(p.grad, 1 - MOMENTUM)
        update = orthogonalised(p.grad.lerp(momentum, MOMENTUM).flatten(1))  # Nesterov's form
        p.mul_(1 - rate * weight_decay)
        p.add_(update.view_as(p), alpha=-rate * max(1.0, update.shape[0] / update.shape[1]) ** 0.5)


def make_optimiser(model: nn.Module, config: OptimiserConfig) -> torch.optim.AdamW:
    """The optimiser of an OptimiserConfig. Weight decay on matrices and tables, not on norms and biases."""
    matrices = hidden_matrices(model) if config.matrices == "muon" else []
    theirs = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in theirs]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    settings: dict[str, Any] = {"lr": config.start_lr, "betas": (config.beta_1, config.beta_2), "eps": config.epsilon}
    if not matrices:
        return torch.optim.AdamW(groups, **settings, fused=True)
    groups.append(
        {"params": matrices, "weight_decay": config.weight_decay, "muon": config.muon_peak_lr / config.peak_lr}
    )
    return MuonAdamW(groups, **settings, fused=True)
