#!/bin/bash
# Pong on one core: a player's frames, shards, Gato, DT, the comparison. About an hour; each command may be killed and run again.
#   POLICIES=FOLDER bash docs/results/pong/run.sh      (from the root of the checkout, environment activated)
# POLICIES holds pong-a3c.safetensors: greydanus/baby-a3c's player (MIT) in the form that etl/experts/a3c.py describes.
set -euo pipefail
export OMP_NUM_THREADS=1
LOGS=data/pong/logs SHARDS=data/pong/shards RUN=runs/tiny-pong-0

[ -e $LOGS/Pong ] || python -m etl.record -e ALE/Pong-v5 --policy "$POLICIES/pong-a3c.safetensors" --temperature 0.1 \
    --steps 200000 --seed 100 -o $LOGS
[ -e $SHARDS/dataset.json ] || python -m etl.build --source atari --input $LOGS --output $SHARDS
deepspeed --num_gpus 1 trainer/main.py --recipe tiny-pong --seed 0 --data.folders $SHARDS --run.output $RUN
python -m eval.curve $RUN --datasets $SHARDS --episodes 10
python -m eval.compare --datasets $SHARDS --models random behaviour dt gato --gato $RUN/export --budget cpu --seeds 3 \
    --agent.decoding greedy -o results/pong
