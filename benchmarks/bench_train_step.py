"""Tokens a second of one training step, ours and others': python benchmarks/bench_train_step.py

All train the same GPT-2 (random weights and tokens, no dropout, clipping, fused AdamW) on the same rows, each in a
process of its own, in turn. MFU is by the planner's FLOPs (attention counted dense) over `--peak`. `lean` is a loop in
plain PyTorch as a person would write it, `huggingface` transformers' GPT-2 in such a loop; `-eager` is without
torch.compile, which is our default on a CPU, and what the others' times are divided by there.
"""

from __future__ import annotations

from functools import partial

import contestants as c
import measure
import torch
from flags import make_parser
from rivals import Rival, Rivals

from megatron.errors import UserError, run
from megatron.flags import positive, positive_number

H200_PEAK = 989e12


def main() -> int:
    parser = make_parser(__doc__, repeats=5)
    c.model_arguments(parser)
    names = [f"{name}{how}" for name in c.MAKERS for how in ("", "-eager")]
    parser.add_argument("--global-batch-size", type=positive, default=4, help="of a step")
    parser.add_argument("--micro-batch-size", type=positive, help="sequences of a micro-batch (default: all)")
    parser.add_argument("--contestants", nargs="+", choices=names, default=names)
    parser.add_argument(
        "--peak",
        type=positive_number,
        help="FLOP/s of the machine (default: 989e12 on a GPU, on a CPU what large products reach)",
    )
    arguments = parser.parse_args()
    sequences, seq_length = arguments.global_batch_size, arguments.seq_length
    micro_batch = arguments.micro_batch_size or sequences
    if sequences % micro_batch:
        raise UserError(f"--global-batch-size {sequences} must be a multiple of --micro-batch-size {micro_batch}")
    model, vocab_size = c.model_of(arguments)
    bf16 = c.use_bf16(arguments.precision, measure.machine()["bf16"])
    peak = arguments.peak or (H200_PEAK if torch.cuda.is_available() else c.peak_flops(bf16))

    with Rivals() as rivals:
        for name in arguments.contestants:
            plain = name.removesuffix("-eager")
            own = {"sequences": sequences, "micro_batch_size": micro_batch} if plain == "ours" else {}
            options = own or {"micro_batch": micro_batch}
            options |= {"bf16": bf16, "compile": plain == name}
            rivals[name] = Rival(partial(c.stopwatch, plain, model, vocab_size, sequences, **options))
        first = {name: measure.timed(partial(rival, "step", seq_length, sequences)) for name, rival in rivals.items()}
        steps = {name: partial(rival, "step", seq_length, sequences) for name, rival in rivals.items()}
        seconds = measure.in_turn(steps, arguments.repeats)

    medians = measure.medians(seconds)
    tokens, flops = sequences * seq_length, c.step_flops(model, vocab_size, sequences, seq_length)
    default = medians.get("ours" if torch.cuda.is_available() else "ours-eager")  # as --compile auto has it
    rows = [
        [name, took, tokens / took, 100 * flops / took / peak, took / (default or took), first[name]]
        for name, took in medians.items()
    ]
    print(
        f"GPT-2 of {model.num_layers} layers x {model.hidden_size}, vocabulary {vocab_size:,}; {sequences} x "
        f"{seq_length} tokens a step, {micro_batch} sequences a micro-batch, {'bf16' if bf16 else 'fp32'}; "
        f"{flops / tokens / 1e6:.1f} MFLOP a token; peak {peak / 1e9:,.0f} GFLOP/s; medians of {arguments.repeats}"
    )
    measure.print_table(["contestant", "s a step", "tokens/s", "MFU %", "time / ours", "first step s"], rows)
    ratio = {name: row[4] for name, row in zip(medians, rows, strict=True)}
    measure.finish(
        arguments.output,
        {"arguments": vars(arguments), "flops": flops, "peak": peak, "first": first, "seconds": seconds, "ratio": ratio,
         "rows": rows},
    )  # fmt: skip
    return 0


if __name__ == "__main__":
    run(main)
