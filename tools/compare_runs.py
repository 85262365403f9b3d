"""Compare runs from their logs: a table on the terminal and a figure.

    python tools/compare_runs.py runs/baseline runs/slw --output comparison.png

Runs may still be going on. The first one is what the others are compared with.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

# Run from a bare source tree, without installing it: Python puts tools/ on the path, not its parent.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron.errors import run
from megatron.instability.figures import figure_comparison
from megatron.instability.report import comparison_table, verdict
from megatron.instability.summary import read_runs, summarise


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="--save directory of a run, or NAME=DIRECTORY")
    parser.add_argument("--output", type=Path, metavar="PNG", help="write the figure here")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    return parser.parse_args()


def main() -> None:
    """Print the table and write the figure."""
    arguments = parse()
    runs = read_runs(arguments.runs)
    summaries = [summarise(run) for run in runs]
    if arguments.output is not None:
        figure_comparison(runs, arguments.output)
    if arguments.json:
        figure = None if arguments.output is None else str(arguments.output)
        print(json.dumps({"runs": [s.to_dict() for s in summaries], "verdict": verdict(runs), "figure": figure}))
        return
    print(comparison_table(summaries, markdown=arguments.markdown))
    if len(runs) > 1:
        print(f"\n{verdict(runs)}")
    if arguments.output is not None:
        print(f"\nfigure: {arguments.output}")


if __name__ == "__main__":
    run(main)
