"""Reading runs back and summing them up, on logs with known answers."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from synthetic_runs import write_losses

from megatron.errors import UserError
from megatron.instability import report, summary
from megatron.instability.groups import group_runs
from megatron.instability.report import comparison_table, verdict
from megatron.instability.summary import RatioSummary, RunState, read_run, read_runs, summarise
from megatron.instability.tables import state_text
from megatron.instability.watching import WatchedRun
from megatron.metrics import MetricsLogger

ROOT = Path(summary.__file__).parent.parent.parent


def test_summary_of_a_known_run(tmp_path: Path) -> None:
    run = read_run(
        write_losses(
            tmp_path / "a",
            [4.0, 2.0, 3.2, 2.5, 1.0, 1.1],
            adam_variance_max=[0.1, None, 0.7, 0.2, 0.1, None],
            adam_variance_norm=[10.0, None, 20.0, 30.0, 20.0, None],
            adam_momentum_norm=[9.0, 8.0, 7.0, 6.0, 5.0, 4.0],
            clipped=[True, False, True, False, False, False],
            skipped=[False] * 5 + [True],
        )
    )
    s = summarise(run)
    assert (s.name, s.steps, s.tokens, s.seconds, s.elapsed) == ("a", 6, 600, 3.0, 6.25)
    assert s.tokens_per_second == 200.0
    assert (s.validation_loss, s.best_validation_loss, s.validation_tokens) == (2.1, 2.1, 600)
    assert s.perplexity == math.exp(2.1)
    assert s.loss_ratio == RatioSummary(1.6, 2, 1, 2 / 6, 1 / 6)
    assert (s.max_adam_variance, s.max_adam_variance_norm, s.max_adam_momentum_norm) == (0.7, 30.0, 9.0)
    assert (s.clipped, s.skipped, s.non_finite, s.first_non_finite) == (2, 1, 0, None)
    assert s.position_matched_loss_ratio == RatioSummary(None, 0, 0, None, None)
    assert (s.min_step_tokens, s.max_step_tokens, s.state.status) == (100, 100, "running")
    assert s.smoothed_loss_ratio.max is None  # 600 tokens are less than a window
    assert json.loads(json.dumps(s.to_dict(), allow_nan=False))["steps"] == 6


def test_the_test_split_is_read_and_best_and_last_differ(tmp_path: Path) -> None:
    with MetricsLogger(write_losses(tmp_path, [4.0, 1.0, 3.0, 3.0])) as logger:
        logger.log_validation({"iteration": 4, "loss": 1.5}, event="test")
    s = summarise(read_run(tmp_path))
    assert (s.test_perplexity, s.best_perplexity, s.perplexity) == (math.exp(1.5), math.exp(2.0), math.exp(4.0))


def test_a_run_that_diverged(tmp_path: Path) -> None:
    s = summarise(read_run(write_losses(tmp_path, [4.0, 2.0, math.nan, math.nan])))
    assert (s.first_non_finite, s.non_finite) == (3, 2)
    assert s.loss_ratio == RatioSummary(math.inf, 2, 2, 0.5, 0.5)
    assert s.smoothed_loss_ratio.max == math.inf and s.best_perplexity == math.exp(3.0)
    assert s.validation_loss is not None and math.isnan(s.validation_loss)
    assert json.loads(json.dumps(s.to_dict(), allow_nan=False))["loss_ratio"]["max"] == "inf"


def test_columns_are_exact_and_absent_values_are_nan(tmp_path: Path) -> None:
    losses = [1 / 3, 0.1 + 0.2, 1e-12]
    run = read_run(write_losses(tmp_path, losses, loss_by_position=[{"0-7": 1 / 7}, None, {"0-7": 0.5, "8-15": 2.0}]))
    assert [x.hex() for x in run.step("loss").tolist()] == [x.hex() for x in losses]
    assert run.step("loss_by_position/0-7")[0] == 1 / 7 and np.isnan(run.step("loss_by_position/8-15")[:2]).all()
    assert np.isnan(run.step("no_such_field")).all() and len(run.step("no_such_field")) == 3


def test_a_run_that_goes_on_and_one_that_was_started_over(tmp_path: Path) -> None:
    write_losses(tmp_path, [4.0, 3.0, 2.0])
    write_losses(tmp_path, [5.0, 6.0])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 3, "los')
    assert read_run(tmp_path).step("loss").tolist() == [5.0, 6.0]
    assert read_run(tmp_path / "metrics.jsonl").validation("loss").tolist() == [7.0]


def test_bad_runs_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing/metrics\.jsonl: no such file"):
        read_run(tmp_path / "nothing")
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 1, "loss": 2}\n{"iteration": 2, "lo\n{"iteration": 3}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:2: "):
        read_run(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 1, "loss": "high"}\n')
    with pytest.raises(UserError, match=r"expected numbers, found .*'high'"):
        read_run(tmp_path)


def test_a_run_without_a_step_is_summed_up(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    s = summarise(read_run(tmp_path))
    assert (s.steps, s.tokens, s.seconds, s.validation_loss, s.loss_ratio.max) == (0, 0, None, None, None)
    assert comparison_table([s]).splitlines()[2].split() == ["state", "starting"]


def test_state_of_a_run(tmp_path: Path) -> None:
    log = write_losses(tmp_path, [2.0]) / "metrics.jsonl"
    os.utime(log, (0, 0))
    state = read_run(tmp_path).state
    assert state.status == "running" and state.silent is not None and state.silent > 1e9
    assert state_text(state).startswith("running or died: log silent for")
    assert state_text(RunState("running", silent=3.0)) == "running"
    (tmp_path / "exit.json").write_text('{"status": "stopped", "iteration": 1, "reason": "SIGTERM"}\n')
    assert read_run(log).state == RunState("stopped", "SIGTERM")
    assert state_text(RunState("stopped", "SIGTERM")) == "stopped (SIGTERM)"
    assert state_text(RunState("died", "process 7 on n1 was killed")) == "died (process 7 on n1 was killed)"
    (tmp_path / "exit.json").write_text('{"status": "finished", "iteration": 1, "reason": null}\n')
    assert read_run(tmp_path).state == RunState("finished")


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"status": "gone", "reason": null}', '{"status": "stopped", "reason": 1}']
)
def test_an_exit_that_is_none_is_named(tmp_path: Path, content: str) -> None:
    write_losses(tmp_path, [2.0])
    (tmp_path / "exit.json").write_text(content)
    with pytest.raises(
        UserError, match=r'exit\.json: expected \{"status": one of finished, stopped, diverged, .*found .*; delete it$'
    ):
        read_run(tmp_path)


def test_tokens_of_a_step(tmp_path: Path) -> None:
    """Of a log that begins later too, as where a run goes on from another's checkpoint."""
    schedule = {"seqlen": [8, 16, 16], "global_batch_size": [2, 2, 4]}
    write_losses(tmp_path / "a", [3.0, 2.0, 1.0], consumed_tokens=[16, 48, 112], **schedule)
    write_losses(tmp_path / "b", [3.0, 2.0, 1.0], iteration=[7, 8, 9], consumed_tokens=[916, 948, 1012], **schedule)
    for name in ("a", "b"):
        assert read_run(tmp_path / name).step_tokens().tolist() == [16, 32, 64]


