"""Numbers as people write them, alone and in lists of stages."""

from __future__ import annotations

import re
from fractions import Fraction
from itertools import pairwise

from megatron.errors import UserError

SUFFIXES = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9, "T": 10**12}


def parse_count(text: str) -> int:
    """An exact int from 157e9, 0.5M, 300K, 30B, 1_000 or 1,000.

    Raises:
        ValueError: when the text is no number or no whole one.
    """
    text = text.strip()
    if re.fullmatch(r"[0-9]{1,3}(,[0-9]{3})+", text):
        text = text.replace(",", "")
    match = re.fullmatch(r"([+-]?[0-9.]+(?:[eE][+-]?[0-9]{1,3})?)([KMBGT]?)", text.replace("_", ""))
    if match is None:
        raise ValueError(text)
    value = Fraction(match[1]) * SUFFIXES[match[2]]
    if value.denominator != 1:
        raise ValueError(text)
    return int(value)


def parse_pairs(flag: str, text: str, *, open_end: bool) -> tuple[list[int], list[int]]:
    """The values and the counts of `128:20K,1024:100`; with `open_end` the last value has none: `128:20K,1024`.

    Raises:
        UserError: naming `flag`, where the text has another form or a number is not positive.
    """
    form = "VALUE:LAST,...,VALUE such as 128:20000,1024" if open_end else "VALUE:COUNT,... such as 128:900,1024:100"
    values: list[int] = []
    counts: list[int] = []
    parts = text.split(",")
    for number, part in enumerate(parts, start=1):
        words = part.split(":")
        try:
            if len(part) > 40 or len(words) != (1 if open_end and number == len(parts) else 2):
                raise ValueError(part)
            value, *count = map(parse_count, words)
            if min([value, *count]) < 1:
                raise ValueError(part)
        except ValueError:
            raise UserError(f"{flag} {text}: expected {form}, found {part!r}") from None
        values.append(value)
        counts += count
    return values, counts


def require_rising(flag: str, text: str, counts: list[int]) -> None:
    """Raise UserError, naming `flag`, unless each stage ends after the one before."""
    if any(b <= a for a, b in pairwise(counts)):
        raise UserError(f"{flag} {text}: the ends of the stages must rise, found {counts}")
