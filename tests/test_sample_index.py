"""The sample index of an epoch, against the slow obvious way."""

from __future__ import annotations

import itertools
from pathlib import Path
from random import Random
from unittest import mock

import numpy as np
import pytest
from corpora import obvious_starts
from hypothesis import given
from hypothesis import strategies as st

from megatron.data import sample_index
from megatron.data.index_cache import IndexKey, load_or_build
from megatron.data.sample_index import (
    SampleIndex,
    build_sample_index,
    count_samples,
    index_dtype,
    order_version,
    shuffled,
)
from megatron.errors import UserError

lengths_of_documents = st.lists(st.integers(0, 12), min_size=1, max_size=30)


@given(lengths_of_documents, st.integers(1, 20), st.integers(1, 12), st.randoms(use_true_random=False))
def test_starts_equal_a_walk_over_the_stream(lengths: list[int], seq_length: int, chunk: int, random: Random) -> None:
    samples = count_samples(sum(lengths), seq_length)
    order = random.sample(range(len(lengths)), len(lengths))
    if samples == 0:
        return
    with mock.patch.object(sample_index, "CHUNK", chunk):
        found = sample_index.locate_samples(np.array(lengths), np.array(order), seq_length, samples)
    assert list(map(tuple, found.tolist())) == obvious_starts(lengths, order, seq_length)


@given(lengths_of_documents, st.integers(1, 20), st.integers(0, 5), st.integers(0, 5))
def test_index_of_an_epoch(lengths: list[int], seq_length: int, seed: int, epoch: int) -> None:
    if sum(lengths) <= seq_length:
        with pytest.raises(UserError):
            build_sample_index(np.array(lengths), seq_length, seed, epoch)
        return
    index = build_sample_index(np.array(lengths), seq_length, seed, epoch)
    samples = (sum(lengths) - 1) // seq_length
    assert sorted(index.documents) == list(range(len(lengths)))
    assert sorted(index.shuffle) == list(range(samples))
    assert list(map(tuple, index.starts.tolist())) == obvious_starts(lengths, index.documents.tolist(), seq_length)
    for array in (index.documents, index.starts, index.shuffle):
        assert array.dtype == np.int32


@pytest.mark.parametrize("lengths", [[5, 6, 0, 7], [5, 2**31 - 1], [5, 2**31]])
def test_numbers_take_four_bytes_where_they_fit(lengths: list[int]) -> None:
    index = build_sample_index(np.array(lengths), 2**20 if lengths[-1] > 9 else 4, 1, 0)
    assert index.starts.dtype == index.documents.dtype == (np.int64 if lengths[-1] == 2**31 else np.int32)
    for large in itertools.permutations((2**31, 5, 7)):
        assert index_dtype(*large) is np.int64
    assert index_dtype(2**31 - 1, 2**31 - 1, 2**31 - 1) is np.int32


@given(st.integers(0, 2000), st.integers(0, 9))
def test_the_order_does_not_depend_on_the_type(count: int, seed: int) -> None:
    orders = [shuffled(count, dtype, np.random.default_rng(seed)).tolist() for dtype in (np.int32, np.int64)]
    assert orders[0] == orders[1] == np.random.default_rng(seed).permutation(count).tolist()


@pytest.mark.parametrize("tokens", [0, 1, 8])
def test_data_shorter_than_a_sample_is_refused_with_the_counts(tokens: int) -> None:
    with pytest.raises(UserError, match=rf"found {tokens} tokens, one sample needs 9 .*--seq-length"):
        build_sample_index(np.array([tokens, 0]), 8, 1, 0)


def test_smallest_data() -> None:
    index = build_sample_index(np.array([0, 9, 0]), 8, 1, 0)
    position = index.documents.tolist().index(1)
    assert index.starts.tolist() == [[position, 0], [position, 8]]
    assert index.shuffle.tolist() == [0]
    assert [count_samples(n, 8) for n in (0, 1, 8, 9, 16, 17)] == [0, 0, 0, 1, 1, 2]


def test_no_documents() -> None:
    with pytest.raises(UserError, match="found 0 tokens"):
        build_sample_index(np.array([], dtype=np.int64), 8, 1, 0)


def test_more_than_two_to_the_31_tokens() -> None:
    lengths = np.array([3_000_000_000, 0, 5_000_000_000, 7])
    index = build_sample_index(lengths, 1_000_000, 1, 0)
    assert len(index.shuffle) == 8000
    stream = np.cumsum(lengths[index.documents]) - lengths[index.documents]
    places = stream[index.starts[:, 0]] + index.starts[:, 1]
    assert (places == np.arange(8001) * 1_000_000).all()
    assert index.starts[:, 1].max() > 2**31


def test_lengths_are_not_changed() -> None:
    lengths = np.array([5, 6, 7])
    build_sample_index(lengths, 2, 1, 0)
    assert lengths.tolist() == [5, 6, 7]


def test_seed_and_epoch_decide_and_every_epoch_differs() -> None:
    lengths = np.full(100, 10)
    orders = {
        (seed, epoch): build_sample_index(lengths, 10, seed, epoch).documents.tobytes()
        for seed in range(3)
        for epoch in range(3)
    }
    assert len(set(orders.values())) == len(orders)
    assert build_sample_index(lengths, 10, 2, 1).documents.tobytes() == orders[2, 1]
    other_length = build_sample_index(lengths, 20, 2, 1).documents.tobytes()
    assert other_length == orders[2, 1], "the order of the documents does not depend on the length"


def test_golden_values() -> None:
    """The order of the data is a promise: a run resumed with a later version must see the same samples."""
    index = build_sample_index(np.array([3, 0, 4, 1, 5, 9, 2, 6]), 4, 1234, 0)
    assert index.documents.tolist() == [5, 6, 7, 0, 4, 1, 3, 2]
    assert index.starts.tolist() == [[0, 0], [0, 4], [0, 8], [2, 1], [2, 5], [4, 0], [4, 4], [7, 2]]
    assert index.shuffle.tolist() == [2, 4, 0, 3, 5, 1, 6]
    assert build_sample_index(np.array([3, 0, 4, 1, 5, 9, 2, 6]), 4, 1234, 1).shuffle.tolist() == [2, 5, 3, 6, 0, 4, 1]
    assert order_version()[:16] == "53a300350ed625a6"


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_the_cache_keeps_either_type(dtype: type, tmp_path: Path) -> None:
    built = SampleIndex(np.arange(2, dtype=dtype), np.array([[0, 0], [0, 4], [1, 3]], dtype), np.arange(2, dtype=dtype))
    key = IndexKey("corpus", range(2), seq_length=4, seed=1, epoch=0)
    load_or_build(tmp_path, key, 9, lambda: built, "train")
    read = load_or_build(tmp_path, key, 9, lambda: pytest.fail("built twice"), "train")
    for name, array in vars(built).items():
        assert getattr(read, name).dtype == dtype
        assert (getattr(read, name) == array).all()
