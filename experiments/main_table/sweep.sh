#!/bin/sh
# Data × family × rule with the small language model pre-trained on public users.
#
#   sh experiments/main_table/sweep.sh OUT ../shared/data/ml-1m ../shared/data/games-5core [OVERRIDE...]
#
# The environment variables FAMILIES (retrieval generative) and DATA (ml_1m games micro_lens_shaped) select cells.
set -eu
out=$1 ml_1m=$2 games=$3
shift 3
. "$(dirname "$0")/../common.sh"
rules=${RULES:-local,fedavg,uniform,fellrec,persistence,updatemixing,centralized}
source_of() {
    case $1 in
        ml_1m) echo "data=ml_1m data.root=$ml_1m" ;;
        games) echo "data=games data.root=$games data.max_users=6000" ;;
        micro_lens_shaped) echo "data=micro_lens_shaped" ;;
    esac
}
# A model of this size cannot spell all titles: train it to select among them, with every line of a prompt as a target.
writing="objective=generative objective.one_target_per_row=false objective.softmax=catalogue ranker=constrained ranker.num_beams=10"
settings_of() {
    case $1_$2 in
        retrieval_micro_lens_shaped) echo "objective=retrieval data.max_history=5" ;; # it has 600 items
        retrieval_*) echo "objective=retrieval objective.num_negatives=1024 data.max_history=5" ;;
        generative_ml_1m) echo "$writing data.max_history=10 data.max_users=3000" ;;
        # An epoch has fewer than 30 steps.
        generative_games) echo "$writing data.max_history=10 data.max_users=4000 trainer.local_epochs=2" ;;
        generative_*) echo "$writing data.max_history=10 trainer.local_epochs=2 trainer.learning_rate=2e-3" ;;
    esac
}
tiny="backbone.num_layers=2"
pretraining_of() {
    case $1_$2 in
        retrieval_*) echo "backbone.pretrain.steps=150" ;;
        generative_games | generative_micro_lens_shaped) echo "backbone.pretrain.steps=300 backbone.pretrain.batch_size=32" ;; # short histories
        generative_*) echo "backbone.pretrain.steps=1500 backbone.pretrain.batch_size=32" ;;
    esac
}
# shellcheck disable=SC2046,SC2086  # several overrides
for family in ${FAMILIES:-retrieval generative}; do
    for data in ${DATA:-ml_1m games micro_lens_shaped}; do
        cell "${data}_$family" ${BACKBONE:-$tiny $(pretraining_of "$family" "$data")} $(source_of "$data") \
            $(settings_of "$family" "$data") trainer.batch_size=32 trainer.num_rounds=6 trainer.max_local_steps=30 \
            trainer.evaluate_every=3 "aggregation=$rules" "$@"
    done
done
report fellrec-local fellrec-uniform persistence-fellrec updatemixing-fellrec
