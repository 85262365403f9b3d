"""The programs in benchmarks/: what they share, and each from end to end on something tiny."""

from __future__ import annotations

import argparse
import gzip
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from whole_runs import ENVIRONMENT

from megatron.errors import UserError
from megatron.tokenizer.training import TrainedTokenizer

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

import bench_loading
import bench_overhead
import bench_preprocessing
import measure
from processes import run_command
from rivals import Rival, Rivals

BENCHMARKS = Path(measure.__file__).parent
MIB = 2**20
TINY_MODEL = (
    "--model-size 10M --num-layers 1 --hidden-size 32 --num-attention-heads 2 --vocab-size 64 --seq-length 16 "
    "--repeats 1"
)
PROGRAMS: dict[str, tuple[str | list[str], list[str]]] = {
    "bench_train_step.py": (
        f"{TINY_MODEL} --contestants ours-eager lean-eager huggingface-eager",
        ["ours-eager", "lean-eager", "huggingface-eager"],
    ),
    "bench_attention.py": ("--tokens 64 --num-attention-heads 2 --head-dim 8 --lengths 8 64 --repeats 1", ["8", "64"]),
    "bench_warmup.py": (f"{TINY_MODEL} --global-batch-size 8 --figure {{directory}}/speed.png", ["8", "16"]),
    "bench_run.py": (
        f"{TINY_MODEL} --train-tokens 1K --global-batch-size 4 --seqlen-start 8 --seqlen-warmup-iters 2",
        ["baseline", "slw", "slw, fixed micro-batches"],
    ),
    "bench_preprocessing.py": (
        "--input {text} --vocab-size 300 --repeats 1 --grow 2",
        ["ours, 1 core", "Hugging Face, 1 core", "ours, 2 cores", "Hugging Face, 2 cores"] * 2,
    ),
    "bench_sample_index.py": ("--documents 2K --repeats 1", ["ours", "copying"]),
    "bench_loading.py": (
        "--tokens 50K --seq-length 64 --seqlen 32 --global-batch-size 4 --batches 2 --repeats 1",
        ["ours", "nanoGPT", "NumPy copying"],
    ),
    "bench_overhead.py": (
        f"{TINY_MODEL} --compile off --calls 1",
        [
            "moment statistics",
            "losses by position: sums",
            "losses by position: totals",
            "the log of a step",
            "its metrics.jsonl",
            "its TensorBoard",
            "its progress line",
            "together",
        ],
    ),
    "bench_checkpoint.py": (
        TINY_MODEL,
        [
            "a step",
            "held up by a save at once (read back included)",
            "held up by a save in the background",
            "a step during that save",
            "until it was on the disk",
        ],
    ),
    "bench_zeroshot.py": (
        "--num-layers 1 --hidden-size 64 --seq-length 32 --vocab-size 64 --windows 2 --repeats 1 --device cpu",
        ["plain loop, fp32", "ours, fp32", "plain loop, bf16", "ours, bf16"],
    ),
    "bench_startup.py": (
        ["--repeats", "1", "--only", "first step, ours", "import megatron.pacing"],
        ["import torch", "import megatron.pacing", "first step, ours"],
    ),
}
"""Flags, and the first column of the table. All of it on files made here: nothing is downloaded."""
LONG = ("bench_train_step.py", "bench_run.py", "bench_startup.py")
"""They start many processes that import torch, one after the other."""


def expected_ratios(name: str, written: dict[str, Any]) -> list[tuple[float, float]]:
    """Pairs of a ratio as written, and as it follows from the times and speeds written beside it."""
    rows, middle = written["rows"], statistics.median
    if name == "bench_train_step.py":
        ours = middle(written["seconds"]["ours-eager"])
        return [(written["ratio"][way], middle(times) / ours) for way, times in written["seconds"].items()]
    if name == "bench_warmup.py":
        tokens, fixed = written["seconds"]["by tokens"], written["seconds"]["fixed"]
        return [(written["ratio"][length], middle(fixed[length]) / middle(tokens[length])) for length in tokens]
    if name == "bench_attention.py":
        return [(written["ratio"][length], theirs / ours) for length, ours, theirs, _ in rows]
    if name == "bench_run.py":
        baseline = rows[0][3] / rows[0][2]
        return [(written["ratio"][way], took / tokens / baseline) for way, _, tokens, took, *_ in rows]
    if name == "bench_zeroshot.py":
        return [(row["ratio to the plain loop"], rows[0]["seconds"] / row["seconds"]) for row in rows]
    if name == "bench_startup.py":
        return [(row["ratio to import torch"], row["seconds"] / rows[0]["seconds"]) for row in rows]
    if name == "bench_loading.py":
        nanogpt = next(row["tokens/s"] for row in rows if row["contestant"] == "nanoGPT")
        return [(row["ratio to nanoGPT"], row["tokens/s"] / nanogpt) for row in rows]
    if name == "bench_preprocessing.py":
        theirs = {row["contestant"][-7:] + str(row["input"]): row for row in rows if row["contestant"][0] == "H"}
        pairs = [(row, theirs[row["contestant"][-7:] + str(row["input"])]) for row in rows]
        return [(row["ratio of commands"], other["command s"] / row["command s"]) for row, other in pairs]
    return []


