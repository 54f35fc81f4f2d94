#!/bin/bash
# One Gato for eight tasks: 41 minutes of one core, and 4 to play; each command may be killed and run again.
#   bash docs/results/eight/run.sh      (after the recordings and builds of docs/results/table/run.sh)
set -euo pipefail
export OMP_NUM_THREADS=1
deepspeed --num_gpus 1 trainer/main.py --recipe tiny --seed 0 --data.root data/table/shards --run.output runs/eight-0
python -m eval.compare --gato runs/eight-0/export --root data/table/shards --models random behaviour gato --episodes 20 \
    --film-seconds 0 --output results/eight
