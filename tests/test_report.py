"""Time to quality, groups over seeds and the tables, on runs with planted answers."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from synthetic_runs import write_losses

from megatron.errors import UserError
from megatron.instability.groups import group_runs
from megatron.instability.html_report import render
from megatron.instability.quality import Arrival, time_to_quality
from megatron.instability.report import BRIEFLY, ROWS, comparison_table, verdict
from megatron.instability.statistics import Correlation, Spread
from megatron.instability.summary import Run, RunSummary, read_run, read_runs, summarise
from megatron.instability.tables import Table, correlation_table, quality_table, report_tables
from tools import compare_runs


def planted(home: Path, losses: dict[str, list[float]], seconds: dict[str, float] | None = None) -> list[Run]:
    """Runs of 100 tokens a step, validated with loss + 1 at every other step."""
    for name, values in losses.items():
        write_losses(home / name, values, seconds=(seconds or {}).get(name, 0.5))
    return read_runs([str(home / name) for name in losses])


def row(tables: list[Table], title: str, *start: str) -> list[str]:
    """The cells after `start` of the row that begins with it."""
    (table,) = [table for table in tables if table.title.startswith(title)]
    (found,) = [row.cells[len(start) :] for row in table.rows if row.cells[: len(start)] == start]
    assert len(table.header) == len(found) + len(start)
    return list(found)


def tables_of(runs: list[Run], perplexities: tuple[float, ...] = ()) -> list[Table]:
    summaries = [summarise(run) for run in runs]
    targets = time_to_quality(runs, perplexities)
    return report_tables(summaries, targets, group_runs(summaries, targets))


LOSSES = {
    "base": [5.0, 5.0, 4.0, 4.0, 3.0, 3.0, 3.0, 3.5],  # best validation: 4, at step 6
    "slw": [5.0, 4.0, 4.0, 3.0, 2.0, 2.0, 2.0, 2.0],  # there at step 4, best 3 at step 6
    "poor": [5.0, 5.0, 5.0, 5.0, 4.0, 4.0, 4.0, 4.0],
}


def test_planted_time_to_quality(tmp_path: Path) -> None:
    runs = planted(tmp_path, LOSSES, {"slw": 0.25})
    given, base, best = time_to_quality(runs, [math.exp(5.5)])
    assert (base.label, base.perplexity, best.label) == ("best of base", math.exp(4.0), "best of slw")
    assert base.arrivals[0] == Arrival("base", 6, 600, 3.0, 6.25)
    assert base.arrivals[1] == Arrival("slw", 4, 400, 1.0, 2.25, 1.5, 3.0, 6.25 / 2.25)
    assert base.arrivals[2] == Arrival("poor") and not base.arrivals[2].reached
    assert [arrival.iteration for arrival in given.arrivals] == [4, 2, 6]
    # Where the first did not reach it there is nothing to save.
    assert best.arrivals[:2] == (Arrival("base"), Arrival("slw", 6, 600, 1.5, 3.25))

    tables = tables_of(runs)
    reach = f"{math.exp(4.0):.2f} (best of base)"
    assert row(tables, "Tokens and time", reach, "slw") == ["400 (33% less)", "00:01 (67% less)", "00:02 (64% less)"]
    assert row(tables, "Tokens and time", reach, "poor") == ["did not reach"] * 3


def test_factors_of_finished_runs_only(tmp_path: Path) -> None:
    planted(tmp_path, LOSSES, {"slw": 0.25})
    for name in ("base", "slw"):
        (tmp_path / name / "exit.json").write_text('{"status": "finished", "iteration": 8, "reason": null}')
    tables = tables_of(read_runs([str(tmp_path / name) for name in LOSSES]))
    assert row(tables, "Cost and quality", "base") == ["8", "800", "00:04", "00:08", "54.60", "90.02"]
    assert row(tables, "Cost and quality", "slw")[1:4] == ["800 (the same)", "00:02 (50% less)", "00:04 (48% less)"]
    assert row(tables, "Cost and quality", "poor")[1:4] == ["800", "00:04", "00:08"]


def test_targets_that_no_run_can_have(tmp_path: Path) -> None:
    runs = planted(tmp_path, {"a": [2.0], "b": [math.nan, math.nan]})
    assert time_to_quality(runs) == []
    for perplexity in (1.0, -3.0, math.nan, math.inf):
        with pytest.raises(UserError, match=r"--target-perplexity .*: expected a number above 1"):
            time_to_quality(runs, [perplexity])


def test_planted_spikes_and_a_run_that_diverged(tmp_path: Path) -> None:
    losses = [4.0, 2.0, 2.5, 3.2, 2.0, 2.4, 1.0, 1.3, 1.1, 1.0]  # above 1.2 at steps 3, 4 and 8; above 1.5 at 4
    runs = planted(tmp_path, {"spiky": losses, "lost": [4.0, 2.0, math.nan, math.inf]})
    tables = tables_of(runs)
    assert row(tables, "Training instability", "spiky")[:3] == ["3 (30.00%)", "1 (10.00%)", "1.600"]
    assert row(tables, "Training instability", "spiky")[3:] == ["-"] * 4
    assert row(tables, "Training instability", "lost")[:3] == ["2 (50.00%)", "2 (50.00%)", "inf"]
    assert row(tables, "Peaks", "lost") == ["-", "-", "-", "0", "0", "2", "step 3"]
    assert row(tables, "Cost and quality", "lost")[-2:] == [f"{math.exp(3.0):.2f}", "inf"]


def test_planted_correlation(tmp_path: Path) -> None:
    """Ratios of 1 + e, a variance of e and noise at right angles to it: r is 0.6, p that of t = 0.75 * sqrt(62)."""
    basis, _ = np.linalg.qr(np.column_stack([np.ones(64), np.random.default_rng(2).normal(size=(64, 2))]))
    ratios = [None, *(1 + basis[:, 1]).tolist()]
    variance = [1.0, *(2 + 0.6 * basis[:, 1] + 0.8 * basis[:, 2]).tolist()]
    write_losses(tmp_path, [2.0] * 65, loss_ratio=ratios, adam_variance_norm=variance, adam_variance_max=[5.0] * 65)
    (run,) = read_runs([str(tmp_path)])
    cells = row(tables_of([run]), "Loss ratio against", run.name)
    assert cells == ["0.60", "1.6e-07", "moderate", "-", "-", "-", "64"]


@pytest.mark.parametrize(
    ("r", "p", "words"),
    [
        (0.9, 0.05, "none found"),
        (-0.9, 0.049, "strong, inverse"),
        (0.7, 1e-9, "strong"),
        (0.69, 1e-9, "moderate"),
        (-0.29, 1e-9, "weak, inverse"),
    ],
)
def test_a_correlation_in_words(tmp_path: Path, r: float, p: float, words: str) -> None:
    (run,) = planted(tmp_path, {"a": [2.0]})
    summary = replace(summarise(run), variance_max_correlation=Correlation(r, p, 9))
    (found,) = correlation_table([summary]).rows
    assert found.cells[6] == words


def test_more_than_the_first_run(tmp_path: Path) -> None:
    runs = planted(tmp_path, LOSSES, {"slw": 0.53, "poor": 2.0})
    for run in runs:
        assert run.path is not None
        run.path.with_name("exit.json").write_text('{"status": "finished", "iteration": 8, "reason": null}')
    tables = tables_of(read_runs([str(tmp_path / name) for name in LOSSES]))
    assert row(tables, "Cost and quality", "slw")[2:4] == ["00:04 (6% more)", "00:09 (6% more)"]
    assert row(tables, "Cost and quality", "poor")[2] == "00:16 (4.0 times)"


def test_bands_span_the_whole_header(tmp_path: Path) -> None:
    tables = [table for table in tables_of(planted(tmp_path, LOSSES)) if table.bands]
    assert len(tables) == 2 and all(sum(span for _, span in t.bands) == len(t.header) for t in tables)


def seeds(tmp_path: Path, *names: str) -> list[RunSummary]:
    losses = {name: [4.0, 2.0 + 0.1 * index, 3.0, 2.0 + 0.1 * index] for index, name in enumerate(names)}
    return [summarise(run) for run in planted(tmp_path, losses)]


def test_seeds_are_grouped_and_spread(tmp_path: Path) -> None:
    summaries = seeds(tmp_path, "base-seed1", "slw_seed1", "slw_seed22", "base-seed2", "base-seed3", "alone-seedling")
    targets = time_to_quality(read_runs([str(tmp_path / s.name) for s in summaries]), [math.exp(3.25)])
    base, slw, alone = group_runs(summaries, targets)
    assert base.runs == ("base-seed1", "base-seed2", "base-seed3") and slw.runs == ("slw_seed1", "slw_seed22")
    assert alone.name == "alone-seedling"
    found = base.spreads["validation_loss"]
    assert isinstance(found, Spread) and (found.n, found.min, found.max) == (3, 3.0, pytest.approx(3.4))
    assert found.mean == pytest.approx((3.0 + 3.3 + 3.4) / 3)
    assert found.std == pytest.approx(math.sqrt(sum((x - found.mean) ** 2 for x in (3.0, 3.3, 3.4)) / 2))
    label = f"perplexity {math.exp(3.25):g}"
    assert (base.reached[label], slw.reached[label], alone.reached[label]) == (1, 2, 0)
    assert base.tokens_to[label] == Spread(1, 200.0, None, 200.0, 200.0)
    cells = row(report_tables(summaries, targets, [base, slw, alone]), "Seeds", "slw")
    assert cells[0] == "2" and cells[8] == "2 of 2"
    assert tuple(cells[1:3]) == ("3.150 ± 0.071 (3.100 to 3.200)", "23.37 ± 1.65 (22.20 to 24.53)")


def test_groups_by_pattern(tmp_path: Path) -> None:
    summaries = seeds(tmp_path, "a1", "a2", "b1")
    assert group_runs(summaries, []) == []  # no two runs of one name
    assert [group.runs for group in group_runs(summaries, [], ["all=a*"])] == [("a1", "a2"), ("b1",)]
    for patterns, message in (
        (["a*"], r"--group a\*: expected GROUP=PATTERN"),
        (["=a*"], r"--group =a\*: expected GROUP=PATTERN"),
        (["x=c*"], r"--group x=c\*: matches no run; they are called a1, a2, b1"),
        (["x=a*", "y=*1"], "--group: the run a1 matches both x and y"),
    ):
        with pytest.raises(UserError, match=message):
            group_runs(summaries, [], patterns)


def test_a_run_without_steps_stands_in_every_table(tmp_path: Path) -> None:
    runs = planted(tmp_path, {"new": [], "slw": [4.0, 3.0]})
    tables = tables_of(runs)
    assert row(tables, "Runs", "new")[:2] == ["starting", "0"]
    for title in ("Training instability", "Loss ratio against"):
        assert set(row(tables, title, "new")) == {"-"}
    assert row(tables, "Tokens and time", f"{math.exp(4.0):.2f} (best of slw)", "new") == ["did not reach"] * 3


def test_zero_shot_results_stand_in_table_2_where_there_are_any(tmp_path: Path) -> None:
    for name in ("plain", "measured"):
        write_losses(tmp_path / name, [3.0, 2.0])
    results = tmp_path / "measured" / "zeroshot.json"
    wikitext = {"adjusted_perplexity": 27.784, "original_tokens": 245_566, "overlapping_eval": 32, "seq_length": 1024}
    lambada = {"accuracy": 0.3337, "examples": 1000, "truncated": 0, "seq_length": 256}
    kept = {"WIKITEXT103": wikitext, "LAMBADA-strict": lambada}
    results.write_text(json.dumps({task: result | {"dtype": "float32"} for task, result in kept.items()}))
    runs = [read_run(tmp_path / name) for name in ("plain", "measured")]
    table = quality_table([summarise(run) for run in runs])
    assert table.header[-2:] == ("WikiText-103 perplexity, zero-shot", "LAMBADA accuracy, zero-shot")
    assert [row.cells[-2:] for row in table.rows] == [("-", "-"), ("27.78", "33.37% *")]
    assert table.footnotes == ("* measured: LAMBADA-strict on 1,000 of 5,153 examples, context 256",)
    assert f'<p class="note">{table.footnotes[0]}</p>' in render(runs, [table])
    assert "zero-shot" not in str(quality_table([summarise(runs[0])]).header)
    results.write_text('{"WIKITEXT103": {}}')
    with pytest.raises(UserError, match=r"zeroshot\.json: expected a number adjusted_perplexity of WIKITEXT103"):
        summarise(read_run(tmp_path / "measured"))


def test_a_log_that_begins_later_is_said_under_its_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    planted(tmp_path, LOSSES)
    log = tmp_path / "slw" / "metrics.jsonl"
    log.write_text("".join(line for line in log.read_text().splitlines(True) if json.loads(line)["iteration"] > 5))
    runs = read_runs([str(tmp_path / "base"), str(tmp_path / "slw")])
    line = "slw: its log begins with step 6; counts, largest and best values are of the 3 steps in it"
    tables = tables_of(runs)
    said = [table.title.partition(" (")[0] for table in tables if table.footnotes == (line,)]
    assert said == ["Training instability", "Cost and quality", "Peaks and faults"]
    seeds = read_runs([f"slw-seed{n}={tmp_path / name}" for n, name in enumerate(("base", "slw"))])
    (table,) = [table for table in tables_of(seeds) if table.title == "Seeds"]
    assert table.footnotes == (line.replace("slw:", "slw-seed1:"),)
    for arguments in (["base", "slw"], ["slw"]):
        monkeypatch.setattr(sys, "argv", ["compare_runs.py", *(str(tmp_path / name) for name in arguments)])
        compare_runs.main()
        assert capsys.readouterr().out.splitlines()[-1] == line
    monkeypatch.setattr(sys, "argv", ["compare_runs.py", str(tmp_path / "base")])
    compare_runs.main()
    assert "its log begins" not in capsys.readouterr().out


@pytest.mark.parametrize("status", ["finished", "stopped", None])
def test_a_run_that_ended_before_its_full_length_is_said_beside_the_verdict(tmp_path: Path, status: str | None) -> None:
    for name, lengths in {"base": [64] * 4, "slw": [8, 24, 40, 40]}.items():
        home = write_losses(tmp_path / name, [4.0, 3.0, 3.0, 2.0], seqlen=lengths)
        (home / "config.yaml").write_text("seq-length: 64\ntrain-tokens: 400\nseqlen-warmup: not known here\n")
        if status is not None:
            (home / "exit.json").write_text(json.dumps({"status": status, "reason": None}))
    sentences = verdict(read_runs([str(tmp_path / "base"), str(tmp_path / "slw")])).splitlines()
    said = "slw ended at sequence length 40, before its warmup reached --seq-length 64"
    assert [said in line for line in sentences] == ([False] * 3 if status is None else [False, True, False, False])
    (tmp_path / "slw/config.yaml").write_text("of: another version")
    assert len(verdict(read_runs([str(tmp_path / "base"), str(tmp_path / "slw")])).splitlines()) == 3


def test_the_table_to_begin_with_is_short(tmp_path: Path) -> None:
    summaries = [summarise(run) for run in planted(tmp_path, LOSSES)]
    rows = [line.partition("  ")[0] for line in comparison_table(summaries, brief=True).splitlines()[2:]]
    assert set(rows) == BRIEFLY and len(rows) == len(BRIEFLY)
    assert len(comparison_table(summaries).splitlines()) == len(ROWS) + 2


def test_a_terminal_shows_many_runs_by_their_seeds(tmp_path: Path) -> None:
    losses = {"slw": (2.0, 2.2, 2.4, 2.6), "baseline": (3.0, 3.0, 3.0)}
    for name, ends in losses.items():
        for seed, end in enumerate(ends):
            home = tmp_path / f"{name}-seed{seed}"
            write_losses(home, [4.0, end])
            with (home / "metrics.jsonl").open("a") as log:
                log.write(json.dumps({"event": "validation", "iteration": 2, "consumed_tokens": 8, "loss": end}) + "\n")
    tool = [sys.executable, str(Path(__file__).parents[1] / "tools/compare_runs.py"), *map(str, tmp_path.iterdir())]
    said = subprocess.run(tool, capture_output=True, text=True, check=True).stdout
    rows = {line.split()[0]: line for line in said.splitlines() if line and line[0] in "sb"}
    assert rows.keys() == {"slw", "baseline"}
    assert "2.300 ± 0.258 (2.000 to 2.600)" in rows["slw"] and rows["slw"].split()[1] == "4"
    assert max(map(len, said.splitlines())) < 120


def test_losses_of_other_texts_are_said_not_to_compare(tmp_path: Path) -> None:
    runs = planted(tmp_path, {"base": [4.0, 3.0], "slw": [4.0, 3.5]})

    def said(**settings: str) -> str:
        for name, value in ({"base": "a", "slw": "a"} | settings).items():
            (tmp_path / name / "config.yaml").write_text(f"data-path: [{value}]\nlr: 1e-3\ntrain-iters: 2\n")
        return verdict(runs)

    assert "cannot be compared" not in said()
    assert "base and slw differ in --data-path: where that is another text" in said(slw="b")
    (tmp_path / "slw" / "config.yaml").unlink()
    assert "cannot be compared" not in verdict(runs)


def test_a_loss_between_validations_is_said_to_be_one(tmp_path: Path) -> None:
    """The first run was validated at 200, 400 and 600 tokens."""
    write_losses(tmp_path / "base", [4.0, 4.0, 3.0, 3.0, 2.0, 2.0])
    for name, tokens, between in (("slw", 100, False), ("long", 125, True)):
        write_losses(tmp_path / name, [4.0] * 4, tokens=tokens)
        text = verdict(read_runs([str(tmp_path / "base"), str(tmp_path / name)]))
        assert ("at 500 tokens, between two validations" in text) == between == ("between" in text)
