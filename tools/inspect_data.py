"""Show what a preprocessed dataset holds: sizes, counts, lengths of documents, decoded samples.

    python tools/inspect_data.py data/books_text_document --documents 3 \\
        --vocab-file gpt2-vocab.json --merge-file gpt2-merges.txt
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from the source tree, installed or not

from megatron.data.indexed_dataset import IndexedDataset
from megatron.data.inspection import describe
from megatron.errors import run
from megatron.flags import Parser, count, positive, some_text
from megatron.tokenizer.build import TOKENIZER_TYPES, TokenizerFiles, add_file_flags


def parse_arguments() -> argparse.Namespace:
    """The flags."""
    parser = Parser(description=__doc__)
    parser.add_argument("prefix", type=some_text, metavar="PREFIX", help="the data, without .bin or .idx")
    parser.add_argument(
        "--documents", type=count, default=3, metavar="N", help="documents to show, spread over the data"
    )
    parser.add_argument("--sample-tokens", type=positive, default=64, metavar="N", help="tokens of each to show")
    group = parser.add_argument_group("Tokenizer (without one, samples are shown as token ids)")
    group.add_argument("--tokenizer-type", choices=TOKENIZER_TYPES, help="what the files hold (default: by the files)")
    add_file_flags(group)
    return parser.parse_args()


def main() -> None:
    """Print the description."""
    arguments = vars(parse_arguments())
    dataset = IndexedDataset(arguments.pop("prefix"))
    shown = {name: arguments.pop(name) for name in ("documents", "sample_tokens")}
    kind = arguments.pop("tokenizer_type")
    files = [arguments[name] for name in ("vocab_file", "merge_file", "tokenizer_file")]
    tokenizer = None
    if kind or any(files):
        kind = kind or TOKENIZER_TYPES[arguments["tokenizer_file"] is not None]
        tokenizer = TokenizerFiles(kind, **arguments).build()
    for line in describe(dataset, tokenizer, **shown):
        print(line)


if __name__ == "__main__":
    run(main)
