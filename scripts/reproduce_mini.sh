#!/usr/bin/env bash
# The paper's comparisons in miniature, several seeds each: bash scripts/reproduce_mini.sh cpu|h200
#   [--data-path PREFIX] [--output DIR] [--jobs N] [--minutes N] [--dry-run]
#
# cpu: 24 runs of some minutes each on a corpus that it makes itself; h200: 6 runs on one GPU, on --data-path.
# Finished runs are not made again and interrupted ones go on where they were; --minutes stops in time, saved.
# Ends with one report over all runs: report.html, report.json and comparison.png in --output.
set -euo pipefail
usage() { sed -n '2,7s/^# \{0,1\}//p' "$0"; }
fail() { echo "error: $1" >&2; exit 2; }

target="${1:-}"
case "$target" in
    cpu | h200) shift ;;
    -h | --help) usage; exit 0 ;;
    *) fail "expected cpu or h200, found ${target:-nothing}; see --help" ;;
esac
data="" output="" jobs=1 minutes="" dry=""
while [ $# -gt 0 ]; do
    case "$1" in
        --data-path) data="${2:?--data-path needs the prefix of a dataset}"; shift 2 ;;
        --output) output="${2:?--output needs a directory}"; shift 2 ;;
        --jobs) jobs="${2:?--jobs needs a number}"; shift 2 ;;
        --minutes) minutes="${2:?--minutes needs a number}"; shift 2 ;;
        --dry-run) dry=1; shift ;;
        -h | --help) usage; exit 0 ;;
        *) fail "unknown argument $1; see --help" ;;
    esac
done
[[ "$jobs" =~ ^[1-9][0-9]*$ ]] || fail "--jobs $jobs: expected a whole number above 0"
[[ -z "$minutes" || "$minutes" =~ ^[1-9][0-9]*$ ]] || fail "--minutes $minutes: expected a whole number above 0"
[ "$target" = cpu ] || [ -n "$data" ] || fail "h200 needs --data-path, the prefix of a dataset made by preprocess_data.py"

# recipe, learning rate, seed: the baseline and the warmup over learning rates, the alternatives at one of them.
runs() {
    local recipe lr seed
    if [ "$target" = cpu ]; then
        for seed in 1234 1235 1236; do
            for lr in 1e-2 2e-2 3e-3; do
                echo "baseline $lr $seed"
                echo "slw $lr $seed"
            done
            [ $seed = 1236 ] || for recipe in slw-from-8 two-stage batch-size-warmup; do echo "$recipe 1e-2 $seed"; done
        done
    else
        printf '%s\n' "gpt3-125m-baseline 2.4e-2 1234" "gpt3-125m-slw 2.4e-2 1234" \
            "deep-baseline 1e-2 1234" "deep-slw 1e-2 1234" "deep-baseline 3e-2 1234" "deep-slw 3e-2 1234"
    fi
}

root="$(cd "$(dirname "$0")/.." && pwd)"
output="${output:-$root/runs/mini-$target}"
python="${PYTHON:-python3}"
threads=""
[ -n "$dry" ] || mkdir -p "$output"
if [ "$target" = cpu ]; then
    if [ -z "$dry" ]; then
        [ -n "$data" ] || bash "$root/scripts/prepare_corpus.sh" "$output/corpus"
        source "$root/scripts/environment.sh" base
        python=python
    fi
    data="${data:-$output/corpus/corpus_text_document}"
    cores="$(getconf _NPROCESSORS_ONLN)"
    threads=$((cores / jobs > 0 ? cores / jobs : 1)) # so that runs beside one another do not fight for cores
fi

begun=$SECONDS stopped="" failed=""
train() { # recipe lr seed
    local name="$1-lr$2-seed$3" left=()
    [ -z "$minutes" ] || left=(--exit-duration-in-mins "$((minutes - (SECONDS - begun) / 60))")
    local command=("$python" "$root/pretrain_gpt2.py" --config "$root/recipes/mini-$target/$1.yaml"
        --lr "$2" --seed "$3" --data-path "$data" --save "$output/$name" --load "$output/$name" "${left[@]}")
    if [ -n "$dry" ]; then
        echo "${command[*]}"
        return
    fi
    if ended "$output/$name"; then
        echo "$name: made already"
        return
    fi
    ${threads:+env OMP_NUM_THREADS=$threads} "${command[@]}" >> "$output/$name.log" 2>&1 &
    local status=0 child=$!
    trap 'kill -TERM $child' TERM # which saves and leaves
    wait $child || status=$?
    if [ $status -gt 128 ]; then # the trap ended the wait, not the run
        status=0
        wait $child || status=$?
    fi
    case $status in
        0) echo "$name: $(grep '^validation' "$output/$name.log" | tail -n 1)" ;;
        75) echo "$name: stopped and saved" ;;
        *) echo "$name: $(tail -n 1 "$output/$name.log")" ;;
    esac
    ! ended "$output/$name" || return 0 # a run that diverges is a result too
    return $status
}

ended() { # run: whether it has come to an end of its own
    [ -e "$1/exit.json" ] && grep -qE '"status": "(finished|diverged)"' "$1/exit.json"
}

collect() { # waits for one run; one that was stopped ends the whole, one that failed only itself
    local status=0
    wait -n || status=$?
    case $status in
        0) ;;
        75) stopped=1 ;;
        *) [ -n "$stopped" ] || failed=1 ;; # a signal to this script ends the wait as well
    esac
}
trap 'stopped=1; kill $(jobs -pr) 2> /dev/null || true' INT TERM
names=() count=0 total="$(runs | wc -l)"
while read -r recipe lr seed; do
    names+=("$output/$recipe-lr$lr-seed$seed")
    count=$((count + 1))
    while [ "$(jobs -pr | wc -l)" -ge "$jobs" ]; do collect; done
    [ -z "$minutes" ] || [ $(((SECONDS - begun) / 60)) -lt "$minutes" ] || stopped=1
    [ -z "$stopped" ] || break
    [ -n "$dry" ] || echo "run $count of $total: $recipe, learning rate $lr, seed $seed"
    if [ -n "$dry" ]; then train "$recipe" "$lr" "$seed"; else train "$recipe" "$lr" "$seed" & fi
done < <(runs)
[ -z "$dry" ] || exit 0
while [ -n "$(jobs -pr)" ]; do collect; done

seen=()
for name in "${names[@]}"; do [ ! -e "$name/metrics.jsonl" ] || seen+=("$name"); done
[ ${#seen[@]} -gt 0 ] || { echo "error: no run has taken a step: see $output/*.log" >&2; exit 1; }
"$python" "$root/tools/compare_runs.py" "${seen[@]}" --json > "$output/report.json"
"$python" "$root/tools/compare_runs.py" "${seen[@]}" --html "$output/report.html" --output "$output/comparison.png"
[ -z "$failed" ] || { echo "error: some runs failed, and are missing in the report or end early there" >&2; exit 1; }
[ -z "$stopped" ] || { echo "stopped: run this script again with the same arguments to go on" >&2; exit 75; }
