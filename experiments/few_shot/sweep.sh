#!/bin/sh
# 1,024 training samples against all, on Amazon Games, with the small language model pre-trained on public users.
#
#   sh experiments/few_shot/sweep.sh OUT ../shared/data/games-5core [OVERRIDE...]
set -eu
out=$1 games=$2
shift 2
. "$(dirname "$0")/../common.sh"
tiny="backbone.num_layers=2 backbone.pretrain.steps=150"

# shellcheck disable=SC2086  # several overrides
for samples in 1024 null; do
    cell "samples_$samples" ${BACKBONE:-$tiny} data=games "data.root=$games" data.max_users=6000 data.max_history=5 \
        objective.num_negatives=1024 data.max_train_samples=$samples trainer.batch_size=32 trainer.num_rounds=6 \
        trainer.max_local_steps=30 trainer.evaluate_every=3 references.show=[markov_decay,item_knn,pretrained] \
        "aggregation=${RULES:-local,fedavg,fellrec,centralized}" "$@"
done
report
