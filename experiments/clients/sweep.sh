#!/bin/sh
# Number and similarity of clients, on Amazon Games. All clients together take 100 local steps per round.
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
# One user has too few interactions to train from scratch: start from the language model pre-trained on 1,350 public users.
cell per_user ${BACKBONE:-backbone.num_layers=2 backbone.pretrain.steps=600} adapter=lora objective.num_negatives=1024 \
    references.show=[] data=games "data.root=$games" data.max_users=1500 data.public_user_rate=0.9 partition=per_user $small \
    trainer.local_epochs=3 "aggregation=$rules" "$@"
report
