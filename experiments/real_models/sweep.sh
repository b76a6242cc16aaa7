#!/bin/sh
# Pretrained models: MiniLM (retrieval, LoRA or all weights) and SmolLM2 (generative, LoRA) on MovieLens-1M and Amazon Games.
#
#   sh experiments/real_models/sweep.sh OUT ../shared/data/ml-1m ../shared/data/games-5core [OVERRIDE...]
#
# OUT/tuning/CELL has the tuning runs (seed 0, two learning rates for each rule), OUT/CELL the comparison of the selected settings.
# The environment variables MODELS (minilm_lora minilm_full smollm2_lora), DATA (ml_1m games), SAMPLES (1024, null for all),
# USERS, ROUNDS, BATCH and RULES make it smaller; RATES are the learning rates of LoRA. With one rate nothing is tuned.
set -eu
out=$1 ml_1m=$2 games=$3
shift 3
. "$(dirname "$0")/../common.sh"
rules=${RULES:-local,fedavg,uniform,fellrec,updatemixing,centralized}
rates=${RATES:-1e-4,3e-4}
lora="adapter=lora adapter.rank=8 adapter.alpha=16 adapter.dropout=0.05"
# Item vectors are computed once a round: with every step they would take ten times as long as the histories. With the
# default temperature of 0.05 the loss of MiniLM's first round is above that of equal scores, and validation became worse.
minilm="${MINILM:-backbone=minilm} objective=retrieval objective.item_encoder=encoded objective.refresh_items=round
    objective.pooling=mean objective.temperature=0.2"
smollm2="${SMOLLM2:-backbone=smollm2} objective=generative"
settings_of() {
    case $1 in
        minilm_lora) echo "$minilm $lora" ;;
        minilm_full) echo "$minilm adapter=full" ;;
        smollm2_lora) echo "$smollm2 $lora ranker=${RANKER:-constrained}" ;;
    esac
}
rates_of() {
    case $1 in
        *_full) echo "1e-5,5e-5" ;;
        *) echo "$rates" ;;
    esac
}
# shellcheck disable=SC2046,SC2086  # several overrides
study() {
    name=$1 model=$2
    shift 2
    set -- $(settings_of $model) "data.max_users=${USERS:-1000}" data.max_history=10 \
        "data.max_train_samples=${SAMPLES:-1024}" "trainer.batch_size=${BATCH:-32}" "trainer.num_rounds=${ROUNDS:-5}" \
        references.show=[popularity,markov_decay,pretrained] "$@"
    case $(rates_of $model) in
        *,*)
            finals=$seeds kept=$out
            seeds=0 out=$kept/tuning
            cell "$name" "$@" --run "aggregation=$rules trainer.learning_rate=$(rates_of $model)"
            seeds=$finals out=$kept
            [ "$fellrec" = echo ] && return
            chosen=$($python "$(dirname "$0")/../chosen.py" "$out/tuning/$name/comparison/comparison.json")
            ;;
        *)
            chosen=
            for rule in $(echo "$rules" | tr , ' '); do
                chosen="$chosen --run 'aggregation=$rule trainer.learning_rate=$(rates_of $model)'"
            done
            ;;
    esac
    eval "cell \"\$name\" \"\$@\" $chosen"
    # FELLRec without heating and without attention, with the learning rate that was best for it.
    fellrec_chosen=$(echo "$chosen" | grep -o "aggregation=fellrec[^']*" || true)
    [ -z "$fellrec_chosen" ] || cell "${name}_halves" "$@" --run "$fellrec_chosen aggregation.heating=false" \
        --run "$fellrec_chosen aggregation.attention=false"
}
for model in ${MODELS:-minilm_lora minilm_full smollm2_lora}; do
    for data in ${DATA:-ml_1m games}; do
        eval "root=\$$data"
        study "${data}_$model" "$model" "data=$data" "data.root=$root" "$@"
    done
done
report fellrec-local fellrec-uniform updatemixing-fedavg updatemixing-fellrec
