#!/bin/sh
# 1,024 training samples against all, on Amazon Games, with the small language model that read the public users' histories.
#
#   sh experiments/few_shot/sweep.sh OUT ../shared/data/games-5core [OVERRIDE...]
set -eu
out=$1 games=$2
shift 2
. "$(dirname "$0")/../common.sh"

for samples in 1024 null; do
    cell "samples_$samples" data=games "data.root=$games" data.max_users=2500 data.max_train_samples=$samples \
        trainer.batch_size=16 trainer.num_rounds=6 trainer.max_local_steps=8 trainer.evaluate_every=3 \
        trainer.precision=bf16-mixed references.show=[markov_decay,item_knn,pretrained] \
        "aggregation=${RULES:-local,fedavg,fellrec,centralized}" "$@"
done
report
