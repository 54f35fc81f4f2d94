#!/bin/bash
# Few-shot, as in the paper's figure: tasks that a training never saw, from a prompt and after fine-tuning on 10 and 100
# demonstrations. Held out by rule: of the tasks in alphabetical order, every fifth of Meta-World from the third on and
# every ninth of BabyAI from the fifth on, ten of each (held-out.txt).
#   bash docs/results/suite/fewshot.sh train      one training without these tasks: some hours of one core
#   bash docs/results/suite/fewshot.sh            demonstrations, 20 x 2 fine-tunings, play, few-shot.{md,svg}; some
#                                                 50 minutes of one busy core with STEPS=100 and EPISODES=20
# from the root of the checkout, environment activated. Each command may be killed and run again. STARTS="trained scratch"
# fine-tunes from random weights too. Lists and numbers are variables, so that a small trial is one line.
set -euo pipefail
export OMP_NUM_THREADS=1
IDS=${IDS:-$(cat docs/results/suite/held-out.txt)}
SHARDS=${SHARDS:-data/suite/shards} DEMONSTRATIONS=${DEMONSTRATIONS:-data/suite/few-shot}
RUN=${RUN:-runs/suite-unseen} TUNED=${TUNED:-runs/few-shot} OUTPUT=${OUTPUT:-results/few-shot}
STEPS=${STEPS:-100} NUMBERS=${NUMBERS:-10 100} EPISODES=${EPISODES:-20} STARTS=${STARTS:-trained} RECORDED=${RECORDED:-115} PORT=${PORT:-29500}

task() { sed -E 's#/#-#; s#-v([0-9]+)$#-expert-v\1#' <<< "$1" | tr '[:upper:]' '[:lower:]'; }
TASKS=$(for id in $IDS; do task "$id"; done)

if [ "${1:-}" = train ]; then
    # prompts are shown with their actions, so they carry no loss; one arm's tasks share a scale, which unseen ones need
    # shellcheck disable=SC2086
    exec deepspeed --num_gpus 1 --master_port "$PORT" trainer/main.py --recipe tiny --data.root "$SHARDS" --run.output "$RUN" \
        --data.stream.excluded-tasks $TASKS --data.stream.prompt-probability 0.4 --data.stream.prompt-start-share 0.5 --data.stream.no-prompt-loss \
        --model.shared-scales metaworld --model.text-gates --run.evaluate-sequences 2 --data.stream.sequence-length 528 \
        --data.global-batch 192 --data.micro-batch 48 \
        --data.stream.domains metaworld 10 minigrid 10 mujoco 10 atari 6 robotics 4 classic 1 box2d 1 ${TRAIN:-}
fi

for id in $IDS; do
    name=$(tr '[:upper:]' '[:lower:]' <<< "$id")
    case $id in BabyAI*) log=$DEMONSTRATIONS/logs/babyai/${name%-v*} ;; *) log=$DEMONSTRATIONS/logs/d4rl/$(task "$id").hdf5 ;; esac
    [ -e "$log" ] || python -m etl.record -e "$id" --episodes "$RECORDED" -o "$DEMONSTRATIONS/logs/$([[ $id == BabyAI* ]] && echo babyai || echo d4rl)"
done
for source in d4rl babyai; do
    [ -e "$DEMONSTRATIONS/shards/$source/dataset.json" ] || [ ! -d "$DEMONSTRATIONS/logs/$source" ] ||
        python -m etl.build --source $source --input "$DEMONSTRATIONS/logs/$source" --output "$DEMONSTRATIONS/shards/$source"
done

play() { # start, demonstrations, folder of the rows, export, then more options
    python -m eval.compare --root "$DEMONSTRATIONS/shards" --episodes "$EPISODES" --film-seconds 0 \
        --gato "$4" -o "$OUTPUT/$1/$2/$3" "${@:5}"
}
# shellcheck disable=SC2086
play trained 0 all "$RUN/export" --tasks $TASKS --models random gato --agent.prompt start
for start in $STARTS; do
    for n in $NUMBERS; do
        for task in $TASKS; do
            run=$TUNED/$start/$n/$task
            [ $start = scratch ] && from="--recipe tiny --optimiser.decay-steps $STEPS" ||
                from="--recipe finetune --deepspeed zero0_cpu --run.start-from $RUN/export --optimiser.peak-lr 1e-3 --optimiser.start-lr 1e-3"
            # shellcheck disable=SC2086
            [ -e "$run/export/model.json" ] || deepspeed --num_gpus 1 --master_port "$PORT" trainer/main.py $from --steps $STEPS \
                --data.root "$DEMONSTRATIONS/shards" --data.stream.tasks "$task" --data.stream.demonstrations $n \
                --data.stream.prompt-probability 0 --data.stream.no-text-loss --data.global-batch 64 \
                --data.micro-batch 64 --run.evaluate-every $STEPS --run.save-every $STEPS --run.export-every 0 --run.output "$run"
            play $start $n "$task" "$run/export" --tasks "$task" --models gato --agent.prompt none
        done
    done
done
python -m eval.figures.fewshot "$OUTPUT"
