"""Every recipe that ships: planned to the paper's steps and tokens, and listed as it is planned."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron.arguments import build_parser, parse_config
from megatron.config import Config
from megatron.counts import parse_count
from megatron.errors import UserError
from megatron.layout import layout_of
from megatron.model.plan import plan_totals
from megatron.model.recipe_tables import HEAD, PaperRun, marks, read_paper_runs, write_tables
from megatron.pacing.learning_rate import LearningRateSchedule
from megatron.progress import Progress

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "recipes"
RUNS = read_paper_runs(RECIPES / "paper.csv")
GPT2_TOKENS = 157_286_400_000

STEPS = {  # by the paper's formulas, from simulations apart from this code
    "gpt2-117m-b512": 300_000,
    "gpt2-117m-b4k": 37_500,
    "gpt2-117m-b512-2k": 150_000,
    "gpt2-117m-b512-slw20k": 310_000,
    "gpt2-117m-b512-slw60k": 330_000,
    "gpt2-117m-b512-slw100k": 350_000,
    "gpt2-117m-b512-slw140k": 370_000,
    "gpt2-117m-b4k-slw10k": 42_500,
    "gpt2-117m-b4k-slw20k": 47_500,
    "gpt2-117m-b4k-slw30k": 52_500,
    "gpt2-117m-b4k-slw40k": 57_500,
    "gpt2-117m-b512-2k-slw70k": 185_000,
    "gpt2-117m-b512-2k-slw110k": 205_000,
    "gpt2-117m-b512-2k-slw150k": 225_000,
    "gpt2-117m-b512-2k-slw190k": 245_000,
    "gpt2-1.5b-b512": 300_000,
    "gpt2-1.5b-b4k": 37_500,
    "gpt2-1.5b-b512-slw270k": 427_617,
    "gpt2-1.5b-b512-slw270k-step-decay": 427_617,
    "gpt2-1.5b-b4k-slw45k": 58_769,
    "gpt2-1.5b-b4k-two-stage": 55_000,
    "gpt2-1.5b-b4k-bsz45k": 59_302,
    "gpt2-1.5b-b4k-bsz45k-by32": 58_769,
    "gpt2-1.5b-b4k-first10k": 10_000,
    "gpt2-1.5b-b4k-first10k-128": 10_000,
    "gpt2-1.5b-b4k-first10k-mixed": 10_000,
    "gpt2-1.5b-b2k-first3k": 3_000,
    "gpt2-1.5b-b2k-first3k-slw8k": 3_000,
    "gpt2-1.5b-b4k-first5k": 5_000,
    "gpt2-1.5b-b4k-first5k-clip0.5": 5_000,
    "gpt2-1.5b-b4k-first5k-clip0.25": 5_000,
    "gpt2-1.5b-b4k-first5k-slw45k": 5_000,
    "gpt3-125m-300b": 591_581,
    "gpt3-125m-30b-30x": 11_417,
    "gpt3-125m-30b-40x": 11_417,
    "gpt3-125m-30b-40x-slw11.5k": 12_723,
}
TOKENS = {  # billions, where a run does not end at its tokens
    ("gpt2-117m-b512-slw60k", "200000"): 89.13,
    ("gpt2-117m-b4k-slw30k", "37000"): 92.28,
    ("gpt2-117m-b512-2k-slw110k", "122500"): 70.78,
    ("gpt2-1.5b-b512-slw270k", "360000"): 121.84,
    ("gpt2-1.5b-b4k-slw45k", "50000"): 120.51,
    ("gpt2-1.5b-b4k-first10k", ""): 10_000 * 4096 * 1024 / 1e9,
    ("gpt2-1.5b-b4k-first10k-128", ""): 10_000 * 4096 * 128 / 1e9,
    ("gpt2-1.5b-b4k-first10k-mixed", ""): 10 * 4096 * (900 * 128 + 100 * 1024) / 1e9,
    ("gpt2-1.5b-b2k-first3k", ""): 3000 * 2048 * 1024 / 1e9,
}
MISPRINTED = {"gpt2-117m-b512-2k-slw150k", "gpt2-1.5b-b4k-bsz45k"}
"""See recipes/README.md: a slip of the paper, and its batch size warmup taken to the letter."""


def recipe(name: str, *flags: str) -> Config:
    return parse_config(build_parser(), ["--config", str(RECIPES / f"{name}.yaml"), *flags])[0]


@pytest.mark.parametrize("run", RUNS, ids=lambda run: f"{run.recipe}@{run.at or 'end'}")
def test_a_run_of_the_paper(run: PaperRun) -> None:
    totals = run.plan(RECIPES)  # once: the longest take seconds
    check_steps_and_tokens(run, totals)
    check_printed(run, totals)
    check_readme(run, totals)


def check_steps_and_tokens(run: PaperRun, totals: dict[str, Any]) -> None:
    config = recipe(run.recipe)
    assert totals["iterations"] == (int(run.at) if run.at else STEPS[run.recipe])
    if (run.recipe, run.at) in TOKENS:
        assert totals["consumed_tokens"] / 1e9 == pytest.approx(TOKENS[run.recipe, run.at], abs=0.005)
    elif config.training.train_iters is None:
        target = config.training.train_tokens
        full_step = config.training.global_batch_size * config.model.seq_length
        assert target == {"gpt2": GPT2_TOKENS, "gpt3": parse_count(run.tokens or "30B")}[run.recipe[:4]]
        assert target <= totals["consumed_tokens"] < target + full_step, "ends at the first step that reaches it"


def check_printed(run: PaperRun, totals: dict[str, Any]) -> None:
    """Steps and tokens round to what the paper prints."""
    found = {run.tokens: totals["consumed_tokens"]}
    if run.recipe not in MISPRINTED:
        found[run.steps] = totals["iterations"]
    for text, value in found.items():
        if text:
            decimals = len(text[:-1].partition(".")[2])
            last_digit = parse_count(f"1{text[-1]}") / 10**decimals
            assert abs(value - parse_count(text)) <= last_digit / 2


def check_readme(run: PaperRun, totals: dict[str, Any]) -> None:
    """recipes/README.md has the line that the tool prints, in its place."""
    first, last = marks(run.section)
    table = (RECIPES / "README.md").read_text().partition(first)[2].partition(last)[0].strip().splitlines()
    assert table[:2] == HEAD.splitlines()
    section = [other for other in RUNS if other.section == run.section]
    assert len(table) == 2 + len(section)
    assert table[2 + section.index(run)] == run.row(totals), "run tools/list_recipes.py --write"


def test_every_recipe_parses_and_every_run_of_the_paper_is_listed_once() -> None:
    shared = {"gpt2-common", "gpt3-common"}
    names = {path.stem for path in RECIPES.glob("*.yaml")} - shared
    assert names == set(STEPS) == {run.recipe for run in RUNS}
    assert len(RUNS) == len(STEPS) + 5, "the early checkpoints"
    for path in RECIPES.rglob("*.yaml"):
        if path.stem not in shared:
            config, _ = parse_config(build_parser(), ["--config", str(path)])
            assert plan_totals(config, 2)["iterations"] == 2, path


@pytest.mark.parametrize("name", STEPS)
def test_ranks_that_the_readme_promises(name: str) -> None:
    config = recipe(name)
    most = 16 if "gpt3" in name and "slw" not in name else {"bsz45k": 1, "by32": 32}.get(name.rpartition("-")[2], 512)
    assert layout_of(config, most).dp == most
    if config.batch_size_warmup.batch_size_warmup != "none":
        with pytest.raises(UserError, match=r"--batch-size-.* must be a multiple"):
            layout_of(config, 2 * most)


def test_learning_rates() -> None:
    """Peaks as printed, and what is left of them where the runs end."""
    for name, peak in [
        ("gpt2-117m-b512-2k-slw70k", 1.5e-4),
        ("gpt2-1.5b-b4k-bsz45k-by32", 6e-4),
        ("gpt3-125m-300b", 6e-4),
        ("gpt3-125m-30b-30x", 1.8e-2),
        ("gpt3-125m-30b-40x", 2.4e-2),
        ("gpt3-125m-30b-40x-slw11.5k", 2.4e-2),
    ]:
        assert recipe(name).learning_rate.lr == peak
    original = recipe("gpt3-125m-300b")
    schedule = LearningRateSchedule(
        original.learning_rate,
        original.learning_rate.warmup(original.training),
        original.learning_rate.decay(original.training),
    )
    for tokens, lr in [(375_000_000, 6e-4), (130_187_500_000, 3.3e-4), (260_000_000_000, 6e-5), (299 * 10**9, 6e-5)]:
        assert schedule.lr(Progress(1, 1, tokens, 375_000_000), samples=1, tokens=1) == pytest.approx(lr)


def test_one_setting_apart() -> None:
    """What a comparison of the paper compares, and nothing else."""
    pairs = [
        ("gpt2-1.5b-b512-slw270k", "gpt2-1.5b-b512-slw270k-step-decay", {"learning_rate"}),
        ("gpt2-1.5b-b4k-first5k", "gpt2-1.5b-b4k-first5k-clip0.25", {"optimizer"}),
        ("gpt2-1.5b-b4k-first5k", "gpt2-1.5b-b4k-first5k-slw45k", {"seqlen_warmup"}),
        ("gpt2-1.5b-b2k-first3k", "gpt2-1.5b-b2k-first3k-slw8k", {"seqlen_warmup"}),
        ("gpt2-1.5b-b4k", "gpt2-1.5b-b4k-bsz45k", {"batch_size_warmup"}),
        ("gpt3-125m-30b-40x", "gpt3-125m-30b-40x-slw11.5k", {"seqlen_warmup", "batch_size_warmup"}),
    ]
    for one, other, sections in pairs:
        a, b = recipe(one), recipe(other)
        assert {name for name in vars(a) if getattr(a, name) != getattr(b, name)} == sections
    decay = recipe("gpt2-1.5b-b512-slw270k-step-decay").learning_rate
    assert decay.lr_decay_iters == 300_000 + 270_000 // 2 and decay.lr_decay_tokens is None


def test_the_sweep_of_the_appendix() -> None:
    for lr in ("1.5e-4", "3e-4", "6e-4", "12e-4"):
        for name in ("gpt2-1.5b-b2k-first3k", "gpt2-1.5b-b2k-first3k-slw8k"):
            config = recipe(name, "--lr", lr, "--seed", "1238")
            assert (config.learning_rate.lr, config.training.global_batch_size) == (float(lr), 2048)


# The tool, on a directory of its own.

TINY = "seq-length: 16\nglobal-batch-size: 2\ntrain-iters: 5\n"
COLUMNS = "section,recipe,at,paper,steps,tokens,hours\n"


def tiny_directory(directory: Path, lines: str = 'runs,tiny,,"Table 1, case 1",1K,,\nruns,tiny,3,,3,,7\n') -> Path:
    (directory / "tiny.yaml").write_text(TINY)
    (directory / "paper.csv").write_text(COLUMNS + lines)
    first, last = marks("runs")
    (directory / "README.md").write_text(f"# Title\n\n{first}\nold\n{last}\n\nThe end.\n")
    return directory


def list_recipes(directory: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "list_recipes.py"), "--recipes", str(directory), *flags]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_tool_prints_and_writes(tmp_path: Path) -> None:
    table = (
        f"{HEAD}\n| tiny | Table 1, case 1 | 1K | 5 | - | 0.00B | - |\n| tiny --at 3 | - | 3 | 3 | - | 0.00B | 7 |\n"
    )
    directory = tiny_directory(tmp_path)
    assert list_recipes(directory).stdout == f"runs\n\n{table}"
    first, last = marks("runs")
    for _ in range(2):
        result = list_recipes(directory, "--write")
        assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
        assert (directory / "README.md").read_text() == f"# Title\n\n{first}\n\n{table}\n{last}\n\nThe end.\n"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("runs,tiny,,x\n", "paper.csv:2: expected 7 cells (section, recipe, at, paper, steps, tokens, hours), found 4"),
        ("runs,tiny,,x,12k,,\n", "paper.csv:2: steps: expected a number such as 58.8K, or nothing, found '12k'"),
        ('runs,"tiny,,x,,,\n', "paper.csv: cannot read what the paper prints: unexpected end of data"),
        ("runs,none,,x,,,\n", "none.yaml: no such file"),
        ("runs,tiny,6,x,,,\n", "--at 6: the run ends after 5 iterations"),
        (
            "others,tiny,,x,,,\n",
            "others: written by tools/list_recipes.py --write -->' and then '<!-- end of others -->', each once",
        ),
    ],
)
def test_bad_tables_are_named(tmp_path: Path, lines: str, message: str) -> None:
    directory = tiny_directory(tmp_path, lines)
    before = (directory / "README.md").read_text()
    result = list_recipes(directory, "--write")
    assert result.returncode == 1
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert message in result.stderr
    assert (directory / "README.md").read_text() == before


def test_missing_files_are_named(tmp_path: Path) -> None:
    assert f"{tmp_path}/paper.csv: cannot read" in list_recipes(tmp_path).stderr
    with pytest.raises(UserError, match=r"README.md: cannot read the file to write the tables to"):
        write_tables(tmp_path / "README.md", {})


def test_marks_out_of_order_are_refused(tmp_path: Path) -> None:
    first, last = marks("runs")
    for text in (f"{last}\n{first}\n", f"{first}\n{last}\n{last}\n", f"{first}\n"):
        readme = tmp_path / "README.md"
        readme.write_text(text)
        with pytest.raises(UserError, match="each once"):
            write_tables(readme, {"runs": "table"})
        assert readme.read_text() == text
