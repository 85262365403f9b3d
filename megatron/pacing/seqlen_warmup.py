"""Sequence length warmup: from progress to the sequence length of the next optimizer step.

All arithmetic is on integers, so that a length never depends on how a float was rounded.
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate
from math import inf, isfinite

from megatron.config import SeqlenWarmupConfig
from megatron.progress import Progress


def linear_seqlen(position: int, duration: int, start: int, end: int, multiple: int = 1) -> int:
    """Length of step-wise linear pacing.

    floor(start + (end - start) * min(position / duration, 1)), then down to a multiple of `multiple`
    (Section 4 of the paper; the DeepSpeed tutorial calls it fixed_linear).

    Args:
        position: the 1-based optimizer step t, or the tokens trained on before it.
        duration: T, in the unit of `position`.
        start, end: first and full length in tokens, both multiples of `multiple`.
    """
    return root_seqlen(position, duration, start, end, multiple, degree=1)


def root_seqlen(position: int, duration: int, start: int, end: int, multiple: int = 1, degree: int = 2) -> int:
    """Length of root pacing: as `linear_seqlen`, with (position / duration)^(1 / degree) for the ratio.

    The 2022 text of the paper writes the exponent as the degree itself; the code that ran, and the DeepSpeed
    tutorial, take the root.
    """
    if position >= duration:
        return end
    growth = _floor_root((end - start) ** degree * position // duration, degree)
    length = start + growth
    return min(length - length % multiple, end)


def _floor_root(value: int, degree: int) -> int:
    """The largest integer x with x**degree <= value."""
    if degree == 1:
        return value
    x = round(value ** (1 / degree))
    while x**degree > value:
        x -= 1
    while (x + 1) ** degree <= value:
        x += 1
    return x


class SeqlenSchedule:
    """The sequence length of every optimizer step of a run."""

    def __init__(self, config: SeqlenWarmupConfig, seq_length: int) -> None:
        self.config = config
        self.seq_length = seq_length
        self._duration = config.duration()
        self._adaptive_step = config.adaptive_step(seq_length)
        self._lengths: list[int] = []
        self._ends: list[int] = []
        if config.seqlen_warmup == "discrete":
            self._lengths, self._ends = config.stages()
        elif config.seqlen_warmup == "mixed":
            self._lengths, durations = config.cycle()
            self._ends = list(accumulate(durations))

    def seqlen(self, progress: Progress) -> int:
        """Length in tokens that the whole next step uses, on every rank and in every micro-batch.

        Growth in steps goes by the 1-based number of the step, t = iteration + 1, in tokens by those trained on before
        it. A stage that ends at step m still has that step; one that ends at n tokens has the steps that begin before.
        """
        config = self.config
        if config.seqlen_warmup == "none":
            return self.seq_length
        if config.seqlen_warmup == "adaptive":
            return min(config.seqlen_start + progress.seqlen_level * self._adaptive_step, self.seq_length)
        if config.seqlen_warmup in ("discrete", "mixed"):
            position = progress.counted(config.seqlen_stages_unit)
            if config.seqlen_warmup == "mixed":
                position %= self._ends[-1]
            return self._lengths[bisect_right(self._ends, position)]
        duration = self._duration
        position = progress.iteration + 1 if duration.unit == "iters" else progress.consumed_tokens
        degree = 1 if config.seqlen_warmup == "linear" else config.seqlen_root_degree
        return root_seqlen(
            position, duration.value, config.seqlen_start, self.seq_length, config.seqlen_multiple, degree
        )

    def sample_tokens(self, seqlen: int) -> int:
        """Tokens of a sample that a step of length `seqlen` trains on: truncation drops the others."""
        return seqlen if self.config.seqlen_realisation == "truncate" else self.seq_length


class AdaptivePacing:
    """When adaptive pacing lengthens. The paper tried such a schedule and gives no formula; this one is ours.

    After a validation: if its loss is at most (1 + tolerance) times the least so far (the first one always is), and
    no step since the validation before had a position-matched loss ratio above `limit`, the length grows by
    --seqlen-adaptive-step. Else it waits for the next validation. It never shrinks.
    """

    def __init__(self, config: SeqlenWarmupConfig, limit: float) -> None:
        self._tolerance = config.seqlen_adaptive_tolerance
        self.on = config.seqlen_warmup == "adaptive"
        """Whether this is the run's pacing."""
        self._limit = limit
        self.least_validation_loss = inf
        self.largest_ratio = 0.0
        """Largest position-matched loss ratio since the last validation."""

    def trained(self, ratio: float | None) -> None:
        """Take in a step's position-matched loss ratio (None: there is none yet); one that is not finite counts."""
        if ratio is not None and not ratio <= self.largest_ratio:
            self.largest_ratio = ratio if isfinite(ratio) else inf

    def validated(self, progress: Progress, loss: float) -> None:
        """Decide after a validation, and lengthen by raising `progress.seqlen_level`."""
        if not self.on:
            return
        calm = self.largest_ratio <= self._limit
        if calm and loss <= (1 + self._tolerance) * self.least_validation_loss:
            progress.seqlen_level += 1
        self.least_validation_loss = min(self.least_validation_loss, loss)
        self.largest_ratio = 0.0

    def state_dict(self) -> dict[str, float]:
        """What a resume needs beside the progress."""
        return {"least_validation_loss": self.least_validation_loss, "largest_ratio": self.largest_ratio}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Take over `state_dict`'s values."""
        self.least_validation_loss, self.largest_ratio = state["least_validation_loss"], state["largest_ratio"]
