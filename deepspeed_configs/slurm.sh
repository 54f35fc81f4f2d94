#!/bin/bash
# sbatch deepspeed_configs/slurm.sh --recipe 1.18b-nodes [...]: one task a GPU, without hostfile or ssh.
# Run so far with SLURM 22.05 on one machine without GPUs (docs/training.md). It may be requeued at any time: the run
# resumes from its last checkpoint, and SIGTERM, sent five minutes before the end of the allocation, saves one.
#SBATCH --job-name=gato
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
set -euo pipefail

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000)) # a port per job: two may share a machine
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # srun no longer takes it from sbatch

# trainer/main.py reads ranks and world size from what srun sets. The shell waits for it, so that SIGTERM ends no job
# whose ranks are still saving.
trap '' TERM
srun --kill-on-bad-exit=1 "${PYTHON:-.venv/bin/python}" trainer/main.py "$@"
