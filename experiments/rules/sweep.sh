#!/bin/sh
# Every rule: Amazon Games with SASRec, MovieLens-1M with the tiny backbone, all its parameters or LoRA.
#
#   sh experiments/rules/sweep.sh OUT ../shared/data/ml-1m ../shared/data/games-5core [OVERRIDE...]
#
# OUT/DATA has a cell for each rule, with the candidates of candidates_DATA.txt, and the table of report.py. The environment
# variables DATA and RULES select data and rules.
set -eu
out=$1 ml_1m=$2 games=$3
shift 3
here=$(dirname "$0")
SEEDS=${SEEDS:-0}
. "$here/../common.sh"

# study DATA ROUNDS OVERRIDE...
study() {
    data=$1 rounds=$2
    shift 2
    grep -v '^#' "$here/candidates_$data.txt" | while IFS=: read -r name lines; do
        case " ${RULES:-$name} " in *" $name "*) ;; *) continue ;; esac
        # A round of an asynchronous rule is one change of the model: as many rounds as make the same local steps.
        case $name in
            fedasync) length=$((5 * rounds)) more=participation.slowdown=4 ;;
            fedbuff) length=$((5 * rounds / 2)) more=participation.slowdown=4 ;;
            *) length=$rounds more= ;;
        esac
        runs=$(printf '%s' "$lines" | sed "s/^ *//; s/ *| */\n/g" | sed "s/.*/--run '&'/" | tr '\n' ' ')
        # shellcheck disable=SC2086  # there may be no further override
        eval "cell \"\$name\" trainer.num_rounds=\$length trainer.evaluate_every=\$((length / 2)) \$more \"\$@\" $runs" \
            < /dev/null
    done
    [ "$fellrec" = echo ] || $python "$here/report.py" "$out"
}

kept=$out
for each in ${DATA:-games ml_1m ml_1m_lora}; do
    out=$kept/$each
    # shellcheck disable=SC2086  # several overrides
    case $each in
        games)
            study games 8 $sasrec data=games "data.root=$games" data.max_users=8000 trainer.max_local_steps=50 \
                trainer.learning_rate=2e-3 "$@"
            ;;
        ml_1m) study ml_1m 4 experiment=ml_1m_small "data.root=$ml_1m" "references.show=[]" "$@" ;;
        ml_1m_lora) study ml_1m_lora 4 experiment=ml_1m_small "data.root=$ml_1m" adapter=lora "references.show=[]" "$@" ;;
        *) continue ;;
    esac
done
