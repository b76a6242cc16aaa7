#!/bin/sh
# Targets of a small generative model: one title per row or every title, softmax over the vocabulary or the catalogue.
#
#   sh experiments/generative_targets/sweep.sh OUT ../shared/data/ml-1m [OVERRIDE...]
set -eu
out=$1 ml_1m=$2
shift 2
SEEDS=${SEEDS:-0} # 2 minutes each
. "$(dirname "$0")/../common.sh"
tiny="backbone.num_layers=2 backbone.pretrain.steps=150"

# shellcheck disable=SC2086  # several overrides
for softmax in vocabulary catalogue; do
    for one in true false; do
        [ $one = true ] && targets=one || targets=every
        cell "${softmax}_$targets" ${BACKBONE:-$tiny} data=ml_1m "data.root=$ml_1m" data.max_users=3000 objective=generative \
            objective.softmax=$softmax objective.one_target_per_row=$one ranker=constrained ranker.num_beams=10 \
            trainer.batch_size=32 trainer.num_rounds=2 trainer.max_local_steps=100 trainer.evaluate_every=2 \
            trainer.learning_rate=2e-3 trainer.learning_rate_decay=cosine references.show=[popularity] \
            "aggregation=${RULES:-centralized}" "$@"
    done
done
report
