"""Sequence length pacing against the formulas in exact rational arithmetic."""

from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.config import SeqlenWarmupConfig
from megatron.errors import UserError
from megatron.pacing.seqlen_warmup import SeqlenSchedule, linear_seqlen, root_seqlen
from megatron.progress import Progress


def exact_linear(t: int, duration: int, start: int, end: int, multiple: int) -> int:
    """PAPER: floor(start + (end-start) * min(t/T, 1)), minus mod multiple, at most end; with Fractions."""
    length = start + (end - start) * min(Fraction(t, duration), Fraction(1))
    floored = length.numerator // length.denominator
    return min(floored - floored % multiple, end)


lengths = st.tuples(st.integers(1, 300), st.integers(0, 300), st.sampled_from([1, 2, 8, 16])).map(
    lambda v: (v[0] * v[2], (v[0] + v[1]) * v[2], v[2])
)


@given(lengths, st.integers(1, 500_000), st.integers(1, 600_000))
def test_linear_equals_the_formula(shape, duration, t):
    start, end, multiple = shape
    assert linear_seqlen(t, duration, start, end, multiple) == exact_linear(t, duration, start, end, multiple)


@given(lengths, st.integers(1, 500_000), st.integers(1, 600_000), st.integers(2, 5))
def test_root_brackets_the_formula(shape, duration, t, degree):
    """The unrounded length x obeys (x - start)^d <= (end - start)^d * t/T < (x + 1 - start)^d, exactly."""
    start, end, multiple = shape
    got = root_seqlen(t, duration, start, end, multiple, degree)
    ratio = min(Fraction(t, duration), Fraction(1))
    grown = [x for x in range(end - start + 1) if Fraction(x) ** degree <= (end - start) ** degree * ratio]
    floored = start + grown[-1]
    assert got == min(floored - floored % multiple, end)


@given(lengths, st.integers(1, 2000))
def test_pacing_starts_near_start_never_falls_and_ends_exactly_at_end(shape, duration):
    start, end, multiple = shape
    walked = [linear_seqlen(t, duration, start, end, multiple) for t in range(1, duration + 2)]
    assert walked[0] >= start - start % multiple
    assert all(a <= b for a, b in pairwise(walked))
    assert walked[-1] == end == walked[duration - 1]
    assert all(length % multiple == 0 for length in walked)


def test_paper_setting_by_hand():
    # 117M: 8 -> 1024 over 60,000 steps. 1016 * t / 60000 grows by 8 every 472.44 steps.
    assert [linear_seqlen(t, 60_000, 8, 1024, 8) for t in (1, 472, 473, 944, 945, 59_527, 59_528, 60_000, 70_000)] == [
        8, 8, 16, 16, 24, 1008, 1016, 1024, 1024,
    ]  # fmt: skip


def schedule(**settings) -> SeqlenSchedule:
    seq_length = settings.pop("seq_length", 1024)
    config = SeqlenWarmupConfig(**settings)
    config.check(seq_length)
    return SeqlenSchedule(config, seq_length)


def test_the_first_step_has_t_1_and_iteration_counts_steps_done():
    linear = schedule(seqlen_warmup="linear", seqlen_start=8, seqlen_warmup_iters=2)
    assert linear.seqlen(Progress(iteration=0)) == linear_seqlen(1, 2, 8, 1024, 8) == 512 + 8 - 8 + 0
    assert linear.seqlen(Progress(iteration=1)) == 1024


def test_duration_in_tokens_looks_at_the_tokens_before_the_step():
    linear = schedule(seqlen_warmup="linear", seqlen_start=8, seqlen_warmup_tokens=1016)
    assert [linear.seqlen(Progress(iteration=9, consumed_tokens=n)) for n in (0, 7, 8, 1015, 1016)] == [
        8, 8, 16, 1016, 1024,
    ]  # fmt: skip


def test_discrete_switches_after_the_last_step_of_a_stage():
    two_stage = schedule(seqlen_warmup="discrete", seqlen_stages="128:20000,1024")
    assert [two_stage.seqlen(Progress(iteration=t - 1)) for t in (1, 20_000, 20_001)] == [128, 128, 1024]
    three = schedule(seqlen_warmup="discrete", seqlen_stages="8:5, 16:10, 24", seq_length=24)
    assert [three.seqlen(Progress(iteration=t - 1)) for t in (5, 6, 10, 11)] == [8, 16, 16, 24]


def test_no_warmup_is_full_length():
    assert schedule().seqlen(Progress()) == 1024


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seqlen_start": 4}, "--seqlen-start 4 must be at least --seqlen-multiple 8"),
        ({"seqlen_start": 12}, "--seqlen-start 12 must be a multiple of --seqlen-multiple 8"),
        ({"seqlen_start": 2048}, "--seqlen-start 2048 must not exceed --seq-length 1024"),
        ({"seq_length": 1020}, "--seq-length 1020 must be a multiple of --seqlen-multiple 8"),
        ({"seqlen_warmup_iters": None}, "found neither"),
        ({"seqlen_warmup_tokens": 5}, "found both"),
        ({"seqlen_warmup_iters": 0}, "at least 1"),
        ({"seqlen_warmup": "root", "seqlen_root_degree": 0}, "--seqlen-root-degree 0"),
        ({"seqlen_warmup": "none"}, "--seqlen-warmup-iters has no effect"),
        ({"seqlen_stages": "8:1,1024"}, "--seqlen-stages goes with"),
        ({"seqlen_warmup": "discrete", "seqlen_warmup_iters": None}, "needs --seqlen-stages"),
        (
            {"seqlen_warmup": "discrete", "seqlen_stages": "8:1,1024"},
            "--seqlen-warmup-iters goes with --seqlen-warmup linear or root, not discrete",
        ),
        ({"seqlen_warmup": "discrete", "seqlen_warmup_iters": None, "seqlen_stages": "8:x,1024"}, "8:x"),
    ],
)
def test_bad_settings_name_the_flag(settings, message):
    with pytest.raises(UserError, match=message):
        schedule(**({"seqlen_warmup": "linear", "seqlen_warmup_iters": 10} | settings))


@pytest.mark.parametrize(
    "text",
    ["", "128", "128:5", "128:x,1024", "128:5,1024:9", "12:5,1024", "128:0,1024", "128:9,256:9,1024", "2048:5,1024"],
)
def test_bad_stages_name_the_flag(text):
    with pytest.raises(UserError, match="--seqlen-stages"):
        SeqlenWarmupConfig(seqlen_warmup="discrete", seqlen_stages=text).check(1024)
