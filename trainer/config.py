"""The whole configuration of a training run: one tree of frozen dataclasses.

A recipe names one tree; the command line changes single fields of it; the run
keeps it as JSON beside its results. Unknown keys are refused.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter

from schemas.episode import STRICT
from schemas.ranges import require
from shards.cache import CacheConfig
from shards.reader import Verify
from shards.stream import OnBadShard, StreamConfig
from trainer.loss import LossConfig
from trainer.model.presets import ModelConfig


@dataclass(frozen=True)
class DataConfig:
    """Which shards, and how they become batches."""

    __pydantic_config__ = STRICT

    folders: tuple[str, ...] = ()
    """Dataset folders or URLs (s3://bucket/name); all finished ones in `root` where none is named."""
    root: str = "data/shards"
    """Where python -m etl.build puts datasets, a folder or a URL."""
    verify: Verify = "auto"
    """What is checked on opening: size (all sizes), full (all hashes too) or auto (hashes up to 2 GiB in all)."""
    on_bad_shard: OnBadShard = "stop"
    """skip: sequences that touch a missing or damaged shard are drawn anew, and counted."""
    cache: CacheConfig = field(default_factory=CacheConfig)
    global_batch: int = 512
    """Sequences a step, over all ranks."""
    micro_batch: int = 8
    """Sequences a rank runs at once; the rest is accumulated."""
    threads: int = 1
    """Threads a rank assembles batches with; more than one help where storage is slow; 0: none, it waits for each."""
    stream: StreamConfig = field(default_factory=StreamConfig)


@dataclass(frozen=True)
class OptimiserConfig:
    """AdamW with warm-up and cosine decay (paper, appendix D), or a constant rate (fine-tuning, appendix E)."""

    __pydantic_config__ = STRICT

    peak_lr: float = 1e-4
    start_lr: float = 1e-7
    schedule: Literal["cosine", "constant"] = "cosine"
    """What follows the warm-up: cosine, or the peak to the end."""
    final_lr_share: float = 0.1
    """The cosine ends at this share of the peak."""
    warmup_steps: int = 15_000
    decay_steps: int = 1_000_000
    beta_1: float = 0.9
    beta_2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    """On matrices; norms and biases have none."""
    gradient_clip: float = 1.0
    matrices: Literal["adamw", "muon"] = "adamw"
    """What updates the matrices of blocks and patch embedder: AdamW as all else (paper), or Muon (ours, at ZeRO 0),
    see trainer/optimiser.py."""
    bins: Literal["rows", "smooth"] = "rows"
    """How the table's rows of continuous values are updated: each by itself (paper), or together, as smooth functions
    of the bin (ours, at ZeRO 0), see trainer/optimiser.py."""
    muon_peak_lr: float = 0.02
    """Muon's rate where AdamW's is `peak_lr`; both follow the same schedule."""


@dataclass(frozen=True)
class RunConfig:
    """Where results go and how often."""

    __pydantic_config__ = STRICT

    output: Path = Path("runs/gato")
    start_from: str = ""
    """An export (RUN/export) whose weights and model shape a new run starts with, to fine-tune them."""
    resume: Literal["auto", "never"] = "auto"
    """auto: the same command run again goes on where it was; never: refuse a folder with checkpoints."""
    log_every: int = 10
    evaluate_every: int = 200
    """Steps between evaluations; the weights of the best mean held-out loss are kept in best/."""
    evaluate_sequences: int = 16
    """Held-out sequences of each task at every evaluation."""
    save_every: int = 200
    """Steps between checkpoints."""
    keep_last: int = 2
    """Newest checkpoints that are kept."""
    keep_best: int = 1
    """Checkpoints of the lowest held-out loss that are kept beside them, among those made at an evaluated step."""
    export_every: int = 0
    """Steps between exports to exports/step-N, for curves of returns; 0: none."""
    skip_limit: int = 20
    """Steps in a row whose gradients are not finite, and which are skipped and counted, before the run gives up."""
    patience_minutes: float = 30.0
    """A rank that hears nothing of the others, or takes no step, for so long ends with its stacks; 0: never."""
    peak_tflops: float = 0.0
    """Peak rate of a device in bfloat16 for the share that is used (MFU); by default known for common GPUs."""
    wandb: str = ""
    """A project of Weights & Biases to report to as well (pip install wandb)."""


@dataclass(frozen=True)
class TrainConfig:
    """A training run."""

    __pydantic_config__ = STRICT

    steps: int = 1_000_000
    seed: int = 0
    deepspeed: str = "zero0_cpu"
    """A file of deepspeed_configs/, by name, or a path."""
    compile: bool = False
    """Each block is compiled by torch.compile, which on a CPU needs a C++ compiler: the same function, to rounding.
    Not with ZeRO 3."""
    activation_checkpointing: bool = False
    """A block's inner activations are made anew in the backward pass: less memory for a third more arithmetic."""
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    data: DataConfig = field(default_factory=DataConfig)
    run: RunConfig = field(default_factory=RunConfig)


_TRAIN: TypeAdapter[TrainConfig] = TypeAdapter(TrainConfig)


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """JSON-able form; paths become strings."""
    return _TRAIN.dump_python(config, mode="json")


def from_dict(raw: dict[str, Any]) -> TrainConfig:
    """Inverse of `to_dict`; pydantic's ValidationError names an unknown or wrong key."""
    return _TRAIN.validate_python(raw)


def deciding(config: TrainConfig) -> dict[str, Any]:
    """The part that decides losses and weights: a resumed run must agree on it. Where and how often
    things are written, and how long the run is, may change."""
    raw = asdict(config)
    # settings that were added later are left out at their defaults: checkpoints from before go on
    later = (
        ("model", "dropout", 0.0), ("model", "patch_norm", "group"),
        ("model", "sequence", "tokens"), ("optimiser", "schedule", "cosine"),
        ("optimiser", "matrices", "adamw"), ("optimiser", "bins", "rows"), ("loss", "stride", 1),
    )  # fmt: skip
    for part, name, default in later:
        if raw[part][name] == default:
            del raw[part][name]
    if "matrices" not in raw["optimiser"]:
        del raw["optimiser"]["muon_peak_lr"]
    return {name: raw[name] for name in ("seed", "model", "loss", "optimiser")}


# setting, least, most; a number that is not finite lies in no range
RANGES = (
    ("steps", 1, 2**40), ("seed", 0, 2**63 - 1),
    ("data.global_batch", 1, 2**24), ("data.micro_batch", 1, 2**24), ("data.threads", 0, 1024),
    ("optimiser.peak_lr", 1e-12, 1e38), ("optimiser.start_lr", 0, 1e38), ("optimiser.final_lr_share", 0, 1),
    ("optimiser.warmup_steps", 0, 2**40), ("optimiser.decay_steps", 1, 2**40), ("optimiser.beta_1", 0, 0.99999),
    ("optimiser.beta_2", 0, 0.9999999), ("optimiser.epsilon", 0, 1), ("optimiser.weight_decay", 0, 10),
    ("optimiser.gradient_clip", 0, 1e9), ("optimiser.muon_peak_lr", 1e-12, 1e38),
    ("loss.soft_bins", 0, 1024), ("loss.stride", 1, 128), ("loss.chunk", 0, 2**31),
    ("model.blocks", 1, 10_000), ("model.heads", 1, 10_000), ("model.width", 1, 2**20), ("model.head_size", 1, 2**16),
    ("model.feed_forward", 1, 2**24), ("model.dropout", 0, 0.99), ("model.stochastic_depth", 0, 0.99),
    ("run.log_every", 1, 2**40), ("run.evaluate_every", 1, 2**40), ("run.evaluate_sequences", 0, 2**31),
    ("run.save_every", 1, 2**40), ("run.keep_last", 1, 2**31), ("run.keep_best", 0, 2**31),
    ("run.export_every", 0, 2**40), ("run.skip_limit", 1, 2**31), ("run.patience_minutes", 0, 1e6),
)  # fmt: skip


def check(config: TrainConfig, world: int) -> None:
    """ValueError names the first setting that makes no sense, alone or with `world` processes."""
    for name, least, most in RANGES:
        value: Any = config
        for part in name.split("."):
            value = getattr(value, part)
        require(name, value, least, most)
    if config.loss.stride > max(1.0, config.loss.soft_bins):
        raise ValueError(
            f"--loss.stride {config.loss.stride}: wider than what a target is spread over; make --loss.soft-bins as "
            "large, or the stride 1"
        )
    data = config.data
    if world < 1 or data.global_batch % (world * data.micro_batch):
        raise ValueError(
            f"--data.global-batch {data.global_batch}: must be a multiple of processes x --data.micro-batch, "
            f"{world} x {data.micro_batch}"
        )


def differences(ours: Any, theirs: Any, name: str = "") -> list[str]:
    """Settings of two trees as JSON has them that are not the same: 'optimiser.peak_lr 0.001, there 0.002'."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        keys = sorted(ours | theirs)
        return [line for key in keys for line in differences(ours.get(key), theirs.get(key), f"{name}.{key}")]
    if ours == theirs:
        return []
    if name == ".stream":
        return ["another stream: its datasets, --data.stream or --seed"]
    return [f"{name.removeprefix('.').removeprefix('config.')} {ours}, there {theirs}"]
