"""Batch size warmup: from progress to the samples of the next optimizer step."""

from __future__ import annotations

from bisect import bisect_right

from megatron.config import BatchSizeWarmupConfig
from megatron.progress import Progress


def linear_batch_size(position: int, duration: int, start: int, end: int, increment: int = 1) -> int:
    """start + (end - start) * min(position / duration, 1), the growth down to a multiple of `increment`.

    Args:
        position: the 1-based optimizer step, or the tokens or samples consumed before it.
        duration: in the unit of `position`.
    """
    growth = (end - start) * min(position, duration) // duration
    return start + growth - growth % increment


class BatchSizeSchedule:
    """The samples of every optimizer step of a run.

    Linear over steps is the baseline of the paper, over tokens GPT-3's, over samples Megatron-LM's
    --rampup-batch-size. Stages end at tokens trained on: one that ends at n has the steps that begin before.
    """

    def __init__(self, config: BatchSizeWarmupConfig, global_batch_size: int) -> None:
        self.config = config
        self.global_batch_size = global_batch_size
        self._sizes, self._ends = config.stages() if config.batch_size_warmup == "stages" else ([], [])

    def batch_size(self, progress: Progress) -> int:
        """Samples of the next step, over all ranks."""
        config = self.config
        if config.batch_size_warmup == "none":
            return self.global_batch_size
        if config.batch_size_warmup == "stages":
            return self._sizes[bisect_right(self._ends, progress.consumed_tokens)]
        duration = config.duration()
        position = progress.iteration + 1 if duration.unit == "iters" else duration.position(progress)
        return linear_batch_size(
            position, duration.value, config.batch_size_start or 0, self.global_batch_size, config.batch_size_increment
        )
