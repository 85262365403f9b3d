"""The shell scripts, where the environment that they make is there."""

import json
import subprocess
import time
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


@pytest.mark.slow
def test_the_quickstart_on_ones_own_text(tmp_path):
    if not list(ROOT.glob(".venv/.installed-base-*")):
        pytest.skip("needs the .venv that scripts/test.sh makes")
    words = "the river runs cold under a stone bridge and nobody has told them of it".split()
    texts = [" ".join(words[n * k % 15] for k in range(1, 200)) for n in range(400)]
    (tmp_path / "my.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    command = ["bash", str(ROOT / "scripts/quickstart.sh"), "--input", "my.jsonl", "--output", "runs/mine"]
    result = subprocess.run(
        [*command, "--train-tokens", "20K"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "baseline" in result.stdout and (tmp_path / "runs/mine/comparison.png").exists()


MINI = str(ROOT / "scripts/reproduce_mini.sh")
STUB = """#!/bin/bash
# In the place of python: notes what it was called with, and ends as the run's name is told to.
save="" previous=""
for word in "$@"; do [ "$previous" = --save ] && save="$word"; previous="$word"; done
echo "$*" >> "$CALLS"
[ -n "$save" ] || exit 0
case "$save" in *"$FAILED"*) echo "error: no such data"; exit 1;; esac
mkdir -p "$save"; touch "$save/metrics.jsonl"
case "$save" in
    *"$SLOW"*) trap 'echo stopped > "$save/told"; exit 75' TERM; touch "$save/going"; while :; do sleep 0.05; done;;
    *"$BAD"*) echo '{"status": "diverged"}' > "$save/exit.json"; echo "error: diverged"; exit 1;;
    *"$STOPPED"*) exit 75;;
esac
echo "validation | step 9 | loss 1.0"
echo '{"status": "finished"}' > "$save/exit.json"
"""


def stubbed(tmp_path: Path, **kinds: str) -> dict[str, str]:
    """The environment in which the runs whose names contain BAD diverge, and so on."""
    stub = tmp_path / "python"
    stub.write_text(STUB)
    stub.chmod(0o755)
    kinds = dict.fromkeys(("BAD", "STOPPED", "FAILED", "SLOW"), "none") | kinds
    return {"PATH": "/usr/bin:/bin", "PYTHON": str(stub), "CALLS": str(tmp_path / "calls"), **kinds}


def calls_of(tmp_path: Path) -> list[str]:
    calls = tmp_path / "calls"
    return calls.read_text().splitlines() if calls.exists() else []


def mini(tmp_path: Path, *arguments: str, **kinds: str) -> subprocess.CompletedProcess[str]:
    environment = stubbed(tmp_path, **kinds)
    return subprocess.run(["bash", MINI, *arguments], capture_output=True, text=True, check=False, env=environment)


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
    result = mini(tmp_path, *arguments)
    assert result.returncode == 2 and said in result.stderr and not calls_of(tmp_path)


def test_the_miniature_is_at_most_24_runs_over_rates_and_seeds(tmp_path):
    result = mini(tmp_path, "cpu", "--dry-run", "--output", str(tmp_path / "mini"))
    assert result.returncode == 0 and not calls_of(tmp_path) and not (tmp_path / "mini").exists()
    commands = [line.split() for line in result.stdout.splitlines()]
    runs = [(c[c.index("--config") + 1], c[c.index("--lr") + 1], c[c.index("--seed") + 1]) for c in commands]
    assert len(runs) == len(set(runs)) == 24
    assert all(Path(recipe).exists() for recipe, _, _ in runs)
    assert {Path(recipe).stem for recipe, _, _ in runs} == {path.stem for path in ROOT.glob("recipes/mini-cpu/*.yaml")}
    assert len({rate for _, rate, _ in runs}) == 3 and len({seed for _, _, seed in runs}) == 3


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_a_run_that_diverges_is_a_result_and_is_not_made_again(tmp_path, jobs):
    arguments = ["h200", "--data-path", "d", "--output", str(tmp_path / "mini"), "--jobs", jobs]
    first = mini(tmp_path, *arguments, BAD="deep-baseline")
    assert first.returncode == 0, first.stderr
    *runs, summary, report = calls_of(tmp_path)
    assert len(runs) == 6 and report.count("-seed1234") == summary.count("-seed1234") == 6
    assert "--html" in report and "--json" in summary and (tmp_path / "mini/report.json").exists()
    assert first.stdout.count("error: diverged") == 2
    (tmp_path / "calls").unlink()
    second = mini(tmp_path, *arguments)
    assert second.returncode == 0 and second.stdout.count("made already") == 6
    assert len(calls_of(tmp_path)) == 2, "the report alone is made again"


def test_a_run_that_is_stopped_stops_the_miniature(tmp_path):
    arguments = ["h200", "--data-path", "d", "--output", str(tmp_path / "mini"), "--minutes", "8"]
    result = mini(tmp_path, *arguments, STOPPED="gpt3-125m-slw")
    assert result.returncode == 75 and "go on" in result.stderr
    calls = calls_of(tmp_path)
    assert len(calls) == 4 and "--exit-duration-in-mins 8" in calls[0]


def test_runs_that_fail_are_told_apart_from_results(tmp_path):
    arguments = ["h200", "--data-path", "d", "--output", str(tmp_path / "mini")]
    some = mini(tmp_path, *arguments, FAILED="deep")
    assert some.returncode == 1 and "some runs failed" in some.stderr and len(calls_of(tmp_path)) == 8
    (tmp_path / "calls").unlink()
    every = mini(tmp_path, *arguments[:-1], str(tmp_path / "other"), FAILED="seed")
    assert every.returncode == 1 and "no run has taken a step" in every.stderr
    assert every.stdout.count("error: no such data") == 6


def test_a_signal_reaches_the_runs_and_the_miniature_waits_for_them(tmp_path):
    output = tmp_path / "mini"
    process = subprocess.Popen(
        ["bash", MINI, "h200", "--data-path", "d", "--output", str(output), "--jobs", "2"],
        env=stubbed(tmp_path, SLOW="gpt3"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 30
    while len(list(output.glob("*/going"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.terminate()
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 75 and "go on" in errors
    assert len(list(output.glob("*/told"))) == 2
