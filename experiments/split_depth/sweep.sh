#!/bin/sh
# The sweep over the depth k of the head, measured and planned, and its report.
#
#   sh experiments/split_depth/sweep.sh OUT data=ml_1m data.root=../shared/data/ml-1m
#
# OUT is a new directory; further overrides apply to `fellrec compare` and `fellrec plan`. Tests set environment variables
# for a smaller sweep.
set -eu
out=$1
shift
python=${PYTHON:-python}
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"  # the number changes the order of sums, and so results
mkdir -p "$out"

# shellcheck disable=SC2086  # several overrides
$python -m fellrec compare "$@" ${MODEL:-backbone.num_layers=6} split.head_layers="${DEPTHS:-0,1,2,3,4}" \
    split.transport=none,inprocess trainer.num_rounds="${ROUNDS:-4}" trainer.max_local_steps=5 trainer.batch_size=16 \
    trainer.evaluate_every=2 run_dir="$out/measured"

$python -m fellrec plan "$@" split.head_layers="${PLANNED_DEPTHS:-$(seq -s , 0 30)}" data.max_train_samples=1024 \
    objective=generative backbone=hf backbone.config=llama_2_7b adapter=lora --format json > "$out/llama_2_7b.json"

$python "$(dirname "$0")/report.py" "$out/measured/comparison/comparison.json" "$out/llama_2_7b.json" "$out"
