"""The planner: totals by hand, and what it prints."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron.arguments import build_parser, parse_config
from megatron.config import Config, SeqlenWarmupConfig, TrainingConfig
from megatron.data.indexed_dataset import Sidecar
from megatron.data.indexed_writer import IndexedDatasetWriter
from megatron.model.plan import plan_table, plan_totals
from megatron.pacing.plan import lr_warmup_iterations, plan_run, reaches_full_length, sample_steps
from tools import plan_run as plan_tool

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "recipes"


def test_totals_by_hand():
    config, _ = parse_config(
        build_parser(),
        "--num-layers 2 --hidden-size 16 --num-attention-heads 2 --seq-length 16 --vocab-size 100 "
        "--global-batch-size 2 --train-iters 3 --seqlen-warmup discrete --seqlen-stages 8:1,16".split(),
    )
    totals = plan_totals(config)
    assert totals["consumed_tokens"] == 2 * (8 + 16 + 16)
    assert totals["consumed_samples"] == 6
    assert totals["full_length_iteration"] == 2
    assert totals["discarded_share"] == pytest.approx(1 - 80 / 96)
    dense = (72 * 2 * 16**2 + 6 * 100 * 16) * 80
    attention = 12 * 2 * 16 * (2 * 8 * 8 + 2 * 2 * 16 * 16)
    assert totals["flops"] == dense + attention


def test_half_of_the_rows_are_of_the_warmup():
    def rows(**warmup: Any) -> list[int]:
        training = TrainingConfig(train_iters=1001, global_batch_size=1)
        config = Config(training=training, seqlen_warmup=SeqlenWarmupConfig(**warmup))
        full = plan_run(config).full_length_iteration
        return [before.iteration for before, _ in sample_steps(config, 1001, 4, full)]

    assert rows() == [0, 333, 667, 1000]
    assert rows(seqlen_warmup="linear", seqlen_start=8, seqlen_warmup_iters=101) == [0, 50, 100, 550, 1000]
    assert rows(seqlen_warmup="linear", seqlen_start=8, seqlen_warmup_iters=1001) == [0, 333, 667, 1000]
    assert rows(seqlen_warmup="linear", seqlen_start=8, seqlen_warmup_iters=9999) == [0, 333, 667, 1000]


def run_tool(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "tools" / "plan_run.py"), *arguments], capture_output=True, text=True, check=False
    )


def test_the_tool_prints_json_and_progress_at_a_step():
    path = str(RECIPES / "gpt2-117m-b4k-slw30k.yaml")
    got = json.loads(run_tool("--config", path, "--json", "--at", "37000").stdout)
    assert got["iterations"] == 37_000
    assert got["consumed_tokens"] == 92_276_785_152
    assert {"consumed_samples", "full_length_iteration", "flops"} <= set(got)
    table = run_tool("--config", path).stdout
    assert "52,500" in table
    assert "full length from     step 30,000" in table


def test_the_tool_refuses_a_step_beyond_the_end():
    result = run_tool("--train-iters", "5", "--at", "6")
    assert result.returncode == 1
    assert "--at 6: the run ends after 5 iterations" in result.stderr


def test_the_planner_needs_no_torch():
    code = (
        "import sys; sys.modules['torch'] = None; import megatron.pacing.plan, megatron.model.plan, megatron.arguments"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_adaptive_pacing_is_said_to_be_planned_at_its_fastest():
    flags = (
        "--seq-length 64 --global-batch-size 1 --train-tokens 640 "
        "--seqlen-warmup adaptive --seqlen-start 8 --seqlen-adaptive-step 8 --eval-interval 2"
    ).split()
    assert "planned as if every validation lengthened" in run_tool(*flags).stdout
    totals = plan_totals(parse_config(build_parser(), flags)[0])
    assert totals["lengthens_at_every_validation"]
    assert totals["full_length_iteration"] == 15, "seven times longer, each time after two steps"
    plain, _ = parse_config(build_parser(), ["--train-iters", "2"])
    assert "as if" not in plan_table(plain, plan_totals(plain))


def test_the_walks_of_the_tuner_end_where_they_know():
    """Against the whole plan, for a warmup in tokens that pacing makes longer."""
    config, _ = parse_config(build_parser(), ["--config", str(RECIPES / "gpt2-117m-b512-slw60k.yaml")])
    short = replace(config, training=replace(config.training, train_tokens=5 * 10**9))
    planned = plan_run(short)
    assert lr_warmup_iterations(short) == planned.lr_warmup_iterations == 3000
    assert reaches_full_length(short) is (planned.full_length_iteration is not None) is False
    assert reaches_full_length(replace(short, seqlen_warmup=SeqlenWarmupConfig()))


def test_the_vocabulary_is_the_datas_or_said_to_be_assumed(tmp_path):
    recipe, data = str(RECIPES / "quickstart" / "slw.yaml"), tmp_path / "toy_text_document"
    with IndexedDatasetWriter(data, np.uint16) as writer:
        writer.add_document(np.arange(9))
    path = Path(f"{data}.json")
    path.write_text(replace(Sidecar.read(path), vocab_size=4096).to_json())
    assert "(vocabulary 4,096)" in run_tool("--config", recipe, "--data-path", str(data)).stdout
    assert "vocabulary 1,000)" in run_tool("--config", recipe, "--vocab-size", "1000").stdout
    assert "vocabulary 50,257, assumed: give --vocab-size" in run_tool("--config", recipe).stdout


def test_mixed_pacing_reaches_full_length_again_and_again():
    table = run_tool("--config", str(RECIPES / "gpt2-1.5b-b4k-first10k-mixed.yaml")).stdout
    assert "step 901 for the first time: 128:900,1024:100, again and again" in table


def test_passes_over_a_corpus_that_is_there_are_told(tmp_path, capsys, monkeypatch):
    """Of three documents of 60 tokens the first two are for training."""
    flags = ["--seq-length", "8", "--global-batch-size", "1", "--vocab-size", "9", "--split", "2,1"]
    data = tmp_path / "toy_text_document"
    with IndexedDatasetWriter(data, np.uint16) as writer:
        for _ in range(3):
            writer.add_document(np.arange(60) % 9)

    def told(steps: int, *more: str) -> str:
        monkeypatch.setattr(sys, "argv", ["plan_run.py", *flags, "--train-iters", str(steps), *more])
        assert plan_tool.main() == 0
        return capsys.readouterr().out.rpartition("\n\n")[2]

    warmup = "--seqlen-warmup linear --seqlen-start 1 --seqlen-multiple 1 --seqlen-warmup-iters 100".split()
    for kind in ([], warmup):  # 14 samples an epoch; of short ones the same beginnings are read again
        assert told(28, "--data-path", str(data), *kind).startswith("note: 28 samples are 2 passes over the 14 of this")
    for quiet in (told(27, "--data-path", str(data)), told(28), told(28, "--data-path", str(tmp_path / "missing"))):
        assert "passes" not in quiet
    index = data.with_suffix(".idx")
    index.write_bytes(index.read_bytes()[:20])
    assert told(28, "--data-path", str(data)).startswith(f"note: {index}: ")
