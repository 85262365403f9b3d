"""The shell scripts, where the environment that they make is there."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron.arguments import build_parser, parse_config
from megatron.pacing.plan import plan_run

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["--help"], 0, "From raw text"),
        (["--input", "/no/such.jsonl"], 2, "error: --input /no/such.jsonl: no such file"),
        (["--input", str(ROOT)], 2, f"error: --input {ROOT} is a folder: give a file"),
        (["--input"], 2, "error: --input needs a value"),
        (["--train-tokens", ""], 2, "error: --train-tokens needs a value"),
        (["--oops"], 2, "error: unknown argument --oops"),
    ],
)
def test_the_quickstart_reads_its_arguments(arguments, status, said):
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


PROGRAMS = """#!/bin/bash
# In the place of .venv/bin/python: what the script has Python work out is real, the programs only note their flags.
[ "$1" != - ] || exec "$REAL" "$@"
echo "$*" >> "$CALLS"
while [ $# -gt 0 ]; do
    case "$1" in
        *stdlib.jsonl) touch "$1" ;;
        */tokenizer) mkdir -p "$1"; echo '{"a": 0}' > "$1/vocab.json"; touch "$1/tokenizer.json" ;;
        --output-prefix) touch "$2_text_document.idx" ;;
        --save) mkdir -p "$2"; echo '{"status": "finished"}' > "$2/exit.json" ;;
    esac
    shift
done
"""


@pytest.fixture
def quickstart(tmp_path):
    """The script in a tree of its own, with programs that do nothing: its output, its status, its calls."""
    root, calls = tmp_path / "tree", tmp_path / "calls"
    (root / ".venv/bin").mkdir(parents=True)
    for name in ("megatron", "recipes", "scripts", "pyproject.toml", "constraints.txt"):
        (root / name).symlink_to(ROOT / name)
    (root / "scripts").unlink()
    shutil.copytree(ROOT / "scripts", root / "scripts")
    files = (root / "pyproject.toml").read_bytes() + (root / "constraints.txt").read_bytes()
    digest = subprocess.run(["cksum"], input=files, capture_output=True, check=True).stdout.split()[0].decode()
    (root / f".venv/.installed-base-{digest}").touch()
    (root / ".venv/bin/python").write_text(PROGRAMS)
    (root / ".venv/bin/python").chmod(0o755)
    environment = os.environ | {"REAL": sys.executable, "PYTHON": sys.executable, "CALLS": str(calls)}

    def call(*arguments: str) -> tuple[str, int, list[str]]:
        calls.unlink(missing_ok=True)
        result = subprocess.run(
            ["bash", str(root / "scripts/quickstart.sh"), "--output", str(tmp_path / "out"), *arguments],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, env=environment, cwd=tmp_path,
        )  # fmt: skip
        return result.stdout, result.returncode, calls.read_text().splitlines() if calls.exists() else []

    return call


def test_a_number_of_tokens_that_is_none_is_refused_before_anything_is_made(quickstart, tmp_path):
    said, status, calls = quickstart("--train-tokens", "lots")
    assert status == 1 and "--train-tokens" in said and "found 'lots'" in said and said.count("\n") == 1
    assert not calls and not (tmp_path / "out").exists()


def test_a_shorter_quickstart_has_shorter_warmups_and_a_corpus_serves_many(quickstart, tmp_path):
    said, status, calls = quickstart("--train-tokens", "300K")
    assert status == 0, said
    assert len(calls) == 6 and "done before" not in said
    flags = [call.partition("--config ")[2].split() for call in calls[3:5]]
    for recipe, own in (("baseline", []), ("slw", ["--seqlen-warmup-iters", "25"])):
        words = flags.pop(0)
        assert words[0] == f"recipes/quickstart/{recipe}.yaml"
        scaled = words[words.index("--train-tokens") : words.index("--save")]
        assert scaled == ["--train-tokens", "300000", "--lr-warmup-iters", "5", *own]
        assert words[-1] == str(tmp_path / "out" / recipe) and str(tmp_path / "out/tokenizer/vocab.json") in words
    assert calls[5].endswith(f"--html {tmp_path}/out/report.html")
    assert "tools/generate_samples_gpt2.py --load" in said and f"{tmp_path}/out/report.html" in said

    said, status, calls = quickstart()
    assert [call.split()[0] for call in calls] == ["pretrain_gpt2.py"] * 2 + ["tools/compare_runs.py"]
    assert not any(flag in call for call in calls for flag in ("--train-tokens", "warmup-iters"))
    assert calls[0].endswith(f"--load {tmp_path}/out/1200K/baseline")
    assert said.count("(done before)") == 3

    said, status, calls = quickstart()
    assert len(calls) == 1 and said.count("(done before)") == 5


def test_the_shortened_warmup_reaches_the_full_length(quickstart):
    for tokens in ("20K", "300K", "1M"):
        _, status, calls = quickstart("--train-tokens", tokens)
        words = calls[-2].split()
        flags = words[words.index("--train-tokens") : words.index("--save")]
        config, _ = parse_config(build_parser(), ["--config", str(ROOT / "recipes/quickstart/slw.yaml"), *flags])
        assert status == 0 and plan_run(config).full_length_iteration is not None


def test_the_tokenizer_of_another_text_is_not_taken(quickstart, tmp_path):
    text = tmp_path / "my.txt"
    text.write_text("Once upon a time")
    assert quickstart("--input", "my.txt")[1] == 0
    said, status, calls = quickstart()
    assert status == 1 and not calls
    assert f"out holds a tokenizer made from {text}, not from the standard library: give another --output" in said
    text.write_text("Twice upon a time")
    assert f"made from {text} as it was then" in quickstart("--input", str(text))[0]
    (tmp_path / "out/tokenizer/tokenizer.json").unlink()
    assert quickstart("--input", str(text))[1] == 0, "what was not made binds nobody"


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
