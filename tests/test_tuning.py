"""The tuner: what it takes for a fluctuation, which trials there are, and its search against known answers."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tuned_run import config_of

from megatron.arguments import build_parser, parse_config
from megatron.errors import UserError
from megatron.instability.summary import Run
from megatron.instability.trials import trial_config
from megatron.instability.tuning import (
    Choice,
    Criterion,
    Outcome,
    SearchOptions,
    SearchSpace,
    judge,
    paced,
    search,
    search_space,
)
from megatron.instability.tuning_figure import FLUCTUATING, STABLE, figure_tuning
from megatron.pacing.plan import walk
from megatron.progress import Duration

ROOT = Path(__file__).parents[1]


# What a fluctuation is


def log_of(
    losses: Sequence[float], *, interval: int = 2, training: Sequence[float] = (), ratios: Sequence[float] = (),
    tokens: int = 8192,
) -> Run:  # fmt: skip
    """A trial's log: validations every `interval` steps, and steps, by default quiet ones."""
    count = max(interval * len(losses), len(training), len(ratios))
    steps = {
        "iteration": np.arange(1.0, count + 1),
        "consumed_tokens": tokens * np.arange(1.0, count + 1),
        "loss": np.array([*training, *[3.0] * (count - len(training))]),
        "position_matched_loss_ratio": np.array([*ratios, *[1.0] * (count - len(ratios))]),
    }
    array = np.array(losses, dtype=float)
    validations = {"iteration": interval * np.arange(1.0, len(losses) + 1), "loss": array, "perplexity": np.exp(array)}
    return Run("trial", steps, validations)


