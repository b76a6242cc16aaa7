#!/bin/sh
# What privacy costs: accuracy and balance against the ε of differential privacy, and against noise in hidden states by
# depth of the head, and in gradients, with what a server recovers of them. A finished run is not run again, a begun one is resumed.
#
#   sh experiments/privacy/sweep.sh OUT ../shared/data/ml-1m [OVERRIDE...]
#
# Environment variables: MODELS, EPSILONS, RULES, NOISES, DEPTHS and GRADIENT_NOISES select runs; FELLREC and PYTHON are the commands to
# run.
set -eu
out=$1 data=$2
shift 2
. "$(dirname "$0")/../common.sh"
common="data=ml_1m references.show=[] tracking.uri=null ~callbacks.matrices ~callbacks.model"
tiny="data.max_users=250 data.max_history=10 backbone.hidden_size=32 backbone.num_layers=3 backbone.pretrain.steps=150
 adapter=lora adapter.rank=4 trainer.batch_size=16"

# one NAME OVERRIDE...: one run with the common settings
one() {
    name=$1
    shift
    # shellcheck disable=SC2086  # several overrides
    run "$name" $common "data.root=$data" "$@"
}

# by_epsilon MODEL RULE DELTA CLIP EPSILON OVERRIDE...: one user a client
by_epsilon() {
    name="epsilon_$1_$2_$5" budget="privacy=user_level privacy.epsilon=$5 privacy.delta=$3 privacy.clip_norm=$4"
    if [ "$5" = none ]; then budget=privacy=none; fi
    rule=$2
    shift 5
    # shellcheck disable=SC2086  # several overrides
    one "$name" "aggregation=$rule" partition=per_user $budget "$@"
    attack "$name" attack=membership attack.users=1000
}

for model in ${MODELS:-sasrec tiny}; do
    for epsilon in ${EPSILONS:-none 8 3 1}; do
        # shellcheck disable=SC2086  # several overrides
        case $model in
            sasrec) by_epsilon sasrec fedavg 1e-4 2.5 "$epsilon" data.max_users=2000 backbone=sasrec \
                backbone.hidden_size=16 participation=poisson participation.rate=0.1 trainer.num_rounds=30 \
                trainer.learning_rate=0.01 trainer.evaluate_every=10 "$@" ;;
            tiny) for rule in ${RULES:-ffa_lora fedavg}; do
                by_epsilon tiny "$rule" 1e-3 0.05 "$epsilon" $tiny trainer.num_rounds=3 trainer.max_local_steps=1 \
                    trainer.learning_rate=2e-3 trainer.evaluate_every=3 "$@"
            done ;;
        esac
    done
done

# cut NAME DEPTH OVERRIDE...: five clients and an executed cut
cut() {
    name=$1 depth=$2
    shift 2
    # shellcheck disable=SC2086  # several overrides
    one "$name" $tiny split=executed "split.head_layers=$depth" aggregation=fedavg trainer.num_rounds=4 \
        trainer.max_local_steps=10 trainer.learning_rate=3e-3 trainer.evaluate_every=4 "$@"
}

for depth in ${DEPTHS:-0 1}; do
    for noise in ${NOISES:-0 0.01 0.03 0.1 0.3}; do
        cut "noise_${depth}_$noise" "$depth" "split.hidden_noise=$noise" "$@"
        attack "noise_${depth}_$noise" attack=nearest_embedding,logit_lens,transformer_inverter
    done
done
for noise in ${GRADIENT_NOISES:-0 0.001 0.01 0.1 1}; do
    cut "gradient_$noise" 1 "split.gradient_noise=$noise" "$@"
    attack "gradient_$noise" attack=gradient split.head_layers=1
done
[ "$fellrec" = echo ] || $python "$(dirname "$0")/report.py" "$out"
