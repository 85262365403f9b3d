"""Print a run before it starts, its memory and its time, from its flags: tools/plan_run.py --config RECIPE [flags]"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

# Run from a source tree, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron.arguments import build_parser, parse_config
from megatron.console import repetition
from megatron.data.datasets import training_tokens
from megatron.data.vocabulary import vocabulary_size
from megatron.errors import EXIT_FAILURE, EXIT_FINISHED, UserError, run
from megatron.flags import Parser, positive, positive_number
from megatron.instability.step_cost import fit_step_cost
from megatron.instability.summary import read_runs
from megatron.model.cost import cost_argument, plan_time, time_table
from megatron.model.plan import memory_table, plan_memory, plan_table, plan_totals


def add_own_flags(parser: Parser) -> None:
    """What the planner is asked, beside the flags of the run."""
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--at", type=positive, metavar="N", help="the progress after N iterations, not at the end")
    parser.add_argument(
        "--world-size", type=positive, metavar="N", help="number of GPUs (default: --tensor-model-parallel-size)"
    )
    parser.add_argument(
        "--gpu-memory",
        type=positive_number,
        metavar="GB",
        help="say whether the run fits in this much a GPU; the status is 1 if not",
    )
    costs = parser.add_mutually_exclusive_group()
    costs.add_argument(
        "--cost",
        type=cost_argument,
        metavar="A,B",
        help="print the hours: a step takes A + B * sequence length seconds at --global-batch-size",
    )
    costs.add_argument(
        "--fit",
        nargs="+",
        metavar="RUN",
        help="the same with A and B fitted to the logs of runs of this model on the machines to be used: their --save "
        "directories, or metrics.jsonl; they need steps of at least two lengths",
    )


def main() -> int:
    """Parse the command line, plan, and print; EXIT_FAILURE where the run does not fit --gpu-memory."""
    parser = build_parser(__doc__, add_own_flags)
    config, arguments = parse_config(parser, sys.argv[1:])
    config = replace(config, tokenizer=replace(config.tokenizer, vocab_size=vocabulary_size(config)))
    fit = None if arguments.fit is None else fit_step_cost(read_runs(arguments.fit), config)
    cost = arguments.cost if fit is None else fit.cost
    totals = plan_totals(config, at=arguments.at)
    tables = [plan_table(config, totals)]
    if cost is not None:
        totals["time"] = plan_time(config, totals, cost)
        tables.append(time_table(totals["time"]))
    if fit is not None:
        totals["time"]["fit"] = fit.to_dict()
        tables[-1] += f"\n{fit}"
    ranks = config.parallel.tensor_model_parallel_size if arguments.world_size is None else arguments.world_size
    memory = plan_memory(config, ranks, arguments.gpu_memory)
    if arguments.json:
        print(json.dumps(totals | {"memory": memory}))
    else:
        try:
            corpus = training_tokens(config.data) or 1
            notes = repetition(totals["consumed_samples"], (corpus - 1) // config.model.seq_length)
        except UserError as error:  # a plan needs no data
            notes = [str(error)]
        print(*tables, memory_table(memory), *(f"note: {text}" for text in notes), sep="\n\n")
    return EXIT_FINISHED if memory.get("fits", True) else EXIT_FAILURE


if __name__ == "__main__":
    run(main)
