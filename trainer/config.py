"""The whole configuration of a training run: one tree of frozen dataclasses.

A recipe names one tree; the command line changes single fields of it; the run
keeps it as JSON beside its results. Unknown keys are refused.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from schemas.episode import STRICT
from schemas.files import parse_json, require_folder, require_unicode
from schemas.ranges import require
from shards.cache import CacheConfig
from shards.reader import Verify
from shards.stream import OnBadShard, StreamConfig
from trainer.loss import LossConfig
from trainer.model.presets import ModelConfig


@dataclass(frozen=True)
class DataConfig:
    """Shards to train on, and how they become batches."""

    __pydantic_config__ = STRICT

    folders: tuple[str, ...] = ()
    """Dataset folders or URLs (s3://bucket/name); by default all finished ones in `root`."""
    root: str = "data/shards"
    """Folder or URL of the datasets that python -m etl.build wrote."""
    verify: Verify = "auto"
    """Check on opening: size (all sizes), full (all hashes too) or auto (hashes up to 2 GiB in all)."""
    on_bad_shard: OnBadShard = "stop"
    """skip: sequences that touch a missing or damaged shard are drawn again, and counted."""
    cache: CacheConfig = field(default_factory=CacheConfig)
    global_batch: int = 512
    """Sequences per step, over all ranks."""
    micro_batch: int = 8
    """Sequences that a rank computes at once; gradients of the rest are accumulated."""
    threads: int = 1
    """Threads per rank that assemble batches; more than one helps if storage is slow; 0: batches are assembled when
    they are needed."""
    stream: StreamConfig = field(default_factory=StreamConfig)


@dataclass(frozen=True)
class OptimiserConfig:
    """AdamW with warm-up and cosine decay (paper, appendix D), or a constant rate (fine-tuning, appendix E)."""

    __pydantic_config__ = STRICT

    peak_lr: float = 1e-4
    start_lr: float = 1e-7
    schedule: Literal["cosine", "constant"] = "cosine"
    """After the warm-up: cosine decay, or the peak rate to the end."""
    final_lr_share: float = 0.1
    """The cosine decay ends at this share of the peak rate."""
    warmup_steps: int = 15_000
    decay_steps: int = 1_000_000
    beta_1: float = 0.9
    beta_2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    """Applied to matrices, not to norms and biases."""
    gradient_clip: float = 1.0
    matrices: Literal["adamw", "muon"] = "adamw"
    """The optimiser for the matrices of blocks and patch embedder: AdamW as for all else (paper), or Muon (ours, at
    ZeRO 0 only), see trainer/optimiser.py."""
    bins: Literal["rows", "smooth"] = "rows"
    """How the table's rows of continuous values are updated: each by itself (paper), or together, as smooth functions
    of the bin (ours, at ZeRO 0 only), see trainer/optimiser.py."""
    muon_peak_lr: float = 0.02
    """Muon's learning rate when AdamW's is `peak_lr`; both follow the same schedule."""


@dataclass(frozen=True)
class RunConfig:
    """Results of a run: where they go and how often."""

    __pydantic_config__ = STRICT

    output: Path = Path("runs/gato")
    start_from: str = ""
    """An export (RUN/export) or its URL to fine-tune: a new run starts with its weights and its model's shape."""
    resume: Literal["auto", "never"] = "auto"
    """auto: the same command run again resumes from the last checkpoint; never: refuse a folder with checkpoints."""
    log_every: int = 10
    evaluate_every: int = 200
    """Steps between evaluations; the weights with the lowest mean held-out loss are kept in best/."""
    evaluate_sequences: int = 16
    """Held-out sequences of each task at every evaluation; 0: no evaluation."""
    save_every: int = 200
    """Steps between checkpoints."""
    keep_last: int = 2
    """Number of newest checkpoints to keep."""
    keep_best: int = 1
    """Number of checkpoints with the lowest held-out loss to keep as well, among those saved at an evaluated step."""
    export_every: int = 0
    """Steps between exports to exports/step-N, for curves of returns; 0: none."""
    skip_limit: int = 20
    """Steps in a row that may be skipped because their gradients are not finite; after that the run ends."""
    patience_minutes: float = 30.0
    """A rank that waits for another, or takes for a step, longer than this prints its stacks and ends; 0: never."""
    peak_tflops: float = 0.0
    """Peak rate of one device in bfloat16, from which the share in use (MFU) follows; known for common GPUs."""
    wandb: str = ""
    """Also report to this Weights & Biases project (pip install wandb)."""


@dataclass(frozen=True)
class TrainConfig:
    """A training run."""

    __pydantic_config__ = STRICT

    steps: int = 1_000_000
    seed: int = 0
    deepspeed: str = "zero0_cpu"
    """A configuration of deepspeed_configs/ by name, or the path of a .json file."""
    compile: bool = False
    """Compile each block with torch.compile (needs a C++ compiler on a CPU): the same function up to rounding. Not
    with ZeRO 3."""
    activation_checkpointing: bool = False
    """Compute a block's inner activations again in the backward pass: less memory for a third more arithmetic."""
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


def load_config(path: Path) -> tuple[str, TrainConfig]:
    """Name of the recipe and the configuration in a run's config.json.

    Raises:
        ValueError: no such file, or a key or value in it that is no setting.
    """
    try:
        raw = parse_json(path.read_bytes(), unique=True)
        recipe = raw.pop("recipe")
        if not isinstance(recipe, str):
            raise ValueError(f"recipe {recipe}")
        return recipe, from_dict(raw)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; give --config the config.json of a run") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"{path}: setting '{where}': {first['msg']}; correct or remove it") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path}: not the configuration of a run ({error}); give --config a run's config.json"
        ) from None


