"""What a step of training pays for being watched: python benchmarks/bench_overhead.py

The statistics of Adam's moments, the losses by position, and the log (loss ratios, metrics.jsonl, TensorBoard, the
progress line) are timed alone, `--calls` times each, by the objects of a run, every one as if it were due at each step;
losses by position are counted whole, although some sum of them is needed anyway. Steps with and without statistics and
log, in turn, check the sum. A share is a part over the step measured, and over one of `--step-tokens`, whose clipping
and update take as long as here, and whose forward and backward passes and losses by position grow with its tokens.
What a checkpoint costs: bench_checkpoint.py.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from io import TextIOWrapper
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import contestants as c
import measure
import numpy as np
import torch
from flags import make_parser

from megatron import console, metrics
from megatron.config import Config, ModelConfig, OptimizerConfig, TrainingConfig
from megatron.data.batch import Batch
from megatron.errors import run
from megatron.flags import positive
from megatron.optimizer.moment_statistics import moment_statistics
from megatron.pacing.plan import StepPlan
from megatron.training.loop import Run
from megatron.training.step import PositionLosses
from pretrain_gpt2 import forward_step

PAPER_STEP = 512 * 1024
"""Tokens of a step of the paper's smaller batch at full length."""


@dataclass(frozen=True)
class Part:
    """Something that a step pays for."""

    name: str
    call: Callable[[], object]
    by_token: bool = False
    """Its time grows with the tokens of the step."""
    of_log: bool = False
    """Counted in "the log of a step" already."""


class Terminal(TextIOWrapper):
    """A terminal that nobody watches."""

    def __init__(self) -> None:
        super().__init__(open(os.devnull, "wb"), encoding="utf-8")  # noqa: SIM115  (closed with the wrapper)

    def isatty(self) -> bool:
        return True


def main() -> int:
    parser = make_parser(__doc__)
    c.model_arguments(parser)
    parser.add_argument("--global-batch-size", type=positive, default=2, help="of the step measured")
    parser.add_argument("--step-tokens", type=positive, default=PAPER_STEP, help="of the step to scale to (512 x 1024)")
    parser.add_argument("--calls", type=positive, default=20, help="of each part")
    parser.add_argument("--compile", choices=["on", "off"], default="on", help="with torch.compile")
    parser.set_defaults(model_size="117M")
    arguments = parser.parse_args()
    # Calls that follow at once would be left out, where the steps of a run, which take longer, write every time.
    metrics.TENSORBOARD_SECONDS = console.REDRAW_SECONDS = 0.0

    model, vocab_size = c.model_of(arguments)
    bf16 = c.use_bf16(arguments.precision, measure.machine()["bf16"])
    ours = c.Ours(
        model, vocab_size, sequences=arguments.global_batch_size, bf16=bf16, compile=arguments.compile == "on"
    )
    rows = c.random_rows(arguments.global_batch_size, arguments.seq_length, vocab_size)
    with tempfile.TemporaryDirectory() as directory, ExitStack() as opened:
        watched = watched_run(ours, model, rows, Path(directory), opened)
        plan = StepPlan(arguments.seq_length, arguments.global_batch_size, c.LR)
        seconds = measure.in_turn(
            {
                "without": partial(synchronised, partial(ours, rows, arguments.seq_length)),
                "with": partial(synchronised, partial(watched.step, plan)),
            },
            arguments.repeats,
        )
        parts = all_parts(ours, watched, plan, rows, Path(directory), opened)
        alone = {part.name: median_of(part.call, arguments.calls) for part in parts}
        update = median_of(ours.clip_and_update(), arguments.calls)
    report(arguments, parts, alone, seconds, update)
    return 0


