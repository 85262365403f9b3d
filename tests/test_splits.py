"""Splits by document, as Megatron makes them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.data.splits import split_documents
from megatron.errors import UserError


def ends(split: str, documents: int) -> list[int]:
    return [part.stop for part in split_documents(split, documents)]


@pytest.mark.parametrize(
    ("split", "documents", "expected"),
    [
        ("949,50,1", 1000, [949, 999, 1000]),
        ("949,50,1", 10, [10, 10, 10]),  # 9.49, 0.5 and 0.01: halves go to the even number
        ("949,50,1", 30, [28, 30, 30]),
        ("949/50/1", 1000, [949, 999, 1000]),
        ("100,0,0", 7, [7, 7, 7]),
        ("1", 7, [7, 7, 7]),
        ("8,2", 10, [8, 10, 10]),
        ("0.98,0.02,0", 100, [98, 100, 100]),
        ("1,1,1", 4, [2, 3, 4]),
        ("1,1,0", 3, [1, 3, 3]),  # 2 and 2: the first gives up one
        ("0,1,1", 3, [0, 1, 3]),  # Megatron's own arithmetic would start at -1
        ("949,50,1", 0, [0, 0, 0]),
    ],
)
def test_known_splits(split: str, documents: int, expected: list[int]) -> None:
    assert ends(split, documents) == expected


def megatron_split(split: str, size: int) -> list[int]:
    """`get_train_valid_test_split_` of Megatron-LM v1.1.5, for three shares."""
    shares = [float(part) for part in split.split(",")]
    total = sum(shares)
    index = [0]
    for share in shares:
        index.append(index[-1] + round(share / total * float(size)))
    excess = index[-1] - size
    return [end - excess for end in index[1:]]


share = st.floats(0, 1000).map(lambda value: round(value, 2))


@given(st.tuples(share, share, share).filter(lambda shares: sum(shares) > 0), st.integers(0, 10**6))
def test_equals_megatron_and_covers_every_document_once(shares: tuple[float, ...], documents: int) -> None:
    split = ",".join(map(str, shares))
    expected = megatron_split(split, documents)
    train, validation, test = split_documents(split, documents)
    assert [train.stop, validation.stop, test.stop] == [max(0, end) for end in expected]
    assert [*train, *validation, *test] == list(range(documents)) if documents < 1000 else True
    assert (train.start, train.stop, validation.stop, test.stop) == (0, validation.start, test.start, documents)


@pytest.mark.parametrize(
    "split", ["", "a,b", "1,2,3,4", "0,0,0", "-1,2", "nan", "inf,1", "1,,1", "949;50;1", "1e308,1e308"]
)
def test_bad_split_is_refused_by_name(split: str) -> None:
    with pytest.raises(UserError, match="--split"):
        split_documents(split, 10)
