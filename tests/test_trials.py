"""Whole searches of the tuner, most with a program in the place of pretrain_gpt2.py, and the journal."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from tuned_run import FLAGS, config_of

from megatron.arguments import build_parser, parse_config
from megatron.data.indexed_writer import IndexedDatasetWriter
from megatron.errors import EXIT_STOPPED, UserError
from megatron.instability.trials import read_journal
from megatron.instability.tuning import paced

ROOT = Path(__file__).parents[1]

PROGRAM = """
import json, os, sys, time
flags = dict(zip(sys.argv[2::2], sys.argv[3::2]))
start, T = int(flags["--seqlen-start"]), int(flags["--seqlen-warmup-iters"])
home = flags["--save"]
assert flags["--load"] == home and os.path.basename(sys.argv[1]) == "pretrain_gpt2.py"
base = dict(line.split(": ") for line in open(flags["--config"]).read().splitlines() if ": " in line)
mode = os.environ.get("MODE", "")
with open(os.path.join(home, "pid"), "w") as file:
    file.write(str(os.getpid()))
with open(os.environ["LAUNCHES"], "a") as file:
    file.write(f"{start} {T}\\n")
os.makedirs(os.path.join(home, "checkpoints"), exist_ok=True)
if mode == f"fail {start} {T}":
    sys.exit("error: --data-path corpus: no such file")
at = 4 if start < 16 else 25 if T > 60 else None
with open(os.path.join(home, "metrics.jsonl"), "w", buffering=1) as log:
    for t in range(1, int(base["train-iters"]) + 1):
        rise = 0.5 if t == at else 0.0
        step = {"iteration": t, "consumed_tokens": 512 * t, "loss": "nan" if mode == "nan" and t == 3 else 5 - 0.01 * t}
        log.write(json.dumps(step) + "\\n")
        if mode != "unvalidated":
            entry = {"event": "validation", "iteration": t, "loss": 5 - 0.01 * t + rise}
            log.write(json.dumps(entry | {"perplexity": 2.718281828459045 ** entry["loss"]}) + "\\n")
        if t == at or mode == "hang" and t == 2:
            time.sleep(120)
"""
"""Starts below 16 fluctuate at once, T above 60 late; a trial that does goes on for ever, it must be stopped."""


DATA = "0.3 wiki 0.7 web".split()


@pytest.fixture(scope="module", autouse=True)
def data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The tuner runs where there are two corpora of noise."""
    home = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for name in DATA[1::2]:
        with IndexedDatasetWriter(home / name, np.uint16) as writer:
            for _ in range(40):
                writer.add_document(rng.integers(0, 200, 200))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        yield home


def tune(home: Path, *flags: str, mode: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(home, *flags), **streams(home, mode), check=False, timeout=100)


def command(home: Path, *flags: str) -> list[str]:
    """tools/tune_pacing.py with PROGRAM: 10 steps of warmup, T of 10 to 120."""
    program, recipe = home / "program.py", home / "recipe.yaml"
    program.write_text(PROGRAM)
    pairs = zip(FLAGS[::2], FLAGS[1::2], strict=True)
    lines = [f"{flag.removeprefix('--')}: {value}\n" for flag, value in pairs]
    recipe.write_text("".join([*lines, "data-path: wiki\n", "vocab-size: 200\n", "split: 80,10,10\n"]))
    return [
        sys.executable, str(ROOT / "tools/tune_pacing.py"), "--config", str(recipe), "--output", str(home / "out"),
        "--launcher", f"{sys.executable} {program}", "--max-multiple", "12", *flags,
    ]  # fmt: skip


