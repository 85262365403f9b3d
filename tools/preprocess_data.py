"""Turn raw text into the trainer's data, PREFIX_KEY_document.bin and .idx (Megatron's format).

    python tools/preprocess_data.py --input books.jsonl.gz --output-prefix data/books --append-eod --workers 2 \\
        --tokenizer-type GPT2BPETokenizer --vocab-file gpt2-vocab.json --merge-file gpt2-merges.txt
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from the source tree, installed or not

from megatron import old_flags
from megatron.data.chunks import TEXT_UNITS, find_inputs
from megatron.data.preprocessing import PreprocessConfig, preprocess
from megatron.errors import note, run
from megatron.flags import Parser, count, output_prefix, positive, positive_number
from megatron.tokenizer.build import TOKENIZER_TYPES, TokenizerFiles, add_file_flags


def parse_arguments() -> argparse.Namespace:
    """The flags, with Megatron's names."""
    parser = Parser(description=__doc__)
    group = parser.add_argument_group("Input")
    group.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="FILE",
        help="files or quoted globs: .jsonl (.json, .ndjson; one object a line), .txt (see "
        "--text-unit), .parquet; the first two also with .gz or .zst",
    )
    group.add_argument(
        "--input-format",
        choices=("jsonl", "text", "parquet"),
        help="what the files hold, where their endings do not tell",
    )
    group.add_argument(
        "--text-unit",
        choices=TEXT_UNITS,
        default=TEXT_UNITS[0],
        help="what is one document in a plain text file: the file, a paragraph (blank lines stand between them) or a "
        "line that is not blank",
    )
    group.add_argument(
        "--json-keys",
        nargs="+",
        default=["text"],
        metavar="KEY",
        help="keys (or columns) to take; each gives a dataset of its own",
    )
    group.add_argument(
        "--skip-bad",
        type=count,
        default=0,
        metavar="N",
        help="pass over up to N bad documents (empty, invalid JSON or UTF-8, key missing) and count "
        "them; one more is an error",
    )
    group.add_argument(
        "--max-document-mb",
        type=positive_number,
        default=128,
        metavar="MB",
        help="a larger line, paragraph or text file is a bad document",
    )
    group = parser.add_argument_group("Tokenizer")
    group.add_argument(
        "--tokenizer-type",
        default=TOKENIZER_TYPES[0],
        choices=TOKENIZER_TYPES,
        help="GPT2BPETokenizer reads --vocab-file and --merge-file, HFTokenizer reads --tokenizer-file",
    )
    add_file_flags(group)
    group.add_argument("--append-eod", action="store_true", help="end each document with it")
    group = parser.add_argument_group("Output")
    group.add_argument(
        "--output-prefix",
        type=output_prefix,
        required=True,
        metavar="PREFIX",
        help="writes PREFIX_KEY_document.bin, .idx and .json",
    )
    group.add_argument("--overwrite", action="store_true", help="replace a dataset that is already there")
    group.add_argument(
        "--workers",
        type=positive,
        default=1,
        metavar="N",
        help="processes that encode; the output does not depend on their number",
    )
    group.add_argument(
        "--log-interval",
        type=count,
        default=1000,
        metavar="N",
        help="documents between two progress lines, rounded up to whole pieces of work; 0: none",
    )
    old_flags.add_preprocessing(parser)
    return parser.parse_args()


def main() -> None:
    """Preprocess, and say what was written."""
    arguments = vars(parse_arguments())
    names = ("tokenizer_type", "vocab_file", "merge_file", "tokenizer_file", "eod_token")
    tokenizer = TokenizerFiles(**{name: arguments.pop(name) for name in names})
    inputs = find_inputs(arguments["input"], arguments["input_format"], arguments["text_unit"])
    summary = preprocess(PreprocessConfig(tokenizer=tokenizer, **arguments))
    for bad in summary.skipped[:10]:
        print(f"skipped {bad}", file=sys.stderr)
    megabytes = summary.input_bytes / 1e6
    print(
        f"{summary.documents:,} documents, {summary.tokens:,} tokens from {megabytes:,.1f} MB in "
        f"{summary.seconds:.1f} s ({megabytes / summary.seconds:.2f} MB/s), {len(summary.skipped)} bad ones skipped"
    )
    for prefix in summary.prefixes:
        print(f"{prefix}.bin, .idx, .json")
    if summary.documents == 1 and [file.unit for file in inputs] == ["file"]:
        note(
            "one plain text file is one document, and whole documents are what training, validation and test get: "
            "--text-unit paragraph (or line) makes many of it, --overwrite replaces this one"
        )


if __name__ == "__main__":
    run(main)
