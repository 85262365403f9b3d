"""Write a checkpoint's weights in a format that other programs read.

    python tools/convert_checkpoint.py --load runs/slw --to safetensors --output slw.safetensors --dtype bf16

On how many ranks and in which layout the checkpoint was saved does not matter.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from the source tree, installed or not

from megatron.checkpointing.export import DTYPES, FORMATS, export_weights
from megatron.errors import run


def parse_arguments() -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--load",
        type=Path,
        required=True,
        metavar="DIR",
        help="a run or its checkpoints, of which the newest is taken, or one checkpoint",
    )
    parser.add_argument(
        "--to", choices=FORMATS, required=True, help="safetensors: the model's weights in one file, by their names here"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the file to write")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="type of the weights (default: as saved)")
    parser.add_argument("--force", action="store_true", help="replace FILE where it exists")
    return parser.parse_args()


def main() -> None:
    """Convert, and say what was written."""
    arguments = parse_arguments()
    print(export_weights(arguments.load, arguments.output, dtype=arguments.dtype, force=arguments.force))


if __name__ == "__main__":
    run(main)
