#!/bin/bash
# One Gato for 334 tasks: logs, shards, one training on two cores, the comparison. Some two and a half hours of two cores;
# each command may be killed and run again.
#   POLICIES=FOLDER bash docs/results/suite/run.sh      (from the root of the checkout, environment activated)
# POLICIES holds published policies of seven bodies, which are not in the project: halfcheetah-tqc and walker2d-trpo as
# .safetensors and ant_trpo.npz (DLR-RM/rl-trained-agents, MIT; Ant's with its first 27 inputs, the others see contact
# forces that are 0), and Adroit's four *_dapg.npz. Without it the seven are left out.
set -euo pipefail
export OMP_NUM_THREADS=1
LOGS=${LOGS:-data/suite/logs} SHARDS=${SHARDS:-data/suite/shards} RUN=${RUN:-runs/suite} OUTPUT=${OUTPUT:-results/suite}
SUITES=${SUITES:-minigrid metaworld ogbench atari mujoco classic box2d robotics gridworlds highway}
STEPS=${STEPS:-4500} EPISODES=${EPISODES:-10}

for suite in $SUITES; do # BabyAI is learned by heart from few timesteps
    case $suite in minigrid) least=(10 4000) ;; metaworld) least=(30 6000) ;; *) least=(10 2000) ;; esac
    python -m etl.record --suite "$suite" --episodes "${least[0]}" --steps "${least[1]}" --workers 2 --output "$LOGS/$suite"
done
body() { # environment, policy, timesteps
    local name=${1%-*}
    [ -e "$LOGS/bodies/d4rl/${name,,}-expert-${1##*-}.hdf5" ] || python -m etl.record -e "$1" --level expert \
        --policy "$POLICIES/$2" --noise 0.05 --steps "$3" --seed 100 -o "$LOGS/bodies/d4rl"
}
if [ -n "${POLICIES:-}" ]; then
    body HalfCheetah-v4 halfcheetah-tqc.safetensors 60000
    body Walker2d-v4 walker2d-trpo.safetensors 60000
    body Ant-v4 ant_trpo.npz 60000
    for name in Door Hammer Pen Relocate; do body AdroitHand$name-v1 "${name,,}_dapg.npz" 20000; done
fi
for logs in "$LOGS"/*/*/; do
    folder=$SHARDS/$(basename "$(dirname "$logs")")-$(basename "$logs")
    [ -e "$folder/dataset.json" ] || python -m etl.build --input "$logs" --output "$folder"
done
deepspeed --num_gpus 2 trainer/main.py --recipe tiny --data.root "$SHARDS" --run.output "$RUN" \
    --data.stream.domains metaworld 8 minigrid 13 gridworlds 6 ogbench 6 mujoco 8 robotics 4 atari 4 classic 1 box2d 1 highway 1 \
    --run.evaluate-sequences 2 --run.evaluate-every 400 --run.save-every 200 --steps "$STEPS" --optimiser.decay-steps "$STEPS" \
    --data.stream.sequence-length 528 --data.global-batch 128 --data.micro-batch 32 --data.stream.prompt-probability 0.4 \
    --data.stream.prompt-start-share 0.5 --data.stream.no-prompt-loss --model.shared-scales metaworld --model.text-gates
python -m eval.compare --gato "$RUN/export" --root "$SHARDS" --models random gato --episodes "$EPISODES" -o "$OUTPUT"