def test_runs_get_names_that_differ(tmp_path: Path) -> None:
    for name in ("lr1/slw", "lr2/slw", "lr2/base"):
        write_losses(tmp_path / name, [2.0])
    paths = [str(tmp_path / name) for name in ("lr1/slw", "lr2/slw", "lr2/base")]
    assert [run.name for run in read_runs(paths)] == ["lr1/slw", "lr2/slw", "lr2/base"]
    assert [run.name for run in read_runs(paths[1:])] == ["slw", "base"]
    assert [run.name for run in read_runs([f"here={paths[0]}", paths[2]])] == ["here", "base"]
    with pytest.raises(UserError, match="two runs are called slw"):
        read_runs([paths[0], paths[0]])


def test_table_is_aligned_and_markdown(tmp_path: Path) -> None:
    runs = [read_run(write_losses(tmp_path / name, [3.0, 2.0])) for name in ("baseline", "a-longer-name")]
    summaries = [summarise(run) for run in runs]
    lines = comparison_table(summaries).splitlines()
    assert len({len(line) for line in lines}) == 1 and len(lines) == len(report.ROWS) + 2
    assert lines[0].split() == ["baseline", "a-longer-name"]
    markdown = comparison_table(summaries, markdown=True).splitlines()
    assert all(line.count("|") == 4 for line in markdown) and set(markdown[1]) <= set("|-: ")


@pytest.mark.parametrize("slw_wins", [True, False])
def test_verdict_names_whichever_wins(tmp_path: Path, slw_wins: bool) -> None:
    good, bad = [4.0, 2.0], [4.0, 2.5]
    write_losses(tmp_path / "base", bad if slw_wins else good, seconds=0.5)
    write_losses(tmp_path / "slw", good if slw_wins else bad, seconds=0.4 if slw_wins else 0.6)
    text = verdict(read_runs([str(tmp_path / "base"), str(tmp_path / "slw")]))
    winner, loser = ("slw", "base") if slw_wins else ("base", "slw")
    lower = f"{winner} has a lower validation loss than {loser} at 200 tokens: 3.0000 against 3.5000 (0.5000 lower)"
    assert lower in text
    assert f"{winner} took less time to train on 200 tokens" in text
    assert "These are single runs" in text and "Times count only where nothing else ran" in text
    assert verdict(read_runs([str(tmp_path / "slw")])) == ""


