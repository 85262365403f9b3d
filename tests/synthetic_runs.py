"""Made-up runs for tests of the analysis: the right shapes, at no cost."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron.instability.loss_ratio import LossRatio, PositionMatchedLossRatio
from megatron.metrics import MetricsLogger


def write_losses(
    directory: Path, losses: Sequence[float], *, tokens: int = 100, seconds: float = 0.5, **more: Sequence[Any]
) -> Path:
    """Write a run of a step for each loss and, at every other step, a validation with that loss plus 1.

    A step has `tokens` tokens and takes `seconds` of training; wall time is twice that. `more` are further columns.
    """
    with MetricsLogger(directory) as logger:
        ratio = LossRatio()
        for t, loss in enumerate(losses, start=1):
            when = {"iteration": t, "consumed_tokens": tokens * t, "seconds": seconds * t}
            step = when | {"loss": loss, "loss_ratio": ratio.update(loss), "elapsed_seconds": 2 * seconds * t}
            logger.log_step(step | {name: values[t - 1] for name, values in more.items()})
            if t % 2 == 0:
                logger.log_validation(when | {"loss": loss + 1, "elapsed_seconds": 2 * seconds * t + 0.25})
    return directory


def write_run(
    directory: Path, *, warmup_steps: int = 0, tokens: int = 10_000_000, spikes: tuple[float, ...] = (), seed: int = 0
) -> Path:
    """Write the metrics.jsonl of a run of sequences up to 256 tokens, 32 a step, with loss spikes at given tokens."""
    random = np.random.default_rng(seed)
    ratio, matched = LossRatio(), PositionMatchedLossRatio(256)
    consumed = iteration = 0
    seconds = elapsed = 0.0
    next_validation = 0
    spiked: set[float] = set()
    with MetricsLogger(directory) as logger:
        while consumed < tokens:
            iteration += 1
            seqlen = 256 if iteration > warmup_steps else 8 + (248 * iteration // max(1, warmup_steps)) // 8 * 8
            consumed += 32 * seqlen
            seconds += 0.02 + 32 * seqlen / 30_000
            elapsed += 0.02 + 32 * seqlen / 30_000
            bump = 0.0
            for spike in spikes:
                if consumed >= spike:
                    spiked.add(spike)
            bump = sum(2.0 * np.exp(-(consumed - s) / 60_000) for s in spiked)
            base = 3.4 + 5.6 * (1 + consumed / 150_000) ** -0.5 + bump
            counts = [32.0 * max(0, min(end, seqlen) - start) for start, end in matched.buckets]
            counts = [count for count in counts if count > 0]
            sums = [
                count * (base + 1.2 / (1 + index) + random.normal(0, 2.5 / count**0.5))
                for index, count in enumerate(counts)
            ]
            loss = sum(sums) / sum(counts)
            lr = 6e-3 * min(1.0, consumed / 500_000) * 0.5 * (1 + np.cos(np.pi * min(1.0, consumed / tokens)))
            step: dict[str, Any] = {
                "iteration": iteration,
                "consumed_samples": 32 * iteration,
                "consumed_tokens": consumed,
                "seqlen": seqlen,
                "global_batch_size": 32,
                "lr": float(lr),
                "loss": loss,
                "loss_ratio": ratio.update(loss),
                "position_matched_loss_ratio": matched.update(sums, counts),
                "loss_by_position": matched.losses(sums, counts),
                "grad_norm": float(0.5 + bump + abs(random.normal(0, 0.1))),
                "clipped": bump > 0.5,
                "skipped": False,
                "loss_scale": 1.0,
                "adam_variance_norm": float(900 * (1 + bump) * (1 + iteration / 50) ** -0.3),
                "adam_variance_max": float(0.05 * (1 + bump) * (1 + abs(random.normal(0, 0.05)))),
                "adam_momentum_norm": 80.0,
                "tokens_per_second": 32 * seqlen / (0.02 + 32 * seqlen / 30_000),
                "seconds": seconds,
                "elapsed_seconds": elapsed,
            }
            logger.log_step(step)
            if consumed >= next_validation:
                next_validation += tokens // 20
                elapsed += 3.0
                logger.log_validation(
                    {
                        "iteration": iteration,
                        "consumed_tokens": consumed,
                        "loss": base + 0.3,
                        "seconds": seconds,
                        "elapsed_seconds": elapsed,
                        "perplexity": float(np.exp(base + 0.3)),
                    }
                )
    return directory
