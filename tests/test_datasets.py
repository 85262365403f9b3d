"""From flags to datasets: splits by corpus, blends, the vocabulary, what a resume compares."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron.config import DataConfig
from megatron.data.blending import BlendedDataset
from megatron.data.datasets import Datasets, build_datasets
from megatron.data.gpt2_dataset import GPT2Dataset
from megatron.data.indexed_writer import IndexedDatasetWriter
from megatron.errors import UserError

VOCABULARY = 10_000


def write(prefix: Path, documents: int, tokens: int, first: int = 0) -> str:
    """A corpus of documents of 1 .. `tokens` tokens, each token another; returns its prefix."""
    lengths = np.arange(documents) % tokens + 1
    ids = np.split(np.arange(first, first + lengths.sum()), np.cumsum(lengths)[:-1])
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        for document in ids:
            writer.add_document(document)
    return str(prefix)


def build(*data_path: str, seed: int = 1, vocab_size: int = VOCABULARY, **settings) -> Datasets:
    config = DataConfig(data_path=data_path, **({"split": "8,1,1"} | settings))
    return build_datasets(config, seq_length=8, seed=seed, vocab_size=vocab_size)


def all_tokens(dataset: GPT2Dataset | BlendedDataset | None) -> set[int]:
    assert dataset is not None
    return set(dataset.samples(np.arange(dataset.num_samples_per_epoch)).reshape(-1).tolist())


def test_splits_of_one_corpus_share_no_document(tmp_path: Path) -> None:
    data = build(write(tmp_path / "a", 60, 20))
    train, validation, test = map(all_tokens, (data.train, data.validation, data.test))
    assert not train & validation and not train & test and not validation & test
    assert sum(data.num_tokens) == 630 and data.notes == ()


def test_blend(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a", 60, 20), write(tmp_path / "b", 60, 20, first=1000)
    data = build("3", a, "1", b)
    tokens = data.train.samples(np.arange(40))
    assert isinstance(data.train, BlendedDataset) and isinstance(data.validation, BlendedDataset)
    assert ((tokens < 1000).all(axis=1).sum(), (tokens >= 1000).all(axis=1).sum()) == (30, 10)
    for number, sample in enumerate(tokens.tolist()):
        pieces = data.train.documents_of(number)
        assert {piece.prefix for piece in pieces} == {a if sample[0] < 1000 else b}
        assert sum(piece.length for piece in pieces) == 9


def test_corpus_too_small_for_a_split_is_left_out_and_said(tmp_path: Path) -> None:
    a, tiny = write(tmp_path / "a", 60, 20), write(tmp_path / "tiny", 8, 20, first=1000)
    data = build("1", a, "1", tiny)
    assert isinstance(data.train, BlendedDataset)
    assert isinstance(data.validation, GPT2Dataset)
    assert len(data.notes) == 2
    assert "tiny: " in data.notes[0] and "for validation: found" in data.notes[0]
    alone = build(tiny)
    assert alone.validation is None and alone.test is None


def test_a_corpus_of_one_document_has_another_cure_than_more_data(tmp_path: Path) -> None:
    one = str(tmp_path / "one")
    with IndexedDatasetWriter(one, np.uint16) as writer:
        writer.add_document(np.arange(20))
    notes = build(one).notes
    assert [f"nothing for {name}: documents are what is split, and there is only 1" in note
            for name, note in zip(("validation", "test"), notes, strict=True)] == [True, True]  # fmt: skip
    assert all("--text-unit paragraph" in note for note in notes)
    assert not any("--text-unit" in note for note in build(one, split="1").notes), "none was asked for"


@pytest.mark.parametrize("tokens", [0, 1, 8])
def test_too_little_to_train_on(tokens: int, tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "a", np.uint16) as writer:
        writer.add_document(np.arange(tokens))
    with pytest.raises(UserError, match=rf"a: 1 documents for train: found {tokens} tokens, one sample needs 9"):
        build(str(tmp_path / "a"), split="1")


def test_exactly_one_sample(tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "a", np.uint16) as writer:
        writer.add_document(np.arange(9))
    data = build(str(tmp_path / "a"), split="1")
    assert data.train.num_samples_per_epoch == 1
    assert data.train.samples(np.array([0, 1, 5])).tolist() == [list(range(9))] * 3


def test_token_beyond_the_vocabulary_is_refused(tmp_path: Path) -> None:
    prefix = write(tmp_path / "a", 60, 20)
    build(prefix, vocab_size=630)
    with pytest.raises(UserError, match=r"a\.bin: found token id 629, the vocabulary has 629 tokens"):
        build(prefix, vocab_size=629)


def test_missing_corpus(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.idx"):
        build(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="--data-path is missing"):
        build()


class TestFingerprint:
    @pytest.fixture()
    def corpora(self, tmp_path: Path) -> tuple[str, str]:
        return write(tmp_path / "a", 60, 20), write(tmp_path / "b", 60, 19)

    def test_same_data_elsewhere_in_other_words(self, corpora: tuple[str, str], tmp_path: Path) -> None:
        a, b = corpora
        (tmp_path / "moved").mkdir()
        moved = write(tmp_path / "moved" / "a2", 60, 20)
        one = build("0.25", a, "0.75", b, split="8,1,1").fingerprint
        assert build("1", moved, "3", b, split="80/10/10", seed=5).fingerprint == one

    def test_every_change_shows(self, corpora: tuple[str, str], tmp_path: Path) -> None:
        a, b = corpora
        other_tokens = write(tmp_path / "c", 60, 20, first=7)
        found = [
            build(a).fingerprint,
            build(b).fingerprint,
            build(other_tokens).fingerprint,
            build(a, split="7,2,1").fingerprint,
            build("1", a, "1", b).fingerprint,
            build("1", b, "1", a).fingerprint,
            build("1", a, "2", b).fingerprint,
        ]
        assert len(set(found)) == len(found)
