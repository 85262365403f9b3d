"""Sequence length warmup: from progress to the sequence length of the next optimizer step."""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate
from math import inf, isfinite

from megatron.config import SeqlenWarmupConfig
from megatron.growth import grown_seqlen
from megatron.progress import Progress


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
        place = progress.counted(config.seqlen_stages_unit)
        if config.seqlen_warmup == "discrete":
            return self._lengths[bisect_right(self._ends, place)]
        if config.seqlen_warmup == "mixed":
            return self._lengths[bisect_right(self._ends, place % self._ends[-1])]
        duration = self._duration
        return grown_seqlen(
            config.seqlen_warmup,
            progress.iteration + 1 if duration.unit == "iters" else progress.consumed_tokens,
            duration.value,
            config.seqlen_start,
            self.seq_length,
            config.seqlen_multiple,
            config.seqlen_root_degree,
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
