#!/usr/bin/env bash
# From raw text to two trained models and their comparison: bash scripts/quickstart.sh
#   [--input FILE] [--output DIR] [--train-tokens N]
#
# Collects a corpus (the Python standard library's sources and docstrings, or your own JSON lines or text), trains a
# tokenizer, preprocesses, pretrains the same small GPT-2 twice to the same number of tokens, at full length and with
# sequence length warmup, and compares them. Made for 2 CPU cores; interrupted, it goes on where it was.
set -euo pipefail

fail() { echo "error: $1" >&2; exit 2; }
absolute() { case "$1" in /*) echo "$1" ;; *) echo "$PWD/$1" ;; esac; }

input="" output="" tokens=""
while [ $# -gt 0 ]; do
    case "$1" in
        --input | --output | --train-tokens)
            [ -n "${2:-}" ] || fail "$1 needs a value; see --help"
            case "$1" in
                --input) input="$(absolute "$2")" ;;
                --output) output="$(absolute "$2")" ;;
                *) tokens="$2" ;;
            esac
            shift 2
            ;;
        -h | --help) sed -n '2,7s/^# \{0,1\}//p' "$0"; exit 0 ;;
        *) fail "unknown argument $1; see --help" ;;
    esac
done
[ ! -d "$input" ] || fail "--input $input is a folder: give a file"
[ -z "$input" ] || [ -f "$input" ] || fail "--input $input: no such file"

source "$(dirname "$0")/environment.sh" base
output="${output:-$root/runs/quickstart${input:+-$(basename "$input")}}"
cd "$root"
step() { printf '\n== %s\n' "$1"; }

# Three lines: the number of tokens, flags of both runs, flags of the warmup. A run shorter than the recipe's has shorter
# warmups, in proportion: else its sequence length would never be full.
planned="$(python - "$tokens" <<'PYTHON'
import sys

from megatron.arguments import build_parser, parse_config
from megatron.errors import run

RECIPE = ["--config", "recipes/quickstart/slw.yaml"]


def plan():
    usual = parse_config(build_parser(), RECIPE)[0]
    most = tokens = usual.training.train_tokens
    if sys.argv[1]:
        tokens = parse_config(build_parser(), [*RECIPE, "--train-tokens", sys.argv[1]])[0].training.train_tokens
    both, warmup = [], []
    if tokens != most:
        both = ["--train-tokens", str(tokens)]
    if tokens < most:
        both += ["--lr-warmup-iters", str(usual.learning_rate.lr_warmup_iters * tokens // most)]
        warmup = ["--seqlen-warmup-iters", str(max(1, usual.seqlen_warmup.seqlen_warmup_iters * tokens // most))]
    parse_config(build_parser(), [*RECIPE, *both, *warmup])
    print(f"{tokens // 1000}K" if tokens % 1000 == 0 else tokens, " ".join(both), " ".join(warmup), sep="\n")


run(plan)
PYTHON
)"
{ read -r tokens; read -ra both; read -ra warmup; } <<< "$planned"$'\n\n'
mkdir -p "$output"

# A second call goes on where the first was, so it must be about the same text.
made_from="$output/made-from" tokenizer="$output/tokenizer"
now="${input:-the standard library}"
[ -z "$input" ] || now+=$'\n'"$(cksum < "$input")"
if [ ! -e "$tokenizer/tokenizer.json" ]; then
    echo "$now" > "$made_from"
elif [ "$(cat "$made_from" 2> /dev/null)" != "$now" ]; then
    then="$(head -n 1 "$made_from" 2> /dev/null || true)"
    [ "$then" != "${input:-the standard library}" ] || then="$input as it was then"
    echo "error: --output $output holds a tokenizer made from $then, not from ${input:-the standard library}:" \
        "give another --output, or delete that one" >&2
    exit 1
fi

bash scripts/prepare_corpus.sh "$output" "$input"

# Runs of another number of tokens than the first ones have a directory of their own.
runs="$output"
[ -e "$output/made-for" ] || echo "$tokens" > "$output/made-for"
[ "$(cat "$output/made-for")" = "$tokens" ] || runs="$output/$tokens"
mkdir -p "$runs"

train() { # recipe, heading, flags
    local name="$1" heading="$2" status=0
    shift 2
    if grep -qs '"status": "finished"' "$runs/$name/exit.json"; then
        step "$heading (done before)"
        return
    fi
    step "$heading"
    python pretrain_gpt2.py --config "recipes/quickstart/$name.yaml" --data-path "$output/corpus_text_document" \
        --vocab-file "$tokenizer/vocab.json" --merge-file "$tokenizer/merges.txt" "$@" \
        --save "$runs/$name" --load "$runs/$name" || status=$?
    case $status in
        0) ;;
        75) echo "stopped and saved: run this script again with the same arguments to go on" >&2 ;;
        130) echo "interrupted: run this script again with the same arguments to go on from the last checkpoint" >&2 ;;
    esac
    [ $status -eq 0 ] || exit $status
}
python - "$tokenizer/vocab.json" <<'PYTHON'
import json, math, sys
size = len(json.load(open(sys.argv[1], encoding="utf-8")))
print(f"\nThe loss is lower the better a model predicts the next token. A model that knows nothing has {math.log(size):.1f},")
print(f"the logarithm of the {size:,} tokens of the vocabulary, and minutes of training bring it to 5 or 6. What counts is the")
print("loss of the lines that begin with validation, on text that is not trained on. A step is one update of the model,")
print("seqlen the length of the pieces of text it learns from; the loss of a step's line is the mean of the last 10 steps.")
print("More words: docs/how-it-works.md.")
PYTHON
train baseline "pretraining at full length" ${both[@]+"${both[@]}"}
train slw "pretraining with sequence length warmup" ${both[@]+"${both[@]}"} ${warmup[@]+"${warmup[@]}"}

step "comparison"
python tools/compare_runs.py "$runs/baseline" "$runs/slw" --brief --output "$runs/comparison.png" \
    --html "$runs/report.html"

short="${runs#"$root"/}"
step "what next, in $root"
cat <<TEXT
source .venv/bin/activate
    # once in each terminal
python tools/generate_samples_gpt2.py --load $short/slw --prompt "The" --out-seq-length 60 --temperature 0.8
    # text by the model: of one so small, trained for minutes, it is gibberish
python tools/compare_runs.py $short/baseline $short/slw
    # every number of both; the report with figures, for a browser: $short/report.html
    # (could it be chance? docs/miniature.md has 24 runs of this model: at this rate seeds alone lie 1.0 to 1.3 apart)
python tools/watch_run.py $short/slw
    # a run as it stands or goes on: in a second terminal, while the first one trains
TEXT
