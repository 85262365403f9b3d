"""Flags that benchmarks share, checked before anything is measured."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron.flags import Parser, output_file, positive


def make_parser(description: str | None, *, repeats: int = 3) -> Parser:
    """A parser with --repeats and --output."""
    parser = Parser(description=description)
    parser.add_argument("--repeats", type=positive, default=repeats, metavar="N", help="medians of so many")
    parser.add_argument("--output", type=output_file, metavar="FILE", help="JSON file to write")
    return parser
