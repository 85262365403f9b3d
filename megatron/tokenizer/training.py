"""Training a byte-level BPE tokenizer, in GPT-2's shape, on the user's own text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from megatron.errors import UserError
from megatron.files import file_errors, write_atomic
from megatron.tokenizer.base import END_OF_TEXT

SMALLEST_VOCABULARY = 257
"""256 bytes and <|endoftext|>."""


TOKENIZER_FILE, VOCAB_FILE, MERGE_FILE = NAMES = ("tokenizer.json", "vocab.json", "merges.txt")


@dataclass(frozen=True)
class TrainedTokenizer:
    """What train_bpe has written."""

    tokenizer_file: Path
    vocab_file: Path
    merge_file: Path
    vocab_size: int
    """Smaller than was asked for where the text has no more pairs to join."""


def train_bpe(texts: Iterator[str], vocab_size: int, output: str | Path, *, min_frequency: int = 2) -> TrainedTokenizer:
    """Train on `texts` and write tokenizer.json, and the same tokenizer as vocab.json and merges.txt, into `output`.

    Ids are as in GPT-2: bytes, then merges in their order, then `<|endoftext|>`. The same texts give the same files.
    `min_frequency`: pairs that are rarer are not joined.
    UserError where `vocab_size` is too small, `min_frequency` negative or `texts` empty.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise UserError(
            f"--vocab-size must be at least {SMALLEST_VOCABULARY} (256 bytes and {END_OF_TEXT}), not {vocab_size}"
        )
    if min_frequency < 0:
        raise UserError(f"--min-frequency must not be negative, found {min_frequency}")
    learner = tokenizers.Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        min_frequency=min_frequency,
        special_tokens=[],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,  # its bar counts texts and pairs against totals that it does not know
    )
    counted = _Counted(texts)
    learner.train_from_iterator(counted, trainer=trainer)
    if counted.characters == 0:
        raise UserError("--input: there is no text to train a tokenizer on")
    model = json.loads(learner.to_str())["model"]
    vocab: dict[str, int] = model["vocab"]
    merges = [(left, right) for left, right in model["merges"]]

    final = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    final.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    final.decoder = decoders.ByteLevel()
    final.add_special_tokens([END_OF_TEXT])
    vocab = dict(sorted(final.get_vocab(with_added_tokens=True).items(), key=lambda item: item[1]))

    directory = Path(output)
    written = TrainedTokenizer(directory / TOKENIZER_FILE, directory / VOCAB_FILE, directory / MERGE_FILE, len(vocab))
    with file_errors("write", directory):
        directory.mkdir(parents=True, exist_ok=True)
    write_atomic(written.vocab_file, json.dumps(vocab, ensure_ascii=False) + "\n")
    write_atomic(written.merge_file, "#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in merges))
    write_atomic(written.tokenizer_file, final.to_str(pretty=True) + "\n")
    return written


def check_free(directory: Path) -> None:
    """UserError where a file that `train_bpe` writes is there already: text may have been encoded with it."""
    for path in (directory / name for name in NAMES):
        if path.exists():
            raise UserError(f"{path} is already there: choose another --output, or replace it with --overwrite")


class _Counted:
    """An iterator that counts the characters it has handed out."""

    def __init__(self, texts: Iterator[str]) -> None:
        self._texts = texts
        self.characters = 0

    def __iter__(self) -> Iterator[str]:
        for text in self._texts:
            self.characters += len(text)
            yield text
