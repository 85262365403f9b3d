"""The shell scripts, where the environment that they make is there."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [(["--help"], 0, "From raw text"), (["--input", "/no/such.jsonl"], 1, "no such file"), (["--oops"], 2, "unknown")],
)
def test_the_quickstart_reads_its_arguments(arguments, status, said):
    if not list(ROOT.glob(".venv/.installed-base-*")):
        pytest.skip("needs the .venv that scripts/test.sh makes")
    result = subprocess.run(
        ["bash", str(ROOT / "scripts/quickstart.sh"), *arguments], capture_output=True, text=True, check=False
    )
    assert result.returncode == status, result.stderr
    assert said in result.stdout + result.stderr


MINI = str(ROOT / "scripts/reproduce_mini.sh")
STUB = """#!/bin/bash
# In the place of python: notes what it was called with, and ends as the run's name is told to.
save="" previous=""
for word in "$@"; do [ "$previous" = --save ] && save="$word"; previous="$word"; done
echo "$*" >> "$CALLS"
[ -n "$save" ] || exit 0
mkdir -p "$save"; touch "$save/metrics.jsonl"
echo "validation | step 9 | loss 1.0"
case "$save" in *"$BAD"*) echo "error: diverged"; exit 1;; *"$STOPPED"*) exit 75;; esac
"""


def mini(tmp_path: Path, *arguments: str, bad: str = "none", stopped: str = "none"):
    stub, calls = tmp_path / "python", tmp_path / "calls"
    stub.write_text(STUB)
    stub.chmod(0o755)
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": str(stub), "CALLS": str(calls), "BAD": bad, "STOPPED": stopped}
    result = subprocess.run(["bash", MINI, *arguments], capture_output=True, text=True, check=False, env=environment)
    return result, calls.read_text().splitlines() if calls.exists() else []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "expected cpu or h200, found nothing"),
        (["gpu"], "expected cpu or h200, found gpu"),
        (["h200"], "h200 needs --data-path"),
        (["cpu", "--jobs", "0"], "--jobs 0: expected a whole number above 0"),
        (["cpu", "--minutes", "soon"], "--minutes soon: expected"),
        (["cpu", "--oops"], "unknown argument --oops"),
    ],
)
def test_the_miniature_reads_its_arguments(tmp_path, arguments, said):
    result, calls = mini(tmp_path, *arguments)
    assert result.returncode == 2 and said in result.stderr and not calls


def test_the_miniature_is_at_most_24_runs_over_rates_and_seeds(tmp_path):
    result, calls = mini(tmp_path, "cpu", "--dry-run", "--output", str(tmp_path / "mini"))
    assert result.returncode == 0 and not calls and not (tmp_path / "mini").exists()
    commands = [line.split() for line in result.stdout.splitlines()]
    runs = [(c[c.index("--config") + 1], c[c.index("--lr") + 1], c[c.index("--seed") + 1]) for c in commands]
    assert len(runs) == len(set(runs)) == 24
    assert all(Path(recipe).exists() for recipe, _, _ in runs)
    assert {Path(recipe).stem for recipe, _, _ in runs} == {path.stem for path in ROOT.glob("recipes/mini-cpu/*.yaml")}
    assert len({rate for _, rate, _ in runs}) == 3 and len({seed for _, _, seed in runs}) == 3


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_a_run_that_diverges_is_a_result_and_the_report_has_all(tmp_path, jobs):
    output = str(tmp_path / "mini")
    result, calls = mini(tmp_path, "h200", "--data-path", "d", "--output", output, "--jobs", jobs, bad="deep-baseline")
    assert result.returncode == 0, result.stderr
    assert len(calls) == 7 and "compare_runs.py" in calls[-1] and calls[-1].count("-seed1234") == 6
    assert result.stdout.count("error: diverged") == 2


def test_a_run_that_is_stopped_stops_the_miniature(tmp_path):
    arguments = ["h200", "--data-path", "d", "--output", str(tmp_path / "mini"), "--minutes", "8"]
    result, calls = mini(tmp_path, *arguments, stopped="gpt3-125m-slw")
    assert result.returncode == 75 and "start" not in result.stdout and "go on" in result.stderr
    assert len(calls) == 3 and "--exit-duration-in-mins 8" in calls[0] and "compare_runs.py" in calls[-1]
