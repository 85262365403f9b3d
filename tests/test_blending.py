"""Blending: an order that follows from the sample's number, whatever window it is looked at through."""

from __future__ import annotations

import heapq

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.data.blending import BlendedDataset, parse_data_path
from megatron.data.gpt2_dataset import Piece
from megatron.errors import UserError

SEQ_LENGTH = 4


class Numbered:
    """Sample k of corpus c is [c, k, 0, 0, 0]."""

    seq_length = SEQ_LENGTH

    def __init__(self, corpus: int, num_samples_per_epoch: int = 10**9) -> None:
        self.corpus = corpus
        self.num_samples_per_epoch = num_samples_per_epoch

    def samples(self, indices: np.ndarray) -> np.ndarray:
        out = np.zeros((len(indices), SEQ_LENGTH + 1), dtype=np.int64)
        out[:, 0] = self.corpus
        out[:, 1] = indices
        return out

    def documents_of(self, index: int) -> list[Piece]:
        return [Piece(str(self.corpus), index, 0, SEQ_LENGTH + 1)]


def blend(weights: list[float], sizes: list[int] | None = None) -> BlendedDataset:
    sizes = sizes or [10**9] * len(weights)
    return BlendedDataset([Numbered(corpus, size) for corpus, size in enumerate(sizes)], weights)


def obvious_order(weights: np.ndarray, count: int) -> list[tuple[int, int]]:
    """(corpus, its sample) of the first `count` samples: take the earliest event, time and again."""
    heap = [(0.5 / weight, corpus, 0) for corpus, weight in enumerate(weights)]
    heapq.heapify(heap)
    order = []
    for _ in range(count):
        _, corpus, number = heapq.heappop(heap)
        order.append((corpus, number))
        heapq.heappush(heap, ((number + 1.5) / weights[corpus], corpus, number + 1))
    return order


weights_of_corpora = st.lists(st.floats(1e-4, 1e4) | st.integers(1, 9).map(float), min_size=1, max_size=8)


@given(weights_of_corpora, st.integers(0, 250), st.integers(0, 50))
def test_any_window_equals_the_obvious_order(weights: list[float], begin: int, length: int) -> None:
    data = blend(weights)
    corpora, numbers = data.locate(begin, begin + length)
    assert (
        list(zip(corpora.tolist(), numbers.tolist(), strict=True))
        == obvious_order(data.weights, 300)[begin : begin + length]
    )


@given(weights_of_corpora, st.lists(st.integers(0, 20_000) | st.integers(10**12, 10**12 + 50), max_size=20))
def test_arbitrary_numbers(weights: list[float], indices: list[int]) -> None:
    data = blend(weights)
    found = data.samples(np.array(indices, dtype=np.int64))
    assert found.shape == (len(indices), SEQ_LENGTH + 1)
    for index, sample in zip(indices, found.tolist(), strict=True):
        corpora, numbers = data.locate(index, index + 1)
        assert sample[:2] == [corpora[0], numbers[0]]
        assert data.documents_of(index) == [Piece(str(corpora[0]), int(numbers[0]), 0, SEQ_LENGTH + 1)]


@given(weights_of_corpora, st.integers(0, 10**13))
def test_windows_far_out_fit_together(weights: list[float], begin: int) -> None:
    """Every corpus' samples come one after the other, also where the numbers are large."""
    data = blend(weights)
    corpora, numbers = data.locate(begin, begin + 60)
    for corpus in range(len(weights)):
        assert (np.diff(numbers[corpora == corpus]) == 1).all()
    halves = [data.locate(begin, begin + 30), data.locate(begin + 30, begin + 60)]
    assert np.concatenate([half[0] for half in halves]).tolist() == corpora.tolist()
    assert np.concatenate([half[1] for half in halves]).tolist() == numbers.tolist()


@given(weights_of_corpora, st.integers(0, 2000))
def test_shares_of_any_prefix(weights: list[float], count: int) -> None:
    """Corpus d has given w_d * count samples, within 1/2 and its part of what all are off together."""
    data = blend(weights)
    given_so_far = np.bincount(data.locate(0, count)[0], minlength=len(weights))
    bound = 0.5 + data.weights * (len(weights) / 2 + 1) + 1e-6
    assert (np.abs(given_so_far - data.weights * count) <= bound).all()


def test_weights_need_not_be_normalised() -> None:
    assert blend([3, 1]).samples(np.arange(40)).tolist() == blend([0.75, 0.25]).samples(np.arange(40)).tolist()


@given(weights_of_corpora, st.data())
def test_epoch_ends_before_a_corpus_repeats_a_sample(weights: list[float], data: st.DataObject) -> None:
    sizes = [data.draw(st.integers(1, 20)) for _ in weights]
    blended = blend(weights, sizes)
    for corpus, number in obvious_order(blended.weights, min(300, blended.num_samples_per_epoch)):
        assert number < sizes[corpus]
    if blended.num_samples_per_epoch < 300:
        corpus, number = obvious_order(blended.weights, blended.num_samples_per_epoch + 1)[-1]
        assert number == sizes[corpus]


class TestDataPath:
    def test_one_prefix_and_blends(self) -> None:
        assert parse_data_path(("wiki",)) == [(1.0, "wiki")]
        assert parse_data_path(("0.3", "wiki", "0.7", "web")) == [(0.3, "wiki"), (0.7, "web")]

    @pytest.mark.parametrize(
        "path",
        [
            (),
            ("wiki", "web"),
            ("0.3", "wiki", "web"),
            ("0", "wiki", "1", "web"),
            ("-1", "wiki", "1", "web"),
            ("nan", "wiki", "1", "web"),
            ("inf", "wiki", "1", "web"),
            ("1e308", "wiki", "1e308", "web"),
            ("1", "wiki", "1", "wiki"),
        ],
    )
    def test_bad_paths_are_refused_by_name(self, path: tuple[str, ...]) -> None:
        with pytest.raises(UserError, match="--data-path"):
            parse_data_path(path)
