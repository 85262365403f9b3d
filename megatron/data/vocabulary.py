"""The vocabulary of a run, from its tokenizer flags or from what preprocessing noted of its data. No torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from megatron.config import Config, DataConfig, TokenizerConfig
from megatron.data.blending import parse_data_path
from megatron.data.indexed_dataset import IndexedDataset, Sidecar, paths_of
from megatron.errors import UserError
from megatron.tokenizer.base import Tokenizer
from megatron.tokenizer.build import named_tokenizer


@dataclass(frozen=True)
class Vocabulary:
    """What training needs to know of the tokenizer."""

    size: int
    """Before padding."""
    eod: int | None
    fingerprint: str
    notes: tuple[str, ...] = ()
    """What the user may not have meant."""


def find_vocabulary(config: TokenizerConfig, prefixes: list[str]) -> Vocabulary:
    """The vocabulary that the tokenizer flags name, else --vocab-size, else what preprocessing noted of the data.

    Raises:
        UserError: where none of them says it, two corpora disagree, or the data were made with another tokenizer than
            that of the flags, as far as preprocessing noted it.
    """
    tokenizer = named_tokenizer(config)
    if tokenizer is not None:
        notes = _compare(config, tokenizer, prefixes)
        require_same_end(tokenizer.eod, prefixes)
        return Vocabulary(tokenizer.vocab_size, tokenizer.eod, tokenizer.fingerprint, notes)
    if config.vocab_size is not None:
        return Vocabulary(config.vocab_size, None, f"vocabulary of {config.vocab_size}")
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
    tokenizer = named_tokenizer(config.tokenizer)
    if tokenizer is not None:
        return tokenizer.vocab_size
    if config.tokenizer.vocab_size is not None:
        return config.tokenizer.vocab_size
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


def _compare(config: TokenizerConfig, tokenizer: Tokenizer, prefixes: Iterable[str]) -> tuple[str, ...]:
    """A note where preprocessing noted a tokenizer of another type than that of the flags, one for all such data.

    One tokenizer has another fingerprint in files of another type, so that they cannot be compared.

    Raises:
        UserError: where it noted another one of the same type, or the data hold ids that the tokenizer has not.
    """
    flags = ("vocab_file", "merge_file", "tokenizer_file")
    given = " and ".join(f"--{flag.replace('_', '-')} {file}" for flag in flags if (file := getattr(config, flag)))
    others = []
    for prefix in prefixes:
        path = paths_of(prefix)[2]
        sidecar = Sidecar.read(path)
        if sidecar is None or sidecar.vocab_size is None or sidecar.tokenizer_fingerprint == tokenizer.fingerprint:
            continue
        if IndexedDataset(prefix).sidecar is None:  # it describes other files
            continue
        if sidecar.tokenizer == tokenizer.name or sidecar.max_token_id >= tokenizer.vocab_size:
            raise UserError(
                f"{given}: expected the {sidecar.tokenizer} of {sidecar.vocab_size:,} tokens, fingerprint "
                f"{(sidecar.tokenizer_fingerprint or '')[:12]}, that {path} notes, found the {tokenizer.name} of "
                f"{tokenizer.vocab_size:,} tokens, fingerprint {tokenizer.fingerprint[:12]}: give the files that the "
                "corpus was preprocessed with"
            )
        others.append(prefix)
    if not others:
        return ()
    return (
        f"{given}: cannot be compared with the tokenizer that preprocessing noted of {', '.join(others)}: its files "
        "are of another type, and so is its fingerprint; see that it is the same tokenizer",
    )