def test_verdict_is_that_of_the_definition_written_out() -> None:
    rng = random.Random(1)
    verdicts = set()
    for _ in range(300):
        perplexities = [rng.uniform(100, 130) * 0.97**k for k in range(rng.randint(2, 12))]
        expected = None
        for k in range(1, len(perplexities)):
            if perplexities[k] / min(perplexities[:k]) > 1.1:
                expected = 2 * (k + 1)
                break
        found = judge(log_of([math.log(p) for p in perplexities]), Criterion(), 2 * len(perplexities))
        assert found is not None
        assert (found.iteration if found.sign else None) == expected
        assert len(found.validations) == (len(perplexities) if expected is None else expected // 2)
        assert found.validations[0] == (2, pytest.approx(perplexities[0]))
        verdicts.add(expected is None)
    assert verdicts == {True, False}


def test_a_trial_without_a_sign_is_undecided_until_its_last_validation() -> None:
    losses = [5.0, 4.0, 4.05, 3.9]
    assert judge(log_of(losses), Criterion(), 10) is None
    assert judge(log_of(losses[:1]), Criterion(), 2) is None, "nothing to compare with"
    found = judge(log_of(losses), Criterion(), 8)
    assert found is not None and found.sign is None
    assert (found.iteration, found.value) == (6, pytest.approx(math.exp(0.05)))
    assert "1.051 at step 6" in found.describe()


def test_tolerance_is_a_share_of_the_perplexity() -> None:
    for rise, tolerance, sign in [(1.09, 0.1, None), (1.11, 0.1, "validation"), (1.11, 0.2, None)]:
        found = judge(log_of([4.0, 4.0 + math.log(rise)]), Criterion(tolerance=tolerance), 4)
        assert found is not None and found.sign == sign


def test_a_loss_that_is_not_finite_decides() -> None:
    for value in (math.nan, math.inf):
        found = judge(log_of([5.0, 4.0], training=[3, 3, value]), Criterion(), 100)
        assert found is not None and (found.sign, found.iteration) == ("non-finite loss", 3)
        assert found.validations == ((2, pytest.approx(math.exp(5))),)
        found = judge(log_of([value, value, 4.0]), Criterion(), 100)
        assert found is not None and (found.sign, found.iteration) == ("non-finite loss", 2)


def test_training_ratio_decides_when_it_stays_high_over_enough_tokens() -> None:
    """Four steps in a row are more than three; a step that has no ratio, or few tokens, counts for neither side."""
    quiet = [5.0, 4.9, 4.8, 4.7, 4.6]
    for ratios, step in [
        ([1, 1.3, 1.3, 1.3, 1, 1.3], None),
        ([1, 1.3, 1.3, 1.3, 1.4], 5),
        ([1, 1.3, 1.3, math.nan, 1.3, 1.4], 6),
        ([1, 1.19, 1.19, 1.19, 1.19, 1.19], None),
    ]:
        found = judge(log_of(quiet, ratios=ratios), Criterion(), 10)
        assert found is not None
        assert (found.sign, found.iteration) == ("loss ratio", step) if step else found.sign is None
    noise = judge(log_of(quiet, ratios=[2.0] * 10, tokens=4095), Criterion(), 10)
    assert noise is not None and noise.sign is None


def test_the_earliest_sign_decides() -> None:
    found = judge(log_of([5.0, 4.0, 6.0], training=[3, 3, 3, 3, 3, 3, math.nan]), Criterion(), 100)
    assert found is not None and (found.sign, found.iteration) == ("validation", 6)


# The search


class Response:
    """A known answer in the place of trials: `fluctuates_at(start, T)` is the step of a fluctuation, or None."""

    def __init__(self, fluctuates_at) -> None:
        self.fluctuates_at = fluctuates_at
        self.asked: list[tuple[int, int]] = []

    def __call__(self, start: int, duration: int) -> Outcome:
        self.asked.append((start, duration))
        step = self.fluctuates_at(start, duration)
        validations = ((10, 100.0), (step or 60, 90.0))
        return Outcome(None if step is None else "validation", step or 60, 0.9 if step is None else 2.0, validations)


def space_of(count: int = 16, first: int = 4, starts: Sequence[int] = (8, 16, 32, 64)) -> SearchSpace:
    """T = 10, 20, ..., of which number `first` comes first; trials of 60 steps, a learning rate warmup of 20."""
    return SearchSpace(tuple(starts), range(10, 10 * count + 1, 10), 10 * first, 20, 60, 2, False)


def test_every_start_and_every_longest_duration_is_found() -> None:
    for count in (1, 2, 3, 7, 16):
        for first in range(1, count + 1):
            for start in (8, 16, 32, 64):
                for longest in range(10, 10 * count + 1, 10):
                    space = space_of(count, first)
                    trial = Response(
                        lambda s, d, start=start, longest=longest: 20 if s < start else None if d <= longest else 40
                    )
                    choice = search(space, trial)
                    assert (choice.start, choice.duration) == (start, longest)
                    assert len(set(trial.asked)) == len(trial.asked)
                    halvings = math.ceil(math.log2(max(first, count - first + 1)))
                    tried_starts = (8, 16, 32, 64).index(start) + 1
                    assert len(trial.asked) <= tried_starts + halvings <= space.most_trials()


def test_the_longest_of_the_range_is_said_to_be_so() -> None:
    trial = Response(lambda start, duration: None)
    choice = search(space_of(), trial)
    assert (choice.start, choice.duration) == (8, 160)
    assert "raise --max-multiple" in choice.words
    capped = search(replace(space_of(), cut_short=True), trial)
    assert "run would end before its full length" in capped.words and "--max-multiple" not in capped.words


def test_nothing_is_recommended_where_everything_fluctuates() -> None:
    at_once = Response(lambda start, duration: 2)
    choice = search(space_of(), at_once)
    assert choice.duration is None and "every start from 8 to 64" in choice.words and "lower --lr" in choice.words
    assert at_once.asked == [(8, 40), (16, 40), (32, 40), (64, 40)]
    later = Response(lambda start, duration: 21)  # the first step after the learning rate warmup
    choice = search(space_of(), later)
    assert choice.duration is None and "start 8 every T tried, down to 10" in choice.words
    assert later.asked == [(8, 40), (8, 20), (8, 10)]


def test_a_response_that_is_not_monotone_gets_a_quiet_duration_below_a_fluctuating_one() -> None:
    rng = random.Random(0)
    for _ in range(200):
        quiet = {10 * k for k in range(1, 17) if rng.random() < 0.6} | {40}
        choice = search(space_of(), Response(lambda start, duration, quiet=quiet: None if duration in quiet else 50))
        assert choice.duration in quiet
        assert choice.duration == 160 or choice.duration + 10 not in quiet


# Which trials there are


def test_multiples_are_of_the_learning_rate_warmup() -> None:
    space = search_space(config_of(), SearchOptions(max_multiple=12))
    assert space.starts == (8, 16, 32)
    assert list(space.durations) == list(range(10, 121, 10)) and space.first_duration == 40
    assert (space.lr_warmup_iterations, space.trial_iterations, space.eval_interval) == (10, 34, 1)
    assert not space.cut_short
    paper = parse_config(build_parser(), ["--config", str(ROOT / "recipes/gpt2-117m-b4k.yaml")])[0]
    paper_space = search_space(paper, SearchOptions(max_multiple=4))
    assert (paper_space.first_duration, paper_space.trial_iterations) == (12_000, 10_000)


def test_durations_end_where_the_run_would_not_reach_its_full_length() -> None:
    config, options = config_of(), SearchOptions()
    space = search_space(config, options)
    assert space.cut_short

    def reaches(duration: int) -> bool:
        return any(step.seqlen == 64 for _, step in walk(paced(config, space.starts[-1], duration)))

    assert reaches(space.durations[-1]) and not reaches(space.durations[-1] + space.durations.step)


@pytest.mark.parametrize("warmup", [("tokens", 1024), ("samples", 80)])
def test_every_trial_gets_past_a_warmup_that_is_not_counted_in_steps(warmup) -> None:
    unit, length = warmup
    config = config_of("--unset", "lr-warmup-iters", f"--lr-warmup-{unit}", str(length))
    space = search_space(config, SearchOptions(max_multiple=8))
    taken = []
    for start in space.starts:
        for duration in space.durations:
            steps = walk(paced(config, start, duration))
            taken.append(next(before.iteration for before, _ in steps if before.counted(unit) >= length))
    assert len(space.durations) == 8
    assert max(taken) == space.lr_warmup_iterations
    assert (space.lr_warmup_iterations > 10) == (unit == "tokens")


@pytest.mark.parametrize(
    ("options", "flags", "message"),
    [
        ({"first_start": 12}, [], "--first-start 12 must be a multiple of --seqlen-multiple 8, from 8 to --seq-length"),
        ({"first_start": 128}, [], "--first-start 128 must be"),
        ({"first_start": 16, "last_start": 8}, [], "--last-start 8 must lie between --first-start 16 and"),
        ({"last_start": 128}, [], "--last-start 128 must lie"),
        ({}, ["--lr-warmup-iters", "0"], "this run has none: give --lr-warmup-iters"),
        ({"trial_multiple": 21.0}, [], "a trial of 210 steps (21 times the learning rate warmup) is longer than"),
        ({"min_multiple": 30.0, "first_multiple": 31.0}, [], "from start 32 over T = 300 steps the run ends before"),
        ({"first_multiple": 33.0}, [], "--first-multiple 33 must lie between --min-multiple 1 and --max-multiple 32"),
        ({"resolution": 0.0}, [], "--resolution 0.0 must be a number above 0"),
        ({"max_multiple": math.nan}, [], "--max-multiple nan must be"),
        ({"trial_multiple": 1.0}, [], "--trial-multiple 1 must be above 1"),
        ({"warmup_validations": 1}, [], "--warmup-validations 1 must be at least 2"),
    ],
)
def test_options_that_leave_no_trial(options, flags, message) -> None:
    with pytest.raises(UserError) as error:
        search_space(config_of(*flags), SearchOptions(**options))
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("tolerance", [0.0, -1.0, math.inf, math.nan])
def test_tolerances_that_make_no_sense(tolerance) -> None:
    with pytest.raises(UserError, match=r"--tolerance .* must be a number above 0"):
        Criterion(tolerance=tolerance)


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--lr-decay-style linear --lr-decay-tokens 51200",
        "--unset=train-tokens --train-iters 200",
        "--unset=train-tokens --train-samples 1600 --unset=lr-warmup-iters --lr-warmup-samples 80",
    ],
)
def test_a_trial_is_the_beginning_of_the_whole_run(flags) -> None:
    config = config_of(*flags.split())
    space = search_space(config, SearchOptions(max_multiple=8))
    trial = list(walk(paced(trial_config(config, space), 16, 50)))
    whole = walk(paced(config, 16, 50))
    assert len(trial) == space.trial_iterations
    assert [step for _, step in trial] == [step for (_, step), _ in zip(whole, trial, strict=False)]


