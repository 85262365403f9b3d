"""Readers that share no code with ours: `struct` over the bytes, JSON by its grammar, exact decimals."""

from __future__ import annotations

import itertools
import json
import re
import struct
from decimal import Context, Decimal, InvalidOperation, localcontext


def read_index_slowly(index: bytes, tokens: bytes) -> list[list[int]] | None:
    """The documents of an .idx and its .bin by the format's description; None where they break it."""
    letters = {1: "B", 2: "b", 3: "h", 4: "i", 5: "q", 8: "H"}
    if len(index) < 34 or index[:9] != b"MMIDIDX\0\0" or index[9:17] != bytes([1]) + bytes(7):
        return None
    sequences, indices = struct.unpack("<QQ", index[18:34])
    if index[17] not in letters or len(index) != 34 + 12 * sequences + 8 * indices or indices == 0:
        return None
    letter = letters[index[17]]
    width = struct.calcsize(letter)
    sizes = struct.unpack(f"<{sequences}i", index[34 : 34 + 4 * sequences])
    pointers = struct.unpack(f"<{sequences}q", index[34 + 4 * sequences : 34 + 12 * sequences])
    documents = struct.unpack(f"<{indices}q", index[34 + 12 * sequences :])
    if any(size < 0 for size in sizes) or len(tokens) != width * sum(sizes):
        return None
    if list(pointers) != [width * sum(sizes[:number]) for number in range(sequences)]:
        return None
    if documents[0] != 0 or documents[-1] != sequences or list(documents) != sorted(documents):
        return None
    flat_tokens = struct.unpack(f"<{sum(sizes)}{letter}", tokens)
    begins = [sum(sizes[:number]) for number in documents]
    return [list(flat_tokens[begin:end]) for begin, end in itertools.pairwise(begins)]


_JSON_TOKEN = re.compile(
    r'[ \t\r\n]*("(?:[^"\\\x00-\x1f]|\\["\\/bfnrt]|\\u[0-9a-fA-F]{4})*"'
    r"|-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?|true|false|null|[][{},:])[ \t\r\n]*"
)
_ESCAPES = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}


def read_line_slowly(line: bytes) -> str | None:
    """The text under "text" by RFC 8259; None where the line is no JSON object with a text that UTF-8 can hold."""
    try:
        rest, tokens = line.decode(), []
        while rest:
            match = _JSON_TOKEN.match(rest)
            if match is None:
                return None
            tokens.append(match[1])
            rest = rest[match.end() :]
        value = _value(tokens)
        found = value.get("text") if isinstance(value, dict) and not tokens else None
        return found if isinstance(found, str) and found.encode() else None
    except (UnicodeError, SyntaxError, IndexError):
        return None


def _value(tokens: list[str]) -> object:
    """Take one value from the front of `tokens`; of others than texts and objects only that they are there."""
    token = tokens.pop(0)
    if token.startswith('"'):
        units = re.sub(
            r"\\(?:u(....)|(.))", lambda m: chr(int(m[1], 16)) if m[1] else _ESCAPES.get(m[2], m[2]), token[1:-1]
        )
        return units.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")  # joins the pairs
    if token not in "[{":
        return _expect(token not in "]},:")
    found: dict[object, object] = {}
    end = {"[": "]", "{": "}"}[token]
    while tokens[0] != end:
        if found or tokens[0] == ",":
            _expect(bool(found) and tokens.pop(0) == ",")
        key: object = len(found)
        if token == "{":
            _expect(tokens[0].startswith('"'))
            key = _value(tokens)
            _expect(tokens.pop(0) == ":")
        found[key] = _value(tokens)
    tokens.pop(0)
    return found if token == "{" else list(found)


def _expect(condition: bool) -> None:
    if not condition:
        raise SyntaxError


def read_safetensors_slowly(content: bytes) -> dict[str, list[object]] | None:
    """Name -> [shape, bytes] of a safetensors file by the format's description; None where it cannot be read so."""
    try:
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        header.pop("__metadata__", None)
        begin = 8 + length
        return {
            name: [entry["shape"], content[begin + entry["data_offsets"][0] : begin + entry["data_offsets"][1]]]
            for name, entry in header.items()
        }
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, IndexError):
        return None


def exact_count(text: str) -> int | None:
    """A count by exact decimals."""
    text = text.strip()
    if "," in text:
        first, *rest = text.split(",")
        if not first.isascii() or not first.isdigit() or len(first) > 3 or any(len(part) != 3 for part in rest):
            return None
        text = text.replace(",", "")
    text = text.replace("_", "")
    factor = {"K": 3, "M": 6, "B": 9, "G": 9, "T": 12}.get(text[-1:], 0)
    text = text[:-1] if factor else text
    if not text.isascii() or text[-1:].isspace() or text[:1].isspace() or len(text.lower().partition("e")[2]) > 4:
        return None
    with localcontext(Context(prec=9999)):
        try:
            value = Decimal(text).scaleb(factor)
        except InvalidOperation:
            return None
    return int(value) if value.is_finite() and value == value.to_integral_value() else None
