"""All use of DeepSpeed: start-up, one training step, gathered weights.

    Gato, TrainConfig -> Engine -> train_step(step, micro-batches of this rank) -> StepResult

Model and loss know nothing of ranks.

Invariant: the loss of a step is the mean over all supervised tokens of the global batch, on whichever rank they are, so
it is the same function at any world size. A step whose gradients are not finite changes nothing.
"""

from __future__ import annotations

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
from deepspeed.runtime.config import DeepSpeedConfigError
from deepspeed.runtime.utils import all_gather_dp_groups
from deepspeed.runtime.zero.utils import ZeRORuntimeException
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

from schemas.files import parse_json
from shards.batch import Batch
from shards.sampler import random
from trainer import deepspeed_file, states
from trainer.config import OptimiserConfig, TrainConfig
from trainer.deepspeed_file import CONFIGS, config_names
from trainer.distributed.ranks import complete_environment, on_rank_0
from trainer.loss import Objective, Targets
from trainer.model import Gato, ModelConfig, segments
from trainer.optimiser import make_optimiser
from trainer.tail import Tail

# what DeepSpeed raises for a configuration that it cannot use
REFUSALS = (ValueError, KeyError, TypeError, AttributeError, AssertionError, NotImplementedError, ImportError,
            DeepSpeedConfigError, ZeRORuntimeException)  # fmt: skip
ACCESS = states.PartitionedAccess(
    safe_get_full_fp32_param, safe_get_full_optimizer_state, safe_set_full_fp32_param, safe_set_full_optimizer_state
)


def learning_rate(step: int, config: OptimiserConfig) -> float:
    """Linear warm-up, then cosine decay to a share of the peak (paper, appendix D), or constant. `step` is from 0."""
    if step < config.warmup_steps:
        return config.start_lr + (config.peak_lr - config.start_lr) * step / config.warmup_steps
    if config.schedule == "constant":
        return config.peak_lr
    span = max(1, config.decay_steps - config.warmup_steps)
    done = min(1.0, (step - config.warmup_steps) / span)
    floor = config.final_lr_share * config.peak_lr
    return floor + (config.peak_lr - floor) * 0.5 * (1.0 + math.cos(math.pi * done))


def start(local_rank: int, patience_minutes: float) -> torch.device:
    """Join the process group and choose the device. Call once per process, before anything else here. Ranks that wait
    for another one longer than `patience_minutes` (0: half an hour) give up.

    Raises:
        ValueError: nothing started this process as a rank.
    """
    complete_environment(os.environ)
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ValueError(
            "training needs its launcher: deepspeed trainer/main.py ... in a checkout, or gato-train ... "
            f"(torchrun, mpirun and srun work too); not set: {', '.join(missing)}"
        )
    os.environ.setdefault("LOCAL_RANK", str(max(local_rank, 0)))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    else:
        local_world = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1")))
        if not os.environ.get("OMP_NUM_THREADS"):
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // max(1, local_world)))
        # For inference only; it would compile for half a minute on every CPU.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend, timeout = "nccl" if device.type == "cuda" else "gloo", timedelta(minutes=patience_minutes or 30)
    deepspeed.init_distributed(dist_backend=backend, timeout=timeout, verbose=False, auto_mpi_discovery=False)
    return device


@dataclass(frozen=True)
class StepResult:
    """One optimiser step over the global batch. `loss`: mean, nats per supervised token; `supervised`: number of
    supervised tokens; `gradient_norm`: before clipping; `applied`: False if it was skipped because its gradients are
    not finite; `stop_requested`: whether any rank was asked to end."""

    loss: float
    supervised: int
    gradient_norm: float
    applied: bool
    stop_requested: bool


