"""Our runs in the shape of the paper's Table 2, and the printed figures in it."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
from synthetic_runs import write_losses

from megatron.errors import UserError
from megatron.evaluation.table2 import PRINTED_ZEROSHOT, _other_length, read_printed, table2
from megatron.instability.summary import read_runs
from megatron.instability.zeroshot_results import differences
from megatron.model.recipe_tables import read_paper_runs

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "recipes"
HEADER = "name,in,steps,-,tokens,-,hours,-,wiki,-,lambada,-".split(",")


def rows(table: str) -> list[list[str]]:
    """The cells of each line below the header."""
    lines = table.splitlines()
    assert len({len(line) for line in lines}) == 1, "the columns are aligned"
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert all(len(row) == len(HEADER) for row in cells)
    return cells[2:]


def run_with(directory: Path, results: dict | None) -> Path:
    """A run of 4 steps of 100 tokens, a quarter of an hour each."""
    write_losses(directory, [4.0, 3.0, 2.0, 1.0], seconds=900.0)
    if results is not None:
        (directory / "zeroshot.json").write_text(json.dumps(results))
    return directory


CONDITIONS = {"seq_length": 1024, "dtype": "float32", "model": "r/checkpoints/iter_0000004"}
WIKI = {"adjusted_perplexity": 1234.567, "original_tokens": 245_566, "overlapping_eval": 32} | CONDITIONS
LAMBADA = {"accuracy": 0.25125, "examples": 5153, "truncated": 0} | CONDITIONS
RESULTS = {"WIKITEXT103": WIKI, "LAMBADA": LAMBADA | {"accuracy": 0.9}, "LAMBADA-strict": LAMBADA}
"""Measured as the paper's were."""


def test_a_run_stands_beside_the_papers(tmp_path: Path) -> None:
    run_with(tmp_path / "gpt2-1.5b-b4k-slw45k", RESULTS)
    run_with(tmp_path / "mine", None)
    early = f"gpt2-1.5b-b4k-slw45k@50000={tmp_path / 'gpt2-1.5b-b4k-slw45k'}"
    runs = read_runs([str(tmp_path / "gpt2-1.5b-b4k-slw45k"), str(tmp_path / "mine"), early])
    ours = ["4 *", "400", "1.00", "1,234.57", "25.12%"]
    table, notes = table2(runs, RECIPES).split("\n\n")
    found = rows(table)
    assert [row[2::2] for row in found] == [ours, ["4", *ours[1:3], "-", "-"], ours]
    assert notes.splitlines() == [
        "* gpt2-1.5b-b4k-slw45k: 4 steps, the paper's run has 58.8K",
        "* gpt2-1.5b-b4k-slw45k@50000: 4 steps, the paper's run has 50K",
    ]
    assert [row[1::2] for row in found] == [
        ["Table 2, case 15", "58.8K", "157B", "155", "13.72", "58.47%"],
        ["-"] * 6,
        ["Table 2, case 14", "50K", "121B", "121", "13.88", "58.20%"],
    ]


def test_what_was_measured_otherwise_is_said_under_the_table(tmp_path: Path) -> None:
    wikitext = WIKI | {"overlapping_eval": 256, "adjusted_perplexity": "inf"}
    strict = LAMBADA | {"examples": 1000, "seq_length": 256}
    run_with(tmp_path / "mine", {"WIKITEXT103": wikitext, "LAMBADA-strict": strict})
    run_with(tmp_path / "same", RESULTS | {"LAMBADA": {}})
    table, notes = table2(read_runs([str(tmp_path / name) for name in ("mine", "same")]), RECIPES).split("\n\n")
    assert [row[-4::2] for row in rows(table)] == [["inf *", "25.12% *"], ["1,234.57", "25.12%"]]
    assert notes == "* mine: WIKITEXT103 stride 256; LAMBADA-strict on 1,000 of 5,153 examples, context 256"


@pytest.mark.parametrize(
    ("name", "note"),
    [
        ("gpt2-117m-b51", "gpt2-117m-b51: the paper has no run of that name; did you mean gpt2-117m-b512?"),
        (
            "gpt2-117m-b512-slw60k@100000",
            "gpt2-117m-b512-slw60k@100000: the paper prints nothing of that step; what it prints: "
            "gpt2-117m-b512-slw60k@200000",
        ),
        ("mine", ""),
    ],
)
def test_names_that_are_almost_the_papers(tmp_path: Path, name: str, note: str) -> None:
    found = table2(read_runs([f"{name}={run_with(tmp_path, None)}"]), RECIPES)
    assert found.partition("\n\n")[2] == note and rows(found.partition("\n\n")[0])[0][2] == "4"


