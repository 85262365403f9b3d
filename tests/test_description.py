"""What the trainer says before its first step."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from megatron.arguments import build_parser, parse_config
from megatron.config import Config, SeqlenWarmupConfig, TokenizerConfig, TrainingConfig
from megatron.distributed.world import World
from megatron.pacing.plan import look_ahead, plan_run
from megatron.progress import Progress
from megatron.training.description import describe, end, last_step, learning_rate, precision, warnings

LINEAR = "--seqlen-warmup linear --seqlen-start 8 --seqlen-warmup-iters 1200"


def configured(flags: str) -> Config:
    return parse_config(build_parser(), flags.split())[0]


def until(flags: str, progress: Progress | None = None) -> str:
    """The end of a run of short steps."""
    config, progress = configured(f"--seq-length 64 --global-batch-size 2 {flags}"), progress or Progress()
    return end(config, progress, look_ahead(config, progress))


def notes(config: Config, progress: Progress | None = None) -> list[str]:
    progress = progress or Progress()
    return warnings(config, progress, look_ahead(config, progress))


def test_the_whole_of_it() -> None:
    config = configured(
        "--global-batch-size 512 --train-tokens 5B --bf16 --lr 6e-4 --min-lr 6e-5 --lr-warmup-iters 3000 "
        f"--lr-decay-tokens 157B {LINEAR} --vocab-size 50257 --save runs/mine"
    )
    data: Any = SimpleNamespace(
        train=SimpleNamespace(num_samples_per_epoch=9_000_000),
        validation=None,
        num_tokens=(9_216_000_000, 0, 0),
        notes=("a short one",),
    )
    assert describe(config, data, 50_257, World(), Progress(), look_ahead(config, Progress())).splitlines() == [
        "model      12 layers, hidden 768, 12 heads, 124M parameters, vocabulary 50,257 (padded to 50,304)",
        "data       9,216,000,000 training tokens, 9,000,000 samples an epoch",
        "length     1024, sequence length warmup: linear from 8 over 1,200 steps, now 8",
        "rate       6e-4 cosine to 6e-5 over 157B tokens, warmup 3,000 steps",
        "batch      512 sequences a step, on cpu, bf16 (autocast), from step 1",
        f"until      step {plan_run(config).progress.iteration:,} (5.00B tokens), full length from step 1,200",
        "note       a short one",
    ]
    later = Progress(iteration=600, consumed_samples=512 * 600, consumed_tokens=10**8)
    said = describe(config, data, 50_304, World(), later, look_ahead(config, later))
    assert "vocabulary 50,304\n" in said and "over 1,200 steps, now 512\n" in said
    data.train.num_samples_per_epoch = 90_000
    said = describe(config, data, 50_304, World(), Progress(), look_ahead(config, Progress()))
    assert "of this corpus: there is no validation, whose loss would rise once" in said


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--train-iters 9", "step 9 (1.15K tokens)"),
        ("--train-iters 2000", "step 2,000 (256K tokens)"),
        ("--train-tokens 1000", "step 8 (1.02K tokens)"),
        ("--train-iters 9 --seqlen-warmup mixed --seqlen-cycle 8:2,64:1",
         "step 9 (480 tokens), full length from step 3 for the first time"),
        ("--train-iters 2 --seqlen-warmup mixed --seqlen-cycle 8:2,64:1", "step 2 (32 tokens)"),
        ("--train-iters 9 --seqlen-warmup adaptive --seqlen-start 32 --seqlen-adaptive-step 32 --eval-interval 4",
         "step 9 (896 tokens) if every validation lengthens, else more steps or fewer tokens"),
        ("--train-iters 9 --exit-interval 4", "step 9 (1.15K tokens); stops at step 4 (--exit-interval 4)"),
        ("--train-iters 9 --exit-interval 9", "step 9 (1.15K tokens)"),
        ("--train-iters 9 --exit-duration-in-mins 2.5",
         "step 9 (1.15K tokens); stops after 2.5 minutes (--exit-duration-in-mins)"),
    ],
)  # fmt: skip
def test_the_end_of_a_run(flags: str, words: str) -> None:
    assert until(flags) == words


def test_the_last_step_is_known_unless_an_adaptive_warmup_has_tokens_to_go_by() -> None:
    adaptive = "--seqlen-warmup adaptive --seqlen-start 32 --seqlen-adaptive-step 32 --eval-interval 4"
    short, ends = "--seq-length 64 --global-batch-size 2", {"--train-iters 9": 9, "--train-tokens 1000": 8}
    for flags, step in ends.items():
        config = configured(f"{short} {flags}")
        assert last_step(config, look_ahead(config, Progress())) == step
    for flags, step in {"--train-iters 9": 9, "--train-samples 18": 9, "--train-tokens 1000": None}.items():
        config = configured(f"{short} {flags} {adaptive}")
        assert last_step(config, look_ahead(config, Progress())) == step


def test_the_end_is_that_of_the_run_as_it_is() -> None:
    """Half of its steps were made at other lengths than the schedules would have now."""
    flags = "--train-tokens 1280 --seqlen-warmup linear --seqlen-start 8 --seqlen-warmup-iters 4"
    assert until(flags) == "step 12 (1.34K tokens), full length from step 4"
    half = Progress(4, 8, consumed_tokens=4 * 128)
    assert until(flags, half) == "step 10 (1.28K tokens), full length from step 4"
    assert until("--train-iters 9 --exit-interval 4", Progress(4, 8, 512)).endswith(
        "; stops at step 8 (--exit-interval 4)"
    )
    assert (
        until("--train-iters 9 --exit-interval 4", Progress(9, 18, 1152)) == "step 9 (1.15K tokens), which is reached"
    )


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--train-iters 9 --lr 1.5e-4 --lr-warmup-iters 1", "1.5e-4 cosine to 0 over 9 steps, warmup 1 step"),
        ("--train-samples 4000 --lr 1 --lr-warmup-samples 1000 --lr-decay-style linear",
         "1e0 linear to 0 over 4,000 samples, warmup 1,000 samples"),
        ("--train-tokens 1B --lr 3e-3 --min-lr 1e-5 --lr-decay-style wsd --lr-warmup-tokens 25M",
         "3e-3 wsd to 1e-5 over the last 10% of 1.00B tokens, warmup 25.0M tokens"),
        ("--train-iters 9 --lr 0.02 --min-lr 0.01 --lr-decay-style constant", "2e-2 constant, no warmup"),
    ],
)  # fmt: skip
def test_the_learning_rate(flags: str, words: str) -> None:
    assert learning_rate(configured(flags)) == words


def test_the_precision() -> None:
    training = TrainingConfig(train_iters=1)
    assert precision(training) == "fp32"
    assert precision(replace(training, fp16=True, loss_scale=0)) == "fp16 (loss scale dynamic)"
    assert precision(replace(training, fp16=True, loss_scale=1024)) == "fp16 (loss scale 1024)"


def test_a_run_too_short_for_its_full_length_is_told() -> None:
    told = "the run ends before its sequence length reaches --seq-length 64"
    short = configured(
        "--seq-length 64 --train-iters 9 --seqlen-warmup linear --seqlen-start 8 --seqlen-warmup-iters 20"
    )
    assert told in notes(short)
    long = replace(short, training=replace(short.training, train_iters=30))
    for progress in (Progress(), Progress(25, 50, 0), Progress(30, 60, 0)):
        assert told not in notes(long, progress)


def test_a_run_that_names_no_tokenizer_is_told() -> None:
    told = "no tokenizer's files are named"
    assert any(told in note for note in notes(Config()))
    named = Config(tokenizer=TokenizerConfig(vocab_file="v", merge_file="m"))
    assert not any(told in note for note in notes(named))


def test_a_resume_with_another_curve_under_the_same_name_is_told() -> None:
    """Ten steps of 64, 160, .. 928, 1024: their tokens by hand."""
    pacing = SeqlenWarmupConfig(seqlen_warmup="linear", seqlen_start=64, seqlen_warmup_iters=10)
    config = Config(training=TrainingConfig(train_iters=20, global_batch_size=2), seqlen_warmup=pacing)
    tokens = 2 * sum(64 + 96 * t for t in range(1, 6))
    told = [notes(config, Progress(5, samples, found))[-1] for samples, found in ((10, tokens + 16), (10, tokens))]
    assert f"had {tokens + 16:,} tokens by step 5 and would have had {tokens:,}" in told[0]
    assert "would have had" not in told[1]
    skipped = notes(config, Progress(5, 12, tokens + 16))
    assert not any("would have had" in note for note in skipped)
