"""The paper's low-cost tuning of sequence length warmup: what a fluctuation is, which trials there are, the search.

Li et al. 2022, Section 4: (1) begin with a small start and T a few times the learning rate warmup; (2) raise the start
until the validation perplexity no longer fluctuates significantly at the very beginning; (3) binary-search the largest
T without significant fluctuation within the first few multiples of the warmup. Here a trial is a function of start and
T; trials.py runs them.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np

from megatron.config import Config, SeqlenWarmupConfig, require
from megatron.growth import Growth
from megatron.instability.loss_ratio import SPIKE
from megatron.instability.summary import Run
from megatron.pacing.plan import lr_warmup_iterations, plan_run, reaches_full_length

Sign = Literal["validation", "loss ratio", "non-finite loss"]
"""What a trial was seen to fluctuate by."""


@dataclass(frozen=True)
class Criterion:
    """When a fluctuation is significant."""

    tolerance: float = 0.1
    """Validation perplexity may be this share above the lowest validated before (0.1 is 0.095 nats a token)."""
    ratio: float = SPIKE
    """The second sign: a position-matched training loss ratio above this (loss_ratio.py) ..."""
    ratio_steps: int = 3
    """... for more than so many steps in a row ..."""
    ratio_tokens: int = 4096
    """... of at least so many tokens: at fewer, the ratio is noise (2.5 / sqrt(4096) is 0.04 nats)."""

    def __post_init__(self) -> None:
        require(0 < self.tolerance < math.inf, f"--tolerance {self.tolerance} must be a number above 0, such as 0.1")


@dataclass(frozen=True)
class Outcome:
    """What a trial has shown."""

    sign: Sign | None
    """The first significant fluctuation; None: there was none."""
    iteration: int
    """Its step; without one, the step of the largest fluctuation."""
    value: float
    """What was compared with the criterion there (NaN for a loss that is not finite): validation perplexity, or loss,
    over the lowest before. Without a significant one, the largest of the validations."""
    validations: tuple[tuple[int, float], ...]
    """(step, perplexity) of every validation until the trial was decided."""

    def describe(self) -> str:
        """The outcome in words."""
        if self.sign is None:
            where = f"{self.value:.3f} at step {self.iteration:,}"
            return f"no significant fluctuation (largest: perplexity over the lowest before {where})"
        if self.sign == "non-finite loss":
            return f"fluctuates: the loss is not finite at step {self.iteration:,}"
        what = "validation perplexity" if self.sign == "validation" else "training loss at equal positions"
        return f"fluctuates: {what} is {self.value:.3f} times the lowest before at step {self.iteration:,}"


def judge(run: Run, criterion: Criterion, last_step: int) -> Outcome | None:
    """The outcome of a trial, from its log so far; None while it is undecided.

    The fluctuation of validation k is perplexity_k / min(perplexity_1 .. perplexity_(k-1)). The earliest sign decides;
    that there is none, only the validation after `last_step` does.
    """
    steps, losses = run.validation("iteration"), run.validation("loss")
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is a sign of its own
        fluctuations = np.exp(losses[1:] - np.minimum.accumulate(losses)[:-1])
    signs: list[tuple[int, Sign, float]] = []
    for iterations, values in ((run.step("iteration"), run.step("loss")), (steps, losses)):
        if not np.isfinite(values).all():
            signs.append((int(iterations[~np.isfinite(values)][0]), "non-finite loss", math.nan))
    significant = np.flatnonzero(fluctuations > 1 + criterion.tolerance)
    if len(significant):
        signs.append((int(steps[1:][significant[0]]), "validation", float(fluctuations[significant[0]])))
    if sustained := _sustained_ratio(run, criterion):
        signs.append((sustained[0], "loss ratio", sustained[1]))
    if signs:
        iteration, sign, value = min(signs, key=lambda found: found[0])
        return Outcome(sign, iteration, value, _validations(run, iteration))
    if not len(fluctuations) or steps[-1] < last_step:
        return None
    largest = int(fluctuations.argmax())
    return Outcome(None, int(steps[1:][largest]), float(fluctuations[largest]), _validations(run, last_step))


def _sustained_ratio(run: Run, criterion: Criterion) -> tuple[int, float] | None:
    """Step and value at which the position-matched ratio has been too high for too long; None if it has not."""
    ratios = run.step("position_matched_loss_ratio")
    tokens = np.diff(run.step("consumed_tokens"), prepend=0)
    judged = (tokens >= criterion.ratio_tokens) & ~np.isnan(ratios)
    above = 0
    for iteration, ratio in zip(run.step("iteration")[judged], ratios[judged], strict=True):
        above = above + 1 if ratio > criterion.ratio else 0
        if above > criterion.ratio_steps:
            return int(iteration), float(ratio)
    return None


def _validations(run: Run, until: int) -> tuple[tuple[int, float], ...]:
    rows = zip(run.validation("iteration"), run.validation("perplexity"), strict=True)
    return tuple((int(iteration), float(perplexity)) for iteration, perplexity in rows if iteration <= until)


@dataclass(frozen=True)
class SearchOptions:
    """Which trials there may be. Multiples are of the learning rate warmup's steps."""

    first_start: int | None = None
    """Smallest sequence length to start with (default: --seqlen-multiple)."""
    last_start: int | None = None
    """Largest sequence length to start with (default: half of --seq-length)."""
    first_multiple: float = 4.0
    """T of the trials that look for the start, in multiples of the learning rate warmup."""
    min_multiple: float = 1.0
    """Smallest T to consider, in the same unit."""
    max_multiple: float = 32.0
    """Largest T to consider, in the same unit."""
    resolution: float = 1.0
    """Distance between one T and the next, in the same unit."""
    trial_multiple: float = 10 / 3
    """Length of a trial, in the same unit (the paper's 10K steps for a warmup of 3K)."""
    warmup_validations: int = 10
    """Validations of a trial within the learning rate warmup; they go on at that interval."""

    def __post_init__(self) -> None:
        for name in ("first_multiple", "min_multiple", "max_multiple", "resolution", "trial_multiple"):
            value = getattr(self, name)
            flag = f"--{name.replace('_', '-')}"
            require(0 < value < math.inf, f"{flag} {value} must be a number above 0")
        require(
            self.min_multiple <= self.first_multiple <= self.max_multiple,
            f"--first-multiple {self.first_multiple:g} must lie between --min-multiple {self.min_multiple:g} "
            f"and --max-multiple {self.max_multiple:g}",
        )
        require(
            self.trial_multiple > 1,
            f"--trial-multiple {self.trial_multiple:g} must be above 1: what fluctuates later than the learning rate "
            "warmup must be seen too",
        )
        require(self.warmup_validations >= 2, f"--warmup-validations {self.warmup_validations} must be at least 2")


