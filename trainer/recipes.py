"""Named recipes: one configuration for one size and hardware, each with a header.

    deepspeed trainer/main.py --recipe NAME [--optimiser.peak-lr 3e-4 ...]

A number is measured if docs/log.md or docs/results/ has it; otherwise it is "not yet".
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from shards.stream import StreamConfig
from trainer.config import DataConfig, OptimiserConfig, RunConfig, TrainConfig
from trainer.loss import LossConfig
from trainer.model.presets import PRESETS

# tiny: one set of weights for many tasks on one core. An element of the sequence is a timestep, a regression head gives
# the actions, observations are scaled per body, the episode's return is a condition, so there are no prompts;
# two blocks, windows of eleven timesteps of a body, Muon, bins that move smoothly (docs/ablations.md)
# command   deepspeed --num_gpus 1 trainer/main.py --recipe tiny
# hardware  1 CPU core, no GPU
# hours     1.7 for eight tasks (85,000 tokens/s, other work beside it)
# expected  of behaviour's return, three seeds (docs/results/table): 106, 107, 103 % on halfcheetah, hopper, walker2d of
#           level medium, 96, 94, 104 % of level expert; Pong 14.0 of 14.8, Breakout 92.9 of 146
TINY = TrainConfig(
    steps=5_000,
    model=replace(PRESETS["tiny"], sequence="timesteps", blocks=2, values=True, returns=True),
    loss=LossConfig(soft_bins=24.0, softmax="targets", stride=8, discrete=20.0),
    optimiser=OptimiserConfig(
        peak_lr=2e-3, warmup_steps=50, decay_steps=5_000, final_lr_share=0.02, matrices="muon", bins="smooth"
    ),
    data=DataConfig(
        global_batch=384,
        micro_batch=96,
        stream=StreamConfig(sequence_length=264, prompt_probability=0.0, text_loss=False),
    ),
    run=RunConfig(output=Path("runs/tiny"), evaluate_every=250, save_every=250, export_every=1_250),
)

# tiny-tokens: an element of the sequence a token, as in the paper, with what learns from few tokens; AdamW, so any ZeRO
# stage. Needed where text is predicted within a timestep, as captions are
# command   deepspeed --num_gpus 1 trainer/main.py --recipe tiny-tokens
# hardware  1 CPU core, no GPU
# hours     0.8 for two control tasks (11,000 tokens/s)
# expected  one set of weights: 105 % of the behaviour's return on halfcheetah-medium, 96 % on hopper-medium (200,000
#           timesteps each, recorded from linear policies; docs/log.md)
TINY_TOKENS = TrainConfig(
    steps=8_000,
    model=PRESETS["tiny"],
    loss=LossConfig(soft_bins=24.0, softmax="targets"),
    optimiser=OptimiserConfig(peak_lr=2e-3, warmup_steps=400, decay_steps=8_000),
    data=DataConfig(global_batch=16, micro_batch=16, stream=StreamConfig(sequence_length=256)),
    run=RunConfig(output=Path("runs/tiny-tokens")),
)

# tiny-paper: the paper's form at tiny's width, to see what `tiny` gains by its departures at equal time
# command   deepspeed --num_gpus 1 trainer/main.py --recipe tiny-paper
# hardware  1 CPU core, no GPU
# hours     0.9 for 2,650 steps of eight tasks (3,000 tokens/s, an older core)
# expected  nothing learned by then, where `tiny` plays all eight in the same time (docs/results/table)
TINY_PAPER = replace(
    TINY_TOKENS,
    model=replace(PRESETS["tiny"], action_position="shared", rotary="none", smooth_bins=False, patch_norm="group"),
    loss=LossConfig(),
    run=replace(TINY_TOKENS.run, output=Path("runs/tiny-paper"), export_every=1000),
)

# quickstart: `tiny`, shortened to fit `make quickstart`
# command   make quickstart
# hardware  2 CPU cores, no GPU
# hours     0.05 of training
# expected  Hopper 3172 of 3138, Freeway 21.2 of 22.0 (docs/log.md, one seed, 5 episodes)
QUICKSTART = replace(
    TINY,
    steps=600,
    loss=replace(TINY.loss, discrete=8.0),
    optimiser=replace(TINY.optimiser, decay_steps=600, warmup_steps=50),
    data=replace(
        TINY.data,
        root="data/quickstart/shards",
        global_batch=64,
        micro_batch=64,
        stream=replace(TINY.data.stream, sequence_length=192, weights={"hopper-expert-v4": 3.0, "freeway-run1": 1.0}),
    ),
    run=RunConfig(output=Path("runs/quickstart"), evaluate_every=200, save_every=200),
)


# finetune: another task from few demonstrations (paper, appendix E: Adam at 1e-5, batch 64, dropout 0.1, from memory;
# not checked against the paper; steps, clipping and Adam's betas are ours)
# command   deepspeed trainer/main.py --recipe finetune --run.start-from runs/79m/export --data.stream.tasks NAME
#           --data.stream.demonstrations 100   (sequence length and loss are the export's; without a GPU, zero1_cpu)
# hardware  one GPU of 24 GB for 79m
# hours     not yet
# expected  not yet
FINETUNE = TrainConfig(
    steps=5_000,
    model=replace(PRESETS["79m"], dropout=0.1, stochastic_depth=0.0),
    deepspeed="zero1",
    optimiser=OptimiserConfig(
        schedule="constant", peak_lr=1e-5, start_lr=1e-5, warmup_steps=0, beta_2=0.999, weight_decay=0.0
    ),
    data=DataConfig(global_batch=64, micro_batch=8),
    run=RunConfig(output=Path("runs/finetune"), evaluate_every=100, save_every=500),
)

# The paper's shapes and schedule: batch 512 x 1024 tokens, 1M steps (§2.3, appendix D). Memory is what --dry-run says.
# Eight micro-batches per step or more, as far as the batch allows: the optimiser's share of a step is small then.
PAPER_79M, PAPER_364M, PAPER_1180M = (
    TrainConfig(
        model=PRESETS[name],
        deepspeed="zero1",
        loss=LossConfig(chunk=4096),  # a GPU wants few large products
        run=RunConfig(output=Path(f"runs/{name}"), evaluate_every=1000, save_every=1000),
    )
    for name in ("79m", "364m", "1.18b")
)

# 79m-table: the results table on a GPU: the paper's shape with what `tiny` has that learns from few tokens
# command   deepspeed trainer/main.py --recipe 79m-table --seed 0 --run.output runs/79m-table-0
# hardware  one GPU of 80 GB
# hours     not yet
# expected  not yet
TABLE_79M = replace(
    PAPER_79M,
    steps=1_500,
    compile=True,
    model=replace(
        PRESETS["79m"],
        action_position="own",
        rotary="token",
        smooth_bins=True,
        stochastic_depth=0.0,
        patch_norm="channel",
    ),
    loss=LossConfig(soft_bins=24.0, softmax="targets", chunk=4096),
    optimiser=OptimiserConfig(peak_lr=6e-4, warmup_steps=75, decay_steps=1_500),
    data=DataConfig(global_batch=256, micro_batch=32, stream=StreamConfig(prompt_start_share=0.5)),
    run=RunConfig(output=Path("runs/79m-table"), evaluate_every=125, save_every=125, export_every=250),
)


def _on(base: TrainConfig, name: str, deepspeed: str, micro_batch: int) -> TrainConfig:
    """A size on some hardware: the same run, since neither micro-batch nor ZeRO stage decides what is learned."""
    data, run = replace(base.data, micro_batch=micro_batch), replace(base.run, output=Path(f"runs/{name}"))
    return replace(base, deepspeed=deepspeed, data=data, run=run)


RECIPES = {
    "tiny": TINY,
    "tiny-tokens": TINY_TOKENS,
    "tiny-paper": TINY_PAPER,
    "quickstart": QUICKSTART,
    "finetune": FINETUNE,
    "79m-table": TABLE_79M,
    # 79m-24gb
    # command   deepspeed trainer/main.py --recipe 79m-24gb
    # hardware  one GPU of 24 GB
    # hours     not yet
    # expected  not yet
    "79m-24gb": _on(PAPER_79M, "79m-24gb", "zero1", 8),
    # 364m-24gb: parameters and optimiser states in host memory (8 GB of it)
    # command   deepspeed trainer/main.py --recipe 364m-24gb
    # hardware  one GPU of 24 GB, 32 GB of host memory
    # hours     not yet
    # expected  not yet
    "364m-24gb": _on(PAPER_364M, "364m-24gb", "zero3_offload", 4),
    # 79m
    # command   deepspeed trainer/main.py --recipe 79m
    # hardware  one GPU of 80 GB
    # hours     not yet
    # expected  not yet
    "79m": _on(PAPER_79M, "79m", "zero1", 32),
    # 364m
    # command   deepspeed trainer/main.py --recipe 364m
    # hardware  one GPU of 80 GB
    # hours     not yet
    # expected  not yet
    "364m": _on(PAPER_364M, "364m", "zero1", 16),
    # 1.18b
    # command   deepspeed trainer/main.py --recipe 1.18b
    # hardware  one H100 of 80 GB
    # hours     not yet; by arithmetic 127 days of 24 hours at an MFU of 40 % (--dry-run)
    # expected  not yet
    "1.18b": _on(PAPER_1180M, "1.18b", "zero1", 8),
    # 1.18b-8gpu
    # command   deepspeed --num_gpus 8 trainer/main.py --recipe 1.18b-8gpu
    # hardware  one machine of 8 H100 of 80 GB
    # hours     not yet; by arithmetic 16 days at an MFU of 40 % (--dry-run --world 8)
    # expected  not yet
    "1.18b-8gpu": _on(PAPER_1180M, "1.18b-8gpu", "zero1", 8),
    # 1.18b-nodes: the paper's batch leaves each GPU 16 sequences, one micro-batch a step
    # command   deepspeed --hostfile deepspeed_configs/hostfile.example trainer/main.py --recipe 1.18b-nodes
    # hardware  4 machines of 8 H100 of 80 GB, one file system under runs/
    # hours     not yet; by arithmetic 4 days at an MFU of 40 % (--dry-run --world 32)
    # expected  not yet
    "1.18b-nodes": _on(PAPER_1180M, "1.18b-nodes", "zero1", 16),
}
