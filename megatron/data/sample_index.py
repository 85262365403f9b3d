"""Where the samples of one epoch start, and in which order they come.

The documents of a split are put in a random order and joined to one stream of tokens. Sample j of the stream
is its tokens [j * seq_length, (j + 1) * seq_length], both ends included: seq_length + 1 tokens, of which the
last is the first of sample j + 1, as in Megatron-LM. A second random order says which sample comes when.

Both orders follow from (seed, epoch) alone, never from the length of the run, so a longer run sees the same
beginning. All counts are int64: corpora of more than 2^31 tokens, documents or samples are ordinary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import cast

import numpy as np
from numpy.typing import NDArray

from megatron.errors import UserError

Int64Array = NDArray[np.int64]
Locate = Callable[[Int64Array, Int64Array, int, int], Int64Array]

DOCUMENT_ORDER = 0
SAMPLE_ORDER = 1
"""Third word of the random seed: which of an epoch's two orders is drawn."""


@dataclass(frozen=True)
class SampleIndex:
    """One epoch of one split. Arrays may be read-only views of a mapped file."""

    documents: Int64Array
    """[documents] the split's documents in this epoch's order, numbered from 0 within the split."""
    starts: Int64Array
    """[samples + 1, 2] position in `documents` and offset in that document of each sample's first token. The
    row after a sample's own gives its last token; the last row is the last token of the last sample."""
    shuffle: Int64Array
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


def locate_samples(lengths: Int64Array, documents: Int64Array, seq_length: int, samples: int) -> Int64Array:
    """Position and offset of the tokens 0, seq_length, .. samples * seq_length of the stream.

    The stream is made of the documents `documents` (numbers into `lengths`, [documents] tokens), one after the
    other; some may be empty. Returns [samples + 1, 2] int64, as `SampleIndex.starts`. The compiled helper of the
    same name gives the same.
    """
    ends = lengths[documents]
    np.cumsum(ends, out=ends)
    starts = np.empty((samples + 1, 2), dtype=np.int64)
    positions, offsets = starts[:, 0], starts[:, 1]
    offsets[:] = np.arange(0, (samples + 1) * seq_length, seq_length, dtype=np.int64)
    positions[:] = np.searchsorted(ends, offsets, side="right")  # the first document that ends after the token
    later = int(np.searchsorted(positions, 1))  # from this row on documents other than the first, which begins at 0
    offsets[later:] -= ends[positions[later:] - 1]
    return starts


def build_sample_index(
    document_lengths: Int64Array, seq_length: int, seed: int, epoch: int, locate: Locate | None = None
) -> SampleIndex:
    """The index of epoch `epoch` over the documents of a split, from their lengths in tokens alone.

    `document_lengths` is [documents] int64, in the order of the file. `locate` is `locate_samples` (default: the
    compiled helper where it was built). Raises UserError where the documents together do not fill one sample.
    """
    num_tokens = int(document_lengths.sum(dtype=np.int64))
    require_sample(num_tokens, seq_length, "the documents of this split")
    samples = count_samples(num_tokens, seq_length)
    documents = generator(seed, epoch, DOCUMENT_ORDER).permutation(np.int64(len(document_lengths)))
    starts = (locate or fastest_locate())(document_lengths, documents, seq_length, samples)
    shuffle = generator(seed, epoch, SAMPLE_ORDER).permutation(np.int64(samples))
    return SampleIndex(documents=documents, starts=starts, shuffle=shuffle)


def fastest_locate() -> Locate:
    """The compiled `locate_samples` where the installation could build it, else the one of NumPy."""
    try:
        from megatron.data import _sample_index  # type: ignore[attr-defined] # noqa: PLC0415 (may not be there)
    except ImportError:
        return locate_samples
    return cast(Locate, _sample_index.locate_samples)
