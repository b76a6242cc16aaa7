#!/bin/sh
# The effect of FELLRec's α and β, on Amazon Games.
#
#   sh experiments/alpha_beta/sweep.sh OUT ../shared/data/games-5core [OVERRIDE...]
set -eu
out=$1 games=$2
shift 2
. "$(dirname "$0")/../common.sh"

# shellcheck disable=SC2086  # several overrides
cell games $sasrec $small data=games "data.root=$games" data.max_users=6000 "$@" --run "aggregation=local,fedavg" \
    --run "aggregation=fellrec aggregation.alpha=${ALPHAS:-0.2,0.7,2} aggregation.beta=${BETAS:-1,5,20}"
report