class Engine:
    """A model under DeepSpeed: this rank's share of a training run."""

    def __init__(self, model: Gato, config: TrainConfig, device: torch.device, asked: Targets):
        self.config, self.device = config, device
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        body = zero_config(config, self.world)
        optimiser = make_optimiser(model, config.optimiser)
        objective = Objective(model, config.loss, asked)
        prepare_blocks(model, config.compile, config.activation_checkpointing)
        decide_attention(device, config)
        deepspeed_file.require_precision(config.deepspeed, body, device.type)
        body = deepspeed_file.ReadFields(body)
        try:
            self.engine, self.optimiser = wrap(objective, optimiser, body)
        except REFUSALS as error:
            raise deepspeed_file.refused(config.deepspeed, error) from error
        if self.rank == 0:
            for line in body.remarks():
                print(f"warning: {config.deepspeed}: {line}", flush=True)
        if self.engine.zero_optimization_partition_weights():
            # the head is the embedding table, used outside the module that owns it
            deepspeed.zero.register_external_parameter(objective, model.tokens.weight)
        self.stage: int = self.engine.zero_optimization_stage()
        if self.stage in (1, 2):
            if self.engine.zero_cpu_offload():
                self.optimiser.check_grad_overflow = True  # DeepSpeed checks in float16 and bfloat16 only
            else:
                Tail(self.optimiser, config.optimiser.gradient_clip, all_gather_dp_groups)
        states.allocate_optimiser_states(self.engine)

    def train_step(self, step: int, batches: list[Batch], stop: bool) -> StepResult:
        """One optimiser step on this rank's micro-batches. `stop`: whether this rank was asked to end. Collective."""
        own = sum(len(batch.predict_index) for batch in batches)
        totals = torch.tensor([own, float(stop)], dtype=torch.float64, device=self.device)
        # DeepSpeed divides by world size and by accumulation steps; the mean is over tokens.
        scale: float | torch.Tensor = self.world * len(batches) / max(1, own)
        if self.world > 1:
            dist.all_reduce(totals)
            scale = (self.world * len(batches) / totals[0].clamp(min=1.0)).float()
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate(step, self.config.optimiser)
        summed = torch.zeros((), dtype=torch.float64, device=self.device)
        self.engine.train()
        for batch in batches:
            loss = self.loss(batch)
            summed += loss.detach()
            self.engine.backward(loss * scale)
            norm = self._clip() if self.engine.is_gradient_accumulation_boundary() else None
            self.engine.step()
        dist.all_reduce(summed)
        # the first value that the host asks a GPU for: all of the step is queued by then
        norm = float(self.engine.get_global_grad_norm() if norm is None else norm)
        supervised = max(1, int(totals[0]))
        return StepResult(float(summed) / supervised, supervised, norm, math.isfinite(norm), bool(totals[1]))

    def _clip(self) -> float | None:
        """At ZeRO 0, where DeepSpeed does not report it: the norm of the reduced gradients, which are then clipped. If
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
        """Summed cross-entropy (nats) of a micro-batch in host memory, as the loader gives it."""
        branch_scale = branch_scales(batch.sequence, self.config.model, self.config.seed)
        return self.engine(
            batch.to(self.device), None if branch_scale is None else branch_scale.to(self.device, non_blocking=True)
        )

    @property
    def gato(self) -> Gato:
        """The bare model, for evaluation between steps."""
        return self.engine.module.gato

    def tensors(self) -> dict[str, torch.Tensor]:
        """The weights and optimiser states that this rank saves, by name, see trainer/states.py. Collective."""
        return states.gather(
            self.engine, ACCESS, self.gato, states.parameters_of_rank(self.gato, self.rank, self.world)
        )

    def restore(self, read: Callable[[str], torch.Tensor], applied: int) -> None:
        """Load weights and optimiser states by name, as `tensors` of any number of ranks returned them after `applied`
        steps. Collective."""
        states.restore(self.engine, ACCESS, self.gato, read, applied)

    @property
    def applied(self) -> int:
        """Number of optimiser steps that were applied."""
        return states.applied_steps(self.engine)

    def gathered_parameters(self) -> Any:
        """Context in which every rank holds the complete weights. Collective under ZeRO 3."""
        partitioned = self.engine.zero_optimization_partition_weights()
        return deepspeed.zero.GatheredParameters(list(self.gato.parameters()), enabled=partitioned)

    def evaluation_model(self) -> Gato:
        """The model itself, or under ZeRO 3 a copy, because there its layers release their weights after each use.
        Collective under ZeRO 3."""
        if not self.engine.zero_optimization_partition_weights():
            return self.gato
        copy = Gato(self.config.model, self.gato.vocabulary).to(self.device)
        with self.gathered_parameters():
            copy.load_state_dict({name: value.detach().clone() for name, value in self.gato.state_dict().items()})
        return copy

    def weights(self) -> dict[str, torch.Tensor] | None:
        """Complete float32 weights on rank 0, None elsewhere. Collective."""
        wanted = {name for name, _ in self.gato.named_parameters()} if self.rank == 0 else set()
        found = states.gather(self.engine, ACCESS, self.gato, wanted, (states.WEIGHT,))
        return {key.rpartition("/")[0]: value for key, value in found.items()} if self.rank == 0 else None


def decide_attention(device: torch.device, config: TrainConfig) -> None:
    """Let a GPU decide which kernel attends within segments, the same one on all ranks, unless the environment does.
    Collective."""
    if device.type == "cuda" and config.model.sequence == "tokens":
        model, data = config.model, config.data

        def measure() -> str:
            if not (name := segments.named(model.head_size)):
                shape = model.heads, model.head_size, data.stream.sequence_length, data.micro_batch
                segments.decide(device, *shape, compiled=config.compile)
                name = segments.in_use()
            return name

        segments.use(on_rank_0(measure))


def wrap(module: nn.Module, optimiser: torch.optim.Optimizer, body: dict[str, Any]) -> tuple[Any, Any]:
    """DeepSpeed's engine around a module, and its optimiser, for a configuration as `zero_config` makes it."""
    engine, wrapped, *_ = deepspeed.initialize(model=module, optimizer=optimiser, config=body)
    return engine, wrapped