@dataclass(frozen=True)
class SearchSpace:
    """The trials that a search chooses from."""

    starts: tuple[int, ...]
    """Starts in the order in which they are tried, each twice the one before."""
    durations: range
    """Values of T in steps, rising."""
    first_duration: int
    """The T, one of `durations`, with which starts are tried."""
    lr_warmup_iterations: int
    """Steps of the learning rate warmup: "the very beginning"."""
    trial_iterations: int
    """Steps of a trial."""
    eval_interval: int
    """Steps between validations."""
    cut_short: bool
    """Whether --max-multiple asked for a longer T, with which the run would end before its full length."""

    def most_trials(self) -> int:
        """The largest number of trials that a search takes: one a start, then the halvings on one side of the first T.

        Of n values of T on that side, 0 to n may be without fluctuation: ceil(log2(n + 1)) trials tell which.
        """
        below = self.durations.index(self.first_duration)
        above = len(self.durations) - below - 1
        return len(self.starts) + max(below, above).bit_length()


def search_space(config: Config, options: SearchOptions) -> SearchSpace:
    """The trials for the run `config`, whose own sequence length warmup is disregarded.

    Raises:
        UserError: where the flags leave no trial, or the run is too short for one.
    """
    seq_length, multiple = config.model.seq_length, config.seqlen_warmup.seqlen_multiple
    first = multiple if options.first_start is None else options.first_start
    last = seq_length // 2 if options.last_start is None else options.last_start
    require(
        multiple <= first <= seq_length and first % multiple == 0,
        f"--first-start {first} must be a multiple of --seqlen-multiple {multiple}, "
        f"from {multiple} to --seq-length {seq_length}",
    )
    require(
        first <= last <= seq_length,
        f"--last-start {last} must lie between --first-start {first} and --seq-length {seq_length}",
    )
    warmup = _lr_warmup_iterations(config, first, options.max_multiple)
    require(
        warmup > 0,
        "trials are measured in multiples of the learning rate warmup, of which this run has none: "
        "give --lr-warmup-iters",
    )
    trial, run = math.ceil(options.trial_multiple * warmup), plan_run(_full_length(config)).progress.iteration
    require(
        trial <= run,
        f"--trial-multiple {options.trial_multiple:g}: a trial of {trial:,} steps ({options.trial_multiple:g} times "
        f"the learning rate warmup) is longer than the run of {run:,}: lower it, or train for longer",
    )
    low, step = max(1, round(options.min_multiple * warmup)), max(1, round(options.resolution * warmup))
    wanted = range(low, max(low, math.floor(options.max_multiple * warmup)) + 1, step)
    starts = tuple(first << k for k in range((last // first).bit_length()))
    # The larger the start, the fewer steps a run to as many tokens has: what fits the largest fits all.
    possible = bisect_left(
        wanted, True, key=lambda duration: not reaches_full_length(paced(config, starts[-1], duration))
    )
    require(
        possible > 0,
        f"from start {starts[-1]} over T = {low:,} steps the run ends before its full length: train for longer, "
        f"or lower --last-start or --min-multiple {options.min_multiple:g}",
    )
    index = round((options.first_multiple * warmup - low) / step)
    return SearchSpace(
        starts=starts,
        durations=wanted[:possible],
        first_duration=wanted[min(max(index, 0), possible - 1)],
        lr_warmup_iterations=warmup,
        trial_iterations=trial,
        eval_interval=max(1, warmup // options.warmup_validations),
        cut_short=possible < len(wanted),
    )


def paced(config: Config, start: int, duration: int) -> Config:
    """`config` growing from length `start` over `duration` steps, by its own pacing where that grows, else linearly."""
    own = config.seqlen_warmup
    pacing = SeqlenWarmupConfig(
        seqlen_warmup=own.seqlen_warmup if own.seqlen_warmup in get_args(Growth) else "linear",
        seqlen_start=start,
        seqlen_warmup_iters=duration,
        seqlen_multiple=own.seqlen_multiple,
        seqlen_root_degree=own.seqlen_root_degree,
        seqlen_realisation=own.seqlen_realisation,
    )
    return replace(config, seqlen_warmup=pacing)


def _full_length(config: Config) -> Config:
    return replace(config, seqlen_warmup=SeqlenWarmupConfig(seqlen_multiple=config.seqlen_warmup.seqlen_multiple))


def _lr_warmup_iterations(config: Config, start: int, max_multiple: float) -> int:
    """Steps of the learning rate warmup in the trial that takes longest over it.

    One counted in tokens takes the more steps the longer T is, and T is counted in these steps: this goes on until they
    no longer grow, so that a trial with any T gets past the warmup.
    """
    steps = 0
    while True:
        planned = lr_warmup_iterations(paced(config, start, max(1, math.floor(max_multiple * steps))))
        if planned <= steps:
            return steps
        steps = planned


@dataclass(frozen=True)
class Choice:
    """What a search has ended with."""

    start: int
    duration: int | None
    """The recommended T; None: no trial of this start was without significant fluctuation."""
    words: str
    """What was found, and what to do."""


def search(space: SearchSpace, trial: Callable[[int, int], Outcome]) -> Choice:
    """The paper's steps 2 and 3, with `trial(start, T)`.

    The halving takes for granted that where some T fluctuates, every longer one does. Where that does not hold it
    still ends with a T that is without fluctuation itself, the next longer one in the space having fluctuated, but not
    with the largest such T.
    """
    for start in space.starts:
        outcome = trial(start, space.first_duration)
        if outcome.sign is None or outcome.iteration > space.lr_warmup_iterations:
            return _search_duration(space, start, outcome, trial)
    starts = f"{space.starts[0]} to {space.starts[-1]}" if len(space.starts) > 1 else f"{space.starts[0]}"
    return Choice(
        space.starts[-1],
        None,
        f"No recommendation: with T = {space.first_duration:,} every start from {starts} fluctuates within the "
        "learning rate warmup. Raise --last-start, or lower --lr: at this one sequence length warmup does not help.",
    )


def _search_duration(space: SearchSpace, start: int, first: Outcome, trial: Callable[[int, int], Outcome]) -> Choice:
    """The largest T without significant fluctuation, `first` being the outcome of `space.first_duration`."""
    durations = space.durations
    still, fluctuating = -1, len(durations)  # the largest T known to be without, the smallest known to be with
    index, outcome = durations.index(space.first_duration), first
    while True:
        if outcome.sign is None:
            still = index
        else:
            fluctuating = index
        if fluctuating - still == 1:
            break
        index = (still + fluctuating) // 2
        outcome = trial(start, durations[index])
    if still < 0:
        return Choice(
            start,
            None,
            f"No recommendation: with start {start} every T tried, down to {durations[0]:,}, fluctuates. Lower --lr, "
            f"raise the start (--first-start {2 * start}), or, where T may be too short rather than too long, raise "
            "--first-multiple.",
        )
    chosen = durations[still]
    words = f"Recommended: start {start}, T = {chosen:,} steps"
    if fluctuating < len(durations):
        return Choice(start, chosen, f"{words}: the next longer, {durations[fluctuating]:,}, fluctuates.")
    advice = (
        f"with a longer one the run would end before its full length (from --last-start {space.starts[-1]})"
        if space.cut_short
        else "a longer one may be better: raise --max-multiple"
    )
    return Choice(start, chosen, f"{words}, the longest in the range, and none of those tried fluctuates; {advice}.")
