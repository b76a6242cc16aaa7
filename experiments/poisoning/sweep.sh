#!/bin/sh
# One of eight clients misbehaves, on generated data: each kind of misbehaviour against each rule.
#
#   sh experiments/poisoning/sweep.sh OUT [OVERRIDE...]
set -eu
out=$1
shift
. "$(dirname "$0")/../common.sh"

sasrec="${BACKBONE:-backbone=sasrec backbone.hidden_size=32} references.show=[]"
small="trainer.batch_size=32 trainer.learning_rate=3e-3 trainer.num_rounds=5 trainer.max_local_steps=5 trainer.evaluate_every=5"

# shellcheck disable=SC2086  # several overrides
for kind in ${KINDS:-none label_flip sign_flip scale copy not_finite}; do
    cell "$kind" $sasrec $small data.reader.num_users=800 data.reader.num_items=100 partition=random \
        partition.num_clients=8 participation.on_failure=skip "aggregation=${RULES:-fedavg,fellrec,median,trimmed_mean,krum,norm_clipping}" \
        callbacks.user_groups.columns=[] '~callbacks.model' '~callbacks.diagnostics' tracking.uri=null \
        "poison.clients=[1]" "poison.kind=$kind" "$@"
done
[ "$fellrec" = echo ] || $python "$(dirname "$0")/report.py" "$out"
