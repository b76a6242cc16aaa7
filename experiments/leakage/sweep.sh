#!/bin/sh
# What a server recovers of the users of MovieLens-1M: from hidden states and gradients by depth of the head, from updates by
# number of users a client, from adapters. A finished run is not run again, a begun one is resumed.
#
#   sh experiments/leakage/sweep.sh OUT ../shared/data/ml-1m [OVERRIDE...]
#
# Environment variables: CELLS and SEEDS select runs; FELLREC and PYTHON are the commands to run.
set -eu
out=$1 data=$2
shift 2
. "$(dirname "$0")/../common.sh"

# each_seed ATTACKS SETTINGS OVERRIDE...: one run of the cell for each seed, and the attacks on it
each_seed() {
    attacks=$1 settings=$2
    shift 2
    for seed in $(echo "$seeds" | tr , ' '); do
        run "$cell-s$seed" data=ml_1m "data.root=$data" 'references.show=[]' tracking.uri=null "$@" "seed=$seed"
        # shellcheck disable=SC2086  # several settings
        attack "$cell-s$seed" "attack=$attacks" $settings
    done
}

tiny="backbone.num_layers=6 backbone.hidden_size=32 backbone.pretrain.steps=60 trainer.num_rounds=1 trainer.max_local_steps=10"
by_users="attack.update_clients=4 attack.users_per_client=[1,5,20]"
at_cut=nearest_embedding,logit_lens,inverter,transformer_inverter,public_tail,gradient
for cell in ${CELLS:-tiny tiny_full sasrec sasrec_sampled smollm2}; do
    # shellcheck disable=SC2086  # several overrides
    case $cell in
        tiny) each_seed "$at_cut,update_scores" "split.head_layers=0,1,2,4 attack.rows=20 $by_users" \
            data.max_users=500 aggregation=fedavg adapter=lora $tiny "$@" ;;
        tiny_full) each_seed update_rows,update_scores "$by_users" \
            data.max_users=500 aggregation=fedavg adapter=full $tiny "$@" ;;
        sasrec) each_seed update_rows,update_scores "$by_users" \
            data.max_users=500 aggregation=fedavg backbone=sasrec trainer.num_rounds=1 trainer.max_local_steps=10 "$@" ;;
        sasrec_sampled) each_seed update_rows,update_scores,membership,client_inference "$by_users" \
            data.max_users=500 aggregation=fellrec backbone=sasrec objective.num_negatives=1024 trainer.batch_size=32 \
            trainer.learning_rate=3e-3 trainer.num_rounds=10 trainer.max_local_steps=10 trainer.evaluate_every=5 "$@" ;;
        smollm2) each_seed nearest_embedding,logit_lens,inverter,public_tail,gradient \
            "split.head_layers=0,1,2,4,8,15 attack.rows=10 attack.inverter_steps=30" \
            data.max_users=50 data.max_history=5 aggregation=fedavg backbone=smollm2 adapter=lora trainer.num_rounds=1 \
            trainer.max_local_steps=2 trainer.batch_size=4 "$@" ;;
        *) echo "CELLS=$cell is not allowed: tiny, tiny_full, sasrec, sasrec_sampled, smollm2" >&2; exit 2 ;;
    esac
done
[ "$fellrec" = echo ] || $python "$(dirname "$0")/report.py" "$out"
