"""Batch size warmup against exact formulas and against Megatron-LM's --rampup-batch-size."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.config import BatchSizeWarmupConfig, Config, ModelConfig, ParallelConfig, TrainingConfig
from megatron.errors import UserError
from megatron.layout import layout_of
from megatron.pacing.batch_size_warmup import BatchSizeSchedule, linear_batch_size
from megatron.pacing.plan import walk
from megatron.progress import Progress


def schedule(full: int, **settings) -> BatchSizeSchedule:
    config = BatchSizeWarmupConfig(**settings)
    config.check(full)
    return BatchSizeSchedule(config, full)


@given(st.integers(1, 3000), st.integers(1, 2000), st.integers(1, 64), st.integers(1, 20), st.integers(0, 40))
def test_linear_is_the_exact_ratio_down_to_an_increment(position, duration, start, increment, increments):
    end = start + increment * increments
    grown = Fraction(end - start) * min(Fraction(position, duration), 1)
    expected = start + max(k * increment for k in range(increments + 1) if k * increment <= grown)
    assert linear_batch_size(position, duration, start, end, increment) == expected


@given(st.integers(1, 50), st.integers(1, 12), st.integers(1, 30), st.integers(1, 5000))
def test_linear_over_samples_is_megatrons_rampup(start, increment, increments, samples):
    """Each increment lasts samples / increments, and is there from the sample that completes it."""
    full = start + increment * increments
    ramp = schedule(
        full, batch_size_warmup="linear", batch_size_start=start, batch_size_increment=increment,
        batch_size_warmup_samples=samples,
    )  # fmt: skip
    for consumed in {0, 1, samples // 3, samples - 1, samples, samples + 1}:
        steps = min(consumed / Fraction(samples, increments), Fraction(increments)) // 1
        assert ramp.batch_size(Progress(consumed_samples=consumed)) == start + steps * increment


def test_linear_over_steps_counts_from_1_and_over_tokens_looks_back():
    steps = schedule(4, batch_size_warmup="linear", batch_size_start=2, batch_size_warmup_iters=4)
    assert [steps.batch_size(Progress(iteration=t - 1)) for t in range(1, 7)] == [2, 3, 3, 4, 4, 4]
    gpt3 = schedule(
        256, batch_size_warmup="linear", batch_size_start=16, batch_size_increment=16,
        batch_size_warmup_tokens=4 * 10**9,
    )  # fmt: skip
    around = [0, 4 * 10**9 // 15 - 1, 4 * 10**9 // 15 + 1, 4 * 10**9 - 1, 4 * 10**9]
    assert [gpt3.batch_size(Progress(consumed_tokens=n)) for n in around] == [16, 16, 32, 240, 256]


def test_stages_end_at_tokens():
    stages = schedule(512, batch_size_warmup="stages", batch_size_stages="128:1B,256:4B,512")
    around = [0, 10**9 - 1, 10**9, 4 * 10**9 - 1, 4 * 10**9]
    assert [stages.batch_size(Progress(consumed_tokens=n)) for n in around] == [128, 128, 256, 256, 512]


def test_a_run_draws_what_its_steps_say_and_ends_by_tokens():
    config = Config(
        model=ModelConfig(seq_length=16),
        training=TrainingConfig(train_tokens=16 * 40, global_batch_size=8),
        batch_size_warmup=BatchSizeWarmupConfig("linear", 2, 2, batch_size_warmup_iters=6),
    )
    seen = [(before.consumed_samples, step.global_batch_size, step.tokens) for before, step in walk(config)]
    sizes = [2, 4, 4, 6, 6, 8, 8, 8]
    assert seen == [(sum(sizes[:i]), size, 16 * size) for i, size in enumerate(sizes)], "46 samples, over 40 asked for"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "needs --batch-size-start"),
        ({"batch_size_start": 0}, "--batch-size-start 0 must be from 1 to --global-batch-size 64"),
        ({"batch_size_start": 65}, "--batch-size-start 65 must be from 1 to --global-batch-size 64"),
        ({"batch_size_start": 4}, "found none"),
        ({"batch_size_start": 4, "batch_size_warmup_iters": 3, "batch_size_warmup_tokens": 9}, "found 2"),
        ({"batch_size_start": 4, "batch_size_warmup_iters": 0}, "must be at least 1, found 0"),
        ({"batch_size_start": 4, "batch_size_warmup_iters": 3, "batch_size_increment": 0}, "increment 0 must be"),
        ({"batch_size_start": 4, "batch_size_warmup_iters": 3, "batch_size_increment": 7}, "60 is no multiple of it"),
        ({"batch_size_stages": "4:9,64"}, "--batch-size-warmup linear takes no --batch-size-stages .for stages."),
        (
            {"batch_size_warmup": "none", "batch_size_start": 4, "batch_size_warmup_tokens": 9},
            "--unset batch-size-start --unset batch-size-warmup-tokens",
        ),
        ({"batch_size_warmup": "none", "batch_size_warmup_samples": 4}, "none takes no --batch-size-warmup-samples"),
        ({"batch_size_warmup": "none", "batch_size_increment": 7}, "none takes no --batch-size-increment"),
        ({"batch_size_warmup": "stages"}, "needs --batch-size-stages"),
        ({"batch_size_warmup": "stages", "batch_size_stages": "4:9,32"}, "last stage must be --global-batch-size 64"),
        ({"batch_size_warmup": "stages", "batch_size_stages": "4:9,8:9,64"}, "must rise, found"),
        ({"batch_size_warmup": "stages", "batch_size_stages": "128:9,64"}, "no stage may exceed"),
        ({"batch_size_warmup": "stages", "batch_size_stages": "4:x,64"}, "found '4:x'"),
    ],
)
def test_bad_settings_name_the_flag(settings, message):
    with pytest.raises(UserError, match=message):
        schedule(64, **({"batch_size_warmup": "linear"} | settings))


@pytest.mark.parametrize(
    ("warmup", "message"),
    [
        (BatchSizeWarmupConfig("linear", 2, 2, batch_size_warmup_iters=9), "--batch-size-start 2 must be a multiple"),
        (BatchSizeWarmupConfig("linear", 4, 2, batch_size_warmup_iters=9), "--batch-size-increment 2 must be a mult"),
        (BatchSizeWarmupConfig("stages", batch_size_stages="6:10,16"), "batch size 6 must be a multiple of the 4 data"),
    ],
)
def test_every_batch_must_divide_over_the_data_parallel_ranks(warmup, message):
    config = Config(
        training=TrainingConfig(train_iters=1, global_batch_size=16),
        parallel=ParallelConfig(),
        batch_size_warmup=warmup,
    )
    assert layout_of(config, 2).dp == 2
    with pytest.raises(UserError, match=message):
        layout_of(config, 4)