def streams(home: Path, mode: str) -> dict:
    environment = os.environ | {"MODE": mode, "LAUNCHES": str(home / "launches"), "OMP_NUM_THREADS": "1"}
    return {"env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}


def launches(home: Path) -> list[str]:
    return (home / "launches").read_text().splitlines()


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> tuple[Path, str]:
    home = tmp_path_factory.mktemp("tuning")
    result = tune(home, "--lr", "2e-3", "--data-path", *DATA)
    assert result.returncode == 0, result.stderr
    return home, result.stdout


def test_a_whole_search(undisturbed) -> None:
    home, printed = undisturbed
    assert launches(home) == ["8 40", "16 40", "16 80", "16 60", "16 70"]
    assert "trials                at most 7 of at most 34 steps" in printed
    assert "trial 5 of at most 7: start 16, T = 70" in printed
    assert "fluctuates: validation perplexity is 1.632 times the lowest before at step 4" in printed
    assert "Recommended: start 16, T = 60 steps: the next longer, 70, fluctuates." in printed
    for trial in (home / "out" / "trials").iterdir():
        assert not (trial / "checkpoints").exists()
        assert not alive(int((trial / "pid").read_text()))


def test_the_recommended_recipe_is_the_run_with_the_chosen_warmup(undisturbed) -> None:
    home, _ = undisturbed
    recipe = home / "out" / "recommended.yaml"
    found = parse_config(build_parser(), ["--config", str(recipe)])[0]
    assert found == paced(
        config_of("--lr", "2e-3", "--vocab-size", "200", "--split", "80,10,10", "--data-path", *DATA), 16, 60
    )
    tool = [sys.executable, str(ROOT / "tools/plan_run.py"), "--config", str(recipe), "--json"]
    planned = json.loads(subprocess.run(tool, capture_output=True, text=True, check=True).stdout)
    assert planned["full_length_iteration"] == 60


def test_the_figure_is_there_and_not_blank(undisturbed) -> None:
    pixels = matplotlib.image.imread(undisturbed[0] / "out" / "tuning.png")
    assert pixels.shape[1] == 1800
    assert 0.01 < (pixels[..., :3].min(axis=2) < 0.9).mean() < 0.3


def test_a_search_that_broke_off_ends_like_an_undisturbed_one(undisturbed, tmp_path) -> None:
    given = ["--lr", "2e-3", "--data-path", *DATA]
    broken = tune(tmp_path, *given, mode="fail 16 80")
    assert broken.returncode == 1
    assert broken.stderr.count("\n") == 1
    assert "start16-T80 ended with status 1 before it was decided: error: --data-path corpus: no such" in broken.stderr
    again = tune(tmp_path, *given)
    assert again.returncode == 0
    assert again.stdout.count("(from the journal)") == 2
    assert launches(tmp_path) == ["8 40", "16 40", "16 80", "16 80", "16 60", "16 70"]
    for name in ("recommended.yaml", "journal.json", "tuning.png", "base.yaml"):
        assert (tmp_path / "out" / name).read_bytes() == (undisturbed[0] / "out" / name).read_bytes(), name


def test_a_journal_of_other_settings_is_refused(undisturbed) -> None:
    home, _ = undisturbed
    result = tune(home, "--lr", "4e-3", "--tolerance", "0.2", "--data-path", *DATA)
    assert result.returncode == 1
    assert "journal.json: its trials were made with lr 0.002, now 0.004; tolerance 0.1, now 0.2:" in result.stderr
    assert len(launches(home)) == 5


def test_the_journal_does_not_depend_on_the_range(undisturbed) -> None:
    """Neither the range nor the first T changes what a trial shows."""
    settings = json.loads((undisturbed[0] / "out" / "journal.json").read_text())["settings"]
    finished = read_journal(undisturbed[0] / "out" / "journal.json", settings)
    assert sorted(finished) == [(8, 40), (16, 40), (16, 60), (16, 70), (16, 80)]
    assert not {"seqlen_start", "seqlen_warmup_iters", "max_multiple", "first_multiple"} & set(settings)


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"settings": {}, "trials": [{"start": 8}]}', "[" * 3000, "\xff",
     '{"settings": {}, "trials": [{"start": 8, "duration": 1, "sign": "odd", "iteration": 1, "value": 1, '
     '"validations": []}]}'],
)  # fmt: skip
def test_what_is_no_journal(tmp_path, content) -> None:
    (tmp_path / "journal.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=r"journal\.json: not a journal of this tool .*; choose another --output"):
        read_journal(tmp_path / "journal.json", {})


def test_sigterm_stops_the_trial_under_way_too(tmp_path) -> None:
    pid_file = tmp_path / "out" / "trials" / "start8-T40" / "pid"
    with subprocess.Popen(command(tmp_path), **streams(tmp_path, "hang")) as process:
        deadline = time.monotonic() + 60
        while not (pid_file.exists() and pid_file.read_text()) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == EXIT_STOPPED
    assert "Traceback" not in errors
    assert not alive(int(pid_file.read_text()))


def test_a_trial_that_is_not_finite_fluctuates(tmp_path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "recommended.yaml").write_text("of: an earlier search")
    result = tune(tmp_path, mode="nan")
    assert result.returncode == 1
    assert "fluctuates: the loss is not finite at step 3" in result.stdout
    assert "No recommendation: with T = 40 every start from 8 to 32 fluctuates" in result.stdout
    assert not (tmp_path / "out" / "recommended.yaml").exists()
    assert json.loads((tmp_path / "out" / "journal.json").read_text())["trials"][0]["value"] == "nan"
    assert tune(tmp_path, mode="nan").stdout.count("(from the journal)") == 3


def test_a_run_without_validation_is_told(tmp_path) -> None:
    result = tune(tmp_path, mode="unvalidated")
    assert result.returncode == 1
    assert "metrics.jsonl: holds no validation after step 1: give the validation split a share" in result.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--launcher", "no-such-program"], "cannot start no-such-program: No such file or directory; see --launcher"),
        (["--first-start", "12"], "--first-start 12 must be a multiple"),
        (["--tolerance", "-1"], "--tolerance -1.0 must be"),
        (["--output", "/dev/null/x"], "--output: '/dev/null/x' cannot be written: '/dev/null' is no directory"),
        (["--resolution", "many"], "argument --resolution: expected a number, found 'many'"),
        (["--data-path", "nosuch"], "nosuch.idx"),
        (["--split", "1,0,0"], "--split 1,0,0: a trial is judged by its validations; wiki: 0 documents for validation"),
    ],
)
def test_faults_are_one_line(tmp_path, flags, message) -> None:
    result = tune(tmp_path, *flags)
    assert result.returncode == 1
    assert message in result.stderr and result.stderr.count("\n") == 1
    assert "trial 1" not in result.stdout or "no-such-program" in flags


