"""GPT-2's byte-level BPE from vocab.json and merges.txt, encoded by tiktoken.

tiktoken merges the adjacent pair whose *joined bytes* have the lowest rank; the original merges the adjacent
*pair* that stands first in merges.txt. Both give the same ids exactly when every token comes from one merge of
tokens made before it, and its bytes, encoded by the merges, give the token itself. Every trained vocabulary is so;
`_check_merges` and `_check_closed` refuse files that are not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import tiktoken
import tokenizers

from megatron.errors import UserError
from megatron.tokenizer.base import END_OF_TEXT, TokenIds, fingerprint_of, read_definition, refuse_lone_surrogates

# The pattern of the original, 's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+, with
# possessive quantifiers, which match the same and do not backtrack.
_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""

_WHITE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # Unicode White_Space: the pattern's \s
_SAFE_CUT = re.compile(rf"(?<=[^{_WHITE}])(?=[{_WHITE}])|(?<=[{_WHITE}])(?=[{_WHITE}][^{_WHITE}])")
_PIECE_CHARACTERS = 1 << 18
"""Longer documents are encoded piece by piece. It bounds the memory of tiktoken's list of Python integers, and keeps
a run of white space below the million characters at which the pattern's one backtracking part overflows its stack."""


def byte_alphabet() -> dict[str, int]:
    """The character that stands for each byte in vocab.json and merges.txt (GPT-2's bytes_to_unicode, inverted)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


def safe_pieces(text: str, limit: int = _PIECE_CHARACTERS) -> Iterator[str]:
    """Cut `text` where GPT-2's pattern always ends a match, so that the pieces' tokens are the text's tokens.

    Two places are safe: before white space that follows something else, and before the last character of a run of
    white space that something else follows. A piece is `limit` characters long, and on to the next such place.
    """
    start = 0
    while len(text) - start > limit:
        cut = _SAFE_CUT.search(text, start + limit)
        if cut is None:
            break
        yield text[start : cut.start()]
        start = cut.start()
    if start < len(text):
        yield text[start:]


class GPT2BPETokenizer:
    """The tokenizer of GPT-2, equal to Hugging Face's GPT2Tokenizer on every text."""

    name = "GPT2BPETokenizer"

    def __init__(
        self,
        vocab_file: str | Path,
        merge_file: str | Path,
        *,
        eod_token: str = END_OF_TEXT,
    ) -> None:
        """Read the two files.

        UserError names the file, and the line of merges.txt, where they are missing, broken or disagree.
        """
        vocab_bytes = read_definition(vocab_file, "--vocab-file")
        merge_bytes = read_definition(merge_file, "--merge-file")
        vocab = _parse_vocab(vocab_bytes, vocab_file)
        if eod_token not in vocab:
            raise UserError(
                f"--vocab-file {vocab_file}: has no token {eod_token!r} to end a document with; "
                "name the one it has with --eod-token"
            )
        merges = _parse_merges(merge_bytes, merge_file)
        alphabet = byte_alphabet()
        for character, byte in alphabet.items():
            if character not in vocab:
                raise UserError(f"--vocab-file {vocab_file}: has no token {character!r} for the byte 0x{byte:02x}")
        _check_merges(merges, vocab, alphabet, vocab_file, merge_file)
        _check_closed(merges, vocab, merge_file)

        self.vocab_size = max(vocab.values()) + 1
        self.eod = vocab[eod_token]
        self.fingerprint = fingerprint_of(vocab_bytes, merge_bytes)
        made = [*sorted(alphabet, key=vocab.__getitem__), *(left + right for _, left, right in merges)]
        to_byte = {ord(character): byte for character, byte in alphabet.items()}
        encoded = {token: token.translate(to_byte).encode("latin-1") for token in made}
        ids = [vocab[token] for token in made]
        # tiktoken's rank is both the merge's priority and the id it returns: ids that do not follow the order of
        # the merges are looked up afterwards.
        in_order = all(a < b for a, b in pairwise(ids[len(alphabet) :]))
        self._id_of_rank = None if in_order else np.array(ids, dtype=np.int32)
        ranks = ids if in_order else range(len(ids))
        self._encoding = tiktoken.Encoding(
            self.name,
            pat_str=_PATTERN,
            mergeable_ranks=dict(zip(encoded.values(), ranks, strict=True)),
            special_tokens={},
        )
        self._bytes_of_id = {vocab[token]: content for token, content in encoded.items()}
        for token in vocab.keys() - encoded.keys():  # special tokens, by their names
            spelled = all(character in alphabet for character in token)
            content = token.translate(to_byte).encode("latin-1") if spelled else token.encode("utf-8")
            self._bytes_of_id[vocab[token]] = content

    def encode_array(self, text: str) -> TokenIds:
        """The token ids of `text`, `[tokens]`; UserError where it holds a lone surrogate."""
        refuse_lone_surrogates(text)
        parts = [np.array(self._encoding.encode_ordinary(piece), dtype=np.int32) for piece in safe_pieces(text)]
        if not parts:
            return np.empty(0, dtype=np.int32)
        ranks = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return ranks if self._id_of_rank is None else self._id_of_rank[ranks]

    def encode(self, text: str) -> list[int]:
        """The token ids of `text`; UserError where it holds a lone surrogate."""
        ids: list[int] = self.encode_array(text).tolist()
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD. UserError for an id without a token."""
        table = self._bytes_of_id
        try:
            return b"".join([table[index] for index in ids]).decode("utf-8", errors="replace")
        except KeyError as error:
            raise UserError(f"token id {error.args[0]} is not in the vocabulary of {self.vocab_size} tokens") from None


def ids_of(vocab_file: str | Path) -> dict[str, int]:
    """Token -> id of a vocab.json; UserError for a broken file."""
    return _parse_vocab(read_definition(vocab_file, "--vocab-file"), vocab_file)


def _parse_vocab(content: bytes, path: str | Path) -> dict[str, int]:
    """The object of vocab.json, token to id."""
    try:
        vocab = json.loads(content.decode("utf-8"))
    except ValueError as error:
        raise UserError(f"--vocab-file {path}: is not valid JSON ({error})") from None
    if not isinstance(vocab, dict) or not vocab:
        raise UserError(f"--vocab-file {path}: expected a JSON object of tokens and ids, as GPT-2's vocab.json")
    taken: dict[int, str] = {}
    for token, index in vocab.items():
        if type(index) is not int or not 0 <= index < 2**31:
            raise UserError(f"--vocab-file {path}: the id of {token!r} must be an integer from 0, not {index!r}")
        if index in taken:
            raise UserError(f"--vocab-file {path}: {taken[index]!r} and {token!r} have the same id {index}")
        taken[index] = token
    return vocab


def _parse_merges(content: bytes, path: str | Path) -> list[tuple[int, str, str]]:
    """(line, left, right) of each merge, in order of priority."""
    try:
        lines = content.decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        broken = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"--merge-file {path}:{broken}: is not UTF-8 text") from None
    merges = []
    for number, raw in enumerate(lines, start=1):
        line = raw.rstrip("\r")
        if not line or (number == 1 and line.startswith("#version")):
            continue
        parts = line.split(" ")
        if len(parts) != 2 or not all(parts):
            raise UserError(f"--merge-file {path}:{number}: expected two tokens with one space between, found {line!r}")
        merges.append((number, parts[0], parts[1]))
    return merges


def _check_merges(
    merges: list[tuple[int, str, str]],
    vocab: dict[str, int],
    alphabet: dict[str, int],
    vocab_file: str | Path,
    merge_file: str | Path,
) -> None:
    """Every merge joins two tokens made before it into one that is in the vocabulary and was not made before."""
    made = dict.fromkeys(alphabet, 0)
    for line, left, right in merges:
        token = left + right
        if left in made and right in made and token in vocab and token not in made:
            made[token] = line
            continue
        where = f"--merge-file {merge_file}:{line}"
        for part in (left, right):
            if part not in made:
                raise UserError(f"{where}: joins {part!r}, which is neither one byte nor made by a line above")
        if token in made:
            raise UserError(f"{where}: makes {token!r} a second time, after line {made[token]}")
        raise UserError(
            f"{where}: makes {token!r}, which is not in --vocab-file {vocab_file}; do the files belong together?"
        )


def _check_closed(merges: list[tuple[int, str, str]], vocab: dict[str, int], merge_file: str | Path) -> None:
    """Every token's own bytes encode to that token: without it tiktoken and the original could differ."""
    model = tokenizers.models.BPE(vocab=vocab, merges=[(left, right) for _, left, right in merges])
    for line, left, right in merges:
        token = left + right
        if [part.value for part in model.tokenize(token)] != [token]:
            raise UserError(
                f"--merge-file {merge_file}:{line}: makes {token!r}, but the merges above it lead elsewhere, so it "
                "could never be used; the lines are out of their order"
            )
