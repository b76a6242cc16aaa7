#!/bin/sh
# Every rule on MovieLens-1M and on Amazon Games with SASRec, three seeds; figures and intervals.
#
#   sh experiments/does_fellrec_help/sweep.sh OUT ../shared/data/ml-1m ../shared/data/games-5core
#
# OUT is a new folder. RULES and SEEDS of the environment make it smaller; further overrides follow the folders, such as
# backbone=tiny, or backbone=hf backbone.path=MODEL adapter=lora.
set -eu
out=$1 ml_1m=$2 games=$3
shift 3
fellrec=${FELLREC:-fellrec}
rules=${RULES:-local,fedavg,fellrec,persistence,centralized} seeds=${SEEDS:-0,1,2}

$fellrec compare data=ml_1m "data.root=$ml_1m" data.max_history=20 backbone=sasrec trainer.num_rounds=12 \
    trainer.max_local_steps=60 trainer.evaluate_every=3 "aggregation=$rules" "seed=$seeds" "run_dir=$out/ml_1m" "$@"

$fellrec compare data=games "data.root=$games" data.max_users=8000 backbone=sasrec trainer.num_rounds=8 \
    trainer.max_local_steps=40 trainer.evaluate_every=4 "aggregation=$rules" "seed=$seeds" "run_dir=$out/games" "$@"