def run_program(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(BENCHMARKS / name), *arguments],
        capture_output=True,
        text=True,
        env=ENVIRONMENT | {"HF_HUB_OFFLINE": "1"},
        check=False,
    )


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A thousand documents, little more than is needed."""
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": f"the {n}th text says {n * n} " * 50}) + "\n" for n in range(1000)))
    return path


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in LONG else []) for name in PROGRAMS]
)
def test_prints_a_row_for_each_contestant_and_writes_where_it_was_measured(
    name: str, tmp_path: Path, text: Path
) -> None:
    if name in ("bench_zeroshot.py", "bench_train_step.py"):
        pytest.importorskip("transformers")
    given, names = PROGRAMS[name]
    words = given.format(text=text, directory=tmp_path).split() if isinstance(given, str) else given
    done = run_program(name, *words, "--output", str(tmp_path / "out.json"))
    assert done.returncode == 0, done.stderr
    table = [line.split("|")[1].strip() for line in done.stdout.splitlines() if line.startswith("|")]
    assert [row for row in table[2:] if row != "compiled"] == names
    assert "--figure" not in words or (tmp_path / "speed.png").stat().st_size > 10_000
    written = json.loads((tmp_path / "out.json").read_text())
    assert {"date", "commit", "processor", "cores", "torch"} <= written["machine"].keys()
    assert written["machine"]["commit"] in done.stdout
    assert len(written["rows"]) == len(table) - 2
    assert "ratio" in written or all(any("ratio" in key for key in row) for row in written["rows"])
    for ratio, expected in expected_ratios(name, written):
        assert ratio == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "arguments", "status", "message"),
    [
        (
            "bench_train_step.py",
            "--micro-batch-size 3",
            1,
            "error: --global-batch-size 4 must be a multiple of --micro-batch-size 3",
        ),
        ("bench_warmup.py", "--seqlen-start 2K", 1, "error: --seqlen-start 2000 must be at most --seq-length 1024"),
        ("bench_loading.py", "--seqlen 2048", 1, "error: --seqlen 2048 must be at most --seq-length 1024"),
        ("bench_loading.py", "--tokens 1K", 1, "error: --tokens 1,000 must be more than the 65,600 of a batch"),
        ("bench_sample_index.py", "--documents 0", 1, "--documents: expected a whole number from 1, found '0'"),
        ("bench_startup.py", "--only x", 1, "error: --only x: expected some of import numpy, import torch, "),
        (
            "bench_preprocessing.py",
            "--input x.txt",
            1,
            "error: --input x.txt: expected a name that ends with .jsonl or ",
        ),
        (
            "bench_preprocessing.py",
            "--input {tiny}",
            1,
            "tiny.jsonl: expected at least 1 MB of JSON lines, found 0.000 MB",
        ),
        ("bench_preprocessing.py", "--output /", 1, "--output: expected a file to write, found the directory '/'"),
        ("bench_preprocessing.py", "--grwo 1", 1, "unknown flag --grwo (did you mean --grow?); see --help"),
    ],
)
def test_a_wrong_flag_is_one_line(name: str, arguments: str, status: int, message: str, tmp_path: Path) -> None:
    tiny = tmp_path / "tiny.jsonl"
    tiny.write_text('{"text": "x"}\n')
    done = run_program(name, *arguments.format(tiny=tiny).split())
    assert done.returncode == status
    assert message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_contestants_take_turns_and_only_rounds_after_the_first_count() -> None:
    calls: list[str] = []

    def contestant(name: str, *seconds: float) -> Any:
        left = iter(seconds)
        return lambda: calls.append(name) or next(left)

    seconds = measure.in_turn({"a": contestant("a", 9.0, 1.0, 2.0), "b": contestant("b", 8.0, 3.0, 4.0)}, repeats=2)
    assert calls == ["a", "b"] * 3
    assert seconds == {"a": [1.0, 2.0], "b": [3.0, 4.0]}
    assert measure.medians({"odd": [3.0, 1.0, 2.0], "even": [1.0, 4.0]}) == {"odd": 2.0, "even": 2.5}


def test_a_contestant_without_a_clock_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 12.5])
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(clock))
    assert measure.timed(lambda: None) == 2.5


def test_a_table_is_markdown(capsys: pytest.CaptureFixture[str]) -> None:
    measure.print_table(["name", "n"], [["a", 1234567], ["long", 0.123456], ["b", 98765.4], ["c", True]])
    assert capsys.readouterr().out.splitlines() == [
        "| name |         n |",
        "| ---- | --------- |",
        "|    a | 1,234,567 |",
        "| long |    0.1235 |",
        "|    b |    98,765 |",
        "|    c |      True |",
    ]


def fails_at_two() -> Any:
    """Made in another process: doubles what it is given, but 2 and 3."""

    def answer(number: int) -> int:
        if number == 2:
            raise UserError("not two")
        if number == 3:
            os._exit(5)
        return 2 * number

    return answer


def test_a_rival_answers_and_its_faults_are_one_line() -> None:
    with Rivals() as rivals:
        rivals["a"] = Rival(fails_at_two)
        assert rivals["a"](7) == 14
        with pytest.raises(UserError, match=r"^not two$"):
            rivals["a"](2)
        assert rivals["a"](8) == 16
        with pytest.raises(UserError, match="died with status 5"):
            rivals["a"](3)


def test_a_command_says_when_it_was_ready_and_how_it_ended() -> None:
    done = run_command([sys.executable, "-uc", "import time; print('ready 1'); time.sleep(0.3); print('3.5 MB/s')"])
    assert 0 < done.seconds_until("ready") < done.seconds - 0.2
    assert done.search(r"([\d.]+) MB/s")[1] == "3.5"
    with pytest.raises(UserError, match="expected a line that begins with 'step 1'"):
        done.seconds_until("step 1")
    with pytest.raises(UserError, match="expected 'GB' in what was printed, found"):
        done.search("GB")
    with pytest.raises(UserError, match=r"ended with status 3: one / two$"):
        run_command([sys.executable, "-c", "print('one'); print('two'); raise SystemExit(3)"])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_memory_is_that_of_the_command_and_of_all_that_it_starts() -> None:
    held = bytearray(300 * MIB)  # of this process: the command must not begin with it
    child = "import time; held = b'x' * (120 << 20); time.sleep(0.4)"
    parent = f"import subprocess, sys; held = b'x' * (60 << 20); subprocess.run([sys.executable, '-c', {child!r}])"
    done = run_command([sys.executable, "-c", parent])
    assert 120 * MIB < done.largest_bytes < 180 * MIB
    assert 180 * MIB < done.sum_bytes < 260 * MIB
    del held


def test_an_input_grows_by_whole_lines_packed_or_not(tmp_path: Path, text: Path) -> None:
    packed = tmp_path / "text.jsonl.gz"
    packed.write_bytes(gzip.compress(text.read_bytes()))
    for source, read in ((text, Path.read_bytes), (packed, lambda path: gzip.decompress(path.read_bytes()))):
        bench_preprocessing.repeat(source, 3, tmp_path / "large")
        assert read(tmp_path / "large") == 3 * text.read_bytes()


def test_contestants_with_different_tokens_are_not_compared(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours-2_text_document.bin", tmp_path / "theirs-2.bin"
    ours.write_bytes(b"ab")
    theirs.write_bytes(b"ab")
    bench_preprocessing.check_equal([2], tmp_path)
    theirs.write_bytes(b"ac")
    with pytest.raises(UserError, match=r"theirs-2\.bin hold different tokens"):
        bench_preprocessing.check_equal([2], tmp_path)


def test_half_a_vocabulary_is_refused(tiny_tokenizer: TrainedTokenizer, text: Path, tmp_path: Path) -> None:
    half = argparse.Namespace(vocab_file=str(tiny_tokenizer.vocab_file), merge_file=None, vocab_size=300)
    with pytest.raises(UserError, match="--merge-file is not given"):
        bench_preprocessing.find_vocabulary(half, text, tmp_path)


def test_all_loaders_predict_the_next_token(tmp_path: Path) -> None:
    corpus = bench_loading.make_corpus(tmp_path / "corpus", 20_000, 100)
    assert corpus.num_tokens == 20_000
    assert 150 < corpus.document_count < 260
    inputs, labels = bench_loading.nanogpt(corpus.bin_path, 4, 16)(0)
    assert inputs.shape == (4, 16)
    assert torch.equal(inputs[:, 1:], labels[:, :-1])


def test_shares_of_a_longer_step_scale_what_grows_with_its_tokens(tmp_path: Path) -> None:
    arguments = argparse.Namespace(
        model_size="m", global_batch_size=10, seq_length=100, step_tokens=10_000, output=str(tmp_path / "out.json")
    )
    parts = [
        bench_overhead.Part("fixed", lambda: None),
        bench_overhead.Part("by token", lambda: None, by_token=True),
        bench_overhead.Part("in fixed", lambda: None, of_log=True),
    ]
    alone = {"fixed": 0.31, "by token": 0.0155, "in fixed": 0.1}
    # 1.5 of 2 seconds grow tenfold: 15.5 seconds.
    bench_overhead.report(arguments, parts, alone, {"without": [2.0], "with": [2.2]}, 0.5)
    written = json.loads((tmp_path / "out.json").read_text())
    share = [row["% of 10,000 tokens"] for row in written["rows"]]
    assert share == pytest.approx([2.0, 1.0, 0.1 / 0.155, 3.0])
    assert [row["% of the step"] for row in written["rows"]] == pytest.approx([15.5, 0.775, 5.0, 16.275])
    assert written["ratio"] == pytest.approx(1.1)