def test_a_trial_neither_hides_nor_mends_what_goes_wrong() -> None:
    flags = (
        "--on-spike rollback --save runs/mine --eval-interval-tokens 10K --exit-interval 5 --exit-duration-in-mins 1"
    )
    config = config_of(*flags.split())
    trial = trial_config(config, search_space(config, SearchOptions()))
    assert (trial.faults.on_nonfinite, trial.faults.on_spike) == ("skip", "log")
    assert (trial.training.exit_interval, trial.training.exit_duration_in_mins) == (None, None)
    assert (trial.evaluation.interval(), trial.evaluation.test) == (Duration(1, "iters"), False)
    assert trial.checkpoint.save is None


def test_figure_shows_each_trial_and_the_choice() -> None:
    space = space_of()
    trials = {
        (8, 40): Outcome("validation", 4, 1.5, ((2, 900.0), (4, 1350.0))),
        (16, 40): Outcome(None, 20, 1.01, ((2, 800.0), (20, 300.0), (60, 200.0))),
        (16, 100): Outcome("non-finite loss", 1, math.nan, ()),
        (16, 70): Outcome("non-finite loss", 4, math.nan, ((2, 700.0), (4, math.inf))),
    }
    figure = figure_tuning(trials, space, Choice(16, 40, ""), None)
    curves, verdicts = figure.axes
    lines = [line for line in curves.get_lines() if len(line.get_xdata()) > 1 and line.get_marker() == "None"]
    assert [line.get_color() for line in lines[:3]] == [FLUCTUATING[0], STABLE[0], FLUCTUATING[0]]
    np.testing.assert_allclose(lines[1].get_ydata(), [800, 300, 200])
    np.testing.assert_allclose(lines[2].get_ydata(), [700, 1350])  # infinite: at the top
    points = [(int(x), int(y)) for line in verdicts.get_lines() for x, y in [(*line.get_xdata(), *line.get_ydata())]]
    assert points == [(40, 8), (40, 16), (100, 16), (70, 16), (40, 16)]
    assert [text.get_text() for text in verdicts.texts] == ["1: 1.50", "2: 1.01", "3: nan", "4: nan"]
