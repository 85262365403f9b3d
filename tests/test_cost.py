"""What a step costs: fitted to made-up logs with a known answer, and to the paper's own hours."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from megatron.arguments import build_parser, parse_config, to_yaml
from megatron.config import Config
from megatron.errors import UserError
from megatron.instability.step_cost import fit_step_cost
from megatron.instability.summary import read_run
from megatron.metrics import MetricsLogger
from megatron.model.cost import StepCost, cost_argument, plan_time
from megatron.model.plan import plan_totals

ROOT = Path(__file__).parents[1]
A, B = 0.65, 0.0034
SMALL = "--num-layers 2 --hidden-size 16 --num-attention-heads 2 --seq-length 256 --global-batch-size 32"
WARMUP = [min(8 + 248 * t // 100 // 8 * 8, 256) for t in range(1, 301)]
"""Lengths of 300 steps, the first hundred from 8 to 256."""


def config(flags: str = "--train-iters 10") -> Config:
    return parse_config(build_parser(), f"{SMALL} {flags}".split())[0]


def write_log(
    directory: Path, lengths: Sequence[int], seconds: Sequence[float], *, batch: int = 32, first: int = 1
) -> Path:
    """The log of steps of these lengths that took so long; the steps from `first` on."""
    tokens = np.cumsum(np.array(lengths) * batch).tolist()
    with MetricsLogger(directory) as logger:
        for index, (seqlen, total) in enumerate(zip(lengths, np.cumsum(seconds).tolist(), strict=True)):
            logger.log_step(
                {
                    "iteration": first + index,
                    "consumed_tokens": tokens[index],
                    "seqlen": seqlen,
                    "global_batch_size": batch,
                    "seconds": total,
                }
            )
    return directory


def times(lengths: Sequence[int], *, noise: float = 0.0, batch: int = 32) -> np.ndarray:
    """A + B * length, for the batch's share of 32, with relative noise."""
    exact = A + B * np.array(lengths) * batch / 32
    return exact * (1 + noise * np.random.default_rng(0).standard_normal(len(lengths)))


def test_exact_times_give_the_cost_exactly(tmp_path: Path) -> None:
    fit = fit_step_cost([read_run(write_log(tmp_path, WARMUP, times(WARMUP)))], config())
    assert (fit.cost.fixed, fit.cost.per_length) == pytest.approx((A, B))
    assert fit.steps == 299, "the first step has no time before it"
    assert fit.median_error < 1e-9
    assert fit.fitted_seconds == pytest.approx(fit.measured_seconds) == pytest.approx(times(WARMUP)[1:].sum())


def test_outliers_do_not_move_the_fit(tmp_path: Path) -> None:
    seconds = times(WARMUP, noise=0.02)
    slow = [0, 1, 2, 17, 40, 41, 77, 150, 151, 152, 299]
    seconds[slow] *= 40
    fit = fit_step_cost([read_run(write_log(tmp_path, WARMUP, seconds))], config())
    assert fit.cost.fixed == pytest.approx(A, rel=0.02)
    assert fit.cost.per_length == pytest.approx(B, rel=0.03)
    assert 0.005 < fit.median_error < 0.02
    assert fit.fitted_seconds < fit.measured_seconds / 2, "the outliers are in the log's time"
    slope, _ = np.polyfit(WARMUP[1:], seconds[1:], 1)
    assert slope != pytest.approx(B, rel=0.5), "a plain fit is led astray by them"


def test_lengths_of_one_step_each_are_taken_together(tmp_path: Path) -> None:
    lengths = list(range(8, 257, 8))
    seconds = times(lengths)
    seconds[[3, 12]] *= 30
    fit = fit_step_cost([read_run(write_log(tmp_path, lengths, seconds))], config())
    assert (fit.cost.fixed, fit.cost.per_length) == pytest.approx((A, B), rel=0.1)


def test_a_smaller_batch_costs_its_share(tmp_path: Path) -> None:
    """In the log (of batch 8 and 16), and in the plan, where the batch grows to 32."""
    runs = [
        read_run(write_log(tmp_path / str(batch), [256] * 9, times([256] * 9, batch=batch), batch=batch))
        for batch in (8, 16)
    ]
    fit = fit_step_cost(runs, config())
    assert (fit.cost.fixed, fit.cost.per_length) == pytest.approx((A, B))
    growing = config(
        "--train-iters 3 --batch-size-warmup linear --batch-size-start 8 --batch-size-increment 12 "
        "--batch-size-warmup-iters 2"
    )
    time = plan_time(growing, plan_totals(growing), fit.cost)
    assert time["hours"] * 3600 == pytest.approx(3 * A + B * 256 * (20 + 32 + 32) / 32)
    assert time["fixed_hours"] * 3600 == pytest.approx(3 * A)


