#!/bin/sh
# The small language model on the data of all clients of MovieLens-1M, compared with the decayed Markov baseline.
#
#   sh experiments/markov_bar/sweep.sh OUT ../shared/data/ml-1m [OVERRIDE...]
set -eu
out=$1 ml_1m=$2
shift 2
SEEDS=${SEEDS:-0} # 14 minutes each
. "$(dirname "$0")/../common.sh"
tiny="backbone.num_layers=2 backbone.pretrain.steps=150 backbone.max_position_embeddings=1024"

# shellcheck disable=SC2086  # several overrides
cell ml_1m ${BACKBONE:-$tiny} data=ml_1m "data.root=$ml_1m" objective=retrieval data.max_history=30 \
    trainer.batch_size=16 trainer.num_rounds=20 trainer.max_local_steps=60 trainer.evaluate_every=5 \
    trainer.learning_rate=2e-3 trainer.learning_rate_decay=cosine references.show=[markov_decay] \
    "aggregation=${RULES:-centralized}" "$@"
report
