"""Correlation, smoothed ratio and spread against their definitions and printed tables."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.instability.statistics import FloatArray, incomplete_beta, pearson, smoothed_loss_ratio, spread


def two_sided_p(t: float, df: int) -> float:
    """P(|T| > t) as the finite sum over angles of Abramowitz and Stegun 26.7.3 (odd df) and 26.7.4 (even df)."""
    angle = math.atan(t / math.sqrt(df))
    cosine, sine = math.cos(angle), math.sin(angle)
    term, total = (cosine, 0.0) if df % 2 else (1.0, 0.0)
    for k in range(1 + df % 2, df, 2):
        total += term
        term *= cosine**2 * k / (k + 1)
    inside = 2 / math.pi * (angle + sine * total) if df % 2 else sine * total
    return 1 - inside


def correlated(r: float, n: int) -> tuple[FloatArray, FloatArray]:
    """Two series whose correlation is `r` by construction."""
    basis, _ = np.linalg.qr(np.column_stack([np.ones(n), np.random.default_rng(n).normal(size=(n, 2))]))
    return 3 + 2 * basis[:, 1], 7 - 5 * (-r * basis[:, 1] - math.sqrt(1 - r * r) * basis[:, 2])


@pytest.mark.parametrize(("df", "t"), [(1, 12.706), (2, 4.303), (5, 2.571), (10, 2.228), (30, 2.042), (120, 1.980)])
def test_incomplete_beta_has_the_printed_critical_values_of_t(df: int, t: float) -> None:
    assert incomplete_beta(df / 2, 0.5, df / (df + t * t)) == pytest.approx(0.05, abs=5e-5)


@given(st.integers(1, 30), st.integers(1, 30), st.floats(0, 1))
def test_incomplete_beta_is_the_binomial_tail(a: int, b: int, x: float) -> None:
    """I_x(a, b) of whole numbers: the chance of at least a successes in a + b - 1 trials (DLMF 8.17.5)."""
    n = a + b - 1
    tail = math.fsum(math.comb(n, k) * x**k * (1 - x) ** (n - k) for k in range(a, n + 1))
    assert incomplete_beta(a, b, x) == pytest.approx(tail, rel=1e-9, abs=1e-13)


@pytest.mark.parametrize("n", [3, 4, 10, 101, 5_000])
@pytest.mark.parametrize("r", [-0.95, -0.2, 0.05, 0.26, 0.6])
def test_planted_correlations(r: float, n: int) -> None:
    found = pearson(*correlated(r, n))
    assert found is not None and found.n == n
    assert found.r == pytest.approx(r, abs=1e-9)
    expected = two_sided_p(abs(r) * math.sqrt((n - 2) / (1 - r * r)), n - 2)
    assert found.p == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_pearson_of_a_long_run_and_at_the_ends() -> None:
    random = np.random.default_rng(3)
    x, y = random.normal(size=300_000), random.normal(size=300_000)
    found, none = pearson(x, 0.23 * x + y), pearson(x, y)
    assert found is not None and found.p < 1e-300
    # With so many steps t is as good as normal.
    assert none is not None and none.p == pytest.approx(math.erfc(abs(none.r) * math.sqrt(150_000)), rel=1e-4)
    exact = pearson(x[:9], 1 - 2 * x[:9])
    assert exact is not None and exact.r == pytest.approx(-1.0) and exact.p < 1e-20


def test_pearson_leaves_out_what_is_not_there() -> None:
    x, y = correlated(0.4, 60)
    holes = x.copy()
    holes[::7] = np.nan
    y[3] = np.inf
    known = np.isfinite(holes) & np.isfinite(y)
    found = pearson(holes, y)
    assert found is not None and found.n == known.sum()
    assert found.r == pytest.approx(np.corrcoef(x[known], y[known])[0, 1], abs=1e-12)
    assert pearson(x, np.ones(60)) is None and pearson(x[:2], y[:2]) is None


def smoothed_by_definition(losses: list[float], tokens: list[int], window: int) -> list[float]:
    """Window by window, as docs/metrics.md has it."""
    averages: list[float] = []
    ratios = []
    for t, loss in enumerate(losses):
        ratio, held, total = math.nan, 0, 0.0
        if math.isfinite(loss):
            for s in range(t, -1, -1):
                if math.isfinite(losses[s]) and held < window:
                    held, total = held + tokens[s], total + tokens[s] * losses[s]
            if held >= window:
                ratio = total / held / min(averages) if averages else math.nan
                averages.append(total / held)
        else:
            ratio = math.inf
        ratios.append(ratio)
    return ratios


@given(
    st.lists(st.tuples(st.floats(0.1, 20) | st.sampled_from([math.nan, math.inf]), st.integers(1, 50)), max_size=30),
    st.integers(1, 120),
)
def test_smoothed_ratio_is_its_definition(steps: list[tuple[float, int]], window: int) -> None:
    losses, tokens = [loss for loss, _ in steps], [count for _, count in steps]
    found = smoothed_loss_ratio(np.array(losses), np.array(tokens, dtype=np.float64), window_tokens=window)
    np.testing.assert_allclose(found, smoothed_by_definition(losses, tokens, window), rtol=1e-9)


def test_smoothing_takes_away_noise_and_leaves_a_spike_that_lasts() -> None:
    random = np.random.default_rng(0)
    tokens = np.full(2_000, 256.0)
    noise = 4 + random.normal(0, 2.5 / 16, 2_000)
    assert (noise[1:] / np.minimum.accumulate(noise)[:-1] > 1.2).any()
    assert not (smoothed_loss_ratio(noise, tokens) > 1.02).any()
    noise[1_000:1_512] *= 1.5  # twice a window
    spiked = np.flatnonzero(smoothed_loss_ratio(noise, tokens) > 1.2)
    assert 1_000 < spiked[0] < 1_256 and len(spiked) > 256
    assert np.isnan(smoothed_loss_ratio(noise, np.full(2_000, np.nan))).all()
    assert len(smoothed_loss_ratio(np.empty(0), np.empty(0))) == 0


def test_spread_of_seeds() -> None:
    values = [20.1, 19.8, 20.6]
    found = spread([None, *values, None])
    assert found is not None and (found.n, found.min, found.max) == (3, 19.8, 20.6)
    assert found.mean == pytest.approx(statistics.mean(values)) and found.std == pytest.approx(statistics.stdev(values))
    one = spread([2])
    assert one is not None and (one.n, one.mean, one.std) == (1, 2.0, None)
    diverged = spread([1.5, math.inf])
    assert diverged is not None and (diverged.mean, diverged.std, diverged.max) == (math.inf, None, math.inf)
    assert spread([None]) is None and spread([]) is None
