#!/bin/bash
# The whole table: logs from the simulators, shards, three Gatos, DT and TT, the comparison. Some eight hours of one
# core; each command may be killed and run again.
#   POLICIES=FOLDER bash docs/results/table/run.sh      (from the root of the checkout, environment activated)
# POLICIES holds hopper-ars.safetensors and so on: policies of DLR-RM/rl-trained-agents and greydanus/baby-a3c (both MIT)
# as safetensors, in the forms that simulators/experts/perceptron.py and simulators/experts/a3c.py describe.
set -euo pipefail
export OMP_NUM_THREADS=1
LOGS=data/table/logs SHARDS=data/table/shards

body() { # environment, policy, noise, level
    local name=${1%-*}
    [ -e "$LOGS/d4rl-$4/${name,,}-$4-${1##*-}.hdf5" ] || python -m etl.record -e "$1" --level "$4" \
        --policy "$POLICIES/$2.safetensors" --noise "$3" --steps 200000 --seed 100 -o "$LOGS/d4rl-$4"
}
game() { # name, policy, frames
    local folder=$LOGS/${1,,}
    [ -e "$folder/$1/1/replay_logs" ] || python -m etl.record -e "ALE/$1-v5" \
        --policy "$POLICIES/$2.safetensors" --temperature 0.1 --steps "$3" --seed 100 -o "$folder"
}
shards() { # source, logs
    [ -e "$SHARDS/$2/dataset.json" ] || python -m etl.build --source "$1" --input "$LOGS/$2" --output "$SHARDS/$2"
}
body Hopper-v4 hopper-ars 0.05 medium
body Hopper-v4 hopper-trpo 0.05 expert
body HalfCheetah-v4 halfcheetah-ars 0.1 medium
body HalfCheetah-v4 halfcheetah-tqc 0.05 expert
body Walker2d-v4 walker2d-sac 0.05 medium
body Walker2d-v4 walker2d-trpo 0.05 expert
game Pong pong-a3c 200000
game Breakout breakout-a3c 600000
shards d4rl d4rl-expert
shards d4rl d4rl-medium
shards atari pong
shards atari breakout
for seed in 0 1 2; do
    deepspeed --num_gpus 1 trainer/main.py --recipe tiny --seed $seed --data.root $SHARDS --run.output runs/table-$seed
done
python -m eval.compare --root $SHARDS --gato runs/table-{0,1,2}/export --budget cpu --seeds 3 --episodes 20 -o results/table
python -m eval.compare --datasets $SHARDS/breakout --gato runs/table-{0,1,2}/export --models gato --episodes 100 -o results/breakout
