"""From the tokenizer flags to a tokenizer."""

from __future__ import annotations

import argparse
import difflib
from dataclasses import dataclass, fields
from pathlib import Path

from megatron.config import TokenizerConfig
from megatron.errors import UserError
from megatron.tokenizer.base import END_OF_TEXT, Tokenizer
from megatron.tokenizer.gpt2_bpe import GPT2BPETokenizer
from megatron.tokenizer.huggingface import HFTokenizer

TOKENIZER_TYPES = (GPT2BPETokenizer.name, HFTokenizer.name)


@dataclass(frozen=True)
class TokenizerFiles:
    """The tokenizer flags of a tool."""

    tokenizer_type: str = GPT2BPETokenizer.name
    vocab_file: str | Path | None = None
    merge_file: str | Path | None = None
    tokenizer_file: str | Path | None = None
    eod_token: str = END_OF_TEXT

    def build(self) -> Tokenizer:
        """The tokenizer; see `build_tokenizer`."""
        return build_tokenizer(
            self.tokenizer_type,
            self.vocab_file,
            self.merge_file,
            self.tokenizer_file,
            eod_token=self.eod_token,
        )


def add_file_flags(group: argparse._ArgumentGroup) -> None:
    """Add the flags, other than --tokenizer-type, that `TokenizerFiles` holds to a tool's command line."""
    _add_files(group)
    group.add_argument(
        "--eod-token",
        default=END_OF_TEXT,
        metavar="TOKEN",
        help=f"the token that ends a document (default: {END_OF_TEXT})",
    )


def add_tokenizer_flags(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Add the flags of a tool that loads a model, whose own tokenizer they replace; see `tokenizer_config`."""
    group = parser.add_argument_group("Tokenizer (default: what --load names)")
    group.add_argument("--tokenizer-type", choices=TOKENIZER_TYPES, default=TokenizerConfig.tokenizer_type)
    _add_files(group)
    return group


def tokenizer_config(given: argparse.Namespace) -> TokenizerConfig:
    """The tokenizer section of a configuration, from the flags among `given`."""
    return TokenizerConfig(**{f.name: getattr(given, f.name) for f in fields(TokenizerConfig) if f.name in given})


def _add_files(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--vocab-file", metavar="FILE", help="vocab.json of a GPT-2 BPE")
    group.add_argument("--merge-file", metavar="FILE", help="merges.txt of a GPT-2 BPE")
    group.add_argument("--tokenizer-file", metavar="FILE", help="tokenizer.json, for HFTokenizer")


def build_tokenizer(
    tokenizer_type: str,
    vocab_file: str | Path | None = None,
    merge_file: str | Path | None = None,
    tokenizer_file: str | Path | None = None,
    *,
    eod_token: str = END_OF_TEXT,
) -> Tokenizer:
    """Build the tokenizer that --tokenizer-type names.

    UserError names the flag that is missing or belongs to the other type, the file that cannot be read, or what is
    wrong in it.
    """
    if tokenizer_type == GPT2BPETokenizer.name:
        if tokenizer_file is not None:
            raise UserError(f"--tokenizer-file is for --tokenizer-type {HFTokenizer.name}, not {tokenizer_type}")
        if vocab_file is None or merge_file is None:
            missing = "--vocab-file" if vocab_file is None else "--merge-file"
            raise UserError(
                f"--tokenizer-type {tokenizer_type} needs --vocab-file (vocab.json) and --merge-file (merges.txt): "
                f"{missing} is not given"
            )
        return GPT2BPETokenizer(vocab_file, merge_file, eod_token=eod_token)
    if tokenizer_type == HFTokenizer.name:
        if vocab_file is not None or merge_file is not None:
            extra = "--merge-file" if vocab_file is None else "--vocab-file"
            raise UserError(f"{extra} is for --tokenizer-type {GPT2BPETokenizer.name}, not {tokenizer_type}")
        if tokenizer_file is None:
            raise UserError(f"--tokenizer-type {tokenizer_type} needs --tokenizer-file (tokenizer.json)")
        return HFTokenizer(tokenizer_file, eod_token=eod_token)
    close = difflib.get_close_matches(tokenizer_type, TOKENIZER_TYPES, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]}?" if close else ""
    raise UserError(f"--tokenizer-type must be one of {', '.join(TOKENIZER_TYPES)}, not {tokenizer_type!r}{hint}")
