"""Print a run before it starts, from its schedules alone: tools/plan_run.py --config RECIPE [flags]"""

from __future__ import annotations

import json
import sys
from pathlib import Path

# Run from a source tree, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron.arguments import build_parser, parse_config, parse_count
from megatron.errors import run
from megatron.model.plan import plan_table, plan_totals


def main() -> None:
    """Parse the command line, plan, and print."""
    parser = build_parser("plan_run.py", __doc__)
    group = parser.add_argument_group("Planner")
    group.add_argument("--json", action="store_true", help="print one JSON object")
    group.add_argument("--at", type=parse_count, metavar="N", help="the progress after N iterations, not at the end")
    config, arguments = parse_config(parser, sys.argv[1:])
    totals = plan_totals(config, at=arguments.at)
    print(json.dumps(totals) if arguments.json else plan_table(config, totals))


if __name__ == "__main__":
    run(main)
