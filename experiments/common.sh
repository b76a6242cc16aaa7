# Read by the sweeps: `. "$(dirname "$0")/../common.sh"` after `out=FOLDER`. Each cell of a sweep is one `fellrec compare`
# in a folder of its own under OUT; a cell that is done is not run again, so a sweep that was stopped goes on.
#
# From the environment: RULES and SEEDS make a sweep smaller, BACKBONE replaces SASRec where that is what is trained (such as
# "backbone=hf backbone.path=MODEL adapter=lora"); FELLREC and PYTHON say what is run.
fellrec=${FELLREC:-fellrec} python=${PYTHON:-python}
seeds=${SEEDS:-0,1,2}

# What the small cells have in common: SASRec, with the softmax over 1,024 drawn items and the true one.
sasrec="${BACKBONE:-backbone=sasrec objective.num_negatives=1024} references.show=[]"
small="trainer.batch_size=32 trainer.learning_rate=3e-3 trainer.num_rounds=12 trainer.max_local_steps=30 trainer.evaluate_every=4"

# cell NAME OVERRIDE...: one comparison
cell() {
    name=$1
    shift
    [ -f "$out/$name/comparison/comparison.json" ] || $fellrec compare "$@" "seed=$seeds" "run_dir=$out/$name"
}

# report [PAIR...]: tables and a figure of all cells, into OUT
report() {
    [ "$fellrec" = echo ] || $python "$(dirname "$0")/../report.py" "$out" "$@"
}
