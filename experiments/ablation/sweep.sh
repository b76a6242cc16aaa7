#!/bin/sh
# Ablation of FELLRec (attention, heating, raw parameters, released code) on MovieLens-1M and Amazon Games.
#
#   sh experiments/ablation/sweep.sh OUT ../shared/data/ml-1m ../shared/data/games-5core [OVERRIDE...]
set -eu
out=$1 ml_1m=$2 games=$3
shift 3
. "$(dirname "$0")/../common.sh"

# shellcheck disable=SC2086  # several overrides
variants() {
    name=$1
    shift
    cell "$name" $sasrec $small "$@" --run "aggregation=local,fedavg" \
        --run "aggregation=fellrec aggregation.attention=true,false aggregation.heating=true,false" \
        --run "aggregation=fellrec aggregation.similarity=parameters" \
        --run "aggregation=fellrec aggregation.fidelity=released_code"
}
variants games data=games "data.root=$games" data.max_users=6000 "$@"
variants ml_1m data=ml_1m "data.root=$ml_1m" "$@"
report
