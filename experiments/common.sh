# Sourced by the sweeps: `. "$(dirname "$0")/../common.sh"` after `out=FOLDER`. Each cell of a sweep is one `fellrec compare`
# in its own directory under OUT; a finished cell is not run again and a begun one is resumed, so an interrupted sweep can
# be restarted.
#
# Environment variables: RULES and SEEDS select runs, BACKBONE replaces SASRec in sweeps that use it (such as
# "backbone=hf backbone.path=MODEL adapter=lora"); FELLREC and PYTHON are the commands to run.
#
# All cells run with one thread per process, or with OMP_NUM_THREADS: the number changes the order of sums, and so results.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
fellrec=${FELLREC:-fellrec} python=${PYTHON:-python}
seeds=${SEEDS:-0,1,2}

# Settings of the small cells: SASRec, with the softmax over 1,024 sampled items and the target.
sasrec="${BACKBONE:-backbone=sasrec objective.num_negatives=1024} references.show=[]"
small="trainer.batch_size=32 trainer.learning_rate=3e-3 trainer.num_rounds=12 trainer.max_local_steps=30 trainer.evaluate_every=4"

# cell NAME OVERRIDE...: one comparison
cell() {
    name=$1
    shift
    if [ -f "$out/$name/comparison/comparison.json" ]; then return; fi
    if [ -f "$out/$name/runs.json" ]; then
        $fellrec compare "resume=$out/$name"
    else
        $fellrec compare "$@" "seed=$seeds" "run_dir=$out/$name"
    fi
}

# run NAME OVERRIDE...: one run
run() {
    name=$1
    shift
    if [ -f "$out/$name/finished.json" ]; then return; fi
    if [ -f "$out/$name/config.yaml" ]; then
        $fellrec train "resume=$out/$name"
    else
        $fellrec train "$@" "run_dir=$out/$name"
    fi
}

# attack NAME OVERRIDE...: attacks on a run
attack() {
    name=$1
    shift
    [ -f "$out/$name/attack/attack.json" ] || $fellrec attack "$out/$name" "$@"
}

# report [PAIR...]: write tables and a figure of all cells into OUT
report() {
    [ "$fellrec" = echo ] || $python "$(dirname "$0")/../report.py" "$out" "$@"
}
