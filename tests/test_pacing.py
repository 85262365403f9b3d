"""Sequence length pacing against the formulas in exact rational arithmetic."""

import inspect
import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from decimal import Decimal, localcontext
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.config import Config, EvaluationConfig, ModelConfig, SeqlenWarmupConfig, TrainingConfig
from megatron.errors import UserError
from megatron.growth import Growth, grown_seqlen
from megatron.pacing import seqlen_warmup
from megatron.pacing.plan import plan_run, walk
from megatron.pacing.seqlen_warmup import AdaptivePacing, SeqlenSchedule
from megatron.progress import Progress

ROOT = Path(__file__).resolve().parents[1]


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
    assert grown_seqlen("linear", t, duration, start, end, multiple) == exact_linear(t, duration, start, end, multiple)


@given(lengths, st.integers(1, 500_000), st.integers(1, 600_000), st.integers(2, 5))
def test_root_brackets_the_formula(shape, duration, t, degree):
    """The unrounded length x obeys (x - start)^d <= (end - start)^d * t/T < (x + 1 - start)^d, exactly."""
    start, end, multiple = shape
    got = grown_seqlen("root", t, duration, start, end, multiple, degree)
    ratio = min(Fraction(t, duration), Fraction(1))
    grown = [x for x in range(end - start + 1) if Fraction(x) ** degree <= (end - start) ** degree * ratio]
    floored = start + grown[-1]
    assert got == min(floored - floored % multiple, end)


@pytest.mark.parametrize("pacing", get_args(Growth))
@given(lengths, st.integers(1, 2000))
def test_pacing_begins_at_start_never_falls_and_ends_exactly_at_end(pacing, shape, duration):
    start, end, multiple = shape
    walked = [grown_seqlen(pacing, t, duration, start, end, multiple) for t in range(duration + 2)]
    assert walked[0] == start
    assert all(a <= b for a, b in pairwise(walked))
    assert walked[-1] == end == walked[duration]
    assert all(type(length) is int and length % multiple == 0 for length in walked)


