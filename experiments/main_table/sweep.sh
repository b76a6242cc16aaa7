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
rules=${RULES:-local,fedavg,fellrec,persistence,centralized}

source_of() {
    case $1 in
        ml_1m) echo "data=ml_1m data.root=$ml_1m" ;;
        games) echo "data=games data.root=$games" ;;
        micro_lens_shaped) echo "data=micro_lens_shaped" ;;
    esac
}
settings_of() {
    case $1 in
        retrieval) echo "objective=retrieval" ;;
        generative) echo "objective=generative ranker=constrained ranker.num_beams=10" ;;
    esac
}
# shellcheck disable=SC2046  # several overrides
for family in ${FAMILIES:-retrieval generative}; do
    for data in ${DATA:-ml_1m games micro_lens_shaped}; do
        cell "${data}_$family" $(source_of "$data") $(settings_of "$family") data.max_users=1000 data.max_history=6 \
            trainer.precision=bf16-mixed trainer.batch_size=16 trainer.num_rounds=6 trainer.max_local_steps=10 \
            trainer.evaluate_every=3 "aggregation=$rules" "$@"
    done
done
report persistence-fellrec persistence-local
