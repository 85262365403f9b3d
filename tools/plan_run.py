"""Print a run before it starts, and its memory, from its flags alone: tools/plan_run.py --config RECIPE [flags]"""

from __future__ import annotations

import json
import sys
from pathlib import Path

# Run from a source tree, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron.arguments import build_parser, parse_config
from megatron.counts import parse_count
from megatron.errors import EXIT_FAILURE, EXIT_FINISHED, run
from megatron.model.plan import memory_table, plan_memory, plan_table, plan_totals


def main() -> int:
    """Parse the command line, plan, and print; EXIT_FAILURE where the run does not fit --gpu-memory."""
    parser = build_parser("plan_run.py", __doc__)
    group = parser.add_argument_group("Planner")
    group.add_argument("--json", action="store_true", help="print one JSON object")
    group.add_argument("--at", type=parse_count, metavar="N", help="the progress after N iterations, not at the end")
    group.add_argument(
        "--world-size", type=parse_count, metavar="N", help="number of GPUs [--tensor-model-parallel-size]"
    )
    group.add_argument(
        "--gpu-memory",
        type=float,
        metavar="GB",
        help="say whether the run fits in this much a GPU; the status is 1 if not",
    )
    config, arguments = parse_config(parser, sys.argv[1:])
    totals = plan_totals(config, at=arguments.at)
    ranks = config.parallel.tensor_model_parallel_size if arguments.world_size is None else arguments.world_size
    memory = plan_memory(config, ranks, arguments.gpu_memory)
    if arguments.json:
        print(json.dumps(totals | {"memory": memory}))
    else:
        print(plan_table(config, totals), memory_table(memory), sep="\n\n")
    return EXIT_FINISHED if memory.get("fits", True) else EXIT_FAILURE


if __name__ == "__main__":
    run(main)
