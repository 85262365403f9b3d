#!/usr/bin/env bash
# Text, tokenizer and dataset for a first run: bash scripts/prepare_corpus.sh OUTPUT [INPUT]
#
# Collects the Python standard library's sources and docstrings, or takes INPUT (JSON lines, text or parquet), trains a
# tokenizer, and writes OUTPUT/corpus_text_document.bin and .idx. What is there already is not made again.
set -euo pipefail
output="${1:?prepare_corpus.sh needs the directory to write to}" input="${2:-}"
source "$(dirname "$0")/environment.sh" base
step() { # heading, what the step makes; false where that is there
    local before=""
    [ ! -e "$2" ] || before=" (done before)"
    printf '\n== %s%s\n' "$1" "$before"
    [ -z "$before" ]
}

mkdir -p "$output"
if [ -z "$input" ]; then
    input="$output/stdlib.jsonl"
    ! step "corpus" "$input" || python "$root/tools/collect_stdlib.py" "$input"
else
    printf '\n== corpus: %s\n' "$input"
fi

name="$(printf %s "$input" | tr '[:upper:]' '[:lower:]')"
name="${name%.gz}"
case "${name%.zst}" in
    *.jsonl | *.json | *.ndjson | *.parquet) text_unit=file ;;
    *) text_unit=paragraph ;; # a text file that is one document leaves nothing to validate on
esac

tokenizer="$output/tokenizer"
! step "tokenizer" "$tokenizer/tokenizer.json" ||
    python "$root/tools/train_tokenizer.py" --input "$input" --text-unit "$text_unit" --vocab-size 4096 \
        --output "$tokenizer" --overwrite # of what was stopped halfway, if anything is there

! step "preprocessing" "$output/corpus_text_document.idx" ||
    python "$root/tools/preprocess_data.py" --input "$input" --text-unit "$text_unit" --output-prefix "$output/corpus" \
        --append-eod --workers 2 --vocab-file "$tokenizer/vocab.json" --merge-file "$tokenizer/merges.txt"
