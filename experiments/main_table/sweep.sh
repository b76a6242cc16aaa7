#!/bin/sh
# Data × family × rule with the small language model that read the public users' histories.
#
#   sh experiments/main_table/sweep.sh OUT ../shared/data/ml-1m ../shared/data/games-5core [OVERRIDE...]
#
# FAMILIES (retrieval generative) and DATA (ml_1m games micro_lens_shaped) of the environment make it smaller.
set -eu
out=$1 ml_1m=$2 games=$3
shift 3
. "$(dirname "$0")/../common.sh"
rules=${RULES:-local,fedavg,uniform,fellrec,persistence,centralized}
tiny="backbone.num_layers=2 backbone.pretrain.steps=150"

source_of() {
    case $1 in
        ml_1m) echo "data=ml_1m data.root=$ml_1m" ;;
        games) echo "data=games data.root=$games data.max_users=6000" ;;
        micro_lens_shaped) echo "data=micro_lens_shaped" ;;
    esac
}
settings_of() {
    case $1_$2 in
        retrieval_micro_lens_shaped) echo "objective=retrieval trainer.max_local_steps=30" ;; # it has 600 items
        retrieval_*) echo "objective=retrieval objective.num_negatives=1024 trainer.max_local_steps=30" ;;
        generative_*) echo "objective=generative ranker=constrained ranker.num_beams=10 data.max_users=1000 trainer.max_local_steps=20" ;;
    esac
}
# shellcheck disable=SC2046,SC2086  # several overrides
for family in ${FAMILIES:-retrieval generative}; do
    for data in ${DATA:-ml_1m games micro_lens_shaped}; do
        cell "${data}_$family" ${BACKBONE:-$tiny} $(source_of "$data") $(settings_of "$family" "$data") data.max_history=5 \
            trainer.batch_size=32 trainer.num_rounds=6 trainer.evaluate_every=3 "aggregation=$rules" "$@"
    done
done
report fellrec-local fellrec-uniform persistence-fellrec
