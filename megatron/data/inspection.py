"""A dataset in words: its files, its counts, the lengths of its documents, and the beginnings of some of them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from megatron.data.indexed_dataset import IndexedDataset
from megatron.errors import UserError
from megatron.tokenizer.base import Tokenizer

_QUANTILES = (
    ("shortest", 0.0),
    ("1%", 0.01),
    ("25%", 0.25),
    ("median", 0.5),
    ("75%", 0.75),
    ("99%", 0.99),
    ("longest", 1.0),
)


def describe(
    dataset: IndexedDataset, tokenizer: Tokenizer | None = None, documents: int = 0, sample_tokens: int = 64
) -> Iterator[str]:
    """Lines that describe `dataset`, with the first `sample_tokens` of `documents` documents spread over it.

    Samples are decoded by `tokenizer`, or given as ids without one. UserError where a token is beyond its vocabulary.
    """
    if documents < 0 or sample_tokens < 1:
        raise UserError(
            f"--documents {documents} must not be negative, and --sample-tokens {sample_tokens} must be at least 1"
        )
    lengths = dataset.document_lengths
    largest = dataset.max_token_id()
    yield f"{dataset.bin_path}  {dataset.bin_path.stat().st_size:,} bytes of {dataset.dtype.name}"
    yield f"{dataset.idx_path}  {dataset.idx_path.stat().st_size:,} bytes, fingerprint {dataset.fingerprint[:16]}"
    yield from _provenance(dataset)
    yield f"documents  {dataset.document_count:,}"
    if len(dataset) != dataset.document_count:
        yield f"sequences  {len(dataset):,}"
    yield f"tokens     {dataset.num_tokens:,}, the largest id {largest}"
    if tokenizer is not None:
        if largest >= tokenizer.vocab_size:
            raise UserError(
                f"{dataset.bin_path}: holds token id {largest}, but the tokenizer has {tokenizer.vocab_size} tokens; "
                "give the tokenizer that made the data"
            )
        ends = np.count_nonzero(dataset.tokens[(dataset.document_starts + lengths - 1)[lengths > 0]] == tokenizer.eod)
        yield f"end of document (id {tokenizer.eod}) at the end of {ends:,} documents"
    if lengths.size:
        yield "tokens a document"
        values = np.quantile(lengths, [quantile for _, quantile in _QUANTILES], method="nearest")
        for (label, _), value in zip(_QUANTILES, values, strict=True):
            yield f"  {label:>8}  {int(value):>12,}"
        yield f"  {'mean':>8}  {lengths.mean():>12,.1f}"
    chosen = np.unique(np.linspace(0, dataset.document_count - 1, min(documents, dataset.document_count)).astype(int))
    for document in chosen if documents > 0 else ():
        tokens = dataset.read_document(int(document))[:sample_tokens]
        shown = repr(tokenizer.decode(tokens.tolist())) if tokenizer else " ".join(map(str, tokens.tolist()))
        yield f"document {document} ({lengths[document]:,} tokens): {shown}"


def _provenance(dataset: IndexedDataset) -> Iterator[str]:
    sidecar = dataset.sidecar
    if sidecar is None:
        yield f"{dataset.sidecar_path}  is missing or describes other files"
    elif sidecar.tokenizer:
        yield (
            f"{dataset.sidecar_path}  made with {sidecar.tokenizer} of {sidecar.vocab_size:,} tokens, "
            f"fingerprint {(sidecar.tokenizer_fingerprint or '')[:16]}"
        )