def test_a_pacing_of_ones_own_is_an_edit_of_one_file(tmp_path):
    """The edit that docs/pacing.md shows, made in a copy of the tree."""
    for room in ("megatron", "tools"):
        shutil.copytree(ROOT / room, tmp_path / room, ignore=shutil.ignore_patterns("__pycache__"))
    growth = tmp_path / "megatron" / "growth.py"
    source, end = growth.read_text(encoding="utf-8"), "        case _:\n"
    page = (ROOT / "docs" / "pacing.md").read_text(encoding="utf-8")
    imports, name, case = page.split("```python\n")[1].split("```")[0].split("\n\n")
    assert source.count(end) == 1 and source.count("\nfrom typing") == 1
    source = source.replace(end, case + end).replace("\nfrom typing", f"\n{imports}\nfrom typing")
    source = re.sub(r"^Growth = .*$", name, source, flags=re.MULTILINE)
    growth.write_text(source, encoding="utf-8")
    flags = "--model-size 117M --train-iters 12 --seqlen-warmup cosine --seqlen-warmup-iters 12 --seqlen-start 64"
    done = subprocess.run(
        [sys.executable, "tools/plan_run.py", *flags.split(), "--global-batch-size", "1", "--json"],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    with localcontext(prec=40):
        # 1 - cos(pi t / 12) by its half angle: 2 sin^2, in radicals.
        root2, root3 = Decimal(2).sqrt(), Decimal(3).sqrt()
        cosines = [(root2 * (root3 + 1)) / 4, root3 / 2, root2 / 2, Decimal("0.5"), (root2 * (root3 - 1)) / 4, 0]
        cosines += [-cosine for cosine in reversed(cosines[:5])] + [-1]
        expected = sum(int(64 + 480 * (1 - Decimal(cosine))) // 8 * 8 for cosine in cosines)
    assert json.loads(done.stdout)["consumed_tokens"] == expected


def test_a_pacing_that_is_none_is_refused():
    with pytest.raises(UserError, match="pacing 'cosin': expected one of linear, root"):
        grown_seqlen("cosin", 1, 2, 8, 16)


def test_the_schedule_gives_the_formula_all_of_its_settings(monkeypatch):
    """One of a pacing's own, that has a default there, would else be taken and do nothing."""
    formula, calls = inspect.signature(grown_seqlen), []
    monkeypatch.setattr(seqlen_warmup, "grown_seqlen", lambda *given: calls.append(formula.bind(*given)) or 8)
    schedule(seqlen_warmup="linear", seqlen_warmup_iters=2).seqlen(Progress())
    assert list(calls[0].arguments) == list(formula.parameters)


OTHERWISE = {int: 16, float: 0.5, str: "8:1,16"}


@pytest.mark.parametrize("name", [f.name for f in fields(SeqlenWarmupConfig)][1:])
def test_every_setting_belongs_to_some_pacings(name):
    if name == "seqlen_multiple":
        pytest.skip("belongs to all")
    hint = get_type_hints(SeqlenWarmupConfig)[name]
    value = get_args(hint)[-1] if get_origin(hint) is Literal else OTHERWISE[next(iter(get_args(hint)), hint)]
    with pytest.raises(UserError, match=f"--seqlen-warmup none takes no --{name.replace('_', '-')}"):
        SeqlenWarmupConfig(**{name: value}).check(1024)


def test_paper_setting_by_hand():
    # 117M: 8 -> 1024 over 60,000 steps. 1016 * t / 60000 grows by 8 every 472.44 steps.
    steps = (1, 472, 473, 944, 945, 59_527, 59_528, 60_000, 70_000)
    expected = [8, 8, 16, 16, 24, 1008, 1016, 1024, 1024]
    assert [grown_seqlen("linear", t, 60_000, 8, 1024, 8) for t in steps] == expected


BARE = {"seqlen_warmup_iters": None}
GROWING = " or ".join(get_args(Growth))


def schedule(**settings) -> SeqlenSchedule:
    seq_length = settings.pop("seq_length", 1024)
    config = SeqlenWarmupConfig(**settings)
    config.check(seq_length)
    return SeqlenSchedule(config, seq_length)


def test_the_first_step_has_t_1_and_iteration_counts_steps_done():
    linear = schedule(seqlen_warmup="linear", seqlen_start=8, seqlen_warmup_iters=2)
    assert linear.seqlen(Progress(iteration=0)) == grown_seqlen("linear", 1, 2, 8, 1024, 8) == 512 + 8 - 8 + 0
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


def test_stages_and_cycles_in_tokens_look_at_the_tokens_before_the_step():
    stages = schedule(seqlen_warmup="discrete", seqlen_stages="128:2B,1024", seqlen_stages_unit="tokens")
    assert [stages.seqlen(Progress(9, consumed_tokens=n)) for n in (0, 2 * 10**9 - 1, 2 * 10**9)] == [128, 128, 1024]
    cycle = schedule(seqlen_warmup="mixed", seqlen_cycle="8:100,16:50", seqlen_stages_unit="tokens", seq_length=24)
    assert [cycle.seqlen(Progress(9, consumed_tokens=n)) for n in (0, 99, 100, 149, 150, 15 * 10**8 + 100)] == [
        8, 8, 16, 16, 8, 16,
    ]  # fmt: skip


def test_mixed_repeats_900_short_steps_and_100_long_ones():
    mixed = schedule(seqlen_warmup="mixed", seqlen_cycle="128:900,1024:100")
    found = [mixed.seqlen(Progress(iteration=t - 1)) for t in range(1, 5001)]
    assert found == ([128] * 900 + [1024] * 100) * 5


def test_adaptive_lengthens_after_validations_that_are_calm_and_no_worse():
    config = SeqlenWarmupConfig(seqlen_warmup="adaptive", seqlen_adaptive_step=16, seqlen_adaptive_tolerance=0.1)
    lengths, progress, pacing = SeqlenSchedule(config, 64), Progress(), AdaptivePacing(config, limit=1.2)
    events = [
        (None, 5.0, 24),  # the first one always does
        (1.0, 5.5, 40),  # within the tolerance of 5.0
        (1.0, 5.51, 40),  # beyond it, though within that of the last
        (1.3, 4.0, 40),  # a step spiked in between
        (1.1, 4.3, 56),  # the spike is forgotten, 4.0 is what counts
        (math.nan, 3.0, 56),  # a ratio that is not finite is no calm
        (1.2, math.nan, 56),
        (1.2, 3.0, 64),
        (1.2, 2.0, 64),
    ]
    for ratio, loss, expected in events:
        resumed = AdaptivePacing(config, limit=1.2)
        pacing.trained(ratio)
        pacing.trained(1.0)
        resumed.load_state_dict(json.loads(json.dumps(pacing.state_dict())))
        resumed.validated(progress, loss)
        pacing = resumed
        assert lengths.seqlen(progress) == expected
    other = AdaptivePacing(SeqlenWarmupConfig(), limit=1.2)
    other.validated(progress := Progress(), 1.0)
    assert progress.seqlen_level == 0, "other pacings have no level"


def test_adaptive_lengthens_by_a_sixteenth_by_default():
    config = SeqlenWarmupConfig(seqlen_warmup="adaptive")
    assert config.adaptive_step(1024) == 64, "1016 / 16 = 63.5, up to a multiple of 8"
    assert config.adaptive_step(16) == 8


def test_a_plan_takes_adaptive_pacing_at_its_fastest():
    config = Config(
        model=ModelConfig(seq_length=64),
        seqlen_warmup=SeqlenWarmupConfig(seqlen_warmup="adaptive", seqlen_adaptive_step=24),
        training=TrainingConfig(train_iters=8, global_batch_size=1),
        evaluation=EvaluationConfig(eval_interval=2),
    )
    assert [step.seqlen for _, step in walk(config)] == [8, 8, 32, 32, 56, 56, 64, 64]


@pytest.mark.parametrize("realisation", ["reshape", "window"])
def test_what_is_not_truncated_counts_all_tokens(realisation):
    config = Config(
        model=ModelConfig(seq_length=32),
        seqlen_warmup=SeqlenWarmupConfig("linear", 8, seqlen_warmup_iters=4, seqlen_realisation=realisation),
        training=TrainingConfig(train_tokens=6 * 64, global_batch_size=2),
    )
    assert [(step.seqlen, step.tokens) for _, step in walk(config)] == [(n, 64) for n in (8, 16, 24, 32, 32, 32)]
    planned = plan_run(config)
    assert planned.discarded_share == 0
    attended = 2 * (4 * 8 * 8 + 2 * 16 * 16 + (24 * 24 + 8 * 8) + 3 * 32 * 32)
    assert planned.token_seqlen_sum == attended, "a step of 24 has a rest of 8"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seqlen_start": 4}, "--seqlen-start 4 must be at least --seqlen-multiple 8"),
        ({"seqlen_start": 12}, "--seqlen-start 12 must be a multiple of --seqlen-multiple 8"),
        ({"seqlen_start": 2048}, "--seqlen-start 2048 must not exceed --seq-length 1024"),
        ({"seq_length": 1020}, "--seq-length 1020 must be a multiple of --seqlen-multiple 8"),
        ({"seqlen_warmup_iters": None}, "found neither"),
        ({"seqlen_warmup": "cubic"}, "--seqlen-warmup cubic: expected one of none, linear, root"),
        ({"seqlen_warmup_tokens": 5}, "found both"),
        ({"seqlen_warmup_iters": 0}, "at least 1"),
        ({"seqlen_warmup": "root", "seqlen_root_degree": 0}, "--seqlen-root-degree 0"),
        (
            {"seqlen_warmup": "none"},
            f"--seqlen-warmup none takes no --seqlen-warmup-iters (for {GROWING}): choose another or drop "
            "it; where a recipe has set it, add --unset seqlen-warmup-iters",
        ),
        (
            {"seqlen_warmup": "none", "seqlen_start": 64},
            f"takes no --seqlen-start (for {GROWING} or adaptive) and no --seqlen-warmup-iters (for {GROWING}): choose "
            "another or drop them; where a recipe has set them, add --unset seqlen-start --unset seqlen-warmup-iters",
        ),
        ({"seqlen_root_degree": 3}, "--seqlen-warmup linear takes no --seqlen-root-degree (for root): "),
        ({"seqlen_stages": "8:1,1024"}, "--seqlen-warmup linear takes no --seqlen-stages (for discrete): "),
        ({"seqlen_cycle": "8:1,1024:1"}, "--seqlen-warmup linear takes no --seqlen-cycle (for mixed): "),
        ({"seqlen_adaptive_step": 8}, "--seqlen-warmup linear takes no --seqlen-adaptive-step (for adaptive): "),
        (BARE | {"seqlen_warmup": "mixed"}, "needs --seqlen-cycle"),
        (BARE | {"seqlen_warmup": "mixed", "seqlen_cycle": "8:1,1024"}, "found '1024'"),
        (BARE | {"seqlen_warmup": "mixed", "seqlen_cycle": "8:0,1024:1"}, "found '8:0'"),
        (BARE | {"seqlen_warmup": "mixed", "seqlen_cycle": "12:1,1024:1"}, "length 12 must be a multiple"),
        (BARE | {"seqlen_warmup": "adaptive", "seqlen_adaptive_step": 12}, "--seqlen-adaptive-step 12 must be"),
        (BARE | {"seqlen_warmup": "adaptive", "seqlen_adaptive_tolerance": -0.1}, "must not be negative"),
        (BARE | {"seqlen_warmup": "adaptive", "seqlen_adaptive_step": 0}, "--seqlen-adaptive-step 0 must be"),
        ({"seqlen_stages_unit": "tokens"}, "linear takes no --seqlen-stages-unit (for discrete or mixed)"),
        ({"seqlen_adaptive_tolerance": 0.5}, "takes no --seqlen-adaptive-tolerance (for adaptive)"),
        (BARE | {"seqlen_warmup": "none", "seqlen_multiple": 0}, "--seqlen-multiple 0 must be at least 1"),
        (BARE | {"seqlen_warmup": "none", "seqlen_realisation": "window"}, "none takes no --seqlen-realisation (for "),
        ({"seqlen_warmup": "discrete", "seqlen_warmup_iters": None}, "needs --seqlen-stages"),
        (
            {"seqlen_warmup": "discrete", "seqlen_stages": "8:1,1024"},
            f"--seqlen-warmup discrete takes no --seqlen-warmup-iters (for {GROWING})",
        ),
        ({"seqlen_warmup": "discrete", "seqlen_warmup_iters": None, "seqlen_stages": "8:x,1024"}, "8:x"),
    ],
)
def test_bad_settings_name_the_flag(settings, message):
    with pytest.raises(UserError, match=re.escape(message)):
        schedule(**({"seqlen_warmup": "linear", "seqlen_warmup_iters": 10} | settings))


@pytest.mark.parametrize(
    "text",
    ["", "128", "128:5", "128:x,1024", "128:5,1024:9", "12:5,1024", "128:0,1024", "128:9,256:9,1024", "2048:5,1024"],
)
def test_bad_stages_name_the_flag(text):
    with pytest.raises(UserError, match="--seqlen-stages"):
        SeqlenWarmupConfig(seqlen_warmup="discrete", seqlen_stages=text).check(1024)
