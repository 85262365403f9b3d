"""Pearson's r with its p-value, the smoothed loss ratio, and the spread of a number over seeds."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]

SMOOTHING_TOKENS = 65_536
"""Tokens that a window of the smoothed loss ratio holds at least: a mean over n tokens is off by about 2.5 / sqrt(n)
nats (per-token losses spread by 2 to 3), here 0.01."""
_CONVERGED = 1e-15
_MAX_TERMS = 100_000


@dataclass(frozen=True)
class Correlation:
    """Pearson's r of two series."""

    r: float
    """In [-1, 1]."""
    p: float
    """Chance of an |r| at least as large from n independent normal pairs without correlation (two-sided)."""
    n: int
    """Pairs."""


@dataclass(frozen=True)
class Spread:
    """A number over several runs."""

    n: int
    """Runs that have it."""
    mean: float
    std: float | None
    """Sample standard deviation (n - 1 below); None for one run, or where a value is infinite or NaN."""
    min: float
    max: float


def pearson(first: FloatArray, second: FloatArray) -> Correlation | None:
    """Pearson's r over the steps where both are finite; None with fewer than 3, or where one does not vary.

    The p-value is exact: t = r * sqrt((n - 2) / (1 - r^2)) has Student's distribution with n - 2 degrees of freedom.
    """
    known = np.isfinite(first) & np.isfinite(second)
    count = int(known.sum())
    if count < 3:
        return None
    x, y = first[known] - first[known].mean(), second[known] - second[known].mean()
    spread = math.sqrt(float(x @ x)) * math.sqrt(float(y @ y))
    if not (0 < spread < math.inf):
        return None
    r = float(np.clip(x @ y / spread, -1.0, 1.0))
    # P(|T| > t) = I_{df / (df + t^2)}(df / 2, 1 / 2), and that x is 1 - r^2.
    return Correlation(r, incomplete_beta((count - 2) / 2, 0.5, (1 - r) * (1 + r)), count)


def incomplete_beta(a: float, b: float, x: float) -> float:
    """The regularised incomplete beta function I_x(a, b) for a, b > 0 and x in [0, 1].

    By the continued fraction DLMF 8.17.22, evaluated from the front by Lentz's method; where it converges slowly, by
    I_x(a, b) = 1 - I_{1-x}(b, a).
    """
    if x <= 0:
        return 0.0
    if x >= 1:
        return 1.0
    if x > (a + 1) / (a + b + 2):
        return 1.0 - incomplete_beta(b, a, 1 - x)
    log_front = a * math.log(x) + b * math.log1p(-x) + math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    upper, lower, value = 1.0, 0.0, 1.0
    for index in range(1, _MAX_TERMS):
        m = index // 2
        if index % 2:
            term = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        else:
            term = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        lower = 1 / _away_from_zero(1 + term * lower)
        upper = _away_from_zero(1 + term / upper)
        value *= upper * lower
        if abs(upper * lower - 1) < _CONVERGED:
            break
    return math.exp(log_front) / (a * value)


def _away_from_zero(value: float) -> float:
    return value if abs(value) > 1e-300 else 1e-300


def smoothed_loss_ratio(loss: FloatArray, tokens: FloatArray, *, window_tokens: float = SMOOTHING_TOKENS) -> FloatArray:
    """The loss ratio of a moving average: A_t / min(A_1 .. A_{t-1}) for every step t.

    A_t is the mean loss over the tokens of the fewest steps up to t that hold at least `window_tokens`. A step whose
    loss is not finite has an infinite ratio and is left out of every average. NaN (no ratio) until a first window is
    full and a step has passed since. Steps of `window_tokens` or more have their plain loss ratio.

    Args:
        loss: [steps], nats a token.
        tokens: [steps], tokens of each step; NaN where not known: then no ratio is.
        window_tokens: more than 0.
    """
    ratios = np.full(len(loss), np.nan)
    finite = np.isfinite(loss)
    index = np.flatnonzero(finite)
    counts = np.concatenate(([0.0], np.cumsum(tokens[index])))
    sums = np.concatenate(([0.0], np.cumsum(loss[index] * tokens[index])))
    if len(index) and np.isfinite(counts).all() and (np.diff(counts) > 0).all():
        start = np.searchsorted(counts, counts[1:] - window_tokens, side="right") - 1
        full = start >= 0
        average = (sums[1:] - sums[start])[full] / (counts[1:] - counts[start])[full]
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios[index[full][1:]] = average[1:] / np.minimum.accumulate(average)[:-1]
    ratios[~finite] = np.inf
    return ratios


def spread(values: Iterable[float | None]) -> Spread | None:
    """The spread of the values that are there; None where none is."""
    known = [float(value) for value in values if value is not None]
    if not known:
        return None
    array = np.array(known)
    varies = len(known) > 1 and bool(np.isfinite(array).all())
    return Spread(
        n=len(known),
        mean=float(array.mean()),
        std=float(array.std(ddof=1)) if varies else None,
        min=float(array.min()),
        max=float(array.max()),
    )
