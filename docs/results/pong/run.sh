#!/bin/bash
# Pong on one core: a player's frames, shards, Gato, DT, the comparison. About an hour; each command may be killed and run again.
#   POLICIES=FOLDER bash docs/results/pong/run.sh      (from the root of the checkout, environment activated)
# POLICIES holds pong-a3c.safetensors: greydanus/baby-a3c's player (MIT) in the form that simulators/experts/a3c.py describes.
# Without it, another player's log: python -m etl.record -e ALE/Pong-v5 --policy expert (scripted, wins slowly).
set -euo pipefail
export OMP_NUM_THREADS=1
LOGS=data/pong/logs SHARDS=data/pong/shards RUN=runs/tiny-pong-0

[ -e $LOGS/Pong/1/replay_logs ] || python -m etl.record -e ALE/Pong-v5 --policy "$POLICIES/pong-a3c.safetensors" --temperature 0.1 \
    --steps 200000 --seed 100 -o $LOGS
[ -e $SHARDS/dataset.json ] || python -m etl.build --source atari --input $LOGS --output $SHARDS
deepspeed --num_gpus 1 trainer/main.py --recipe tiny-pong --seed 0 --data.folders $SHARDS --run.evaluate-sequences 200 \
    --run.output $RUN
python -m eval.curve $RUN --datasets $SHARDS --episodes 10
for how in "sample" "sample --agent.temperature 0.5"; do # what docs/results/pong/README.md has beside the greedy play
    python -m eval.compare --datasets $SHARDS --models gato --gato $RUN/export --agent.decoding $how -o results/pong-sampled
done
python -m eval.compare --datasets $SHARDS --models random behaviour dt gato --gato $RUN/export --budget cpu --seeds 3 \
    --agent.decoding greedy -o results/pong
