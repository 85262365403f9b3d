"""WikiText-103's perplexity after Megatron-LM (Shoeybi et al. 2019): per word of the file, whatever the tokenizer.

The file is taken whole as one stream of tokens, and each token but the first is predicted once: those of the first
`seq_length` in one window, the others in windows that move on by a stride and predict only what the last one had not.
"""

from __future__ import annotations

import json
import re
from itertools import islice
from pathlib import Path

from megatron.errors import UserError
from megatron.evaluation.scoring import Piece, Scores
from megatron.instability.summary import perplexity_of
from megatron.tokenizer.base import TokenIds, Tokenizer, read_definition

# WikiText's own spacing, undone in Megatron-LM's order. One of its rules, on "' " before a digit, is left out: the
# slashes around its pattern, which other languages ask for, are part of it here, so that it applies to no text.
_FIRST = [("s '", "s'"), (" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", ".")]
_FIRST += [(f" {mark} ", f"{mark} ") for mark in ":;.!?,"]
_BRACKETS = [(re.compile(rf"\{opening}\s*([^\{closing}]*?)\s*\{closing}"), rf"{opening}\1{closing}")
             for opening, closing in ("()", "[]", "{}", '""', "''")]  # fmt: skip
_LAST = [(" ".join("=" * level), "=" * level) for level in (4, 3, 2)]
_LAST += [(" \N{DEGREE SIGN} ", "\N{DEGREE SIGN}"), (" \n", "\n"), ("\n ", "\n"), (" N ", " 1 "), (" 's", "'s")]


def detokenise(text: str) -> str:
    """WikiText's tokens, with blanks around every mark, as plain text."""
    for old, new in _FIRST:
        text = text.replace(old, new)
    for pattern, new in _BRACKETS:
        text = pattern.sub(new, text)
    for old, new in _LAST:
        text = text.replace(old, new)
    return text


def read_wikitext(path: Path, tokenizer: Tokenizer) -> tuple[TokenIds, int]:
    """The tokens of a wiki.*.tokens, detokenised, [tokens]; and the number of words as the file has them.

    Raises:
        UserError: for a file that cannot be read, is no UTF-8 text, is JSON lines, or holds less than two words.
    """
    content = read_definition(path, "--valid-data")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"--valid-data {path}:{line}: is not UTF-8 text; expected a wiki.test.tokens") from None
    if not text.strip():
        raise UserError(f"--valid-data {path}: is empty; expected a wiki.test.tokens")
    first = list(islice((line for line in text.split("\n") if line.strip()), 3))
    if all(_is_object(line) for line in first):
        raise UserError(
            f"--valid-data {path}: expected plain text, a wiki.test.tokens, found JSON lines: {first[0][:60]}"
        )
    words = len(text.strip().split(" "))
    tokens = tokenizer.encode_array(detokenise(text))
    if words < 2 or len(tokens) < 2:
        raise UserError(f"--valid-data {path}: expected at least two words, found {text.strip()[:60]!r}")
    return tokens, words


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def windows(tokens: TokenIds, seq_length: int, stride: int) -> list[Piece]:
    """Every token but the first as a target once. A stride of `seq_length` makes windows that do not overlap."""
    last = len(tokens) - 1
    pieces = [Piece(tokens[: seq_length + 1], min(seq_length, last))]
    for start in range(stride, last - seq_length + stride, stride):
        piece = tokens[start : start + seq_length + 1]
        pieces.append(Piece(piece, len(piece) - 1 - (seq_length - stride)))
    return pieces


def perplexities(scores: Scores, tokens: int, words: int) -> dict[str, float | int | None]:
    """Perplexity per token, and the adjusted one: per word of the file, exp(loss_sum / (words - 1))."""
    total = float(scores.losses.sum())
    loss = total / (tokens - 1)
    return {
        "adjusted_perplexity": perplexity_of(total / (words - 1)),
        "perplexity": perplexity_of(loss),
        "loss": loss,
        "tokens": tokens,
        "original_tokens": words,
    }
