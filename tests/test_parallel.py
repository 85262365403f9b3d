"""Every layout of ranks against one process: losses, gradients, statistics, samples, and faults that all share."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PROGRAM = Path(__file__).with_name("parallel_ranks.py")


def run(part: str, ranks: int, seconds: float = 250) -> dict[str, Any]:
    """What the ranks of one part found."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(PROGRAM), part, str(rank), str(ranks), str(port)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )
        for rank in range(ranks)
    ]  # fmt: skip
    deadline = time.monotonic() + seconds
    try:
        told = [process.communicate(timeout=max(1.0, deadline - time.monotonic())) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode == 0 for process in processes), "\n".join(errors[-3000:] for _, errors in told)
    return json.loads(told[0][0])


def check(found: dict[str, dict[str, float]]) -> None:
    for case, worst in found.items():
        for kind, error in worst.items():
            exact = kind in ("samples", "bucket_tokens", "clipped", "validation_tokens")
            # A norm of thousands of square roots of tiny numbers sums up more rounding than a loss does.
            limit = 0 if exact else 1e-4 if kind == "adam_variance_norm" else 1e-5
            assert error <= limit, f"{case}: {kind} differs by {error:.1e}"


@pytest.mark.parametrize("ranks", [2, 4])
def test_layouts_equal_one_process(ranks):
    found = run("pairs", ranks)
    assert len(found) == (4 if ranks == 2 else 12)
    check(found)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_layout_equals_one_process(ranks):
    check(run("every", ranks, seconds=1700))


def test_compiled_with_any_length_a_model_is_whole_graphs_and_few():
    for case, seen in run("compiled", 4).items():
        assert seen["loss"] < 1e-5, case
        assert seen["breaks"] == 0, case
        assert 1 <= seen["graphs"] <= 3, case


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_reduction_in_bf16_rounds_what_is_sent_and_nothing_else(ranks):
    found = run("reduced", ranks)
    assert len(found) == 3
    for case, seen in found.items():
        assert seen["error"] <= 1, case
        assert seen["changed"] > 0.9, case
        assert seen["all_fp32"], case
        # Stage 3 adds up reduced micro-batches, which takes more digits than any of them has.
        assert seen["short"] < 0.9 if "zero=3" in case else seen["short"] == 1, case


@pytest.fixture(scope="module")
def faults() -> dict[str, Any]:
    return run("faults", 4)


def test_an_infinite_gradient_on_one_rank_is_skipped_on_all(faults):
    cases = [ranks for case, ranks in faults.items() if case.startswith("overflow")]
    assert len(cases) == 3
    for ranks in cases:
        assert all(rank == ranks[0] for rank in ranks)
        before, poisoned, after = ranks[0]
        assert [step[0] for step in ranks[0]] == [False, True, False]
        assert [step[1] for step in ranks[0]] == [1024.0, 512.0, 512.0]
        assert before[2] == poisoned[2] != after[2]


def test_dropout_under_tensor_parallelism(faults):
    """Equal on ranks that hold the same rows, different inside the split layers and on other data parallel ranks."""
    equal, split = (ranks for case, ranks in faults.items() if case.startswith("dropout"))
    outside, inside = zip(*(rank[:2] for rank in equal), strict=True)
    assert outside[0] == outside[1] != outside[2] == outside[3]
    assert len(set(inside)) == 4
    assert len({rank[0] for rank in split}) == 4
    assert len({rank[1] for rank in split}) == 4
    assert all(rank[2] for rank in [*equal, *split])
