#!/bin/sh
# Three domains with one or two clients each, every client with the catalogue of its domain: films, games and toys.
#
#   sh experiments/cross_domain/sweep.sh OUT ../shared/data/ml-1m ../shared/data/games-5core ../shared/data/toys-5core [OVERRIDE...]
#
# The environment variables MODELS (tiny minilm) and CLIENTS (1 2) select cells, USERS is the number of users of each domain,
# MINILM replaces `backbone=minilm`.
set -eu
out=$1 ml_1m=$2 games=$3 toys=$4
shift 4
. "$(dirname "$0")/../common.sh"
rules=${RULES:-local,fedavg,uniform,fellrec,updatemixing,centralized}
users=${USERS:-2000}
domains="data=federation data.members=[ml_1m,games,toys] data.max_history=5"
for domain in ml_1m games toys; do
    eval "folder=\$$domain"
    domains="$domains data.member.$domain.root=$folder data.member.$domain.max_users=$users"
done
settings_of() {
    case $1 in
        tiny) echo "backbone.num_layers=2 backbone.pretrain.steps=300 trainer.learning_rate=1e-3" ;;
        minilm) echo "${MINILM:-backbone=minilm} trainer.learning_rate=5e-4" ;;
    esac
}
# shellcheck disable=SC2046,SC2086  # several overrides
domain_cell() {
    name=$1 model=$2 clients=$3
    shift 3
    cell "$name" $(settings_of "$model") $domains partition.num_clients=$clients objective.num_negatives=1024 \
        references.show=[markov_decay,item_knn,pretrained] trainer.batch_size=32 trainer.num_rounds=8 \
        trainer.max_local_steps=30 trainer.evaluate_every=2 "$@"
}
for model in ${MODELS:-tiny minilm}; do
    for clients in ${CLIENTS:-1 2}; do
        domain_cell "${model}_$clients" $model $clients "aggregation=$rules" "$@"
        domain_cell "${model}_${clients}_halves" $model $clients --run aggregation=fedavg \
            --run "aggregation=fellrec aggregation.heating=false" --run "aggregation=fellrec aggregation.attention=false" "$@"
    done
done
report fellrec-local fellrec-uniform updatemixing-fedavg updatemixing-fellrec
[ "$fellrec" = echo ] || $python "$(dirname "$0")/report.py" "$out"
