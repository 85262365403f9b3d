"""Print runs in the shape of the paper's Table 2, with the printed figures beside them: tools/table2.py [RUN ...]

A run's zero-shot numbers are those that tools/evaluate_zeroshot.py has left in its directory. A run called as a recipe,
gpt2-117m-b512=runs/mine, or gpt2-117m-b512-slw60k@200000=... for an early checkpoint, stands beside the paper's.
Without runs: all that the paper prints.
"""

from __future__ import annotations

import sys
from pathlib import Path

# Run from a source tree, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron.errors import run
from megatron.evaluation.table2 import table2
from megatron.flags import Parser
from megatron.instability.summary import read_runs

RECIPES = Path(__file__).resolve().parents[1] / "recipes"


def main() -> None:
    """Print the table."""
    parser = Parser(description=__doc__)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="--save directory of a run, or NAME=DIRECTORY")
    arguments = parser.parse_args()
    print(table2(read_runs(arguments.runs) if arguments.runs else [], RECIPES))


if __name__ == "__main__":
    run(main)
