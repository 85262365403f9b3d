"""Collect the Python standard library's sources and docstrings as a corpus: tools/collect_stdlib.py OUT.jsonl"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

# Run from a source tree, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron.data.stdlib_corpus import write_stdlib_corpus
from megatron.errors import run


def main() -> None:
    """Parse the command line and write the corpus."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("output", type=Path, help="the JSON lines file to write")
    output = parser.parse_args().output
    documents, size = write_stdlib_corpus(output)
    print(f"{output}: {documents:,} documents, {size / 1e6:.1f} MB of text")


if __name__ == "__main__":
    run(main)