def test_steps_are_the_papers_where_they_round_to_them() -> None:
    for steps, other in ((58_800, False), (58_840, False), (57_000, True)):
        assert _other_length(steps, "58.8K") is other


@pytest.mark.parametrize(
    ("task", "changed", "said"),
    [
        ("WIKITEXT103", {"original_tokens": 245_569}, ""),
        ("WIKITEXT103", {"original_tokens": 217_642}, "on the validation text"),
        ("WIKITEXT103", {"original_tokens": 3_000}, "on 3,000 words, not the test text's 245,566"),
        ("WIKITEXT103", {"seq_length": 2048, "dtype": "bfloat16"}, "context 2,048, in bfloat16"),
        ("WIKITEXT103", {"model": "r/checkpoints/iter_0000003"}, "at step 3 of 4"),
        ("WIKITEXT103", {"overlapping_eval": None}, "overlapping_eval not recorded: evaluate it again"),
        ("LAMBADA-strict", {"model": "an exported model"}, ""),
        ("LAMBADA-strict", {"truncated": 12, "seq_length": 128}, "context 128, 12 cut to the context"),
        ("LAMBADA-strict", {"seq_length": "x", "dtype": 3}, "seq_length, dtype not recorded: evaluate it again"),
    ],
)
def test_conditions_that_are_not_the_papers(task: str, changed: dict, said: str) -> None:
    assert differences(task, RESULTS[task] | changed, steps=4) == said


@pytest.mark.parametrize("broken", [{"LAMBADA-strict": {"model": "x"}}, {"WIKITEXT103": {"adjusted_perplexity": None}}])
def test_half_a_result_is_named(tmp_path: Path, broken: dict) -> None:
    run = run_with(tmp_path / "mine", broken)
    with pytest.raises(UserError, match=r"mine/.*: .*: evaluate (that task|it) again"):
        table2(read_runs([str(run)]), RECIPES)


def test_printed_figures_belong_to_runs_of_the_paper() -> None:
    costs = {(run.recipe, run.at): run.paper for run in read_paper_runs(RECIPES / "paper.csv")}
    printed = read_printed(RECIPES / PRINTED_ZEROSHOT)
    assert len({line.name for line in printed}) == len(printed)
    others = [line for line in printed if (line.run, line.at) not in costs]
    assert [line.paper[:16] for line in others] == [f"Table 2, case {case}" for case in (18, 19, 20, 21)]
    for line in printed:
        assert 12 < float(line.wikitext) < 38 and 32 < float(line.lambada) < 64
        if line not in others:
            assert line.paper.split(", ")[1] in costs[line.run, line.at].replace(";", ",").split(", ")
    cases = [line.paper for line in printed if line.paper.startswith("Table 2")]
    assert sorted({int(paper.split()[3].strip(",")) for paper in cases}) == list(range(1, 22)), "all of Table 2"


def test_the_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    main = runpy.run_path(str(ROOT / "tools" / "table2.py"))["main"]
    monkeypatch.setattr(sys, "argv", ["table2.py"])
    main()
    assert rows(capsys.readouterr().out)[0] == [
        "gpt2-117m-b512", "Table 2, case 1", *"- 300K - 157B - 37 - 27.78 - 33.19%".split()
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["table2.py", str(run_with(tmp_path / "gpt2-117m-b4k", RESULTS))])
    main()
    assert rows(capsys.readouterr().out.partition("\n\n")[0])[0][-4:] == ["1,234.57", "28.09", "25.12%", "32.54%"]


def test_bad_printed_figures_are_named(tmp_path: Path) -> None:
    path = tmp_path / PRINTED_ZEROSHOT
    with pytest.raises(UserError, match=r"zeroshot.csv: cannot read what the paper prints: .*No such file"):
        read_printed(path)
    path.write_text("run,at,paper,wikitext,lambada\nx,,y\n")
    with pytest.raises(UserError, match=r"zeroshot.csv:2: expected 5 cells \(run, at, paper, .*\), found 3"):
        read_printed(path)