def branch_scales(sequence: Any, model: ModelConfig, seed: int) -> torch.Tensor | None:
    """Scales of the residual branches of sequences (B,): float32 (B, blocks, 2, 1), (B, blocks, 2, W) with dropout, or
    None with neither dropout nor stochastic depth. 0 for a branch that stochastic depth skips (paper, appendix D) or a
    channel that dropout zeroes (appendix E), else the reciprocal of the probability to stay. A function of seed and
    sequence number alone."""
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
    """Compile the blocks, or checkpoint their inner activations. Names of weights stay the same."""
    if compile:  # variants: mask, predict_index, branch_scale, gradients; beyond the limit, blocks would run uncompiled
        torch._dynamo.config.recompile_limit = 64
    for number, block in enumerate(model.blocks):
        if compile:
            # the last one's feed-forward has another number of rows in every batch
            block.compile(dynamic=None if number == len(model.blocks) - 1 else False)
        if activation_checkpointing:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def zero_config(config: TrainConfig, world: int) -> dict[str, Any]:
    """The DeepSpeed configuration of a run of `world` processes: its file, completed by the run's own settings.

    Raises:
        ValueError: the file contradicts a setting, or two settings exclude each other.
    """
    raw, data = read_config(config.deepspeed), config.data
    body = deepspeed_file.complete_offload(deepspeed_file.resolve_auto(raw, torch.cuda.is_available())[0])
    stage = body.get("zero_optimization", {}).get("stage", 0)
    if config.compile and stage == 3:
        raise ValueError(
            "--compile cannot be used with ZeRO 3, whose layers fetch their weights while they run; leave one out"
        )
    if stage and config.optimiser.matrices == "muon":
        raise ValueError("--optimiser.matrices muon updates whole matrices, which ZeRO 1 to 3 split; "
                         "use adamw, or a configuration of stage 0: --deepspeed zero0, on a CPU zero0_cpu")  # fmt: skip
    if stage and config.optimiser.bins == "smooth":
        raise ValueError("--optimiser.bins smooth moves rows of the table together, which ZeRO 1 to 3 cut up; "
                         "use rows, or a configuration of stage 0: --deepspeed zero0, on a CPU zero0_cpu")  # fmt: skip
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
            raise ValueError(f"{config.deepspeed}: field '{key}' is set by {setting}; remove it from the file")
        if value is not None:
            body[key] = value
    if not stage:
        body["gradient_clipping"] = 0.0  # see `Engine._clip`
    return {"steps_per_print": 10**9} | body


def read_config(name: str) -> dict[str, Any]:
    """A DeepSpeed configuration by name or path. ValueError lists the names, or says why the file is not JSON."""
    path = Path(name) if name.endswith(".json") else CONFIGS / f"{name}.json"
    if not path.is_file():
        known = ", ".join(config_names())
        raise ValueError(f"no DeepSpeed configuration '{name}'; known: {known}, or give a path to a .json file")
    try:
        body = parse_json(path.read_bytes(), unique=True)
    except ValueError as error:
        raise ValueError(
            f"{path}: not JSON ({error}); correct it, or name one of {', '.join(config_names())}"
        ) from None
    return deepspeed_file.require_shape(name, body)
