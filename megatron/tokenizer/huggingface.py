"""Any tokenizer.json, through Hugging Face's `tokenizers`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from megatron.errors import UserError
from megatron.tokenizer.base import END_OF_TEXT, TokenIds, fingerprint_of, read_definition, refuse_lone_surrogates


class HFTokenizer:
    """The tokenizer of a tokenizer.json: no special tokens are added, and those named in a text are taken as text."""

    name = "HFTokenizer"

    def __init__(self, tokenizer_file: str | Path, *, eod_token: str = END_OF_TEXT) -> None:
        """Read `tokenizer_file`; UserError where it is missing, broken, or has no `eod_token`."""
        content = read_definition(tokenizer_file, "--tokenizer-file")
        self._tokenizer = _parse(content, tokenizer_file)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._take_special_tokens_as_text()
        eod = self._tokenizer.token_to_id(eod_token)
        if eod is None:
            raise UserError(
                f"--tokenizer-file {tokenizer_file}: has no token {eod_token!r} to end a document with; "
                "name the one it has with --eod-token"
            )
        self.eod: int = eod
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.fingerprint = fingerprint_of(content)

    def _take_special_tokens_as_text(self) -> None:
        self._tokenizer.encode_special_tokens = True

    def __setstate__(self, state: dict[str, Any]) -> None:
        """On its way to a worker process the library's tokenizer forgets this setting."""
        self.__dict__.update(state)
        self._take_special_tokens_as_text()

    def encode(self, text: str) -> list[int]:
        """The token ids of `text`; UserError where it holds a lone surrogate."""
        refuse_lone_surrogates(text)
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def encode_array(self, text: str) -> TokenIds:
        """The token ids of `text`, `[tokens]`; UserError where it holds a lone surrogate."""
        return np.array(self.encode(text), dtype=np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, special tokens by their names; UserError for an id beyond the vocabulary."""
        listed = [int(index) for index in ids]
        if listed and not 0 <= min(listed) <= max(listed) < self.vocab_size:
            wrong = min(listed) if min(listed) < 0 else max(listed)
            raise UserError(f"token id {wrong} is not in the vocabulary of {self.vocab_size} tokens")
        text: str = self._tokenizer.decode(listed, skip_special_tokens=False)
        return text


def ids_of(tokenizer_file: str | Path) -> dict[str, int]:
    """Token -> id of a tokenizer.json; UserError for a broken file."""
    parsed = _parse(read_definition(tokenizer_file, "--tokenizer-file"), tokenizer_file)
    ids: dict[str, int] = parsed.get_vocab(with_added_tokens=True)
    return ids


def _parse(content: bytes, path: str | Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # tokenizers raises plain Exception for whatever it cannot read
        raise UserError(f"--tokenizer-file {path}: is not a tokenizer.json ({error})") from None
