"""The sample index of an epoch, against the slow obvious way."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from random import Random

import numpy as np
import pytest
from corpora import obvious_starts
from hypothesis import given
from hypothesis import strategies as st

from megatron.data.sample_index import Locate, build_sample_index, count_samples, locate_samples, order_version
from megatron.errors import UserError

lengths_of_documents = st.lists(st.integers(0, 12), min_size=1, max_size=30)
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Locate:
    """`locate_samples` of sample_index.cpp, built here as the installation builds it."""
    directory = tmp_path_factory.mktemp("build")
    command = ["setup.py", "build_ext", "--build-lib", str(directory), "--build-temp", str(directory / "temp")]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False)
    found = list(directory.glob("megatron/data/_sample_index*.so"))
    if not found:
        pytest.skip(f"the optional helper was not built (no compiler, pybind11 or setuptools): {done.stderr[-300:]}")
    spec = importlib.util.spec_from_file_location("_sample_index", found[0])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.locate_samples


@pytest.fixture(params=["numpy", "compiled"], scope="session")
def locate(request: pytest.FixtureRequest) -> Locate:
    return locate_samples if request.param == "numpy" else request.getfixturevalue("compiled")


@given(lengths_of_documents, st.integers(1, 20), st.randoms(use_true_random=False))
def test_starts_equal_a_walk_over_the_stream(
    locate: Locate, lengths: list[int], seq_length: int, random: Random
) -> None:
    samples = count_samples(sum(lengths), seq_length)
    order = random.sample(range(len(lengths)), len(lengths))
    if samples == 0:
        return
    found = locate(np.array(lengths), np.array(order), seq_length, samples)
    assert found.dtype == np.int64 and found.flags.c_contiguous
    assert list(map(tuple, found.tolist())) == obvious_starts(lengths, order, seq_length)


def test_compiled_helper_refuses_what_would_make_it_read_or_write_elsewhere(compiled: Locate) -> None:
    lengths = np.array([5, 5])
    for documents, samples, message in [([0, 2], 4, "out of range"), ([-1, 0], 4, "out of range"), ([0], 4, "so many")]:
        with pytest.raises(ValueError, match=message):
            compiled(lengths, np.array(documents), 2, samples)
    with pytest.raises(TypeError):
        compiled(lengths.astype(np.int32), np.array([0, 1]), 2, 4)


def test_compiled_helper_equals_numpy_on_many_documents(compiled: Locate) -> None:
    lengths = np.random.default_rng(0).lognormal(3, 2, 20_000).astype(np.int64)
    for seq_length in (1, 64, 4096):
        one, other = (build_sample_index(lengths, seq_length, 1, 0, way) for way in (locate_samples, compiled))
        assert (one.starts == other.starts).all() and (one.shuffle == other.shuffle).all()


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
        assert array.dtype == np.int64


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


def test_more_than_two_to_the_31_tokens(locate: Locate) -> None:
    lengths = np.array([3_000_000_000, 0, 5_000_000_000, 7])
    index = build_sample_index(lengths, 1_000_000, 1, 0, locate)
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
