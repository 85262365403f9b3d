"""The loss ratio, the paper's measure of instability, and one that compares equal positions.

Pure Python: the training loop updates both every step and keeps their state in its checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

SPIKE = 1.2
"""A step above this ratio counts as a spike (the paper's Table 1)."""
LARGE_SPIKE = 1.5
"""The threshold of the paper's appendix table."""
MIN_BUCKET_TOKENS = 256
"""Fewest tokens of a bucket that make an observation; see PositionMatchedLossRatio."""


def position_buckets(seq_length: int) -> list[tuple[int, int]]:
    """Half-open ranges of positions [0, 8), [8, 16), [16, 32), ... that cover `seq_length` positions.

    Each doubles the context, so that the loss varies little within one. The last ends at `seq_length`.
    """
    buckets = []
    start, end = 0, 8
    while start < seq_length:
        buckets.append((start, min(end, seq_length)))
        start, end = end, 2 * end
    return buckets


def bucket_name(bucket: tuple[int, int]) -> str:
    """The name of a bucket in logs: first and last position, such as 8-15."""
    return f"{bucket[0]}-{bucket[1] - 1}"


class LossRatio:
    """The paper's loss ratio at step t: loss_t / min(loss_1 .. loss_{t-1}) (Li et al. 2022, Section 3)."""

    def __init__(self) -> None:
        self.minimum: float | None = None
        """Smallest finite loss so far."""

    def update(self, loss: float) -> float | None:
        """Take in one step's mean loss and return its ratio; None where no finite loss came before.

        A loss that is not finite is returned as it is (inf or nan) and never enters the minimum.
        """
        loss = float(loss)
        if not math.isfinite(loss):
            return loss
        best = self.minimum
        if best is None or loss < best:
            self.minimum = loss
        return None if best is None else _divide(loss, best)

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON values, floats exact."""
        return {"minimum": self.minimum}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self.minimum = state["minimum"]


class PositionMatchedLossRatio:
    """A loss ratio that compares a step with the best that was seen at the same positions.

    Under sequence length warmup the paper's ratio is confounded. A token at position 5 has 5 tokens of
    context, one at position 900 has 900, and its loss is lower for that alone. A step at length 8 has only
    the former: its mean loss is high, hence the running minimum stays high, and when the length has grown, a spike
    must first make up for the gain in context before the ratio shows it. So here the loss is kept by
    position bucket (`position_buckets`), each with its own running minimum, and with n_b tokens in bucket b:

        r_t = sum_b n_b * loss_b(t)  /  sum_b n_b * min_{s<t} loss_b(s)

    over the buckets observed at step t and at some step before it. At a constant length and with one bucket
    this is the paper's ratio.

    Weighting by n_b lets a bucket count for no more than its share of the step. The minimum needs more care, for it
    remembers the luckiest observation for ever: a mean over n tokens is off by about 2.5 / sqrt(n) nats
    (per-token losses spread by 2 to 3), and its minimum over a run by some three times that. A bucket
    therefore counts as observed at a step only if

    - it has at least `min_tokens` tokens (256: off by 0.16 nats, so that one lucky mean does not by
      itself read as a ratio of 1.2 at the usual losses of 3 to 5), and
    - at least half of its positions were trained on, judged by its tokens per position against those of the first
      bucket. At length 520 the bucket 512-1023 holds 8 positions a sequence: its minimum would be noise
      that is later weighted with 512 positions, and of positions that have less context than the others.

    The rest of the step still has its ratio. Minima of several buckets need not stem from the same step, so at constant
    length this ratio lies at or above the paper's by its noise (at most about twice as far above 1).
    """

    def __init__(self, seq_length: int, *, min_tokens: int = MIN_BUCKET_TOKENS) -> None:
        self.buckets = position_buckets(seq_length)
        self.names = [bucket_name(bucket) for bucket in self.buckets]
        self.minima: list[float | None] = [None] * len(self.buckets)
        """Smallest finite mean loss of each bucket so far."""
        self._min_tokens = min_tokens

    def update(self, loss_sums: Sequence[float], tokens: Sequence[float]) -> float | None:
        """Take in one step and return its ratio; None where no observed bucket was observed before.

        `loss_sums[b]` is the sum of the losses (nats) of bucket b over the step's global batch and `tokens[b]` the
        number of unmasked tokens in it; both may stop at the last bucket that the step's length reaches. A step
        with a loss that is not finite gives inf or nan, and that bucket's minimum stays as it was.
        """
        found = best = 0.0
        matched = False
        total = 0.0
        for index in self._observed(tokens):
            count, loss_sum = float(tokens[index]), float(loss_sums[index])
            total += loss_sum
            loss = loss_sum / count
            minimum = self.minima[index]
            if minimum is not None:
                matched = True
                found += loss_sum
                best += count * minimum
            if math.isfinite(loss) and (minimum is None or loss < minimum):
                self.minima[index] = loss
        if not math.isfinite(total):
            return total
        return _divide(found, best) if matched else None

    def losses(self, loss_sums: Sequence[float], tokens: Sequence[float]) -> dict[str, float]:
        """Mean loss of every bucket that holds a token, by name: what the log calls loss_by_position."""
        return {
            name: float(total) / float(count)
            for name, total, count in zip(self.names, loss_sums, tokens, strict=False)
            if count > 0
        }

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON values, floats exact; minima by bucket name."""
        return {"minima": dict(zip(self.names, self.minima, strict=True))}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`. A bucket that the saved run did not have starts without a minimum."""
        self.minima = [state["minima"].get(name) for name in self.names]

    def _observed(self, tokens: Sequence[float]) -> list[int]:
        if not tokens:
            return []
        rows = tokens[0] / (self.buckets[0][1] - self.buckets[0][0])
        return [
            index
            for index, ((start, end), count) in enumerate(zip(self.buckets, tokens, strict=False))
            if count >= self._min_tokens and count >= 0.5 * rows * (end - start)
        ]


def _divide(loss: float, best: float) -> float:
    """loss / best, where a best of 0 (a loss learnt to the last bit) is matched or missed without bound."""
    if best == 0:
        return 1.0 if loss == 0 else math.inf
    return loss / best
