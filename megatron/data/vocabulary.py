"""The vocabulary of a run, from its tokenizer flags or from what preprocessing noted of its data. No torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from megatron.config import Config, DataConfig, TokenizerConfig
from megatron.data.blending import parse_data_path
from megatron.data.indexed_dataset import IndexedDataset, Sidecar, paths_of
from megatron.errors import UserError
from megatron.tokenizer.build import named_tokenizer


@dataclass(frozen=True)
class Vocabulary:
    """What training needs to know of the tokenizer."""

    size: int
    """Before padding."""
    eod: int | None
    fingerprint: str


def find_vocabulary(config: TokenizerConfig, prefixes: list[str]) -> Vocabulary:
    """The vocabulary that the tokenizer flags name, else --vocab-size, else what preprocessing noted of the data.

    Raises:
        UserError: where none of them says it, two corpora disagree, or documents of the data end with another token
            than the tokenizer's.
    """
    named = _named(config)
    if named is not None:
        if named.eod is not None:
            require_same_end(named.eod, prefixes)
        return named
    noted = {prefix: IndexedDataset(prefix).sidecar for prefix in prefixes}
    found = set()
    for prefix, sidecar in noted.items():
        if sidecar is None or sidecar.vocab_size is None:
            raise UserError(
                f"{prefix} does not say which tokenizer made it: give --vocab-file and --merge-file, "
                "--tokenizer-file, or --vocab-size"
            )
        found.add(Vocabulary(sidecar.vocab_size, sidecar.eod, sidecar.tokenizer_fingerprint or ""))
    if len(found) != 1:
        raise UserError(f"--data-path: the corpora were made with different tokenizers: {', '.join(prefixes)}")
    return found.pop()


def vocabulary_size(config: Config) -> int | None:
    """Its size, for a plan: the data need not be there. None where neither flags nor data say it.

    Raises UserError for a tokenizer that cannot be read.
    """
    named = _named(config.tokenizer)
    if named is not None:
        return named.size
    noted = noted_vocabulary(config.data)
    return noted.size if noted is not None else None


def noted_vocabulary(config: DataConfig) -> Vocabulary | None:
    """What preprocessing noted of the first corpus that tells; None where none does, or the data are not there."""
    for prefix in prefixes_of(config):
        sidecar = Sidecar.read(paths_of(prefix)[2])
        if sidecar is not None and sidecar.vocab_size is not None:
            return Vocabulary(sidecar.vocab_size, sidecar.eod, sidecar.tokenizer_fingerprint or "")
    return None


def prefixes_of(config: DataConfig) -> list[str]:
    """The corpora of --data-path; none where it is not given."""
    return [prefix for _, prefix in parse_data_path(config.data_path)] if config.data_path else []


def require_same_end(eod: int, prefixes: Iterable[str]) -> None:
    """Raise UserError where preprocessing noted that documents end with another token than `eod`.

    --eod-mask-loss and its like would else look for a token that ends none of them.
    """
    for prefix in prefixes:
        sidecar = Sidecar.read(paths_of(prefix)[2])
        if sidecar is not None and sidecar.eod not in (None, eod):
            raise UserError(
                f"--eod-token: expected the token id {sidecar.eod} that preprocessing put at the end of documents in "
                f"{prefix}, found {eod}: give the tokenizer and the --eod-token that it was given"
            )


def _named(config: TokenizerConfig) -> Vocabulary | None:
    """The vocabulary that the flags name; None where they name none."""
    tokenizer = named_tokenizer(config)
    if tokenizer is not None:
        return Vocabulary(tokenizer.vocab_size, tokenizer.eod, tokenizer.fingerprint)
    if config.vocab_size is not None:
        return Vocabulary(config.vocab_size, None, f"vocabulary of {config.vocab_size}")
    return None
