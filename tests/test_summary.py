"""Reading runs back and summing them up, on logs with known answers."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron.errors import UserError
from megatron.instability import report, summary
from megatron.instability.report import comparison_table, verdict
from megatron.instability.summary import pearson, read_run, read_runs, summarise
from megatron.metrics import MetricsLogger

ROOT = Path(summary.__file__).parent.parent.parent


def write(directory: Path, losses: list[float], *, tokens: int = 100, seconds: float = 0.5, **more: Any) -> Path:
    """A run of a step for each loss and a validation at every other step."""
    with MetricsLogger(directory) as logger:
        best = math.inf
        for t, loss in enumerate(losses, start=1):
            entry = {"iteration": t, "consumed_tokens": tokens * t, "seconds": seconds * t, "loss": loss}
            entry["elapsed_seconds"] = 2 * entry["seconds"]
            entry["loss_ratio"] = loss / best if best < math.inf else None
            best = min(best, loss) if math.isfinite(loss) else best
            entry |= {name: values[t - 1] for name, values in more.items()}
            logger.log_step(entry)
            if t % 2 == 0:
                logger.log_validation(
                    {
                        "iteration": t,
                        "consumed_tokens": tokens * t,
                        "loss": loss + 1,
                        "elapsed_seconds": 2 * seconds * t + 0.25,
                    }
                )
    return directory


def test_summary_of_a_known_run(tmp_path: Path) -> None:
    run = read_run(
        write(
            tmp_path / "a",
            [4.0, 2.0, 3.2, 2.5, 1.0, 1.1],
            adam_variance_max=[0.1, None, 0.7, 0.2, 0.1, None],
            clipped=[True, False, True, False, False, False],
            skipped=[False] * 5 + [True],
        )
    )
    s = summarise(run)
    assert (s.name, s.steps, s.tokens, s.seconds, s.elapsed) == ("a", 6, 600, 3.0, 6.25)
    assert s.tokens_per_second == 200.0
    assert (s.validation_loss, s.best_validation_loss, s.validation_tokens) == (2.1, 2.1, 600)
    assert s.perplexity == math.exp(2.1)
    assert (s.max_loss_ratio, s.loss_ratio_above_1_2, s.loss_ratio_above_1_5) == (1.6, 2, 1)
    assert (s.max_adam_variance, s.clipped, s.skipped, s.first_non_finite) == (0.7, 2, 1, None)
    assert s.max_position_matched_loss_ratio is None
    assert json.loads(json.dumps(s.to_dict(), allow_nan=False))["steps"] == 6


def test_a_run_that_diverged(tmp_path: Path) -> None:
    s = summarise(read_run(write(tmp_path, [4.0, 2.0, math.nan, math.nan])))
    assert (s.first_non_finite, s.max_loss_ratio, s.loss_ratio_above_1_2) == (3, math.inf, 2)
    assert s.validation_loss is not None and math.isnan(s.validation_loss)
    assert json.loads(json.dumps(s.to_dict(), allow_nan=False))["max_loss_ratio"] == "inf"


def test_columns_are_exact_and_absent_values_are_nan(tmp_path: Path) -> None:
    losses = [1 / 3, 0.1 + 0.2, 1e-12]
    run = read_run(write(tmp_path, losses, loss_by_position=[{"0-7": 1 / 7}, None, {"0-7": 0.5, "8-15": 2.0}]))
    assert [x.hex() for x in run.step("loss").tolist()] == [x.hex() for x in losses]
    assert run.step("loss_by_position/0-7")[0] == 1 / 7 and np.isnan(run.step("loss_by_position/8-15")[:2]).all()
    assert np.isnan(run.step("no_such_field")).all() and len(run.step("no_such_field")) == 3


def test_a_run_that_goes_on_and_one_that_was_started_over(tmp_path: Path) -> None:
    write(tmp_path, [4.0, 3.0, 2.0])
    write(tmp_path, [5.0, 6.0])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 3, "los')
    assert read_run(tmp_path).step("loss").tolist() == [5.0, 6.0]
    assert read_run(tmp_path / "metrics.jsonl").validation("loss").tolist() == [7.0]


def test_bad_runs_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing/metrics\.jsonl: no such file"):
        read_run(tmp_path / "nothing")
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="holds no step yet"):
        read_run(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 1, "loss": 2}\n{"iteration": 2, "lo\n{"iteration": 3}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:2: "):
        read_run(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 1, "loss": "high"}\n')
    with pytest.raises(UserError, match=r"expected numbers, found .*'high'"):
        read_run(tmp_path)


def test_runs_get_names_that_differ(tmp_path: Path) -> None:
    for name in ("lr1/slw", "lr2/slw", "lr2/base"):
        write(tmp_path / name, [2.0])
    paths = [str(tmp_path / name) for name in ("lr1/slw", "lr2/slw", "lr2/base")]
    assert [run.name for run in read_runs(paths)] == ["lr1/slw", "lr2/slw", "lr2/base"]
    assert [run.name for run in read_runs(paths[1:])] == ["slw", "base"]
    assert [run.name for run in read_runs([f"here={paths[0]}", paths[2]])] == ["here", "base"]
    with pytest.raises(UserError, match="two runs are called slw"):
        read_runs([paths[0], paths[0]])


def test_pearson_against_numpy_and_planted_values() -> None:
    random = np.random.default_rng(3)
    x, y = random.normal(size=500), random.normal(size=500)
    y += 0.4 * x
    assert pearson(x, y) == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-12)
    holes = x.copy()
    holes[::7] = np.nan
    assert pearson(holes, y) == pytest.approx(np.corrcoef(x[np.isfinite(holes)], y[np.isfinite(holes)])[0, 1])
    assert pearson(x, -2 * x + 1) == pytest.approx(-1.0)
    assert pearson(x, np.ones(500)) is None and pearson(x[:2], y[:2]) is None


def test_table_is_aligned_and_markdown(tmp_path: Path) -> None:
    runs = [read_run(write(tmp_path / name, [3.0, 2.0])) for name in ("baseline", "a-longer-name")]
    summaries = [summarise(run) for run in runs]
    lines = comparison_table(summaries).splitlines()
    assert len({len(line) for line in lines}) == 1 and len(lines) == len(report.ROWS) + 2
    assert lines[0].split() == ["baseline", "a-longer-name"]
    markdown = comparison_table(summaries, markdown=True).splitlines()
    assert all(line.count("|") == 4 for line in markdown) and set(markdown[1]) <= set("|-: ")


@pytest.mark.parametrize("slw_wins", [True, False])
def test_verdict_names_whichever_wins(tmp_path: Path, slw_wins: bool) -> None:
    good, bad = [4.0, 2.0], [4.0, 2.5]
    write(tmp_path / "base", bad if slw_wins else good, seconds=0.5)
    write(tmp_path / "slw", good if slw_wins else bad, seconds=0.4 if slw_wins else 0.6)
    text = verdict(read_runs([str(tmp_path / "base"), str(tmp_path / "slw")]))
    winner = "slw" if slw_wins else "base"
    assert f"{winner} has the lower validation loss at 200 tokens: 3.0000 against 3.5000 (0.5000 lower)" in text
    assert f"{winner} took less time to train on 200 tokens" in text
    assert verdict(read_runs([str(tmp_path / "slw")])) == ""


def test_verdict_compares_at_equal_tokens(tmp_path: Path) -> None:
    """The second run is half as long: the first is read off where the second ends."""
    write(tmp_path / "base", [4.0, 4.0, 3.0, 3.0, 2.0, 2.0, 1.0, 1.0])
    write(tmp_path / "slw", [4.0, 4.0, 3.0, 2.5])
    text = verdict(read_runs([str(tmp_path / "base"), str(tmp_path / "slw")]))
    assert "slw has the lower validation loss at 400 tokens: 3.5000 against 4.0000" in text
    assert "Both took about 00:02 to train on 400 tokens" in text


def test_verdict_of_a_diverged_run(tmp_path: Path) -> None:
    write(tmp_path / "base", [4.0, math.nan])
    write(tmp_path / "slw", [4.0, 3.0])
    text = verdict(read_runs([str(tmp_path / "base"), str(tmp_path / "slw")]))
    assert "base diverged; slw has validation loss 4.0000 at 200 tokens." in text


def test_tool_from_another_directory(tmp_path: Path) -> None:
    write(tmp_path / "base", [4.0, 2.0])
    write(tmp_path / "slw", [4.0, 3.0])

    def tool(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "tools" / "compare_runs.py"), *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    result = tool("base", "slw", "--json", "--output", "figures/c.png")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert [run["name"] for run in found["runs"]] == ["base", "slw"]
    assert (tmp_path / "figures" / "c.png").stat().st_size > 10_000
    missing = tool("base", "gone")
    assert missing.returncode == 1 and missing.stderr.startswith("error: gone/metrics.jsonl")
    assert missing.stderr.count("\n") == 1
