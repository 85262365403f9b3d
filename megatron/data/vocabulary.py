"""The vocabulary of a run, from its tokenizer flags or from what preprocessing noted of its data. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.config import Config, TokenizerConfig
from megatron.data.blending import parse_data_path
from megatron.data.indexed_dataset import IndexedDataset, Sidecar, paths_of
from megatron.errors import UserError
from megatron.tokenizer.build import build_tokenizer


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
        UserError: where none of them says it, or two corpora disagree.
    """
    named = _named(config)
    if named is not None:
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
    for _, prefix in parse_data_path(config.data.data_path) if config.data.data_path else ():
        sidecar = Sidecar.read(paths_of(prefix)[2])
        if sidecar is not None and sidecar.vocab_size is not None:
            return sidecar.vocab_size
    return None


def _named(config: TokenizerConfig) -> Vocabulary | None:
    """The vocabulary that the flags name; None where they name none."""
    if config.vocab_file or config.merge_file or config.tokenizer_file:
        if config.vocab_size is not None:
            raise UserError("--vocab-size is for training without a tokenizer's files: drop it")
        tokenizer = build_tokenizer(config.tokenizer_type, config.vocab_file, config.merge_file, config.tokenizer_file)
        return Vocabulary(tokenizer.vocab_size, tokenizer.eod, tokenizer.fingerprint)
    if config.vocab_size is not None:
        return Vocabulary(config.vocab_size, None, f"vocabulary of {config.vocab_size}")
    return None
