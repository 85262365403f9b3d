"""Samples of one split of one corpus, by number: sample i depends on the data, the seed and i, on nothing else."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from megatron.data.index_cache import CACHE_FROM, LOCK_SECONDS, IndexKey, load_or_build
from megatron.data.sample_index import Int64Array, SampleIndex, build_sample_index, count_samples, require_sample

EPOCHS_KEPT = 2
"""Indices held at a time: a step may lie across the border of two epochs."""
COPY_FROM = 192
"""Mean tokens a piece (what a sample takes of one document) from which copying piece by piece is faster."""


class Corpus(Protocol):
    """What a dataset needs of an `IndexedDataset`."""

    @property
    def document_lengths(self) -> Int64Array: ...  # [documents] tokens
    @property
    def document_starts(self) -> Int64Array: ...  # [documents] first token in `tokens`
    @property
    def tokens(self) -> NDArray[np.integer]: ...  # [tokens], all documents in a row
    @property
    def fingerprint(self) -> str: ...
    @property
    def prefix(self) -> str | Path: ...


@dataclass(frozen=True)
class Piece:
    """The tokens that a sample takes of one document."""

    prefix: str
    """The corpus."""
    document: int
    """Number of the document in the corpus."""
    offset: int
    """First token, within the document."""
    length: int
    """Number of tokens."""


class Dataset(Protocol):
    """Numbered samples without end, each a pure function of its number."""

    @property
    def seq_length(self) -> int: ...

    @property
    def num_samples_per_epoch(self) -> int: ...

    def samples(self, indices: Int64Array) -> Int64Array: ...

    def documents_of(self, index: int) -> list[Piece]: ...


class GPT2Dataset:
    """Samples of the documents `documents` of a corpus; sample i belongs to epoch i // num_samples_per_epoch.

    Validation and test read samples 0 .. num_samples_per_epoch: one fixed order.
    """

    def __init__(
        self,
        indexed: Corpus,
        documents: range,
        *,
        seq_length: int,
        seed: int,
        cache_dir: str | None,
        name: str,
        timeout: float = LOCK_SECONDS,
    ) -> None:
        """`name` (such as "train") marks cache files and messages. `cache_dir` None means `index-cache` beside the
        corpus, used where the index is large (`CACHE_FROM`); a directory given is always used. `timeout`: seconds
        to wait there for another process that builds an index.

        Raises UserError where the documents do not hold one sample.
        """
        self.indexed = indexed
        self.documents = documents
        self.seq_length = seq_length
        self.seed = seed
        self.name = name
        self._timeout = timeout
        window = slice(documents.start, documents.stop)
        self._lengths = np.asarray(indexed.document_lengths[window], dtype=np.int64)
        self._starts = np.asarray(indexed.document_starts[window], dtype=np.int64)
        self._tokens = np.asarray(indexed.tokens)  # slices of a memmap are slow; the plain view keeps the map alive
        self.num_tokens = int(self._lengths.sum(dtype=np.int64))
        """Tokens of the split."""
        self.num_samples_per_epoch = count_samples(self.num_tokens, seq_length)
        """Samples after which the data is repeated, in another order."""
        require_sample(self.num_tokens, seq_length, f"{indexed.prefix}: {len(documents):,} documents for {name}")
        self._cache_dir: Path | None = None
        if cache_dir is not None:
            self._cache_dir = Path(cache_dir)
        elif len(documents) + self.num_samples_per_epoch >= CACHE_FROM:
            self._cache_dir = Path(indexed.prefix).parent / "index-cache"
        self._epochs: dict[int, SampleIndex] = {}
        self._lock = threading.Lock()

    def samples(self, indices: Int64Array) -> Int64Array:
        """Tokens [n, seq_length + 1] int64 of the samples numbered `indices` [n], in any order, repeats allowed."""
        indices = np.asarray(indices, dtype=np.int64)
        out = np.empty((len(indices), self.seq_length + 1), dtype=np.int64)
        epochs, within = np.divmod(indices, self.num_samples_per_epoch)
        for epoch in np.unique(epochs).tolist():
            rows = np.flatnonzero(epochs == epoch)
            if len(rows) == len(indices):
                self._gather(*self._pieces(self.index(epoch), within)[1:], out.reshape(-1))
            else:
                part = np.empty((len(rows), self.seq_length + 1), dtype=np.int64)
                self._gather(*self._pieces(self.index(epoch), within[rows])[1:], part.reshape(-1))
                out[rows] = part
        return out

    def documents_of(self, index: int) -> list[Piece]:
        """What sample `index` is made of, in order: documents, offsets and lengths that sum to seq_length + 1."""
        epoch, within = divmod(int(index), self.num_samples_per_epoch)
        documents, starts, lengths = self._pieces(self.index(epoch), np.array([within], dtype=np.int64))
        offsets = starts - self._starts[documents]
        return [
            Piece(str(self.indexed.prefix), self.documents.start + document, offset, length)
            for document, offset, length in zip(documents.tolist(), offsets.tolist(), lengths.tolist(), strict=True)
        ]

    def index(self, epoch: int) -> SampleIndex:
        """The sample index of an epoch, out of memory, out of the cache or built now."""
        with self._lock:
            found = self._epochs.pop(epoch, None) or self._load(epoch)
            self._epochs[epoch] = found  # the newest is last
            while len(self._epochs) > EPOCHS_KEPT:
                del self._epochs[next(iter(self._epochs))]
            return found

    def _load(self, epoch: int) -> SampleIndex:
        def build() -> SampleIndex:
            return build_sample_index(self._lengths, self.seq_length, self.seed, epoch)

        if self._cache_dir is None:
            return build()
        key = IndexKey(self.indexed.fingerprint, self.documents, self.seq_length, self.seed, epoch)
        name = f"{Path(self.indexed.prefix).name}-{self.name}-epoch{epoch}"
        return load_or_build(self._cache_dir, key, self.num_tokens, build, name, timeout=self._timeout)

    def _pieces(self, index: SampleIndex, samples: Int64Array) -> tuple[Int64Array, Int64Array, Int64Array]:
        """The pieces of the samples numbered `samples` within an epoch, one after the other.

        Returns documents (numbered within the split), first tokens in the file, and lengths (0 nowhere), [pieces].
        """
        stream = index.shuffle[samples]
        first, last = index.starts[stream], index.starts[stream + 1]  # [n, 2] position, offset of the end tokens
        counts = last[:, 0] - first[:, 0] + 1
        heads = np.cumsum(counts) - counts  # where each sample's pieces begin
        positions = np.repeat(first[:, 0] - heads, counts) + np.arange(int(counts.sum()), dtype=np.int64)
        documents = np.asarray(index.documents[positions], dtype=np.int64)  # indices may be of four bytes
        begins = np.zeros(len(documents), dtype=np.int64)
        begins[heads] = first[:, 1]
        ends = self._lengths[documents]
        ends[heads + counts - 1] = last[:, 1] + 1
        filled = ends > begins  # empty documents between the ends
        documents, begins, ends = documents[filled], begins[filled], ends[filled]
        return documents, self._starts[documents] + begins, ends - begins

    def _gather(self, starts: Int64Array, lengths: Int64Array, out: Int64Array) -> None:
        """Copy the pieces [starts, starts + lengths) of the file one after the other into `out`."""
        borders = np.cumsum(lengths) - lengths
        if len(out) >= COPY_FROM * len(starts):
            for start, border, length in zip(starts.tolist(), borders.tolist(), lengths.tolist(), strict=True):
                out[border : border + length] = self._tokens[start : start + length]
        else:
            sources = np.repeat(starts - borders, lengths) + np.arange(len(out), dtype=np.int64)
            out[:] = self._tokens[sources]