def test_verdict_says_how_far_seeds_lie_apart(tmp_path: Path) -> None:
    ends = {"base-seed1": 2.0, "base-seed2": 2.25, "slw-seed1": 2.0, "slw-seed2": 2.125, "lost-seed1": math.inf}
    for name, loss in ends.items():
        write_losses(tmp_path / name, [4.0, loss])
    runs = read_runs([str(tmp_path / name) for name in ends])
    text = verdict(runs, group_runs([summarise(run) for run in runs], []))
    assert "Runs that differ only in their seed lie up to 0.2500 apart in their last validation loss" in text
    assert "single runs:" not in text


def test_verdict_compares_at_equal_tokens(tmp_path: Path) -> None:
    """The second run is half as long: the first is read off where the second ends."""
    write_losses(tmp_path / "base", [4.0, 4.0, 3.0, 3.0, 2.0, 2.0, 1.0, 1.0])
    write_losses(tmp_path / "slw", [4.0, 4.0, 3.0, 2.5])
    text = verdict(read_runs([str(tmp_path / "base"), str(tmp_path / "slw")]))
    assert "slw has a lower validation loss than base at 400 tokens: 3.5000 against 4.0000" in text
    assert "Both took about 00:02 to train on 400 tokens" in text


def test_verdict_of_a_diverged_run(tmp_path: Path) -> None:
    write_losses(tmp_path / "base", [4.0, math.nan])
    write_losses(tmp_path / "slw", [4.0, 3.0])
    text = verdict(read_runs([str(tmp_path / "base"), str(tmp_path / "slw")]))
    assert "base diverged; slw has validation loss 4.0000 at 200 tokens." in text


def test_tool_from_another_directory(tmp_path: Path) -> None:
    write_losses(tmp_path / "base", [4.0, 2.0])
    write_losses(tmp_path / "slw", [4.0, 3.0])

    def tool(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "tools" / "compare_runs.py"), *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    result = tool("base", "slw", "--json", "--output", "figures/c.png", "--html", "reports/r.html")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert [run["name"] for run in found["runs"]] == ["base", "slw"]
    assert [target["label"] for target in found["targets"]] == ["best of base"] and found["groups"] == []
    assert (tmp_path / "figures" / "c.png").stat().st_size > 10_000
    assert (tmp_path / "reports" / "r.html").read_text().startswith("<!DOCTYPE html>")
    missing = tool("base", "gone")
    assert missing.returncode == 1 and missing.stderr.startswith("error: gone/metrics.jsonl")
    assert missing.stderr.count("\n") == 1


def test_a_run_that_diverged_has_no_loss_at_its_end(tmp_path: Path) -> None:
    write_losses(tmp_path, [2.0, math.nan])
    (tmp_path / "exit.json").write_text('{"status": "diverged", "iteration": 2, "reason": "step 2: loss nan"}')
    with (tmp_path / "metrics.jsonl").open("a") as log:
        log.write('{"event": "validation", "iteration": 1, "consumed_tokens": 8, "loss": 2.5}\n')
    run = read_run(tmp_path)
    summary = summarise(run)
    assert (run.state.status, summary.first_non_finite) == ("diverged", 2)
    assert summary.validation_loss is not None and math.isnan(summary.validation_loss)
    assert summary.best_validation_loss == 2.5


def test_a_run_that_is_starting_has_no_log_yet(tmp_path: Path) -> None:
    within = [write_losses(tmp_path / "several" / name, [1.0]) for name in ("baseline", "slw")]
    with pytest.raises(UserError, match=f"several holds 2 runs, and is none itself: give {within[0]} {within[1]}$"):
        read_run(tmp_path / "several")
    with pytest.raises(UserError, match=r"metrics\.jsonl: no such file; expected the --save directory"):
        read_run(tmp_path)
    (tmp_path / "owner.json").write_text("{}")
    run = read_run(tmp_path)
    assert (run.step_count, run.state.status, run.name) == (0, "starting", tmp_path.name)


def test_a_run_that_ended_before_its_first_step_has_died_and_is_watched_as_such(tmp_path: Path) -> None:
    (tmp_path / "owner.json").write_text("")  # as a fault or an interrupt leaves it
    for there in (False, True):
        assert (tmp_path / "metrics.jsonl").exists() == there
        state = read_run(tmp_path).state
        assert state == RunState("died", "it ended by a fault or an interrupt; its output says which")
        assert WatchedRun(tmp_path).state == (state.status, state.reason)
        assert comparison_table([summarise(read_run(tmp_path))]).splitlines()[2].split() == ["state", "died"]
        (tmp_path / "metrics.jsonl").write_text("")
    (tmp_path / "owner.json").write_text("{}")
    assert read_run(tmp_path).state.status == WatchedRun(tmp_path).state.word == "starting"
    os.utime(tmp_path / "metrics.jsonl", (0, 0))
    assert state_text(read_run(tmp_path).state).startswith("starting or died: log silent for")
