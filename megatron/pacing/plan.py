"""A whole run from its schedules alone: what the trainer will do at each step, before it does it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import takewhile

from megatron.config import Config
from megatron.pacing.batch_size_warmup import BatchSizeSchedule
from megatron.pacing.learning_rate import LearningRateSchedule
from megatron.pacing.seqlen_warmup import SeqlenSchedule
from megatron.progress import Progress, crossed


@dataclass(frozen=True)
class StepPlan:
    """What one optimizer step will use."""

    seqlen: int
    global_batch_size: int
    """Samples drawn."""
    lr: float
    sample_tokens: int | None = None
    """Tokens of each sample that are trained on; None: `seqlen`, the others are truncated."""

    @property
    def tokens(self) -> int:
        """Tokens trained on."""
        return self.global_batch_size * (self.sample_tokens or self.seqlen)


class Schedules:
    """The schedules of one run. The trainer, the planner and a resume all ask this object."""

    def __init__(self, config: Config) -> None:
        self.ends = config.training.ends()
        self.batch_size_schedule = BatchSizeSchedule(config.batch_size_warmup, config.training.global_batch_size)
        self.lr_warmup = config.learning_rate.warmup(config.training)
        self.seqlen_schedule = SeqlenSchedule(config.seqlen_warmup, config.model.seq_length)
        self.lr_schedule = LearningRateSchedule(
            config.learning_rate, self.lr_warmup, config.learning_rate.decay(config.training)
        )

    def finished(self, progress: Progress) -> bool:
        """Whether a limit of the run is reached."""
        return any(end.reached(progress) for end in self.ends)

    def plan(self, progress: Progress) -> StepPlan:
        """Sequence length, batch size and learning rate of the next step."""
        samples = self.batch_size_schedule.batch_size(progress)
        seqlen = self.seqlen_schedule.seqlen(progress)
        sample_tokens = self.seqlen_schedule.sample_tokens(seqlen)
        lr = self.lr_schedule.lr(progress, samples=samples, tokens=samples * sample_tokens)
        return StepPlan(seqlen, samples, lr, sample_tokens)

    def advance(self, progress: Progress, step: StepPlan) -> None:
        """Count `step` as done."""
        progress.advance(samples=step.global_batch_size, tokens=step.tokens, lr_warmup=self.lr_warmup)

    def after(self, progress: Progress, step: StepPlan) -> Progress:
        """The progress when `step` is done; `progress` stays as it is."""
        later = replace(progress)
        self.advance(later, step)
        return later


@dataclass(frozen=True)
class PlannedRun:
    """Totals of a run that was only planned."""

    progress: Progress
    full_length_iteration: int | None
    """First step (1-based) at full length; None if it is never reached."""
    lr_warmup_iterations: int
    """Steps until the end of the learning rate warmup (all steps if it does not end)."""
    token_seqlen_sum: int
    """Sum over tokens of the length of their sequence: what attention costs, see model/flops.py."""
    full_length_tokens: int
    """Tokens the same samples would have held at full length; the difference was truncated."""

    @property
    def discarded_share(self) -> float:
        """Share of the drawn tokens that truncation dropped."""
        return 1 - self.progress.consumed_tokens / self.full_length_tokens if self.full_length_tokens else 0.0


def walk(config: Config, at: int | None = None, start: Progress | None = None) -> Iterator[tuple[Progress, StepPlan]]:
    """Every step of a run in turn, from `start` on: the progress before it (one record that changes) and what it uses.

    Ends where the run does, or at `at` steps; the record then holds the final progress. Adaptive pacing is taken to
    lengthen after every validation, the fastest that it can.
    """
    schedules = Schedules(config)
    progress = Progress() if start is None else replace(start)
    adaptive = config.evaluation.interval() if config.seqlen_warmup.seqlen_warmup == "adaptive" else None
    while not schedules.finished(progress) and (at is None or progress.iteration < at):
        step = schedules.plan(progress)
        yield progress, step
        before = replace(progress) if adaptive else progress
        schedules.advance(progress, step)
        progress.seqlen_level += crossed(adaptive, before, progress)


def plan_run(config: Config, at: int | None = None) -> PlannedRun:
    """Walk a run without a model, to its end or for `at` steps."""
    lr_warmup = config.learning_rate.warmup(config.training)
    seq_length = config.model.seq_length
    progress = Progress()
    full_length_iteration = None
    lr_warmup_iterations = 0
    token_seqlen_sum = 0
    for progress, step in walk(config, at):  # one record: after the loop it is the final progress
        lr_warmup_iterations += not lr_warmup.reached(progress)
        whole, rest = divmod(step.tokens // step.global_batch_size, step.seqlen)
        token_seqlen_sum += step.global_batch_size * (whole * step.seqlen**2 + rest**2)
        if full_length_iteration is None and step.seqlen == seq_length:
            full_length_iteration = progress.iteration + 1
    return PlannedRun(
        progress=progress,
        full_length_iteration=full_length_iteration,
        lr_warmup_iterations=lr_warmup_iterations,
        token_seqlen_sum=token_seqlen_sum,
        full_length_tokens=progress.consumed_samples * seq_length,
    )


@dataclass(frozen=True)
class Outlook:
    """A run as seen from one of its steps."""

    scheduled: Progress
    """Where the schedules lead by that step: elsewhere than the run is, if its settings were others until now."""
    end: Progress
    """The end of the run, from where it is."""
    full_length_iteration: int | None
    """First step (1-based) at full length, behind or ahead; None if it is never reached."""
    seqlen: int | None
    """Length of the next step; None if there is none."""


def look_ahead(config: Config, progress: Progress) -> Outlook:
    """Walk to where the run is, and from there to its end: no more steps than the run has."""
    full_length_iteration = seqlen = None
    ends = []
    for start, at in ((Progress(), progress.iteration), (progress, None)):
        end = start
        for end, step in walk(config, at, start):
            if full_length_iteration is None and step.seqlen == config.model.seq_length:
                full_length_iteration = end.iteration + 1
            if seqlen is None and start is progress:
                seqlen = step.seqlen
        ends.append(end)
    return Outlook(ends[0], ends[1], full_length_iteration, seqlen)


def reaches_full_length(config: Config) -> bool:
    """Whether some step of the run is at full length; the walk ends there."""
    return any(step.seqlen == config.model.seq_length for _, step in walk(config))


def lr_warmup_iterations(config: Config) -> int:
    """Steps until the end of the learning rate warmup, or all of the run; the walk ends there."""
    warmup = config.learning_rate.warmup(config.training)
    return sum(1 for _ in takewhile(lambda step: not warmup.reached(step[0]), walk(config)))


def sample_steps(
    config: Config, iterations: int, rows: int, full_length: int | None = None
) -> list[tuple[Progress, StepPlan]]:
    """About `rows` of the first `iterations` steps: half of them spread evenly until step `full_length`, the others
    after it (None: all of them over all steps). The first and the last are among them."""
    last, middle = iterations - 1, (full_length or 1) - 1
    wanted = {round(row * last / max(rows - 1, 1)) for row in range(rows)}
    if 0 < middle < last:
        wanted = {round(row * middle / (rows // 2)) for row in range(rows // 2 + 1)}
        wanted |= {round(last - row * (last - middle) / (rows // 2)) for row in range(rows // 2)}
    return [(replace(before), step) for before, step in walk(config, iterations) if before.iteration in wanted]


def target_tokens(config: Config) -> int:
    """Tokens trained on at the end of the run, as the limit in tokens or the plan says."""
    ends = config.training.ends()
    return ends[0].value if [end.unit for end in ends] == ["tokens"] else plan_run(config).progress.consumed_tokens
