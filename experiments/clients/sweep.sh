#!/bin/sh
# How many clients there are, and how alike they are, on Amazon Games. All clients together take 100 steps a round.
#
#   sh experiments/clients/sweep.sh OUT ../shared/data/games-5core [OVERRIDE...]
set -eu
out=$1 games=$2
shift 2
. "$(dirname "$0")/../common.sh"
rules=${RULES:-local,fedavg,fellrec}

# shellcheck disable=SC2086  # several overrides
clients() {
    name=$1 steps=$2
    shift 2
    cell "$name" $sasrec data=games "data.root=$games" data.max_users=6000 $small \
        trainer.max_local_steps=$steps "aggregation=$rules" "$@"
}
for number in 3 5 10 20; do
    clients "kmeans_$number" $((100 / number)) partition.num_clients=$number "$@"
done
clients random_5 20 partition=random "$@"
clients per_user 1 partition=per_user data.max_users=130 "$@"
report
