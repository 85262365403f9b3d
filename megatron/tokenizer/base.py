"""What a tokenizer is to the rest of the trainer."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from megatron.errors import UserError

END_OF_TEXT = "<|endoftext|>"

TokenIds = npt.NDArray[np.int32]


class Tokenizer(Protocol):
    """Text to token ids and back. It can be sent to another process."""

    name: str
    """The value of --tokenizer-type that builds it."""

    vocab_size: int
    """Number of ids, before padding: every id that encode() returns is smaller."""

    eod: int
    """The id that ends a document. encode() never returns it: its name in a document is taken as plain text."""

    fingerprint: str
    """sha256 of the files that define it, in hexadecimal."""

    def encode(self, text: str) -> list[int]:
        """The token ids of `text`; none for the empty string. UserError where `text` holds a lone surrogate."""
        ...

    def encode_array(self, text: str) -> TokenIds:
        """The same ids as `encode`, as an array `[tokens]`: less memory, and faster for long documents."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; bytes that are no UTF-8 (a cut character) become U+FFFD."""
        ...


def refuse_lone_surrogates(text: str) -> None:
    """Raise UserError where `text` holds half a surrogate pair: it has no UTF-8 form and so no tokens.

    JSON can spell one ("\\ud800"). Replacing it silently would give back another text than went in.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        found = f"U+{ord(text[error.start]):04X}"
        raise UserError(
            f"the text holds the lone surrogate {found} at character {error.start}, "
            "which no UTF-8 text can hold; repair or remove it"
        ) from None


def read_definition(path: str | Path, flag: str) -> bytes:
    """The bytes of the file that `flag` names; UserError that names both where it cannot be read."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        where = "" if Path(path).is_absolute() else f", seen from {Path.cwd()}"
        raise UserError(f"{flag} {path}: cannot be read ({error.strerror or error}{where})") from None


def fingerprint_of(*contents: bytes) -> str:
    """sha256 over the digests of `contents`, in hexadecimal: the order counts, the paths do not."""
    total = hashlib.sha256()
    for content in contents:
        total.update(hashlib.sha256(content).digest())
    return total.hexdigest()