def test_the_hours_of_a_plan_are_those_of_its_steps(tmp_path: Path) -> None:
    """Also where a sample is cut into pieces: then all of its tokens are trained on."""
    slw = "--train-iters 9 --seqlen-warmup linear --seqlen-start 8 --seqlen-warmup-iters 8"
    lengths = [8 + 248 * t // 8 // 8 * 8 for t in range(1, 9)] + [256]
    for flags, expected in [(slw, times(lengths).sum()), (f"{slw} --seqlen-realisation reshape", 9 * (A + B * 256))]:
        planned = config(flags)
        hours = plan_time(planned, plan_totals(planned), StepCost(A, B))["hours"]
        assert hours * 3600 == pytest.approx(expected)


@pytest.mark.parametrize(
    ("seconds", "fixed", "per_length"),
    [
        ([1.0] * 10 + [0.8] * 10, 0.9, 0.0),  # longer steps were no slower
        ([0.1] * 10 + [4.0] * 10, 0.0, (64 * 0.1 + 256 * 4.0) / (64**2 + 256**2)),  # the line would cross below 0
    ],
)
def test_no_part_of_a_cost_is_negative(tmp_path: Path, seconds: list[float], fixed: float, per_length: float) -> None:
    run = read_run(write_log(tmp_path, [64] * 11 + [256] * 10, [1.0, *seconds]))
    fit = fit_step_cost([run], config())
    assert (fit.cost.fixed, fit.cost.per_length) == pytest.approx((fixed, per_length))


def test_steps_after_a_gap_in_the_log_are_left_out(tmp_path: Path) -> None:
    lengths = [64] * 10 + [256] * 10
    directory = write_log(tmp_path, lengths, times(lengths))
    lines = (directory / "metrics.jsonl").read_text().splitlines(keepends=True)
    del lines[4:7]
    (directory / "metrics.jsonl").write_text("".join(lines))
    fit = fit_step_cost([read_run(directory)], config())
    assert fit.steps == 20 - 3 - 1 - 1
    assert (fit.cost.fixed, fit.cost.per_length) == pytest.approx((A, B))


@pytest.mark.parametrize(
    ("lengths", "found"),
    [
        ([256] * 40, "found 39 steps of one size"),
        ([64] * 4 + [256] * 4, "found 7 steps of 2 sizes"),
        ([], "found 0 steps of 0 sizes"),
    ],
)
def test_a_log_that_cannot_tell_a_from_b(tmp_path: Path, lengths: list[int], found: str) -> None:
    path = write_log(tmp_path, lengths, times(lengths)) / "metrics.jsonl"
    with pytest.raises(UserError, match=f"--fit {path}: expected at least 5 steps .* at each of two .*{found}: give"):
        fit_step_cost([read_run(tmp_path)], config())


def test_a_log_of_another_model(tmp_path: Path) -> None:
    run = write_log(tmp_path, WARMUP, times(WARMUP))
    (tmp_path / "config.yaml").write_text(to_yaml(config()).replace("seqlen-warmup: none", "seqlen-warmup: cosine"))
    assert fit_step_cost([read_run(run)], config("--train-iters 5")).steps == 299
    with pytest.raises(UserError, match=r"expected .* 4 layers of 16, found 2 layers of 16 in .*config.yaml"):
        fit_step_cost([read_run(run)], config("--num-layers 4 --train-iters 5"))


# The paper, and the tool.


def plan(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "plan_run.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_papers_hours() -> None:
    """1.5B at batch 512: what 341 h and 364 h say of a step foretells the 286 h of the checkpoint at 360K steps."""
    steps, slw_steps, tokens = 300_000, 427_617, 157_286_400_000
    fixed = (364 - 341) * 3600 / (slw_steps - steps)  # the tokens are the same
    per_length = (341 * 3600 - fixed * steps) * 512 / tokens
    assert fixed == pytest.approx(0.65, abs=0.005)
    recipe = str(ROOT / "recipes" / "gpt2-1.5b-b512-slw270k.yaml")
    result = plan("--config", recipe, "--at", "360000", "--cost", f"{fixed},{per_length}", "--json")
    time = json.loads(result.stdout)["time"]
    assert time["hours"] == pytest.approx(286, rel=0.005)
    assert time["fixed_hours"] == pytest.approx(360_000 * fixed / 3600)
    assert (time["fixed_seconds"], time["seconds_per_length"]) == (fixed, per_length)


def test_the_tool_fits_prints_and_takes_what_it_prints(tmp_path: Path) -> None:
    run = write_log(tmp_path, WARMUP, times(WARMUP, noise=0.01))
    flags = f"{SMALL} --train-iters 36000 --vocab-size 100".split()
    text = plan(*flags, "--fit", str(run)).stdout
    assert "fitted to            299 steps: half of them lie within 0." in text
    cost = text.partition("--cost ")[2].split()[0]
    fitted = json.loads(plan(*flags, "--fit", str(run / "metrics.jsonl"), "--json").stdout)["time"]
    assert {"steps", "measured_seconds", "fitted_seconds", "median_error"} == set(fitted.pop("fit"))
    given = json.loads(plan(*flags, "--cost", cost, "--json").stdout)["time"]
    assert given == pytest.approx(fitted, rel=1e-3)
    hours = 36_000 * (A + B * 256) / 3600
    assert given["hours"] == pytest.approx(hours, rel=0.01)
    assert f"training time        {given['hours']:.4g} h" in text
    assert "time" not in json.loads(plan(*flags, "--json").stdout)


@pytest.mark.parametrize("text", ["0.65", "1,2,3", "-1,2", "1,-2", "0,0", "nan,1", "1,nan", "1,inf", "a,b", ",", ""])
def test_what_is_no_cost(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=f"not both 0; found {re.escape(repr(text))}"):
        cost_argument(text)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--cost 0.65", "argument --cost: expected A,B, the seconds of a step A + B * sequence length, such as"),
        ("--cost 1,2 --fit x", "argument --fit: not allowed with argument --cost"),
        ("--fit nowhere", "nowhere/metrics.jsonl: no such file; expected the --save directory of a run"),
        ("--fit", "argument --fit: expected at least one argument"),
    ],
)
def test_bad_costs_are_named(flags: str, message: str) -> None:
    result = plan("--train-iters", "5", *flags.split())
    assert result.returncode == 1
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert message in result.stderr
