"""Compare runs from their logs: a table on the terminal, a figure, and a report of tables and figures.

    python tools/compare_runs.py runs/baseline runs/slw --output comparison.png --html report.html

Runs may still be going on. The first one is what the others are compared with. Runs whose names differ only in an
ending such as -seed1234 also get a row together, with mean and spread. docs/metrics.md defines every number.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

# Run from a bare source tree, without installing it: Python puts tools/ on the path, not its parent.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron.errors import run
from megatron.flags import Parser, output_file, positive_number
from megatron.instability.figures import figure_comparison
from megatron.instability.groups import group_runs
from megatron.instability.html_report import write_report
from megatron.instability.quality import time_to_quality
from megatron.instability.report import aligned, comparison_table, verdict
from megatron.instability.setup import setup_of
from megatron.instability.summary import read_runs, summarise
from megatron.instability.tables import groups_table, later_logs, report_tables

MANY = 6
"""Runs beyond which a terminal shows seeds together, and leaves each run to the report."""


def parse() -> argparse.Namespace:
    """The command line."""
    parser = Parser(description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="--save directory of a run, or NAME=DIRECTORY")
    parser.add_argument("--output", type=output_file, metavar="PNG", help="write the figure here")
    parser.add_argument(
        "--html", type=output_file, metavar="FILE", help="write a report of tables and figures, one file"
    )
    parser.add_argument(
        "--target-perplexity",
        type=positive_number,
        nargs="+",
        default=[],
        metavar="PPL",
        help="validation perplexities whose tokens and time to reach are compared, beside the best of the first run",
    )
    parser.add_argument(
        "--group",
        action="append",
        default=[],
        metavar="GROUP=PATTERN",
        help="take the runs whose names match the shell pattern as one setting with several seeds; repeatable",
    )
    parser.add_argument("--brief", action="store_true", help="print the rows to begin with alone")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    return parser.parse_args()


def main() -> None:
    """Print the table, and write the figure and the report."""
    arguments = parse()
    runs = read_runs(arguments.runs)
    summaries = [summarise(run) for run in runs]
    targets = time_to_quality(runs, arguments.target_perplexity)
    groups = group_runs(summaries, targets, arguments.group)
    sentences = verdict(runs, groups)
    if arguments.output is not None:
        figure_comparison(runs, arguments.output)
    if arguments.html is not None:
        write_report(arguments.html, runs, report_tables(summaries, targets, groups), sentences, setup_of(runs))
    if arguments.json:
        report = {
            "runs": [summary.to_dict() for summary in summaries],
            "targets": [target.to_dict() for target in targets],
            "groups": [group.to_dict() for group in groups],
            "verdict": sentences,
            "figure": None if arguments.output is None else str(arguments.output),
            "html": None if arguments.html is None else str(arguments.html),
        }
        print(json.dumps(report, allow_nan=False))
        return
    if groups and len(runs) > MANY:
        seeds = groups_table(groups, brief=True)
        print(aligned([seeds.header, *(row.cells for row in seeds.rows)], arguments.markdown))
    else:
        print(comparison_table(summaries, markdown=arguments.markdown, brief=arguments.brief))
        if len(runs) > 1:
            print(f"\n{sentences}")
    if later := later_logs(summaries):
        print("", *later, sep="\n")
    if arguments.output is not None:
        print(f"\nfigure: {arguments.output}")
    if arguments.html is not None:
        print(f"\nreport: {arguments.html}")


if __name__ == "__main__":
    run(main)
