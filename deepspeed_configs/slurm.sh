#!/bin/bash
# sbatch deepspeed_configs/slurm.sh --recipe 1.18b-nodes [...]: one task a GPU, without hostfile or ssh.
# An example: its way of starting ranks was tried with two on one CPU, the script itself on no cluster. It may be
# requeued at any time: the run goes on from its last checkpoint, and SIGTERM, sent five minutes before the end of the
# allocation, saves one.
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
export MASTER_ADDR MASTER_PORT=29500

# What the deepspeed launcher would set, from what SLURM sets.
srun --kill-on-bad-exit=1 bash -c '
    export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE
    exec .venv/bin/python trainer/main.py "$@"
' gato "$@"
