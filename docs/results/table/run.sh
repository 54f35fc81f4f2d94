#!/bin/bash
# The whole table: logs from the simulators, shards, three Gatos, DT and TT, the comparison. Some four hours of one
# core; each command may be killed and run again.
#   POLICIES=FOLDER bash docs/results/table/run.sh      (from the root of the checkout, environment activated)
# POLICIES holds hopper-ars.safetensors and so on: policies of DLR-RM/rl-trained-agents and greydanus/baby-a3c (both MIT)
# as safetensors, in the forms that simulators/experts/perceptron.py and simulators/experts/a3c.py describe.
set -euo pipefail
export OMP_NUM_THREADS=1
LOGS=data/table/logs SHARDS=data/table/shards

body() { # environment, policy, noise, level
    local name=${1%-*}
    [ -e "$LOGS/d4rl/${name,,}-$4-${1##*-}.hdf5" ] || python -m etl.record -e "$1" --level "$4" \
        --policy "$POLICIES/$2.safetensors" --noise "$3" --steps 200000 --seed 100 -o $LOGS/d4rl
}
game() {
    [ -e "$LOGS/atari/$1/1/replay_logs" ] || python -m etl.record -e "ALE/$1-v5" \
        --policy "$POLICIES/$2.safetensors" --temperature 0.1 --steps 200000 --seed 100 -o $LOGS/atari
}
body Hopper-v4 hopper-ars 0.05 medium
body Hopper-v4 hopper-trpo 0.05 expert
body HalfCheetah-v4 halfcheetah-ars 0.1 medium
body HalfCheetah-v4 halfcheetah-tqc 0.05 expert
body Walker2d-v4 walker2d-sac 0.05 medium
body Walker2d-v4 walker2d-trpo 0.05 expert
game Pong pong-a3c
game Breakout breakout-a3c
for source in d4rl atari; do
    [ -e $SHARDS/$source/dataset.json ] || python -m etl.build --source $source --input $LOGS/$source --output $SHARDS/$source
done
for seed in 0 1 2; do
    deepspeed --num_gpus 1 trainer/main.py --recipe tiny-tokens --seed $seed --steps 3500 --optimiser.decay-steps 3500 \
        --optimiser.matrices muon --optimiser.warmup-steps 200 --data.stream.prompt-start-share 0.5 --model.patch-norm group \
        --data.root $SHARDS --run.output runs/tiny-table-$seed
done
python -m eval.compare --root $SHARDS --gato runs/tiny-table-{0,1,2}/export --budget cpu --seeds 3 -o results/table
