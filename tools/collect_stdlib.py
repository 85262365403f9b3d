"""Collect the Python standard library's sources and docstrings as a corpus: tools/collect_stdlib.py OUT.jsonl"""

from __future__ import annotations

import sys
from pathlib import Path

# Run from a source tree, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron.data.stdlib_corpus import write_stdlib_corpus
from megatron.errors import run
from megatron.flags import Parser, output_file


def main() -> None:
    """Parse the command line and write the corpus."""
    parser = Parser(description=__doc__)
    parser.add_argument("output", type=output_file, metavar="OUT.jsonl", help="the JSON lines file to write")
    output = parser.parse_args().output
    documents, size = write_stdlib_corpus(output)
    print(f"{output}: {documents:,} documents, {size / 1e6:.1f} MB of text")


if __name__ == "__main__":
    run(main)
