"""Learning rate: linear warmup, then one decay over steps, samples or tokens."""

from __future__ import annotations

import math

from megatron.config import LearningRateConfig
from megatron.progress import Duration, Progress


class LearningRateSchedule:
    """The learning rate of every optimizer step, a function of progress alone.

    Warmup: step t (1-based) uses peak * t / W; counted in tokens or samples, t is what will have been consumed
    when the step is done. Decay: by what was consumed before the step, from the end of the warmup to the end of
    the decay span. A decay over tokens after a warmup in another unit starts at `progress.lr_anchor_tokens`.
    """

    def __init__(self, config: LearningRateConfig, warmup: Duration, decay: Duration) -> None:
        self.config = config
        self.warmup = warmup
        self.decay = decay

    def lr(self, progress: Progress, *, samples: int, tokens: int) -> float:
        """Learning rate of the next step, which draws `samples` samples and trains on `tokens` tokens."""
        peak = self.config.lr
        warmup = self.warmup
        if warmup.value > 0 and not warmup.reached(progress):
            step = {"iters": 1, "samples": samples, "tokens": tokens}[warmup.unit]
            after = warmup.position(progress) + step
            if after <= warmup.value:
                return peak * after / warmup.value
        return self._decayed(progress)

    def _decayed(self, progress: Progress) -> float:
        """Learning rate after the warmup, from the share of the decay span that is behind."""
        config = self.config
        start = self._decay_start(progress)
        span = self.decay.value - start
        ratio = min(max((self.decay.position(progress) - start) / span, 0.0), 1.0) if span > 0 else 1.0
        shape = decay_shape(config.lr_decay_style, ratio, config.lr_wsd_fraction)
        if config.lr_floor == "interpolate":
            return config.min_lr + (config.lr - config.min_lr) * shape
        return max(config.lr * shape, config.min_lr)

    def _decay_start(self, progress: Progress) -> int:
        """Where the decay starts, in the unit of the decay."""
        if self.warmup.value == 0:
            return 0
        if self.warmup.unit == self.decay.unit:
            return self.warmup.value
        # Config admits another unit for the warmup only where the decay is over tokens. The anchor is None only
        # in the one step that crosses the end of a warmup counted in samples: the decay starts there.
        return progress.consumed_tokens if progress.lr_anchor_tokens is None else progress.lr_anchor_tokens


def decay_shape(style: str, ratio: float, wsd_fraction: float = 0.1) -> float:
    """Factor in [0, 1] at `ratio` of the decay span: 1 at its start, 0 at its end (constant stays at 1)."""
    if style == "constant":
        return 1.0
    if style == "linear":
        return 1.0 - ratio
    if style == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * ratio))
    tail = (1.0 - ratio) / wsd_fraction
    return min(tail, 1.0)
