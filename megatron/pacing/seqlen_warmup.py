"""Sequence length warmup: from progress to the sequence length of the next optimizer step.

All arithmetic is on integers, so that a length never depends on how a float was rounded.
"""

from __future__ import annotations

from bisect import bisect_left

from megatron.config import SeqlenWarmupConfig, parse_stages
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
        self._lengths: list[int] = []
        self._last_steps: list[int] = []
        if config.seqlen_warmup == "discrete" and config.seqlen_stages is not None:
            self._lengths, self._last_steps = parse_stages(
                config.seqlen_stages, seq_length=seq_length, multiple=config.seqlen_multiple
            )

    def seqlen(self, progress: Progress) -> int:
        """Length in tokens that the whole next step uses, on every rank and in every micro-batch.

        In steps the position is the 1-based number of the step, t = iteration + 1; in tokens it is the tokens
        trained on before the step.
        """
        config = self.config
        if config.seqlen_warmup == "none":
            return self.seq_length
        if config.seqlen_warmup == "discrete":
            return self._lengths[bisect_left(self._last_steps, progress.iteration + 1)]
        duration = self._duration
        position = progress.iteration + 1 if duration.unit == "iters" else progress.consumed_tokens
        degree = 1 if config.seqlen_warmup == "linear" else config.seqlen_root_degree
        return root_seqlen(
            position, duration.value, config.seqlen_start, self.seq_length, config.seqlen_multiple, degree
        )
