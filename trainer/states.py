"""Weights and optimiser states as complete float32 tensors by name, whatever the ZeRO stage and world size.

    engine (stage 0: plain tensors; 1, 2: slices of flat buffers; 3: partitions) -> "blocks.0.norm_1.weight/exp_avg" ...

A checkpoint is independent of the number of ranks and the ZeRO stage that saved it: any number of ranks at any stage
can load it, bit for bit. DeepSpeed's own files cannot do that (stages 1 to 3 refuse another world size), and they are
pickles.

Invariant: these functions are collective (every rank calls them), and assemble one parameter at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's
WEIGHT = "weight"
KINDS = (WEIGHT, *MOMENTS)


@dataclass(frozen=True)
class PartitionedAccess:
    """How to read and write a partitioned parameter as one complete float32 tensor: DeepSpeed's functions, which
    trainer/engine.py supplies. `get_state` and `set_state` take a moment's name too."""

    get_weight: Callable[[Tensor], Tensor]
    get_state: Callable[[Tensor, str], Tensor]
    set_weight: Callable[[Tensor, Tensor], None]
    set_state: Callable[[Tensor, Tensor, str], None]


def master_weights(engine: Any) -> list[Tensor]:
    """The float32 tensors that the optimiser updates: the parameters, or at ZeRO 1 to 3 this rank's flat buffers."""
    stage = engine.zero_optimization_stage()
    if stage == 0:
        return [p for group in engine.optimizer.param_groups for p in group["params"]]
    zero = engine.optimizer
    return list(zero.fp32_partitioned_groups_flat if stage == 3 else zero.single_partition_of_fp32_groups)


def base_optimiser(engine: Any) -> torch.optim.Optimizer:
    """The torch optimiser inside ZeRO's wrapper."""
    return engine.optimizer if engine.zero_optimization_stage() == 0 else engine.optimizer.optimizer


def allocate_optimiser_states(engine: Any) -> None:
    """Create AdamW's states as they are before the first step. torch creates them during that step, which is too late
    to load a checkpoint into them."""
    optimiser = base_optimiser(engine)
    fused = bool(optimiser.defaults.get("fused"))
    for master in master_weights(engine):
        state = optimiser.state[master]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=master.device if fused else "cpu")
            state |= {key: torch.zeros_like(master, memory_format=torch.preserve_format) for key in MOMENTS}
    if engine.zero_optimization_stage() in (1, 2):
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def applied_steps(engine: Any) -> int:
    """Number of optimiser steps that were applied."""
    optimiser = base_optimiser(engine)
    return max(int(optimiser.state[master]["step"]) for master in master_weights(engine))


def parameters_of_rank(model: nn.Module, rank: int, world: int) -> set[str]:
    """Names of the parameters whose tensors `rank` saves. Each parameter belongs to one rank; all ranks save about as
    many bytes."""
    parameters = list(model.named_parameters())
    sizes = [getattr(p, "ds_numel", p.numel()) for _, p in parameters]  # under ZeRO 3 a parameter at rest is empty
    total, before, own = sum(sizes), 0, set()
    for (name, _), size in zip(parameters, sizes):
        if (before + size // 2) * world // total == rank:
            own.add(name)
        before += size
    return own


def gather(
    engine: Any,
    access: PartitionedAccess,
    model: nn.Module,
    wanted: set[str],
    kinds: tuple[str, ...] = (WEIGHT, *MOMENTS),
) -> dict[str, Tensor]:
    """Complete float32 tensors of the parameters `wanted`, on the CPU, by name: NAME/weight, NAME/exp_avg,
    NAME/exp_avg_sq. Collective."""
    found: dict[str, Tensor] = {}
    unpartitioned = engine.zero_optimization_stage() == 0
    for name, parameter in model.named_parameters():
        for kind in kinds:
            if unpartitioned:
                value = parameter.data if kind == WEIGHT else engine.optimizer.state[parameter][kind]
            elif kind == WEIGHT:
                value = access.get_weight(parameter)
            else:
                value = access.get_state(parameter, kind)
            if name in wanted:
                found[f"{name}/{kind}"] = value.detach().float().cpu().contiguous()
    return found


def restore(engine: Any, access: PartitionedAccess, model: nn.Module, read: Callable[[str], Tensor], step: int) -> None:
    """Inverse of `gather`: set the float32 master weights and the optimiser's states, `read` by name, and its count of
    applied steps. The weights that the model computes with must be loaded before the engine is created."""
    optimiser, unpartitioned = base_optimiser(engine), engine.zero_optimization_stage() == 0
    for name, parameter in model.named_parameters():
        for kind in KINDS:
            value = read(f"{name}/{kind}")
            if unpartitioned:
                (parameter.data if kind == WEIGHT else optimiser.state[parameter][kind]).copy_(value)
            elif kind == WEIGHT:
                access.set_weight(parameter, value)
            else:
                access.set_state(parameter, value, kind)
    for master in master_weights(engine):
        optimiser.state[master]["step"].fill_(step)
