"""Where the samples of one epoch start, and in which order they come.

The documents of a split are put in a random order and joined to one stream of tokens. Sample j of the stream
is its tokens [j * seq_length, (j + 1) * seq_length], both ends included: seq_length + 1 tokens, of which the
last is the first of sample j + 1, as in Megatron-LM. A second random order says which sample comes when.

Both orders follow from (seed, epoch) alone, never from the length of the run, so a longer run sees the same
beginning. Corpora of more than 2^31 tokens, documents or samples are ordinary.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from megatron.errors import UserError

Int64Array = NDArray[np.int64]
IndexArray = NDArray[np.signedinteger]

DOCUMENT_ORDER = 0
SAMPLE_ORDER = 1
"""Third word of the random seed: which of an epoch's two orders is drawn."""
CHUNK = 2**17
"""Documents whose samples are located at a time: what is needed for them stays in the cache."""


@dataclass(frozen=True)
class SampleIndex:
    """One epoch of one split: arrays of one type (`index_dtype`), which may be read-only views of a mapped file."""

    documents: IndexArray
    """[documents] the split's documents in this epoch's order, numbered from 0 within the split."""
    starts: IndexArray
    """[samples + 1, 2] position in `documents` and offset in that document of each sample's first token. The
    row after a sample's own gives its last token; the last row is the last token of the last sample."""
    shuffle: IndexArray
    """[samples] the epoch's i-th sample is sample `shuffle[i]` of the stream."""


def count_samples(num_tokens: int, seq_length: int) -> int:
    """Samples in an epoch of `num_tokens` tokens: every one has a token to predict at each position."""
    return max(0, (num_tokens - 1) // seq_length)


def require_sample(num_tokens: int, seq_length: int, where: str) -> None:
    """Raise UserError, with both counts, where `num_tokens` are too few for one sample of `where`."""
    if count_samples(num_tokens, seq_length) == 0:
        raise UserError(
            f"{where}: found {num_tokens:,} tokens, one sample needs {seq_length + 1:,} (--seq-length + 1): "
            "give more data, a larger share in --split or a smaller --seq-length"
        )


def generator(seed: int, epoch: int, order: int) -> np.random.Generator:
    """The random numbers of one order: PCG64 seeded by SeedSequence([seed, epoch, order])."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch, order])))


@cache
def order_version() -> str:
    """Digest of a small permutation: it changes if a NumPy release changes the numbers behind `permutation`.

    NumPy does not promise that they stay (NEP 19). As a part of the cache's key and of the data's fingerprint
    this turns such a change into a rebuilt index and a refused resume, instead of another order unnoticed.
    """
    return hashlib.sha256(generator(0, 0, DOCUMENT_ORDER).permutation(1000).astype("<i8").tobytes()).hexdigest()


def locate_samples(lengths: Int64Array, documents: IndexArray, seq_length: int, samples: int) -> IndexArray:
    """Position and offset of the tokens 0, seq_length, .. samples * seq_length of the stream.

    The stream is made of the documents `documents` (numbers into `lengths`, [documents] tokens), one after the
    other; some may be empty. Returns [samples + 1, 2] of the type of `documents`, as `SampleIndex.starts`.
    """
    starts = np.empty((samples + 1, 2), dtype=documents.dtype)
    found = before = 0  # starts found, and tokens before the chunk
    for first in range(0, len(documents), CHUNK):
        ends = before + np.cumsum(lengths[documents[first : first + CHUNK]])
        stop = min(samples + 1, -(-int(ends[-1]) // seq_length))
        tokens = np.arange(found * seq_length, stop * seq_length, seq_length, dtype=np.int64)
        within = np.searchsorted(ends, tokens, side="right")  # the first document that ends after the token
        begins = np.concatenate(([before], ends[:-1]))
        starts[found:stop, 0] = first + within
        starts[found:stop, 1] = tokens - begins[within]
        found, before = stop, int(ends[-1])
    return starts


def build_sample_index(document_lengths: Int64Array, seq_length: int, seed: int, epoch: int) -> SampleIndex:
    """The index of epoch `epoch` over the documents of a split, from their lengths in tokens alone.

    `document_lengths` is [documents] int64, in the order of the file. Raises UserError where the documents together do
    not fill one sample.
    """
    num_tokens = int(document_lengths.sum(dtype=np.int64))
    require_sample(num_tokens, seq_length, "the documents of this split")
    samples = count_samples(num_tokens, seq_length)
    dtype = index_dtype(len(document_lengths), samples, int(document_lengths.max()))
    documents = shuffled(len(document_lengths), dtype, generator(seed, epoch, DOCUMENT_ORDER))
    starts = locate_samples(document_lengths, documents, seq_length, samples)
    return SampleIndex(documents, starts, shuffled(samples, dtype, generator(seed, epoch, SAMPLE_ORDER)))


def index_dtype(documents: int, samples: int, longest: int) -> type[np.int32 | np.int64]:
    """The type of an index over so many documents, the longest of so many tokens: four bytes where they are enough."""
    return np.int32 if max(documents, samples, longest) <= np.iinfo(np.int32).max else np.int64


def shuffled(count: int, dtype: type[np.int32 | np.int64], random: np.random.Generator) -> IndexArray:
    """`random.permutation(count)`, whose order does not depend on the type, in fewer bytes."""
    numbers: IndexArray = np.arange(count, dtype=dtype)
    random.shuffle(numbers)
    return numbers
