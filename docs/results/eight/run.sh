#!/bin/bash
# One Gato for eight tasks: some 70 minutes of one core; each command may be killed and run again.
#   bash docs/results/eight/run.sh      (after the recordings and builds of docs/results/table/run.sh)
set -euo pipefail
export OMP_NUM_THREADS=1
SHARDS=data/table/shards GAMES="pong-run1 0.4 breakout-run1 0.4"

# Ended by Ctrl-C some time after step 3,000; its schedule is of 12,000 steps.
[ -e runs/eight-a/exports/step-3000 ] || deepspeed --num_gpus 1 trainer/main.py --recipe tiny-timesteps --seed 0 \
    --steps 12000 --optimiser.decay-steps 12000 --data.root $SHARDS --data.stream.weights $GAMES \
    --run.output runs/eight-a --run.evaluate-every 500 --run.save-every 500 --run.export-every 1000
deepspeed --num_gpus 1 trainer/main.py --recipe tiny-timesteps --seed 1 --steps 8000 --optimiser.decay-steps 8000 \
    --optimiser.peak-lr 1e-3 --optimiser.muon-peak-lr 0.01 --optimiser.warmup-steps 100 --loss.discrete 20 \
    --run.start-from runs/eight-a/exports/step-3000 --data.root $SHARDS --data.stream.weights $GAMES \
    --run.output runs/eight-b --run.evaluate-every 500 --run.save-every 500 --run.export-every 1000
python -m eval.compare --gato runs/eight-b/export --root $SHARDS --models random behaviour gato --episodes 20 \
    --film-seconds 0 --output results/eight
