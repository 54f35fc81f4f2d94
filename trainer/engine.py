"""All of DeepSpeed but the states: start-up, one training step, weights for export.

Model and loss know nothing of ranks. The loss of a step is the mean over all
supervised tokens of the global batch, whatever rank they fell on, so it is the
same function at any world size. A step whose gradients are not finite changes nothing.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from shards.batch import Batch
from shards.sampler import random
from trainer import states
from trainer.config import OptimiserConfig, TrainConfig
from trainer.loss import Objective
from trainer.model import Gato, ModelConfig
from trainer.optimiser import make_optimiser

CONFIGS = Path(__file__).resolve().parent.parent / "deepspeed_configs"


def learning_rate(step: int, config: OptimiserConfig) -> float:
    """Linear warm-up, then cosine to a share of the peak (paper, appendix D), or the peak. `step` counts from 0."""
    if step < config.warmup_steps:
        return config.start_lr + (config.peak_lr - config.start_lr) * step / config.warmup_steps
    if config.schedule == "constant":
        return config.peak_lr
    span = max(1, config.decay_steps - config.warmup_steps)
    done = min(1.0, (step - config.warmup_steps) / span)
    floor = config.final_lr_share * config.peak_lr
    return floor + (config.peak_lr - floor) * 0.5 * (1.0 + math.cos(math.pi * done))


def start(local_rank: int, patience_minutes: float) -> torch.device:
    """Join the process group and choose the device. Call once a process, before anything else here. Ranks that wait
    for another longer than `patience_minutes` (0: half an hour) give up."""
    if not {"RANK", "OMPI_COMM_WORLD_RANK"} & set(os.environ):
        raise ValueError("a training is started by its launcher: deepspeed trainer/main.py ...")
    device = torch.device("cpu")
    if torch.cuda.is_available():
        local_rank = int(os.environ.get("LOCAL_RANK", max(local_rank, 0)))
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        local_world = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1")))
        if not os.environ.get("OMP_NUM_THREADS"):
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // max(1, local_world)))
        # Serves inference only, and would compile for half a minute on every CPU.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend, timeout = "nccl" if device.type == "cuda" else "gloo", timedelta(minutes=patience_minutes or 30)
    deepspeed.init_distributed(dist_backend=backend, timeout=timeout, verbose=False)
    return device


def agreed(make: Callable[[], Any]) -> Any:
    """What `make` gives on rank 0, on every rank; its ValueError or OSError too. Collective."""
    told: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            told[0] = make()
        except (ValueError, OSError) as error:
            told[1] = error
    dist.broadcast_object_list(told)
    if told[1] is not None:
        raise told[1]
    return told[0]


@dataclass(frozen=True)
class StepResult:
    """Of one optimiser step over the global batch: mean loss, supervised tokens, gradient norm before clipping;
    whether it was applied, or skipped since its gradients are not finite."""

    loss: float
    supervised: int
    gradient_norm: float
    applied: bool
    stop_requested: bool


class Engine:
    """A model under DeepSpeed. `continuous`, `text`: see `Objective`."""

    def __init__(self, model: Gato, config: TrainConfig, device: torch.device, continuous: list[bool], text: bool):
        self.config, self.device = config, device
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        body = zero_config(config, self.world)
        optimiser = make_optimiser(model, config.optimiser)
        objective = Objective(model, config.loss, continuous, text)
        prepare_blocks(model, config.compile, config.activation_checkpointing)
        self.engine, self.optimiser, _, _ = deepspeed.initialize(model=objective, optimizer=optimiser, config=body)
        if self.engine.zero_optimization_partition_weights():
            # the head is the embedding table, used outside the module that owns it
            deepspeed.zero.register_external_parameter(objective, model.tokens.weight)
        self.stage: int = self.engine.zero_optimization_stage()
        if self.stage in (1, 2):
            self.optimiser.check_grad_overflow = True  # which DeepSpeed does in float16 and bfloat16 only
        states.allocate(self.engine)

    def train_step(self, step: int, batches: list[Batch], stop: bool) -> StepResult:
        """One optimiser step on this rank's micro-batches. `stop`: this rank was asked to end; the result
        says whether any rank was."""
        counted = sum(len(batch.chosen) for batch in batches)
        totals = torch.tensor([counted, float(stop)], dtype=torch.float64, device=self.device)
        dist.all_reduce(totals)
        supervised = max(1, int(totals[0]))
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate(step, self.config.optimiser)
        summed = torch.zeros((), dtype=torch.float64, device=self.device)
        self.engine.train()
        for batch in batches:
            loss = self.loss(batch)
            summed += loss.detach()
            # DeepSpeed divides by world size and by accumulation steps; the mean is over tokens.
            self.engine.backward(loss * (self.world * len(batches) / supervised))
            norm = self._clip() if self.engine.is_gradient_accumulation_boundary() else None
            self.engine.step()
        dist.all_reduce(summed)
        norm = float(self.engine.get_global_grad_norm() if norm is None else norm)
        loss_ = float(summed) / supervised
        return StepResult(loss_, supervised, norm, math.isfinite(norm), bool(totals[1]))

    def _clip(self) -> float | None:
        """Norm of the reduced gradients, which are then clipped, at ZeRO 0, where DeepSpeed does not tell it; where
        it is not finite they are dropped, and an optimiser without gradients changes nothing."""
        if self.stage > 0:
            return None
        parameters = [p for p in self.gato.parameters() if p.grad is not None]
        total = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        norm, limit = float(total), self.config.optimiser.gradient_clip
        if not math.isfinite(norm):
            for parameter in parameters:
                parameter.grad = None
        elif limit > 0:
            torch.nn.utils.clip_grads_with_norm_(parameters, limit, total)
        return norm

    def loss(self, batch: Batch) -> torch.Tensor:
        """Summed cross-entropy of the targets of a micro-batch, which is the loader's, in the host's memory."""
        keep = branch_scales(batch.sequence, self.config.model, self.config.seed)
        return self.engine(batch.to(self.device), None if keep is None else keep.to(self.device, non_blocking=True))

    @property
    def gato(self) -> Gato:
        """The bare model, for evaluation between steps."""
        return self.engine.module.gato

    def tensors(self) -> dict[str, torch.Tensor]:
        """This rank's share of weights and optimiser states, by name, see trainer/states.py. Collective."""
        return states.collect(self.engine, self.gato, states.share(self.gato, self.rank, self.world))

    def restore(self, read: Callable[[str], torch.Tensor], applied: int) -> None:
        """Weights and optimiser states by name, as `tensors` of any ranks gave them, behind `applied` steps."""
        states.restore(self.engine, self.gato, read, applied)

    @property
    def applied(self) -> int:
        """Optimiser steps that were applied."""
        return states.steps(self.engine)

    def gathered(self) -> Any:
        """Context in which the whole weights are at hand on every rank; collective under ZeRO 3."""
        whole = self.engine.zero_optimization_partition_weights()
        return deepspeed.zero.GatheredParameters(list(self.gato.parameters()), enabled=whole)

    def whole_model(self) -> Gato:
        """The model for evaluation: itself, or under ZeRO 3 a copy, since there its layers let go of their weights
        after each use. Collective under ZeRO 3."""
        if not self.engine.zero_optimization_partition_weights():
            return self.gato
        copy = Gato(self.config.model, self.gato.vocabulary).to(self.device)
        with self.gathered():
            copy.load_state_dict({name: value.detach().clone() for name, value in self.gato.state_dict().items()})
        return copy

    def weights(self) -> dict[str, torch.Tensor] | None:
        """Full float32 weights on rank 0, None elsewhere. Collective."""
        wanted = {name for name, _ in self.gato.named_parameters()} if self.rank == 0 else set()
        found = states.collect(self.engine, self.gato, wanted, (states.WEIGHT,))
        return {key.rpartition("/")[0]: value for key, value in found.items()} if self.rank == 0 else None