def test_flags_that_are_needed(tmp_path) -> None:
    tool = [sys.executable, str(ROOT / "tools/tune_pacing.py")]
    for given, message in [
        (FLAGS, "--output DIR is needed"),
        ([*FLAGS, "--output", str(tmp_path / "out")], "--config RECIPE is needed"),
    ]:
        result = subprocess.run([*tool, *given], capture_output=True, text=True, check=False)
        assert result.returncode == 1 and message in result.stderr


def test_a_dry_run_prints_the_trials_and_writes_nothing(tmp_path) -> None:
    result = tune(tmp_path, "--dry-run")
    assert result.returncode == 0, result.stderr
    *_, first, second, third, last = result.stdout.splitlines()
    for start, line in ((8, first), (16, second), (32, third)):
        trial = tmp_path / "out" / "trials" / f"start{start}-T40"
        flags = f"--seqlen-start {start} --seqlen-warmup-iters 40 --save {trial} --load {trial}"
        assert line.endswith(f"pretrain_gpt2.py --config {tmp_path / 'out' / 'base.yaml'} {flags}")
    assert last.endswith("T = 10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 110, 120")
    assert not (tmp_path / "out").exists() and not (tmp_path / "launches").exists()


def test_a_pacing_that_grows_is_tuned_itself(tmp_path) -> None:
    warmup = ["--seqlen-warmup", "root", "--seqlen-root-degree", "3", "--seqlen-warmup-tokens", "5"]
    result = tune(tmp_path, *warmup)
    assert result.returncode == 0, result.stderr
    found = parse_config(build_parser(), ["--config", str(tmp_path / "out" / "recommended.yaml")])[0].seqlen_warmup
    assert (found.seqlen_warmup, found.seqlen_root_degree, found.seqlen_warmup_tokens) == ("root", 3, None)