def resume_critical(config: TrainConfig) -> dict[str, Any]:
    """The settings that determine losses and weights, which must be the same when a run resumes. Where and how often
    results are written, and how long the run is, may change."""
    raw = asdict(config)
    # settings that were added later are left out at their defaults: older checkpoints can be resumed
    later = (
        ("model", "dropout", 0.0), ("model", "patch_norm", "group"),
        ("model", "sequence", "tokens"), ("optimiser", "schedule", "cosine"),
        ("optimiser", "matrices", "adamw"), ("optimiser", "bins", "rows"), ("loss", "stride", 1),
        ("model", "values", False), ("model", "returns", False), ("loss", "squared", 100.0),
        ("loss", "discrete", 1.0), ("model", "shared_scales", ()),
        ("model", "text_gates", False),
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
    ("loss.soft_bins", 0, 1024), ("loss.stride", 1, 128), ("loss.squared", 0, 1e9), ("loss.discrete", 1e-6, 1e6),
    ("loss.chunk", 0, 2**31),
    ("model.blocks", 1, 10_000), ("model.heads", 1, 10_000), ("model.width", 1, 2**20), ("model.head_size", 1, 2**16),
    ("model.feed_forward", 1, 2**24), ("model.local_positions", 1, 2**20),
    ("model.patch_channels", 2, 2**16), ("model.patch_groups", 1, 2**15),
    ("model.dropout", 0, 0.99), ("model.stochastic_depth", 0, 0.99),
    ("run.log_every", 1, 2**40), ("run.evaluate_every", 1, 2**40), ("run.evaluate_sequences", 0, 2**31),
    ("run.save_every", 1, 2**40), ("run.keep_last", 1, 2**31), ("run.keep_best", 0, 2**31),
    ("run.export_every", 0, 2**40), ("run.skip_limit", 1, 2**31), ("run.patience_minutes", 0, 1e6),
    ("run.peak_tflops", 0, 1e9),
)  # fmt: skip


def check(config: TrainConfig, world: int) -> None:
    """Check the ranges of all settings, for a run of `world` processes, and that its output can be a folder.

    Raises:
        ValueError: the first setting that is out of range, as the command line spells it.
    """
    for name, least, most in RANGES:
        value: Any = config
        for part in name.split("."):
            value = getattr(value, part)
        require(name, value, least, most)
    if config.loss.stride > max(1.0, config.loss.soft_bins):
        raise ValueError(
            f"--loss.stride {config.loss.stride}: must not exceed --loss.soft-bins {config.loss.soft_bins}, over which "
            "a target is spread; raise those, or give stride 1"
        )
    if config.model.text_gates and config.model.sequence != "timesteps":
        raise ValueError("--model.text-gates: needs --model.sequence timesteps; give that too, or leave it out")
    output = config.run.output
    for name in ("", "checkpoints", "export", "exports", "best", "tensorboard"):
        require_folder("run.output", output / name)
    for name in ("metrics.jsonl", "config.json", ".lock"):
        if (output / name).is_dir():
            raise ValueError(f"--run.output {output}: '{name}' there is a folder; move it away, or give another")
    require_unicode("run.output", output)
    for folder in (*config.data.folders, config.data.root):
        require_unicode("data.folders", folder)
    require("processes", world, 1, 2**20)
    whole, micro = config.data.global_batch, config.data.micro_batch
    each, left = divmod(whole, world)
    if left or each % micro:
        fitting = next(size for size in range(micro, 0, -1) if each % size == 0)
        remedy = "choose another batch or number of processes" if left else f"give --data.micro-batch {fitting}"
        raise ValueError(
            f"--data.global-batch {whole}: must be a multiple of processes x --data.micro-batch, {world} x {micro}; "
            f"{remedy}"
        )


def remarks(config: TrainConfig) -> list[str]:
    """Settings that are possible and yet hardly meant, a line each."""
    optimiser, found = config.optimiser, []
    if optimiser.schedule == "cosine" and config.steps != optimiser.decay_steps:
        short = config.steps < optimiser.decay_steps
        what = "the learning rate will not have decayed" if short else "its last steps have the lowest learning rate"
        found.append(
            f"--steps {config.steps} is not --optimiser.decay-steps {optimiser.decay_steps}: {what}; give both the "
            "same number unless this is meant"
        )
    if config.steps < optimiser.warmup_steps:
        found.append(
            f"--steps {config.steps} ends within --optimiser.warmup-steps {optimiser.warmup_steps}, before the "
            "learning rate's peak"
        )
    return found


def differences(ours: Any, theirs: Any, name: str = "") -> list[str]:
    """Settings that differ between two trees, as JSON has them: 'optimiser.peak_lr 0.001, there 0.002'."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        keys = sorted(ours | theirs)
        return [line for key in keys for line in differences(ours.get(key), theirs.get(key), f"{name}.{key}")]
    if ours == theirs:
        return []
    if name == ".stream":
        return ["another stream: its datasets, --data.stream or --seed"]
    return [f"{name.removeprefix('.').removeprefix('config.')} {ours}, there {theirs}"]
