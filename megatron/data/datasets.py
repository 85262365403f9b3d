"""From `--data-path` and `--split` to the datasets for training, validation and test."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace

from megatron.config import Config, DataConfig
from megatron.data.blending import BlendedDataset, parse_data_path
from megatron.data.gpt2_dataset import Dataset, GPT2Dataset
from megatron.data.index_cache import LOCK_SECONDS
from megatron.data.indexed_dataset import IndexedDataset, paths_of
from megatron.data.sample_index import order_version
from megatron.data.splits import NAMES, parse_split, split_documents
from megatron.data.vocabulary import Vocabulary, find_vocabulary, prefixes_of
from megatron.errors import UserError


@dataclass(frozen=True)
class Datasets:
    """What a run reads."""

    train: Dataset
    validation: Dataset | None
    """None where no corpus has enough for a sample: `notes` says why."""
    test: Dataset | None
    """As `validation`."""
    fingerprint: str
    """What a resume compares: the digest of the corpora, their weights and their splits."""
    notes: tuple[str, ...]
    """What the user may not have meant: a corpus that validation or test go without, a tokenizer of another type."""
    num_tokens: tuple[int, int, int]
    """Tokens of all corpora in training, validation and test."""


def open_data(config: Config) -> tuple[Vocabulary, Datasets]:
    """The vocabulary and the datasets that `config` names."""
    vocabulary = find_vocabulary(config.tokenizer, [prefix for _, prefix in parse_data_path(config.data.data_path)])
    datasets = build_datasets(
        config.data,
        seq_length=config.model.seq_length,
        seed=config.training.seed,
        vocab_size=vocabulary.size,
        timeout=60 * config.parallel.distributed_timeout_minutes,
    )
    if config.seqlen_warmup.seqlen_warmup == "adaptive" and datasets.validation is None:
        raise UserError(
            f"--seqlen-warmup adaptive lengthens after validations, and --split {config.data.split} leaves no document "
            "for them"
        )
    return vocabulary, replace(datasets, notes=(*vocabulary.notes, *datasets.notes))


def build_datasets(
    config: DataConfig, *, seq_length: int, seed: int, vocab_size: int, timeout: float = LOCK_SECONDS
) -> Datasets:
    """The datasets of a run; documents are split corpus by corpus, so that none is in two splits.

    `vocab_size` is the tokenizer's, before padding; `timeout` are the seconds to wait, at any time of the run, for
    another process that builds the same sample index. Raises UserError where a corpus is missing or damaged, holds
    a token id that the tokenizer does not have, or is too small for one training sample.
    """
    weighted = parse_data_path(config.data_path)
    corpora = [IndexedDataset(prefix) for _, prefix in weighted]
    for corpus in corpora:
        _check_vocabulary(corpus, vocab_size)
    splits = [split_documents(config.split, len(corpus.document_lengths)) for corpus in corpora]
    built: list[Dataset | None] = []
    notes: list[str] = []
    totals: list[int] = []
    for number, name in enumerate(NAMES):
        parts: list[tuple[float, GPT2Dataset]] = []
        tokens = 0
        for (weight, _), corpus, ranges in zip(weighted, corpora, splits, strict=True):
            documents = ranges[number]
            tokens += int(corpus.document_lengths[documents.start : documents.stop].sum())
            if name != "train" and not len(documents) and (few := _few_documents(corpus, config.split, name)):
                notes.append(few)
                continue
            try:
                dataset = GPT2Dataset(
                    corpus,
                    documents,
                    seq_length=seq_length,
                    seed=seed,
                    cache_dir=config.data_cache_path,
                    name=name,
                    timeout=timeout,
                )
            except UserError as error:
                if name == "train":
                    raise
                notes.append(str(error))
            else:
                parts.append((weight, dataset))
        built.append(_blend(parts))
        totals.append(tokens)
    train, validation, test = built
    if train is None:
        raise UserError("--data-path holds nothing to train on")
    return Datasets(
        train=train,
        validation=validation,
        test=test,
        fingerprint=_fingerprint(weighted, corpora, splits),
        notes=tuple(notes),
        num_tokens=(totals[0], totals[1], totals[2]),
    )


def training_tokens(config: DataConfig) -> int | None:
    """Tokens of all corpora in training; None where no --data-path is given or its files are not all there.

    Raises UserError for a corpus that is damaged, or a --split that makes no sense.
    """
    prefixes = prefixes_of(config)
    if not prefixes or not all(path.exists() for prefix in prefixes for path in paths_of(prefix)[:2]):
        return None
    tokens = 0
    for lengths in (IndexedDataset(prefix).document_lengths for prefix in prefixes):
        documents = split_documents(config.split, len(lengths))[0]
        tokens += int(lengths[documents.start : documents.stop].sum())
    return tokens


def _few_documents(corpus: IndexedDataset, split: str, name: str) -> str | None:
    """Why a split that was asked for is empty, where the corpus has fewer documents than there are splits."""
    found = len(corpus.document_lengths)
    if found >= len(NAMES) or parse_split(split)[NAMES.index(name)] == 0:
        return None
    return (
        f"{corpus.bin_path.with_suffix('')}: nothing for {name}: documents are what is split, and there is only "
        f"{found}: preprocess a text file with --text-unit paragraph or line"
    )


def _blend(parts: list[tuple[float, GPT2Dataset]]) -> Dataset | None:
    if len(parts) <= 1:
        return parts[0][1] if parts else None
    return BlendedDataset([dataset for _, dataset in parts], [weight for weight, _ in parts])


def _check_vocabulary(corpus: IndexedDataset, vocab_size: int) -> None:
    found = corpus.max_token_id()
    if found >= vocab_size:
        raise UserError(
            f"{corpus.bin_path}: found token id {found:,}, the vocabulary has {vocab_size:,} tokens "
            f"(0 to {vocab_size - 1:,}): give the tokenizer that the corpus was preprocessed with"
        )


def _fingerprint(
    weighted: list[tuple[float, str]], corpora: list[IndexedDataset], splits: list[tuple[range, range, range]]
) -> str:
    """Digest of what decides sample i, the seed and the length aside (those are settings of their own).

    Paths are left out: data may be moved between two parts of a run. Where PREFIX.json is there, its checksum of
    the tokens counts too; `IndexedDataset.fingerprint` covers only the lengths of the documents.
    """
    total = sum(weight for weight, _ in weighted)
    parts = [
        [
            corpus.fingerprint,
            corpus.sidecar and corpus.sidecar.bin_crc32,
            (weight / total).hex(),
            [part.stop for part in ranges],
        ]
        for (weight, _), corpus, ranges in zip(weighted, corpora, splits, strict=True)
    ]
    return hashlib.sha256(json.dumps([order_version(), parts]).encode()).hexdigest()
