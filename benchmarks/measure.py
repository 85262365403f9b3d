"""What all benchmarks share: the machine in words, contestants timed in turn, a table, and JSON."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def machine() -> dict[str, Any]:
    """Where and with what this runs: processor, GPU, versions, commit, date."""
    import torch  # noqa: PLC0415  (benchmarks of the parts without torch time their own imports)

    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit or "unknown",
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "bf16": _has_bf16(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _has_bf16() -> bool:
    """Whether the processor multiplies bf16 itself (AVX-512 BF16, AMX, or Arm's BF16)."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    return any(flag in text for flag in ("avx512_bf16", "amx_bf16", " bf16"))


def in_turn(contestants: Mapping[str, Callable[[], Any]], repeats: int, *, warmups: int = 1) -> dict[str, list[float]]:
    """Seconds of each contestant, `repeats` times, one after the other in each round, so that a machine whose speed
    drifts is the same for all. A contestant that returns a float has timed itself."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for round_ in range(-warmups, repeats):
        for name, contestant in contestants.items():
            took = timed(contestant)
            if round_ >= 0:
                seconds[name].append(took)
    return seconds


def timed(function: Callable[[], Any]) -> float:
    """Seconds of one call, by a clock of its own if it returns a float."""
    started = time.perf_counter()
    result = function()
    return result if isinstance(result, float) else time.perf_counter() - started


def medians(seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The median of each list."""
    return {name: statistics.median(values) for name, values in seconds.items()}


def print_table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table in Markdown, numbers to four digits, columns of equal width."""
    cells = [[_cell(value) for value in row] for row in rows]
    widths = [max(len(column[i]) for column in [list(head), *cells]) for i in range(len(head))]
    for line in [list(head), ["-" * width for width in widths], *cells]:
        print("| " + " | ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) + " |")


def _cell(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def finish(path: Path | str | None, result: Mapping[str, Any]) -> None:
    """Print where this was measured, and write it with `result` to the JSON file `path`, if one is given."""
    where = machine()
    print("  ".join(f"{name} {value}" for name, value in where.items() if value is not None))
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps({"machine": where, **result}, indent=1, default=str) + "\n", encoding="utf-8")
