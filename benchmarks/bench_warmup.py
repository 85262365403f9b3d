"""What a step costs at each length of a sequence length warmup: python benchmarks/bench_warmup.py

The same number of sequences a step at every length: with micro-batches by their tokens (ours), and with micro-batches
of a fixed number of sequences (as the original had them), in processes of their own, in turn. Before that each walks
through all lengths of a warmup twice with a few sequences: what the first walk takes longer are stalls, by compilation
or allocation. Where the time of a short step goes is told apart: its update alone, what a micro-batch costs by itself
(from the two ways at the shortest length), and the reduction of gradients between two processes.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import contestants as c
import measure
import torch
import torch.distributed as dist
from flags import make_parser
from matplotlib.figure import Figure
from rivals import Rival, Rivals

from megatron.errors import UserError, run
from megatron.flags import output_file, positive
from megatron.model.flops import parameter_count

WALK_SEQUENCES = 2
"""Sequences of a step of the walk."""


def main() -> int:
    parser = make_parser(__doc__)
    c.model_arguments(parser)
    parser.add_argument("--global-batch-size", type=positive, default=64, help="of a step, at every length")
    parser.add_argument("--micro-batch-size", type=positive, default=4, help="sequences at full length")
    parser.add_argument("--seqlen-start", type=positive, default=8, help="shortest length; it doubles")
    parser.add_argument("--seqlen-multiple", type=positive, default=8, help="lengths of the walk are multiples of it")
    parser.add_argument("--compile", choices=["auto", "on", "off"], default="auto", help="auto: on a GPU")
    parser.add_argument("--figure", type=output_file, metavar="FILE", help="draw tokens/s by length (.png, .svg)")
    arguments = parser.parse_args()
    sequences, seq_length = arguments.global_batch_size, arguments.seq_length
    if sequences % arguments.micro_batch_size:
        raise UserError(
            f"--global-batch-size {sequences} must be a multiple of --micro-batch-size {arguments.micro_batch_size}"
        )
    if arguments.seqlen_start > seq_length:
        raise UserError(f"--seqlen-start {arguments.seqlen_start} must be at most --seq-length {seq_length}")
    model, vocab_size = c.model_of(arguments)
    bf16 = c.use_bf16(arguments.precision, measure.machine()["bf16"])
    compiled = arguments.compile == "on" or (arguments.compile == "auto" and torch.cuda.is_available())
    lengths = [seq_length]
    while lengths[0] // 2 >= arguments.seqlen_start:
        lengths.insert(0, lengths[0] // 2)

    common = {"sequences": sequences, "bf16": bf16, "compile": compiled, "micro_batch_size": arguments.micro_batch_size}
    with Rivals() as rivals:
        for name, fixed in (("by tokens", False), ("fixed", True)):
            build = partial(c.stopwatch, "ours", model, vocab_size, sequences, fixed_micro_batch=fixed, **common)
            rivals[name] = Rival(build)
        walks = {name: walk(rival, seq_length, arguments.seqlen_multiple) for name, rival in rivals.items()}
        seconds: dict[str, dict[int, list[float]]] = {name: {} for name in rivals}
        for length in lengths:
            steps = {name: partial(rival, "step", length, sequences) for name, rival in rivals.items()}
            for name, values in measure.in_turn(steps, arguments.repeats).items():
                seconds[name][length] = values
        update = measure.medians(measure.in_turn({"": partial(rivals["by tokens"], "update")}, arguments.repeats))[""]
    reduction = reduce_seconds(parameter_count(model, vocab_size), arguments.repeats)

    medians = {name: measure.medians(values) for name, values in seconds.items()}  # type: ignore[arg-type]
    by_tokens, fixed_ = medians["by tokens"], medians["fixed"]
    full = seq_length / by_tokens[seq_length]
    rows = [
        [
            length,
            by_tokens[length],
            sequences * length / by_tokens[length],
            100 * length / by_tokens[length] / full,
            sequences * length / fixed_[length],
            fixed_[length] / by_tokens[length],
        ]
        for length in lengths
    ]
    print(
        f"GPT-2 of {model.num_layers} layers x {model.hidden_size}, vocabulary {vocab_size:,}; {sequences} sequences "
        f"a step, {arguments.micro_batch_size} of {seq_length} tokens a micro-batch, {'bf16' if bf16 else 'fp32'}, "
        f"{'compiled' if compiled else 'eager'}; medians of {arguments.repeats}"
    )
    measure.print_table(
        ["seqlen", "s a step", "tokens/s", f"% of {seq_length}", "tokens/s, fixed", "fixed / ours"], rows
    )
    micro_batches = sequences // arguments.micro_batch_size
    fits = -(-sequences * lengths[0] // (arguments.micro_batch_size * seq_length))
    each = (fixed_[lengths[0]] - by_tokens[lengths[0]]) / max(1, micro_batches - fits)
    print(f"a step of {sequences} x {lengths[0]} tokens: {1000 * by_tokens[lengths[0]]:.1f} ms, of which")
    print(f"  {1000 * update:8.1f} ms  clipping and update, at any length")
    print(f"  {1000 * each:8.1f} ms  each micro-batch by itself: {fits}, or {micro_batches} of fixed size")
    for dtype, took in reduction.items():
        print(f"  {1000 * took:8.1f} ms  would be the sum of gradients over 2 processes in {dtype}, not overlapped")
    for name, found in walks.items():
        print(
            f"a walk through {found['lengths']} lengths, micro-batches {name}: {found['graphs']:.0f} graphs compiled, "
            f"stalls {found['sum']:.1f} s, the longest {found['largest']:.1f} s at length {found['at']}"
        )
    if arguments.figure:
        draw(
            arguments.figure, lengths, {"by tokens (ours)": [row[2] for row in rows], "fixed": [row[4] for row in rows]}
        )
    measure.finish(
        arguments.output,
        {"arguments": vars(arguments), "seconds": seconds, "rows": rows, "walks": walks, "update": update,
         "micro_batch": each, "reduction": reduction, "ratio": {row[0]: row[5] for row in rows}},
    )  # fmt: skip
    return 0


def draw(path: Path, lengths: list[int], ways: dict[str, list[float]]) -> None:
    """Tokens a second by length, for each way to cut a step into micro-batches."""
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.add_subplot()
    for (name, values), style in zip(ways.items(), ("o-", "s--"), strict=True):
        axes.plot(lengths, values, style, label=f"micro-batches {name}")
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("sequence length of the step, the same number of sequences")
    axes.set_ylabel("tokens/s")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def walk(rival: Callable[..., float], seq_length: int, multiple: int) -> dict[str, Any]:
    """Steps at all lengths of a warmup, twice; stalls are what the first of the two took longer."""
    lengths = range(min(multiple, seq_length), seq_length + 1, multiple)
    first, second = ([rival("step", length, WALK_SEQUENCES) for length in lengths] for _ in range(2))
    stalls = [max(0.0, a - b) for a, b in zip(first, second, strict=True)]
    largest = max(stalls)
    return {
        "lengths": len(lengths),
        "graphs": rival("graphs"),
        "sum": sum(stalls),
        "largest": largest,
        "at": lengths[stalls.index(largest)],
    }


def reduce_seconds(elements: int, repeats: int) -> dict[str, float]:
    """Seconds that two processes on this machine (gloo) take to sum tensors of `elements`, by dtype."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with Rivals() as rivals:
        for rank in range(2):
            rivals[str(rank)] = Rival(partial(reducer, rank, port, elements))
        found: dict[str, list[float]] = {}
        for _ in range(repeats + 1):
            for dtype in ("float32", "bfloat16"):
                for rival in rivals.values():
                    rival.ask(dtype)
                found.setdefault(dtype, []).append(max(rival.answer() for rival in rivals.values()))
    return measure.medians({dtype: values[1:] for dtype, values in found.items()})


def reducer(rank: int, port: int, elements: int) -> Callable[[str], float]:
    """One of two processes: its answer to a dtype is the seconds of one sum over both."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)

    def answer(dtype: str) -> float:
        tensor = torch.ones(elements, dtype=getattr(torch, dtype))
        dist.barrier()
        return measure.timed(lambda: dist.all_reduce(tensor) and None)

    return answer


if __name__ == "__main__":
    run(main)