def branch_scales(sequence: Any, model: ModelConfig, seed: int) -> torch.Tensor | None:
    """Scales of the residual branches, float32 (B, blocks, 2, 1), or (B, blocks, 2, W) with dropout; None with neither.
    0 for a branch that stochastic depth skips (paper, appendix D) or a channel that dropout does (appendix E), else
    the reciprocal of the probability to stay. A function of seed and sequence number alone."""
    scales = None
    for name, probability, shape in (
        ("depth", model.stochastic_depth, (model.blocks, 2, 1)),
        ("dropout", model.dropout, (model.blocks, 2, model.width)),
    ):
        if probability:
            draws = np.stack([random(seed, name, int(i)).random(shape) for i in sequence])
            kept = ((draws >= probability) / (1.0 - probability)).astype(np.float32)
            scales = kept if scales is None else scales * kept
    return None if scales is None else torch.from_numpy(scales)


def prepare_blocks(model: Gato, compile: bool, activation_checkpointing: bool) -> None:
    """Compile the blocks, and let their inner activations go until the backward pass; names of weights stay."""
    if compile:  # with and without mask, places chosen, branches scaled, gradients; beyond it, blocks would run plain
        torch._dynamo.config.recompile_limit = 64
    for number, block in enumerate(model.blocks):
        if compile:
            # the last one's feed-forward sees another number of places in every batch
            block.compile(dynamic=None if number == len(model.blocks) - 1 else False)
        if activation_checkpointing:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def zero_config(config: TrainConfig, world: int) -> dict[str, Any]:
    """The DeepSpeed configuration of a run of `world` processes: its file, and what the run's own settings say.
    ValueError where they do not go together."""
    body, data = read_config(config.deepspeed), config.data
    stage = body.get("zero_optimization", {}).get("stage", 0)
    if config.compile and stage == 3:
        raise ValueError("--compile does not go with ZeRO 3, whose layers fetch their weights while they run")
    if stage and config.optimiser.matrices == "muon":
        raise ValueError("--optimiser.matrices muon updates whole matrices, which ZeRO 1 to 3 cut up; "
                         "use adamw, or a configuration of stage 0 such as --deepspeed zero0_cpu")  # fmt: skip
    if stage and config.optimiser.bins == "smooth":
        raise ValueError("--optimiser.bins smooth moves rows of the table together, which ZeRO 1 to 3 cut up; "
                         "use rows, or a configuration of stage 0 such as --deepspeed zero0_cpu")  # fmt: skip
    ours = {
        "train_batch_size": (data.global_batch, "--data.global-batch"),
        "train_micro_batch_size_per_gpu": (data.micro_batch, "--data.micro-batch"),
        "gradient_accumulation_steps": (data.global_batch // (world * data.micro_batch), "--data.micro-batch"),
        "gradient_clipping": (config.optimiser.gradient_clip, "--optimiser.gradient-clip"),
        "optimizer": (None, "--optimiser.*"),
        "scheduler": (None, "--optimiser.*"),
    }
    for key, (value, setting) in ours.items():
        if body.pop(key, "auto") not in ("auto", value):
            raise ValueError(f"{config.deepspeed}: field '{key}' is for {setting} to say; remove it from the file")
        if value is not None:
            body[key] = value
    if not stage:
        body["gradient_clipping"] = 0.0  # see `Engine._clip`
    return {"steps_per_print": 10**9} | body


def read_config(name: str) -> dict[str, Any]:
    """A DeepSpeed configuration by name or path; ValueError lists the names."""
    path = Path(name) if name.endswith(".json") else CONFIGS / f"{name}.json"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in CONFIGS.glob("*.json")))
        raise ValueError(f"no DeepSpeed configuration '{name}'; known: {known}, or give a path to a .json file")
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); correct it, or name one of {CONFIGS}") from None