def watched_run(ours: c.Ours, model: ModelConfig, rows: np.ndarray, directory: Path, opened: ExitStack) -> Run:
    """The loop of a run whose every step is on `rows`; what it asks of data, checkpoints and signals stands still."""
    log = opened.enter_context(metrics.MetricsLogger(directory / "run", tensorboard=True))
    line = opened.enter_context(console.ProgressLine("run", target_tokens=10**12, stream=Terminal()))
    config = Config(
        model=model,
        training=TrainingConfig(train_iters=10**6, global_batch_size=len(rows)),
        optimizer=OptimizerConfig(moment_statistics_interval=1),
    )
    loader = SimpleNamespace(batch=lambda *numbers: rows, prefetch=lambda *numbers: None)
    still: dict[str, Any] = {
        "datasets": SimpleNamespace(train=None),
        "loader": loader,
        "saver": SimpleNamespace(failed=False),
        "watch": SimpleNamespace(at=lambda what: None),
        "stop": SimpleNamespace(reason=None),
    }
    run = Run(
        config, ours.state, eod=None, metrics=log, console=line, forward_step=forward_step, settings={},
        world=ours.world, saved=False, **still,
    )  # fmt: skip
    run._train_step = ours.train_step  # with its precision and compiled as the one without
    return run


def all_parts(
    ours: c.Ours, watched: Run, plan: StepPlan, rows: np.ndarray, directory: Path, opened: ExitStack
) -> list[Part]:
    """The parts of a step that has been made, each as something to call."""
    state, world = ours.state, ours.world
    result = ours.train_step(Batch.from_samples(rows), plan)
    moments = moment_statistics(state.optimizer, world)
    losses = torch.rand(len(rows), plan.seqlen, device=world.device)
    positions = PositionLosses(plan.seqlen, world.device)
    one = torch.ones((), device=world.device)
    entry = json.loads((directory / "run" / metrics.METRICS_FILE).read_text(encoding="utf-8").splitlines()[-1])
    log = opened.enter_context(metrics.MetricsLogger(directory / "log"))
    tensorboard = opened.enter_context(
        metrics.MetricsLogger(None, tensorboard=True, tensorboard_dir=directory / "tensorboard")
    )
    line = opened.enter_context(console.ProgressLine("run", target_tokens=10**12, stream=Terminal()))
    return [
        Part("moment statistics", lambda: moment_statistics(state.optimizer, world)),
        Part("losses by position: sums", lambda: positions.add(losses, None), by_token=True),
        Part(
            "losses by position: totals",
            lambda: positions.by_bucket(positions.totals(world, one, one).cpu()),
        ),
        Part("the log of a step", lambda: watched._log(plan, result, moments, 1.0)),
        Part("its metrics.jsonl", lambda: log.log_step(entry), of_log=True),
        Part("its TensorBoard", lambda: tensorboard.log_step(entry), of_log=True),
        Part("its progress line", lambda: line.update(entry), of_log=True),
    ]


def synchronised(call: Callable[[], object]) -> float:
    """Seconds of a call, with what it leaves to the GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def median_of(call: Callable[[], object], calls: int) -> float:
    """Median seconds of so many calls after a first one."""
    call()
    return statistics.median(synchronised(call) for _ in range(calls))


def report(
    arguments: argparse.Namespace,
    parts: list[Part],
    alone: dict[str, float],
    seconds: dict[str, list[float]],
    update: float,
) -> None:
    """Print the shares and write the JSON."""
    medians = measure.medians(seconds)
    step = medians["without"]
    scale = arguments.step_tokens / (arguments.global_batch_size * arguments.seq_length)
    scaled_step = update + (step - update) * scale
    rows = [
        {
            "part": part.name,
            "ms": 1000 * alone[part.name],
            "% of the step": 100 * alone[part.name] / step,
            f"% of {arguments.step_tokens:,} tokens": 100
            * alone[part.name]
            * (scale if part.by_token else 1)
            / scaled_step,
        }
        for part in parts
    ]
    counted = [row for row, part in zip(rows, parts, strict=True) if not part.of_log]
    rows.append({"part": "together", **{name: sum(row[name] for row in counted) for name in [*rows[0]][1:]}})
    print(
        f"{arguments.model_size}, {arguments.global_batch_size} x {arguments.seq_length} tokens in {step:.3f} s, of "
        f"which clipping and update {update:.3f} s; {arguments.step_tokens:,} tokens would take {scaled_step:,.1f} s; "
        f"with all parts the step measured takes {medians['with'] / step:.3f} times as long"
    )
    measure.print_table([*rows[0]], [[*row.values()] for row in rows])
    measure.finish(
        arguments.output,
        {
            "arguments": vars(arguments),
            "rows": rows,
            "update": update,
            "scaled_step": scaled_step,
            "ratio": medians["with"] / step,
            "seconds": seconds,
        },
    )


if __name__ == "__main__":
    run(main)