def test_the_recipe_may_have_another_pacing(tmp_path) -> None:
    """What belongs to that one is unset; how samples are made short stays."""
    flags = ["--seqlen-warmup", "discrete", "--seqlen-stages", "8:3,64"]
    result = tune(tmp_path, *flags, "--seqlen-realisation", "reshape")
    assert result.returncode == 0, result.stderr
    found = parse_config(build_parser(), ["--config", str(tmp_path / "out" / "recommended.yaml")])[0]
    assert found.seqlen_warmup.seqlen_stages is None
    assert (found.seqlen_warmup.seqlen_warmup, found.seqlen_warmup.seqlen_realisation) == ("linear", "reshape")


def test_what_a_deepspeed_file_or_an_unset_has_changed_is_recommended_too(tmp_path) -> None:
    (tmp_path / "ds.json").write_text('{"gradient_clipping": 0.5, "steps_per_print": 7}')
    result = tune(tmp_path, "--deepspeed-config", str(tmp_path / "ds.json"), "--unset", "lr-decay-style")
    assert result.returncode == 0, result.stderr
    found = parse_config(build_parser(), ["--config", str(tmp_path / "out" / "recommended.yaml")])[0]
    assert (found.optimizer.clip_grad, found.logging.log_interval) == (0.5, 7)


def test_logs_of_a_search_that_was_killed_in_its_first_trial_are_of_its_settings(tmp_path) -> None:
    assert tune(tmp_path, mode="fail 8 40").returncode == 1
    assert tune(tmp_path, "--lr", "6e-3", mode="fail 8 40").returncode == 1, "no step was taken: it may change"
    log = tmp_path / "out" / "trials" / "start8-T40" / "metrics.jsonl"
    log.write_text('{"iteration": 1, "consumed_tokens": 8, "loss": 3.0}\n')
    again = tune(tmp_path, "--lr", "5e-3")
    assert again.returncode == 1 and "lr" in again.stderr and "another --output" in again.stderr


def test_a_launcher_that_is_no_command_is_one_line(tmp_path) -> None:
    result = tune(tmp_path, "--launcher", "'x")
    assert result.returncode == 1 and "--launcher 'x: No closing quotation" in result.stderr


@pytest.mark.slow
def test_real_trials_lead_to_a_recommendation(tmp_path) -> None:
    """A tiny model on noise, at a rate at which nothing happens: the longest T of the range."""
    rng = np.random.default_rng(0)
    corpus = tmp_path / "toy_text_document"
    with IndexedDatasetWriter(corpus, np.uint16) as writer:
        for _ in range(400):
            writer.add_document(rng.integers(0, 200, 200))
    arguments = command(tmp_path, "--data-path", str(corpus), "--vocab-size", "200", "--eval-iters", "1")
    arguments += ["--split", "80,10,10", "--launcher", sys.executable, "--max-multiple", "6", "--lr", "1e-4"]
    result = subprocess.run(arguments, **streams(tmp_path, ""), check=False, timeout=250)
    assert result.returncode == 0, result.stderr
    assert "Recommended: start 8, T = 60 steps, the longest in the range" in result.stdout
    trials = tmp_path / "out" / "trials"
    assert sorted(path.name for path in trials.iterdir()) == ["start8-T40", "start8-T50", "start8-T60"]
    assert not any((trial / "checkpoints").exists() for trial in trials.iterdir())
