"""How far a run has come. Sequence length, batch size and learning rate all follow from this record."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

Unit = Literal["iters", "samples", "tokens"]


@dataclass(frozen=True)
class Duration:
    """A stretch of training, counted in optimizer steps, in samples or in tokens trained on."""

    value: int
    unit: Unit

    def position(self, progress: Progress) -> int:
        """How far `progress` has come, in this duration's unit."""
        return progress.counted(self.unit)

    def reached(self, progress: Progress) -> bool:
        """Whether the stretch is over. A stretch of length 0 is over before the first step."""
        return self.position(progress) >= self.value


@dataclass
class Progress:
    """Everything the schedules may look at. One method changes it."""

    iteration: int = 0
    """Optimizer steps taken, those skipped for a non-finite gradient included."""
    consumed_samples: int = 0
    """Samples (full-length windows of the corpus) drawn. A truncated sample counts as one."""
    consumed_tokens: int = 0
    """Tokens trained on: a truncated sample counts with the length it had; dropped tail tokens never count."""
    lr_anchor_tokens: int | None = None
    """Tokens at the end of the learning rate warmup, where a decay over tokens starts. None while it warms up."""
    seqlen_level: int = 0
    """How often adaptive pacing has lengthened the sequences."""

    def counted(self, unit: Unit) -> int:
        """The counter that `unit` names."""
        if unit == "iters":
            return self.iteration
        return self.consumed_samples if unit == "samples" else self.consumed_tokens

    def advance(self, *, samples: int, tokens: int, lr_warmup: Duration) -> None:
        """Count one optimizer step that drew `samples` samples and trained on `tokens` tokens.

        The step that ends `lr_warmup` sets `lr_anchor_tokens`: to the warmup's own length where it is counted
        in tokens, else to the tokens trained on so far.
        """
        self.iteration += 1
        self.consumed_samples += samples
        self.consumed_tokens += tokens
        if self.lr_anchor_tokens is None and lr_warmup.reached(self):
            self.lr_anchor_tokens = lr_warmup.value if lr_warmup.unit == "tokens" else self.consumed_tokens

    def position(self) -> dict[str, int]:
        """What every line of the log begins with."""
        return {
            "iteration": self.iteration,
            "consumed_samples": self.consumed_samples,
            "consumed_tokens": self.consumed_tokens,
        }

    def to_dict(self) -> dict[str, int | None]:
        """Plain values for a checkpoint; `Progress(**d)` is the inverse."""
        return asdict(self)


def crossed(interval: Duration | None, before: Progress, after: Progress) -> bool:
    """Whether a multiple of `interval` lies in the step from `before` to `after`; never where that led back."""
    if interval is None or after.iteration <= before.iteration:
        return False
    return interval.position(before) // interval.value != interval.position(after) // interval.value
