"""The tokenizer of a run against the one that preprocessing noted of its data."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron.config import Config, DataConfig, ModelConfig, TokenizerConfig
from megatron.data.datasets import open_data
from megatron.data.indexed_writer import IndexedDatasetWriter
from megatron.data.vocabulary import find_vocabulary
from megatron.errors import UserError
from megatron.tokenizer.build import named_tokenizer
from megatron.tokenizer.training import TrainedTokenizer, train_bpe


def pair(trained: TrainedTokenizer) -> TokenizerConfig:
    return TokenizerConfig(vocab_file=str(trained.vocab_file), merge_file=str(trained.merge_file))


def whole(trained: TrainedTokenizer) -> TokenizerConfig:
    return TokenizerConfig(tokenizer_file=str(trained.tokenizer_file))


def write(path: Path, flags: TokenizerConfig | None) -> str:
    """The prefix of a corpus with the ids 0 to 349; without `flags` its sidecar names no tokenizer."""
    with IndexedDatasetWriter(path, np.uint16, tokenizer=named_tokenizer(flags) if flags else None) as writer:
        writer.add_document(np.arange(350))
    return str(path)


@pytest.fixture
def smaller(tmp_path: Path) -> TrainedTokenizer:
    return train_bpe(iter(["some other text, and some more of it"] * 3), 280, tmp_path / "smaller")


@pytest.fixture
def swapped(tiny_tokenizer: TrainedTokenizer, tmp_path: Path) -> TokenizerConfig:
    """The files of the tiny tokenizer with two ids swapped: as many tokens, and the same end of documents."""
    ids = json.loads(tiny_tokenizer.vocab_file.read_text(encoding="utf-8"))
    ids["a"], ids["b"] = ids["b"], ids["a"]
    (tmp_path / "swapped.json").write_text(json.dumps(ids), encoding="utf-8")
    return replace(pair(tiny_tokenizer), vocab_file=str(tmp_path / "swapped.json"))


def test_another_tokenizer_of_the_same_size_is_refused(
    tiny_tokenizer: TrainedTokenizer, swapped: TokenizerConfig, tmp_path: Path
) -> None:
    own = pair(tiny_tokenizer)
    fine, other = write(tmp_path / "fine", own), write(tmp_path / "other", swapped)
    assert find_vocabulary(own, [fine]).notes == ()
    expected, found = (tokenizer.fingerprint[:12] for flags in (swapped, own) if (tokenizer := named_tokenizer(flags)))
    message = (
        rf"^--vocab-file {own.vocab_file} and --merge-file {own.merge_file}: expected the GPT2BPETokenizer of 400 "
        rf"tokens, fingerprint {expected}, that {other}.json notes, found .* of 400 tokens, fingerprint {found}: give"
    )
    with pytest.raises(UserError, match=message):
        find_vocabulary(own, [fine, other])  # the second of a blend
    assert find_vocabulary(TokenizerConfig(vocab_size=400), [fine, other]).size == 400, "compares nothing"


def test_another_tokenizer_json_is_refused(
    tiny_tokenizer: TrainedTokenizer, smaller: TrainedTokenizer, tmp_path: Path
) -> None:
    prefix = write(tmp_path / "corpus", whole(tiny_tokenizer))
    assert find_vocabulary(whole(tiny_tokenizer), [prefix]).notes == ()
    with pytest.raises(UserError, match=rf"^--tokenizer-file {smaller.tokenizer_file}: expected the HFTokenizer of 40"):
        find_vocabulary(whole(smaller), [prefix])


def test_the_size_is_named_before_the_end_of_documents(
    tiny_tokenizer: TrainedTokenizer, smaller: TrainedTokenizer, tmp_path: Path
) -> None:
    prefix = write(tmp_path / "corpus", pair(tiny_tokenizer))
    message = rf"expected the GPT2BPETokenizer of 400 tokens, .* found the {{}} of {smaller.vocab_size} tokens"
    for flags, kind in ((pair(smaller), "GPT2BPETokenizer"), (whole(smaller), "HFTokenizer")):
        with pytest.raises(UserError, match=message.format(kind)):
            find_vocabulary(flags, [prefix])


def test_files_of_another_type_are_noted_once(tiny_tokenizer: TrainedTokenizer, tmp_path: Path) -> None:
    own = pair(tiny_tokenizer)
    paths = [write(tmp_path / name, flags) for name, flags in (("a", own), ("b", whole(tiny_tokenizer)), ("c", own))]
    config = Config(
        model=ModelConfig(seq_length=8),
        data=DataConfig(data_path=("1", paths[0], "1", paths[1], "1", paths[2]), split="1"),
        tokenizer=whole(tiny_tokenizer),
    )
    (note,) = [note for note in open_data(config)[1].notes if "--tokenizer-file" in note]
    assert note.startswith(f"--tokenizer-file {tiny_tokenizer.tokenizer_file}: cannot be compared with the to")
    assert f" of {paths[0]}, {paths[2]}: its files are of another type" in note


def test_a_sidecar_that_names_no_tokenizer_or_describes_other_files_is_not_compared(
    tiny_tokenizer: TrainedTokenizer, swapped: TokenizerConfig, tmp_path: Path
) -> None:
    plain, stale = write(tmp_path / "plain", None), write(tmp_path / "stale", swapped)
    sidecar = (tmp_path / "stale.json").read_bytes()
    with IndexedDatasetWriter(tmp_path / "new", np.uint16) as writer:
        writer.add_document(np.arange(20))
    for ending in ("bin", "idx"):
        (tmp_path / f"new.{ending}").replace(tmp_path / f"stale.{ending}")
    assert (tmp_path / "stale.json").read_bytes() == sidecar
    assert find_vocabulary(pair(tiny_tokenizer), [plain, stale]).notes == ()
