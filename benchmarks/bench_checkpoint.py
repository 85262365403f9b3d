"""How long a save holds up training, at once and in the background: python benchmarks/bench_checkpoint.py

Trains a GPT-2 for a few steps and saves between them, in turn without, at once and in the background. The time held up
is that of the call that saves; in the background the step meanwhile is timed too.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from functools import partial
from pathlib import Path

import contestants as c
import measure
from flags import make_parser

from megatron.checkpointing.saver import Saver
from megatron.checkpointing.state import collect
from megatron.errors import run
from megatron.flags import positive


def main() -> int:
    parser = make_parser(__doc__)
    c.model_arguments(parser)
    parser.add_argument("--global-batch-size", type=positive, default=2, help="of a step")
    parser.add_argument("--save", metavar="DIR", help="where to save (default: a temporary directory)")
    parser.set_defaults(model_size="117M", seq_length=256)
    arguments = parser.parse_args()

    model, vocab_size = c.model_of(arguments)
    bf16 = c.use_bf16(arguments.precision, measure.machine()["bf16"])
    ours = c.Ours(model, vocab_size, sequences=arguments.global_batch_size, bf16=bf16, compile=False)
    rows = c.random_rows(arguments.global_batch_size, arguments.seq_length, vocab_size)
    train = partial(ours, rows, arguments.seq_length)
    train()
    tensors = collect(ours.state.model, ours.state.optimizer)
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    with tempfile.TemporaryDirectory(dir=arguments.save) as name:
        home = Path(name)
        make = partial(Saver, world=ours.world, report=lambda line: None, keep_last=2)
        with (
            make(home / "at-once", background=False) as at_once,
            make(home / "background", background=True) as background,
        ):
            iterations = itertools.count(1)
            started = 0.0

            def save(saver: Saver) -> None:
                nonlocal started
                started = time.perf_counter()
                saver.save(iteration=next(iterations), tensors=tensors, state={}, config_text="")

            def wait() -> float:
                background.wait()
                return time.perf_counter() - started

            seconds = measure.in_turn(
                {
                    "a step": train,
                    "held up by a save at once (read back included)": partial(save, at_once),
                    "held up by a save in the background": partial(save, background),
                    "a step during that save": train,
                    "until it was on the disk": wait,
                },
                arguments.repeats,
                warmups=0,
            )
    medians = measure.medians(seconds)
    print(
        f"{arguments.model_size}, {arguments.global_batch_size} x {arguments.seq_length} tokens a step on "
        f"{ours.world.device}, {size / 1e9:.2f} GB a checkpoint, medians of {arguments.repeats}"
    )
    step = medians["a step"]
    rows = [{"what": name, "seconds": took, "ratio to a step": took / step} for name, took in medians.items()]
    measure.print_table([*rows[0]], [[*row.values()] for row in rows])
    measure.finish(arguments.output, {"arguments": vars(arguments), "bytes": size, "rows": rows, "seconds": seconds})
    return 0


if __name__ == "__main__":
    run(main)
