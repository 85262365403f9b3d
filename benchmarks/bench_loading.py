"""Tokens a second from a .bin to the tensors of a batch, in one process: python benchmarks/bench_loading.py

Ours (samples that cross documents, in the epoch's shuffled order, then inputs and labels), in turn with `get_batch` of
nanoGPT, which people copy, and with NumPy copying as many tokens from one place: the speed of memory. The tokens are
made up, and in the page cache. A batch reads 2 bytes a token and leaves 16, an int64 in the inputs and in the labels.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import measure
from flags import make_parser

from megatron.data.batch import Batch
from megatron.data.gpt2_dataset import GPT2Dataset
from megatron.data.indexed_dataset import IndexedDataset
from megatron.data.indexed_writer import IndexedDatasetWriter
from megatron.data.sampler import SampleLoader
from megatron.errors import UserError, run
from megatron.flags import positive

VOCAB_SIZE = 50257
BYTES_A_TOKEN = 2 + 16
DOCUMENTS_AT_ONCE = 10_000
GetBatch = Callable[[int], object]
"""Makes the inputs and labels of a step, from 0."""


def main() -> int:
    parser = make_parser(__doc__, repeats=5)
    parser.add_argument("--tokens", type=positive, default=50_000_000, help="of the corpus")
    parser.add_argument("--mean-length", type=positive, default=500, help="tokens a document")
    parser.add_argument("--seq-length", type=positive, default=1024)
    parser.add_argument("--seqlen", type=positive, help="truncate to so many tokens (default: --seq-length)")
    parser.add_argument("--global-batch-size", type=positive, default=64, help="of a batch")
    parser.add_argument("--batches", type=positive, default=32, help="of a measurement")
    arguments = parser.parse_args()
    seqlen = arguments.seqlen or arguments.seq_length
    if seqlen > arguments.seq_length:
        raise UserError(f"--seqlen {seqlen} must be at most --seq-length {arguments.seq_length}")
    batch_tokens = arguments.global_batch_size * (arguments.seq_length + 1)
    if batch_tokens >= arguments.tokens:
        raise UserError(f"--tokens {arguments.tokens:,} must be more than the {batch_tokens:,} of a batch")

    with tempfile.TemporaryDirectory() as directory:
        corpus = make_corpus(Path(directory) / "corpus", arguments.tokens, arguments.mean_length)
        dataset = GPT2Dataset(
            corpus,
            range(corpus.document_count),
            seq_length=arguments.seq_length,
            seed=1,
            cache_dir=None,
            name="train",
        )
        with SampleLoader(dataset, num_workers=0) as loader:
            get_batch: dict[str, GetBatch] = {
                "ours": ours(loader, arguments.global_batch_size, seqlen),
                "nanoGPT": nanogpt(corpus.bin_path, arguments.global_batch_size, seqlen),
                "NumPy copying": copying(corpus.tokens, arguments.global_batch_size, seqlen),
            }
            runs = {name: partial(run_batches, get, arguments.batches) for name, get in get_batch.items()}
            seconds = measure.in_turn(runs, arguments.repeats)
    medians = measure.medians(seconds)
    tokens = arguments.batches * arguments.global_batch_size * seqlen
    print(f"{arguments.global_batch_size} x {seqlen} tokens a batch, {arguments.mean_length} a document, one process")
    rows = [
        {
            "contestant": name,
            "tokens/s": tokens / took,
            "GB/s": BYTES_A_TOKEN * tokens / took / 1e9,
            "ratio to copying": medians["NumPy copying"] / took,
            "ratio to nanoGPT": medians["nanoGPT"] / took,
        }
        for name, took in medians.items()
    ]
    measure.print_table([*rows[0]], [[*row.values()] for row in rows])
    measure.finish(arguments.output, {"arguments": vars(arguments), "rows": rows, "seconds": seconds})
    return 0


def run_batches(get_batch: GetBatch, batches: int) -> None:
    """Make the batches of the first steps."""
    for step in range(batches):
        get_batch(step)


def make_corpus(prefix: Path, tokens: int, mean_length: float) -> IndexedDataset:
    """A corpus of about so many random tokens, in documents of lognormal lengths (sigma 1), read once."""
    random = np.random.default_rng(0)
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        for lengths in _lengths(random, tokens, mean_length):
            writer.add_documents(random.integers(0, VOCAB_SIZE, int(lengths.sum()), dtype=np.uint16), lengths)
    corpus = IndexedDataset(prefix)
    np.bitwise_or.reduce(corpus.tokens)
    return corpus


def _lengths(random: np.random.Generator, tokens: int, mean_length: float) -> Iterator[np.ndarray]:
    """Lengths of documents, many at a time, that add up to `tokens`."""
    while tokens > 0:
        lengths = 1 + random.lognormal(np.log(mean_length) - 0.5, 1.0, DOCUMENTS_AT_ONCE).astype(np.int64)
        lengths = lengths[: int(np.searchsorted(np.cumsum(lengths), tokens)) + 1]
        lengths[-1] -= max(0, int(lengths.sum()) - tokens)
        tokens -= int(lengths.sum())
        yield lengths


def ours(loader: SampleLoader, sequences: int, seqlen: int) -> GetBatch:
    """What a step of training does, without reading ahead."""

    def get_batch(step: int) -> Batch:
        return Batch.from_samples(loader.batch(step * sequences, sequences)).truncate(seqlen)

    return get_batch


def nanogpt(path: Path, sequences: int, seqlen: int) -> GetBatch:
    """`get_batch` of nanoGPT's train.py: windows at random places."""

    def get_batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        data = np.memmap(path, dtype=np.uint16, mode="r")
        ix = torch.randint(len(data) - seqlen, (sequences,))
        x = torch.stack([torch.from_numpy((data[i : i + seqlen]).astype(np.int64)) for i in ix])
        y = torch.stack([torch.from_numpy((data[i + 1 : i + 1 + seqlen]).astype(np.int64)) for i in ix])
        return x, y

    return get_batch


def copying(tokens: np.ndarray, sequences: int, seqlen: int) -> GetBatch:
    """Inputs and labels copied as two runs of tokens into memory that is there already."""
    size = sequences * seqlen
    inputs, labels = np.empty((2, size), dtype=np.int64)
    tokens = np.asarray(tokens)

    def get_batch(step: int) -> None:
        start = step * size % (len(tokens) - size)
        np.copyto(inputs, tokens[start : start + size])
        np.copyto(labels, tokens[start + 1 : start + 1 + size])

    return get_batch


if __name__ == "__main__":
    run(main)
