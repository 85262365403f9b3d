"""Stand-ins for corpora, and the slow obvious way to cut samples out of them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron.data.sample_index import DOCUMENT_ORDER, SAMPLE_ORDER, generator


@dataclass
class CorpusInMemory:
    """What a dataset asks of an IndexedDataset, without files. Every token tells its place in the corpus."""

    lengths: Sequence[int]
    directory: Path = Path()
    first_token: int = 0
    dtype: type = np.int32

    def __post_init__(self) -> None:
        self.document_lengths = np.array(self.lengths, dtype=np.int64)
        self.document_starts = np.cumsum(self.document_lengths) - self.document_lengths
        self.tokens = np.arange(self.first_token, self.first_token + sum(self.lengths)).astype(self.dtype)
        self.fingerprint = hashlib.sha256(repr(self.lengths).encode()).hexdigest()
        self.prefix = str(self.directory / "corpus")

    def document(self, number: int) -> list[int]:
        start = int(self.document_starts[number])
        return self.tokens[start : start + self.lengths[number]].tolist()


def obvious_starts(lengths: Sequence[int], order: Sequence[int], seq_length: int) -> list[tuple[int, int]]:
    """(position, offset) of every seq_length-th token of the stream, by walking it."""
    places = [(position, offset) for position, document in enumerate(order) for offset in range(lengths[document])]
    return places[: (len(places) - 1) // seq_length * seq_length + 1 : seq_length]


def obvious_epoch(corpus: CorpusInMemory, documents: range, seq_length: int, seed: int, epoch: int) -> list[list[int]]:
    """All samples of an epoch in their order: join the shuffled documents, cut windows, shuffle the windows."""
    order = generator(seed, epoch, DOCUMENT_ORDER).permutation(len(documents))
    stream = [token for position in order for token in corpus.document(documents[int(position)])]
    count = (len(stream) - 1) // seq_length
    windows = [stream[j * seq_length : (j + 1) * seq_length + 1] for j in range(count)]
    return [windows[j] for j in generator(seed, epoch, SAMPLE_ORDER).permutation(count)]
