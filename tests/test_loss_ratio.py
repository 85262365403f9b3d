"""The loss ratios against their definitions over the whole history."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.instability.loss_ratio import (
    LossRatio,
    PositionMatchedLossRatio,
    bucket_name,
    position_buckets,
)

LOSSES = st.lists(st.floats(0.01, 20.0) | st.sampled_from([math.nan, math.inf]), max_size=30)


def reference_ratio(losses: list[float]) -> list[float | None]:
    """loss_t / min(loss_1 .. loss_{t-1}), written as it is defined."""
    ratios: list[float | None] = []
    for t, loss in enumerate(losses):
        earlier = [x for x in losses[:t] if math.isfinite(x)]
        if not math.isfinite(loss):
            ratios.append(loss)
        else:
            ratios.append(loss / min(earlier) if earlier else None)
    return ratios


def same(a: float | None, b: float | None) -> bool:
    return a == b or (a is not None and b is not None and math.isnan(a) and math.isnan(b))


@given(LOSSES)
def test_loss_ratio_is_its_definition(losses: list[float]) -> None:
    tracker = LossRatio()
    found = [tracker.update(loss) for loss in losses]
    expected = reference_ratio(losses)
    assert all(map(same, found, expected))


@given(LOSSES, st.integers(0, 30))
def test_state_survives_json_exactly(losses: list[float], cut: int) -> None:
    straight, first = LossRatio(), LossRatio()
    expected = [straight.update(loss) for loss in losses]
    found = [first.update(loss) for loss in losses[:cut]]
    second = LossRatio()
    second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
    found += [second.update(loss) for loss in losses[cut:]]
    assert all(map(same, found, expected))
    assert second.state_dict() == straight.state_dict()


def test_loss_of_zero() -> None:
    tracker = LossRatio()
    assert [tracker.update(x) for x in (1.0, 0.0, 0.0, 0.5)] == [None, 0.0, 1.0, math.inf]


@pytest.mark.parametrize("seq_length", [1, 7, 8, 9, 16, 17, 256, 1000, 1024, 2048])
def test_buckets_cover_every_position_once(seq_length: int) -> None:
    buckets = position_buckets(seq_length)
    assert [p for start, end in buckets for p in range(start, end)] == list(range(seq_length))


def test_bucket_names() -> None:
    assert [bucket_name(b) for b in position_buckets(1000)] == [
        *("0-7", "8-15", "16-31", "32-63", "64-127", "128-255", "256-511", "512-999"),
    ]


STEPS = st.lists(
    st.tuples(st.sampled_from([4, 8, 16, 24, 32, 40, 64, 100]), st.integers(1, 64), st.integers(0, 10**6)),
    max_size=20,
)


def sums_and_tokens(seqlen: int, rows: int, noise: int, seq_length: int = 100) -> tuple[list[float], list[float]]:
    """Bucket sums of a made-up step; buckets beyond seqlen are left out."""
    tokens = [float(rows * (min(end, seqlen) - start)) for start, end in position_buckets(seq_length) if start < seqlen]
    return [count * (1 + (noise * (i + 3) % 997) / 100) for i, count in enumerate(tokens)], tokens


@given(STEPS, st.sampled_from([1, 64, 256]))
def test_position_matched_ratio_is_its_definition(steps: list[tuple[int, int, int]], min_tokens: int) -> None:
    tracker = PositionMatchedLossRatio(100, min_tokens=min_tokens)
    buckets = position_buckets(100)
    history: list[dict[int, float]] = []
    for step in steps:
        sums, tokens = sums_and_tokens(*step)
        rows = tokens[0] / 8
        observed = {
            b: sums[b] / tokens[b]
            for b in range(len(tokens))
            if tokens[b] >= min_tokens and 2 * tokens[b] >= rows * (buckets[b][1] - buckets[b][0])
        }
        matched = [b for b in observed if any(b in past for past in history)]
        found = tracker.update(sums, tokens)
        if matched:
            best = sum(tokens[b] * min(past[b] for past in history if b in past) for b in matched)
            assert found == pytest.approx(sum(sums[b] for b in matched) / best, rel=1e-12)
        else:
            assert found is None
        history.append(observed)


@given(STEPS, st.integers(0, 20))
def test_position_matched_state_survives_json_exactly(steps: list[tuple[int, int, int]], cut: int) -> None:
    straight, first, second = (PositionMatchedLossRatio(100) for _ in range(3))
    expected = [straight.update(*sums_and_tokens(*step)) for step in steps]
    found = [first.update(*sums_and_tokens(*step)) for step in steps[:cut]]
    second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
    found += [second.update(*sums_and_tokens(*step)) for step in steps[cut:]]
    assert found == expected
    assert second.state_dict() == straight.state_dict()


def test_one_bucket_is_the_papers_ratio() -> None:
    paper, matched = LossRatio(), PositionMatchedLossRatio(8, min_tokens=1)
    for loss in (4.0, 3.5, 3.75, 5.0, 3.0):
        assert matched.update([loss * 512], [512]) == paper.update(loss)


def test_spike_that_the_papers_ratio_hides() -> None:
    """Length 8 at its best: 6.0. At length 64 the context lowers the loss to 4; a spike then adds 2 nats everywhere."""
    paper, matched = LossRatio(), PositionMatchedLossRatio(64)
    rows, by_bucket = 512, [6.0, 4.0, 4.0, 3.8]
    tokens = [float(rows * (end - start)) for start, end in position_buckets(64)]
    short = ([6.0 * tokens[0]], tokens[:1])
    full = ([loss * n for loss, n in zip(by_bucket, tokens, strict=True)], tokens)
    spike = ([(loss + 2) * n for loss, n in zip(by_bucket, tokens, strict=True)], tokens)
    ratios = []
    for sums, counts in (short, full, spike):
        ratios.append((paper.update(sum(sums) / sum(counts)), matched.update(sums, counts)))
    assert ratios[1][0] is not None and ratios[1][0] < 0.75  # a drop that is context, not learning
    assert ratios[1][1] == pytest.approx(1.0)  # the same positions are as they were
    assert ratios[2][1] == pytest.approx(1 + 2 / (sum(full[0]) / sum(tokens)))
    # Straight from short to spike, the paper's ratio sees nothing wrong at all; the matched one does.
    paper, matched = LossRatio(), PositionMatchedLossRatio(64)
    paper.update(6.0), matched.update(*short)
    assert paper.update(sum(spike[0]) / sum(tokens)) == pytest.approx(1.0, abs=0.03)
    assert matched.update(*spike) == pytest.approx(8 / 6)


def test_small_and_partial_buckets_do_not_enter() -> None:
    tracker = PositionMatchedLossRatio(64)
    assert tracker.update([10.0], [255]) is None and tracker.minima[0] is None
    tracker.update([8 * 512 * 4.0, 8 * 512 * 4.0, 4 * 512 * 0.1], [8 * 512, 8 * 512, 4 * 512])
    assert tracker.minima == [4.0, 4.0, None, None]  # 4 of the 16 positions 16-31 are no observation


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_bucket(bad: float) -> None:
    tracker = PositionMatchedLossRatio(16)
    tracker.update([2048.0, 1024.0], [512, 512])
    assert not math.isfinite(tracker.update([2048.0, bad], [512, 512]) or 0.0)
    assert tracker.minima == [4.0, 2.0]
    assert tracker.update([2048.0, 1024.0], [512, 512]) == 1.0


def test_losses_by_position() -> None:
    tracker = PositionMatchedLossRatio(1024)
    assert tracker.losses([8.0, 0.0, 6.0], [2, 0, 3]) == {"0-7": 4.0, "16-31": 2.0}
