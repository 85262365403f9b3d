"""From the tokenizer flags to a tokenizer."""

from __future__ import annotations

import argparse
import difflib
from dataclasses import dataclass, fields
from pathlib import Path

from megatron.config import TokenizerConfig
from megatron.errors import CommandLineError, UserError
from megatron.flags import some_text
from megatron.old_flags import aliases
from megatron.tokenizer import gpt2_bpe, huggingface
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
    eod_token: str | None = None
    """None: END_OF_TEXT."""

    def build(self) -> Tokenizer:
        """The tokenizer; see `build_tokenizer`."""
        return build_tokenizer(
            self.tokenizer_type,
            self.vocab_file,
            self.merge_file,
            self.tokenizer_file,
            eod_token=self.eod_token,
        )


def add_file_flags(group: argparse._ArgumentGroup, eod_default: str = END_OF_TEXT) -> None:
    """Add the flags, other than --tokenizer-type, that `TokenizerFiles` holds to a tool's command line."""
    group.add_argument(
        "--vocab-file", *aliases("vocab_file"), type=some_text, metavar="FILE", help="vocab.json of a GPT-2 BPE"
    )
    group.add_argument("--merge-file", type=some_text, metavar="FILE", help="merges.txt of a GPT-2 BPE")
    group.add_argument("--tokenizer-file", type=some_text, metavar="FILE", help="tokenizer.json, for HFTokenizer")
    group.add_argument("--eod-token", metavar="TOKEN", help=f"the token that ends a document (default: {eod_default})")


def add_tokenizer_flags(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Add the flags of a tool that loads a model, whose own tokenizer they replace; see `tokenizer_config`."""
    group = parser.add_argument_group("Tokenizer (default: what --load names)")
    group.add_argument(
        "--tokenizer-type",
        choices=TOKENIZER_TYPES,
        help="of the files that are given (default: by the files)",
    )
    add_file_flags(group, f"what --load names, else {END_OF_TEXT}")
    return group


def tokenizer_config(given: argparse.Namespace) -> TokenizerConfig:
    """The tokenizer section of a configuration, from the flags among `given`.

    Raises CommandLineError for a --tokenizer-type without its files.
    """
    values = {f.name: value for f in fields(TokenizerConfig) if (value := getattr(given, f.name, None)) is not None}
    flags = TokenizerConfig(**values)
    if "tokenizer_type" in values:
        try:
            _require_files(flags.tokenizer_type, flags.vocab_file, flags.merge_file, flags.tokenizer_file)
        except UserError as error:
            raise CommandLineError(str(error)) from None
    return flags


def names_files(flags: TokenizerConfig) -> bool:
    """Whether `flags` say which files a tokenizer is made of, be it half."""
    given = flags.vocab_file or flags.merge_file or flags.tokenizer_file
    return bool(given) or flags.tokenizer_type != TokenizerConfig.tokenizer_type


def named_tokenizer(flags: TokenizerConfig) -> Tokenizer | None:
    """The tokenizer whose files `flags` name; None where they name none.

    UserError as of `build_tokenizer`, and for --vocab-size beside files or --eod-token without them.
    """
    if names_files(flags):
        if flags.vocab_size is not None:
            raise UserError("--vocab-size is for a model without a tokenizer's files: drop it")
        return build_tokenizer(
            flags.tokenizer_type, flags.vocab_file, flags.merge_file, flags.tokenizer_file, eod_token=flags.eod_token
        )
    if flags.eod_token is not None:
        raise UserError(
            f"--eod-token {flags.eod_token} is a tokenizer's: give --vocab-file and --merge-file, or --tokenizer-file, "
            "too, or drop it"
        )
    return None


def tokens_of(flags: TokenizerConfig) -> dict[int, str]:
    """Id -> token, of the files that `flags` name. UserError for a file that is missing or broken."""
    files = flags.vocab_file, flags.merge_file, flags.tokenizer_file
    _require_files(_kind(flags.tokenizer_type, *files), *files)
    whole = flags.tokenizer_file
    ids = gpt2_bpe.ids_of(str(flags.vocab_file)) if whole is None else huggingface.ids_of(whole)
    return {index: token for token, index in ids.items()}


def first_difference(given: TokenizerConfig, expected: TokenizerConfig) -> str | None:
    """Where an id is another token's in the one's files than in the other's, of whatever kinds; None: nowhere.

    UserError as of `tokens_of`.
    """
    found, tokens = tokens_of(given), tokens_of(expected)
    for index in sorted(found.keys() & tokens.keys()):
        if found[index] != tokens[index]:
            return f"expected {tokens[index]!r} for the id {index}, found {found[index]!r}"
    return None


def build_tokenizer(
    tokenizer_type: str,
    vocab_file: str | Path | None = None,
    merge_file: str | Path | None = None,
    tokenizer_file: str | Path | None = None,
    *,
    eod_token: str | None = None,
) -> Tokenizer:
    """Build the tokenizer that --tokenizer-type names; a document ends with `eod_token`, None: END_OF_TEXT.

    A --tokenizer-file alone is an HFTokenizer's, whatever the default is.

    UserError names the flag that is missing or belongs to the other type, the file that cannot be read, or what is
    wrong in it.
    """
    tokenizer_type = _kind(tokenizer_type, vocab_file, merge_file, tokenizer_file)
    _require_files(tokenizer_type, vocab_file, merge_file, tokenizer_file)
    end = END_OF_TEXT if eod_token is None else eod_token
    if tokenizer_file is not None:
        return HFTokenizer(tokenizer_file, eod_token=end)
    return GPT2BPETokenizer(str(vocab_file), str(merge_file), eod_token=end)


def _kind(
    tokenizer_type: str,
    vocab_file: str | Path | None,
    merge_file: str | Path | None,
    tokenizer_file: str | Path | None,
) -> str:
    """The type, which a --tokenizer-file alone changes where it is the default: a Config does not say who chose it."""
    alone = tokenizer_file is not None and vocab_file is None and merge_file is None
    return HFTokenizer.name if alone and tokenizer_type == TokenizerConfig.tokenizer_type else tokenizer_type


def _require_files(
    tokenizer_type: str,
    vocab_file: str | Path | None,
    merge_file: str | Path | None,
    tokenizer_file: str | Path | None,
) -> None:
    """Raise UserError unless the files are those, and all, that a tokenizer of this type is made of."""
    if tokenizer_type == GPT2BPETokenizer.name:
        if tokenizer_file is not None:
            raise UserError(f"--tokenizer-file is for --tokenizer-type {HFTokenizer.name}, not {tokenizer_type}")
        if vocab_file is None or merge_file is None:
            missing = "--vocab-file" if vocab_file is None else "--merge-file"
            raise UserError(
                f"--tokenizer-type {tokenizer_type} needs --vocab-file (vocab.json) and --merge-file (merges.txt): "
                f"{missing} is not given"
            )
    elif tokenizer_type == HFTokenizer.name:
        if vocab_file is not None or merge_file is not None:
            extra = "--merge-file" if vocab_file is None else "--vocab-file"
            raise UserError(f"{extra} is for --tokenizer-type {GPT2BPETokenizer.name}, not {tokenizer_type}")
        if tokenizer_file is None:
            raise UserError(f"--tokenizer-type {tokenizer_type} needs --tokenizer-file (tokenizer.json)")
    else:
        close = difflib.get_close_matches(tokenizer_type, TOKENIZER_TYPES, n=1, cutoff=0.5)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise UserError(f"--tokenizer-type must be one of {', '.join(TOKENIZER_TYPES)}, not {tokenizer_type!r}{hint}")
