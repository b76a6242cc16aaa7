#!/bin/sh
# Every rule, tuned on validation with three configurations each, then run with three seeds: MovieLens-1M, Amazon Games, SASRec.
#
#   sh experiments/does_fellrec_help/sweep.sh OUT ../shared/data/ml-1m ../shared/data/games-5core [OVERRIDE...]
#
# OUT/tuning/DATA has the tuning runs (seed 0), OUT/DATA the comparison of the selected settings. The environment variable
# DATA selects data sets.
set -eu
out=$1 ml_1m=$2 games=$3
shift 3
. "$(dirname "$0")/../common.sh"

# shellcheck disable=SC2086  # several overrides
study() {
    name=$1
    shift
    common="$sasrec trainer.evaluate_every=4"
    finals=$seeds kept=$out
    seeds=0 out=$kept/tuning
    cell "$name" $common "$@" --run "aggregation=local,fedavg,uniform,centralized trainer.learning_rate=1e-3,2e-3,4e-3" \
        --run "aggregation=fellrec aggregation.alpha=0.7 trainer.learning_rate=1e-3,2e-3" \
        --run "aggregation=fellrec aggregation.alpha=0.2 trainer.learning_rate=2e-3" \
        --run "aggregation=persistence aggregation.exponent=1 trainer.learning_rate=1e-3,2e-3" \
        --run "aggregation=persistence aggregation.exponent=3 trainer.learning_rate=2e-3" \
        --run "aggregation=updatemixing aggregation.own_share=0,0.2 aggregation.server_learning_rate=1 trainer.learning_rate=2e-3" \
        --run "aggregation=updatemixing aggregation.own_share=0.2 aggregation.server_learning_rate=1.5 trainer.learning_rate=2e-3"
    seeds=$finals out=$kept
    [ "$fellrec" = echo ] && return
    chosen=$($python "$(dirname "$0")/../chosen.py" "$out/tuning/$name/comparison/comparison.json")
    eval "cell \"\$name\" \$common \"\$@\" $chosen"
}
for data in ${DATA:-ml_1m games}; do
    case $data in
        ml_1m) study ml_1m data=ml_1m "data.root=$ml_1m" trainer.num_rounds=20 trainer.max_local_steps=60 "$@" ;;
        games)
            study games data=games "data.root=$games" data.max_users=8000 trainer.num_rounds=16 \
                trainer.max_local_steps=50 "$@"
            ;;
    esac
done
report fellrec-local fellrec-uniform persistence-fellrec updatemixing-local updatemixing-uniform updatemixing-fellrec \
    updatemixing-persistence
