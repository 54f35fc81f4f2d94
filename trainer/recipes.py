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

# tiny
# command   deepspeed trainer/main.py --recipe tiny
# hardware  2 CPU cores, no GPU
# hours     0.8 on one core that is its own, for two control tasks (11,000 tokens/s)
# expected  one set of weights: 105 % of the behaviour's return on halfcheetah-medium, 96 % on hopper-medium (200,000
#           timesteps each, recorded from linear policies; docs/log.md)
TINY = TrainConfig(
    steps=8_000,
    model=PRESETS["tiny"],
    loss=LossConfig(soft_bins=24.0, softmax="targets"),
    optimiser=OptimiserConfig(peak_lr=2e-3, warmup_steps=400, decay_steps=8_000),
    data=DataConfig(global_batch=16, micro_batch=16, stream=StreamConfig(sequence_length=256)),
    run=RunConfig(output=Path("runs/tiny")),
)

# tiny-table: `tiny` for the results table: one set of weights for all datasets, by Muon (docs/ablations.md).
# Medium and expert share an environment, so the agent is prompted: training must show starts of episodes after prompts
# command   deepspeed --num_gpus 1 trainer/main.py --recipe tiny-table --seed 0 --run.output runs/tiny-table-0
# hardware  1 CPU core, no GPU
# hours     0.43
# expected  of the behaviour's return: 104 % on halfcheetah-medium, 86 % on hopper-medium, 36 and 25 % on their experts,
#           under 10 % on Walker2d, nothing on Pong and Breakout (docs/results/table, 3 seeds; patches by GroupNorm)
TINY_TABLE = replace(
    TINY,
    steps=3_500,
    optimiser=replace(TINY.optimiser, matrices="muon", decay_steps=3_500, warmup_steps=200),
    data=replace(TINY.data, stream=replace(TINY.data.stream, prompt_start_share=0.5)),
    run=RunConfig(output=Path("runs/tiny-table"), evaluate_every=250, save_every=250, export_every=500),
)

# tiny-timesteps: `tiny-table`, faster: an element of the sequence a timestep, bins that move smoothly, two blocks,
# windows of eleven timesteps of a body; actions decoded from a plain output, observations scaled per body, the
# episode's return shown and asked for, so no prompts (docs/ablations.md)
# command   deepspeed --num_gpus 1 trainer/main.py --recipe tiny-timesteps --seed 0 --run.output runs/tiny-timesteps-0
#           --data.stream.weights pong-run1 0.25 breakout-run1 0.25
# hardware  1 CPU core, no GPU
# hours     0.35
# expected  by these 3,000 steps not measured. Of behaviour's return with longer training at lower rates, 1.2 hours
#           (docs/results/eight, one seed): 101, 110, 96 % on halfcheetah, hopper, walker2d of level medium, 90, 92,
#           109 % of level expert, Pong -8.8, Breakout 12.1
TINY_TIMESTEPS = replace(
    TINY_TABLE,
    steps=3_000,
    model=replace(TINY.model, sequence="timesteps", blocks=2, values=True, returns=True),
    loss=replace(TINY.loss, stride=8, discrete=8.0),
    optimiser=replace(TINY_TABLE.optimiser, bins="smooth", decay_steps=3_000, final_lr_share=0.02),
    data=DataConfig(
        global_batch=96,
        micro_batch=96,
        stream=StreamConfig(sequence_length=264, prompt_probability=0.0),
    ),
    run=replace(TINY_TABLE.run, output=Path("runs/tiny-timesteps")),
)

# tiny-pong: Pong alone, from 200,000 frames of a player (docs/results/pong)
# command   deepspeed --num_gpus 1 trainer/main.py --recipe tiny-pong --seed 0
# hardware  1 CPU core, no GPU
# hours     0.48
# expected  returns of 2.8 and 4.7 (2 seeds) sampled, 10.0 and 8.5 greedily; the player's 14.8, random -20.5
TINY_PONG = replace(
    TINY_TABLE,
    steps=3_000,
    optimiser=replace(TINY_TABLE.optimiser, decay_steps=3_000),
    data=replace(TINY_TABLE.data, stream=replace(TINY_TABLE.data.stream, tasks=("pong-run1",))),
    run=replace(TINY_TABLE.run, output=Path("runs/tiny-pong")),
)

# quickstart: `tiny-timesteps`, shortened to fit `make quickstart`
# command   make quickstart
# hardware  2 CPU cores, no GPU
# hours     0.05 of training
# expected  Hopper 3167 of 3138, Freeway 22.4 of 22.0 (docs/log.md, one seed, 5 episodes)
QUICKSTART = replace(
    TINY_TIMESTEPS,
    steps=600,
    optimiser=replace(TINY_TIMESTEPS.optimiser, decay_steps=600, warmup_steps=50),
    data=replace(
        TINY_TIMESTEPS.data,
        root="data/quickstart/shards",
        global_batch=64,
        micro_batch=64,
        stream=replace(
            TINY_TIMESTEPS.data.stream, sequence_length=192, weights={"hopper-expert-v4": 3.0, "freeway-run1": 1.0}
        ),
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
    "tiny-table": TINY_TABLE,
    "tiny-timesteps": TINY_TIMESTEPS,
    "tiny-pong": TINY_PONG,
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
