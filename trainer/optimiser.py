"""AdamW, with Muon for the matrices between hidden vectors: one optimiser whose states have AdamW's names.

    gradient -> momentum (`exp_avg`) -> nearest semi-orthogonal matrix -> step of a rate of its own

    gradient of a range of bins -> coefficients of smooth functions of the bin -> AdamW's step -> back to all its rows

Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) is not in the paper. Tables, norms, the patch embedder's
first convolution and everything else stay with AdamW, whose `exp_avg_sq` is kept for all, zero where Muon steps, so
that checkpoints know one form.

With `bins` smooth (ours) the table's rows of continuous values move together: a step is one of AdamW for the 35
coefficients of fixed functions of the bin's centre, so that a bin learns from all others near it, plus a tenth of a
step of each row's own. The table itself is plain at any time. The coefficients' moments are kept in rows that no id
has, after the vocabulary's.

Invariant: a matrix is updated as one, so parameters must not be partitioned (ZeRO 0).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from schemas.vocabulary import bin_centres
from trainer.config import OptimiserConfig
from trainer.model import Gato

MOMENTUM = 0.95
REMAINDER = 0.1  # of a step, of what a bin's row learns by itself where bins move smoothly
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


def smooth_functions(bins: int) -> Tensor:
    """Fixed functions of a bin's centre c, float32 (bins, 35), of mean norm 1: 1, c, c^2, sines and cosines of periods
    from twice the range down to a 32nd of it."""
    c = torch.as_tensor(bin_centres(bins))[:, None]
    waves = c * torch.logspace(-1, 5, 16, base=2.0, dtype=torch.float64) * math.pi
    functions = torch.cat([c**0, c, c**2, waves.sin(), waves.cos()], dim=1)
    return (functions / functions.norm(dim=1).mean()).float()


def hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """Parameters for Muon: the matrices of the blocks, the gates and, but for the first, the patch embedder, a
    convolution's kernel as (out, rest). Under AdamW the embedder's wide last one outgrows what differs between patches.
    """
    inner = ("blocks.", "gates.1", "patches.conv", "patches.skip", "patches.out")
    return [p for name, p in model.named_parameters() if name.startswith(inner) and p.ndim >= 2]


class MuonAdamW(torch.optim.AdamW):
    """AdamW whose groups with `muon` > 0 step by Muon, at `muon` times their rate, and whose groups with ranges `bins`
    are tables of bins that move smoothly."""

    def __init__(self, groups: list[dict[str, Any]], **settings: Any):
        super().__init__([{"muon": 0.0, "bins": ()} | group for group in groups], **settings)
        self.functions: dict[int, Tensor] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["muon"] and not group["bins"]]
        try:
            result = super().step(closure)
        finally:
            self.param_groups = groups
        for group in groups:
            for p in group["params"] if group["muon"] else ():
                if p.grad is not None:
                    self._step(p, group["muon"] * group["lr"], group["weight_decay"])
            for p in group["params"] if group["bins"] else ():
                if p.grad is not None:
                    self._step_table(p, group)
        return result

    def _state(self, p: Tensor) -> dict[str, Tensor]:
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            state |= {key: torch.zeros_like(p) for key in ("exp_avg", "exp_avg_sq")}
        return state

    def _step_table(self, p: Tensor, group: dict[str, Any]) -> None:
        """Ranges of bins by their functions and a little by themselves; rows after them by themselves; those before,
        mostly text, only where they have a gradient."""
        state, gradient = self._state(p), p.grad
        assert gradient is not None
        state["step"] += 1
        first, stop, spare = group["bins"][0][0], group["rows"], group["rows"]
        p[first:stop].mul_(1 - group["lr"] * group["weight_decay"])
        for start, size in group["bins"]:
            if size not in self.functions:
                self.functions[size] = smooth_functions(size).to(p)
            functions = self.functions[size]
            count, rows = functions.shape[1], slice(start, start + size)
            step = self._adam(state, slice(spare, spare + count), functions.T @ gradient[rows], group)
            p[rows].addmm_(functions, step, alpha=-group["lr"])
            p[rows].add_(self._adam(state, rows, gradient[rows], group), alpha=-REMAINDER * group["lr"])
            spare += count
        after = slice(start + size, stop)
        p[after].add_(self._adam(state, after, gradient[after], group), alpha=-group["lr"])
        if gradient[:first].norm():
            p[:first].mul_(1 - group["lr"] * group["weight_decay"])
            p[:first].add_(self._adam(state, slice(first), gradient[:first], group), alpha=-group["lr"])

    def _adam(self, state: dict[str, Tensor], rows: slice, gradient: Tensor, group: dict[str, Any]) -> Tensor:
        """Adam's direction for a gradient whose moments lie in `rows` of the state."""
        (beta_1, beta_2), step = group["betas"], state["step"]
        mean = state["exp_avg"][rows].lerp_(gradient, 1 - beta_1)
        square = state["exp_avg_sq"][rows].lerp_(gradient.square(), 1 - beta_2)
        root = (square / (1 - beta_2**step)).sqrt_().add_(group["eps"])
        return mean / (1 - beta_1**step) / root

    def _step(self, p: Tensor, rate: float, weight_decay: float) -> None:
        state = self._state(p)
        assert p.grad is not None
        state["step"] += 1
        momentum = state["exp_avg"].lerp_(p.grad, 1 - MOMENTUM)
        update = orthogonalised(p.grad.lerp(momentum, MOMENTUM).flatten(1))  # Nesterov's form
        p.mul_(1 - rate * weight_decay)
        p.add_(update.view_as(p), alpha=-rate * max(1.0, update.shape[0] / update.shape[1]) ** 0.5)


def make_optimiser(model: nn.Module, config: OptimiserConfig) -> torch.optim.AdamW:
    """The optimiser of an OptimiserConfig. Weight decay on matrices and tables, not on norms and biases."""
    matrices = hidden_matrices(model) if config.matrices == "muon" else []
    tables: list[Tensor] = []
    if config.bins == "smooth":
        assert isinstance(model, Gato)
        tables, ids = [model.tokens.weight], model.vocabulary
    theirs = {id(p) for p in (*matrices, *tables)}
    rest = [p for p in model.parameters() if id(p) not in theirs]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    settings: dict[str, Any] = {"lr": config.start_lr, "betas": (config.beta_1, config.beta_2), "eps": config.epsilon}
    if not matrices and not tables:
        return torch.optim.AdamW(groups, **settings, fused=True)
    muon = config.muon_peak_lr / config.peak_lr
    if matrices:
        groups.append({"params": matrices, "weight_decay": config.weight_decay, "muon": muon})
    if tables:
        bins = sorted({(r.start, r.size) for r in (ids.observation_continuous, ids.action_continuous)})
        groups.append({"params": tables, "weight_decay": config.weight_decay, "bins": tuple(bins), "rows": ids.size})
    return MuonAdamW(groups, **settings, fused=True)
