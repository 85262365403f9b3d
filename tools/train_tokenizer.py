"""Train a byte-level BPE tokenizer on the user's text: tokenizer.json, and the same as vocab.json and merges.txt.

python tools/train_tokenizer.py --input books.jsonl.gz --vocab-size 8192 --output data/tokenizer
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from the source tree, installed or not

from megatron.data.chunks import TEXT_UNITS, InputFile, find_inputs
from megatron.data.documents import read_texts
from megatron.errors import note, run
from megatron.flags import Parser, count, output_directory, positive
from megatron.tokenizer.training import check_free, train_bpe


def parse_arguments() -> argparse.Namespace:
    """The flags."""
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="FILE",
        help="files or quoted globs: .jsonl (.json, .ndjson), .txt, .parquet; also .gz, .zst",
    )
    parser.add_argument(
        "--input-format",
        choices=("jsonl", "text", "parquet"),
        help="what the files hold, where their endings do not tell",
    )
    parser.add_argument(
        "--text-unit",
        choices=TEXT_UNITS,
        default=TEXT_UNITS[0],
        help="what is one document in a plain text file: the file, a paragraph (blank lines stand between them) or a "
        "line that is not blank",
    )
    parser.add_argument("--json-keys", nargs="+", default=["text"], metavar="KEY", help="keys (or columns) to take")
    parser.add_argument(
        "--vocab-size",
        type=positive,
        required=True,
        metavar="N",
        help="tokens: 256 bytes, merges and <|endoftext|>",
    )
    parser.add_argument(
        "--min-frequency",
        type=count,
        default=2,
        metavar="N",
        help="rarer pairs are not joined",
    )
    parser.add_argument(
        "--output", type=output_directory, required=True, metavar="DIR", help="where the three files go"
    )
    parser.add_argument(
        "--log-interval",
        type=count,
        default=1000,
        metavar="N",
        help="documents between two progress lines; 0: none",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace those that are already there")
    return parser.parse_args()


def read_all(files: Sequence[InputFile], keys: Sequence[str], log_interval: int) -> Iterator[str]:
    """Every text, with progress lines; and a word when the last is read, as what follows has no progress to show."""
    yield from read_texts(files, keys, log_interval=log_interval)
    if log_interval:
        note("all text is read; the merges are being learnt")


def main() -> None:
    """Train, and say what was written."""
    arguments = parse_arguments()
    if not arguments.overwrite:
        check_free(Path(arguments.output))
    files = find_inputs(arguments.input, arguments.input_format, arguments.text_unit)
    trained = train_bpe(
        read_all(files, arguments.json_keys, arguments.log_interval),
        arguments.vocab_size,
        arguments.output,
        min_frequency=arguments.min_frequency,
    )
    fewer = (
        ""
        if trained.vocab_size == arguments.vocab_size
        else f" (the text has no more than these, not {arguments.vocab_size:,})"
    )
    print(f"{trained.vocab_size:,} tokens{fewer}: {trained.tokenizer_file}, {trained.vocab_file}, {trained.merge_file}")


if __name__ == "__main__":
    run(main)
