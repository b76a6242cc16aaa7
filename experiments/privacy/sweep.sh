#!/bin/sh
# What privacy costs: accuracy and balance against the ε of differential privacy, and against noise in hidden states by
# depth of the head, with what a server recovers of them. A finished run is not run again, a begun one is resumed.
#
#   sh experiments/privacy/sweep.sh OUT ../shared/data/ml-1m [OVERRIDE...]
#
# Environment variables: EPSILONS, RULES, NOISES and DEPTHS select runs; FELLREC and PYTHON are the commands to run.
set -eu
out=$1 data=$2
shift 2
. "$(dirname "$0")/../common.sh"
small="data=ml_1m data.max_users=250 data.max_history=10 backbone.hidden_size=32 backbone.num_layers=3
 backbone.pretrain.steps=150 adapter=lora adapter.rank=4 trainer.batch_size=16 references.show=[] tracking.uri=null
 ~callbacks.matrices ~callbacks.model"

# one NAME OVERRIDE...: one run
one() {
    name=$1
    shift
    if [ -f "$out/$name/results.json" ]; then return; fi
    # shellcheck disable=SC2086  # several overrides
    if [ -f "$out/$name/config.yaml" ]; then
        $fellrec train "resume=$out/$name"
    else
        $fellrec train $small "data.root=$data" "$@" "run_dir=$out/$name"
    fi
}

for rule in ${RULES:-ffa_lora fedavg}; do
    for epsilon in ${EPSILONS:-none 8 1}; do
        budget="privacy=user_level privacy.epsilon=$epsilon privacy.delta=1e-3 privacy.clip_norm=0.05"
        if [ "$epsilon" = none ]; then budget=privacy=none; fi
        # shellcheck disable=SC2086  # several overrides
        one "epsilon_${rule}_$epsilon" "aggregation=$rule" partition=per_user trainer.num_rounds=3 \
            trainer.max_local_steps=1 trainer.learning_rate=2e-3 trainer.evaluate_every=3 $budget "$@"
    done
done

for depth in ${DEPTHS:-0 1}; do
    for noise in ${NOISES:-0 0.01 0.03 0.1 0.3}; do
        one "noise_${depth}_$noise" split=executed "split.head_layers=$depth" "split.hidden_noise=$noise" \
            aggregation=fedavg trainer.num_rounds=4 trainer.max_local_steps=10 trainer.learning_rate=3e-3 \
            trainer.evaluate_every=4 "$@"
        if [ ! -f "$out/noise_${depth}_$noise/attack/attack.json" ]; then
            $fellrec attack "$out/noise_${depth}_$noise" attack=nearest_embedding,logit_lens
        fi
    done
done
[ "$fellrec" = echo ] || $python "$(dirname "$0")/report.py" "$out"
