#!/usr/bin/env bash
# From raw text to two trained models and their comparison: bash scripts/quickstart.sh
#   [--input FILE] [--output DIR] [--train-tokens N]
#
# Collects a corpus (the Python standard library's sources and docstrings, or your own JSON lines or text), trains a
# tokenizer, preprocesses, pretrains the same small GPT-2 twice to the same number of tokens, at full length and with
# sequence length warmup, and compares them. Made for 2 CPU cores; interrupted, it goes on where it was.
set -euo pipefail
source "$(dirname "$0")/environment.sh" base

absolute() { python -c 'import os, sys; print(os.path.abspath(sys.argv[1]))' "$1"; }
step() { printf '\n== %s\n' "$1"; }

input="" output="" tokens=1200K
while [ $# -gt 0 ]; do
    case "$1" in
        --input) input="$(absolute "${2:?--input needs a file}")"; shift 2 ;;
        --output) output="$(absolute "${2:?--output needs a directory}")"; shift 2 ;;
        --train-tokens) tokens="${2:?--train-tokens needs a number}"; shift 2 ;;
        -h | --help) sed -n '2,7s/^# \{0,1\}//p' "$0"; exit 0 ;;
        *) echo "error: unknown argument $1; see --help" >&2; exit 2 ;;
    esac
done
if [ -n "$input" ] && [ ! -f "$input" ]; then
    echo "error: --input $input: no such file" >&2
    exit 1
fi
if [ -z "$output" ]; then
    output="$root/runs/quickstart${input:+-$(basename "$input")}"
fi
mkdir -p "$output"
cd "$root"

# A second call goes on where the first was, so it must be about the same text and tokens.
made_from="$output/made-from"
now="input ${input:-the standard library} $([ -z "$input" ] || cksum < "$input") tokens $tokens"
[ -e "$made_from" ] || echo "$now" > "$made_from"
if [ "$(cat "$made_from")" != "$now" ]; then
    echo "error: $output was made from \"$(cat "$made_from")\", now \"$now\": delete it or give another --output" >&2
    exit 1
fi

bash scripts/prepare_corpus.sh "$output" "$input"

train() { # recipe
    python pretrain_gpt2.py --config "recipes/quickstart/$1.yaml" --data-path "$output/corpus_text_document" \
        --train-tokens "$tokens" --save "$output/$1" --load "$output/$1" && return
    local status=$?
    [ $status -ne 75 ] || echo "stopped and saved: run this script again with the same arguments to go on" >&2
    exit $status
}
step "pretraining at full length"
train baseline
step "pretraining with sequence length warmup"
train slw

step "comparison"
python tools/compare_runs.py "$output/baseline" "$output/slw" --output "$output/comparison.png"
