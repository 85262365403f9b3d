"""Flags that benchmarks share, checked before anything is measured."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron.counts import parse_count


def make_parser(description: str | None, *, repeats: int = 3) -> argparse.ArgumentParser:
    """A parser with --repeats and --output."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--repeats", type=positive, default=repeats, help=f"medians of so many (default: {repeats})")
    parser.add_argument("--output", type=new_file, metavar="FILE", help="JSON file to write")
    return parser


def positive(text: str) -> int:
    """A whole number from 1, such as 10M."""
    try:
        value = parse_count(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, found {text!r}")
    return value


def new_file(text: str) -> str:
    """The name of a file that can be written: its directory is there."""
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"expected a file in a directory that exists, found {text!r}")
    return text
