"""Documents out of chunks of input files: JSON lines, plain text and rows of parquet parsed and checked.

JSON lines: one object a line; blank lines (white space alone) are passed over. Plain text: the file is one document,
or each paragraph, or each line that is not blank. Parquet: a row is one document.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron.data.chunks import BadDocument, Chunk, InputFile, ReadPosition, read_chunks, too_large
from megatron.data.progress_line import ProgressLine
from megatron.errors import UserError

_BLANK_LINES_OR_END = re.compile(rb"\n\s*(?:\n|\Z)")


@dataclass(frozen=True)
class Document:
    """A document that can be encoded."""

    where: str
    """FILE:LINE"""
    texts: list[str]
    """In the order of the keys."""


def parse_chunk(chunk: Chunk, keys: Sequence[str], max_document_bytes: int) -> Iterator[Document | BadDocument]:
    """The document of each record, its texts in the order of `keys`, or why it cannot be taken."""
    path, unit, plain = chunk.file.path, chunk.file.unit, chunk.file.format == "text"
    if unit == "row":
        for number, values in enumerate(zip(*(chunk.content[key] for key in keys), strict=True), start=chunk.first):
            yield _checked(dict(zip(keys, values, strict=True)), keys, f"{path}:row {number}", max_document_bytes)
        return
    for number, content in _RECORDS[unit](chunk):
        record = content.removesuffix(b"\r") if plain and unit != "file" else content
        yield _parse(record, keys, path, number, max_document_bytes, plain=plain)


def _lines(chunk: Chunk) -> Iterator[tuple[int, bytes]]:
    for number, line in enumerate(chunk.content.split(b"\n"), start=chunk.first):
        if line and not line.isspace():
            yield number, line


def _paragraphs(chunk: Chunk) -> Iterator[tuple[int, bytes]]:
    content, number, begin = b"\n" + chunk.content, chunk.first, 1
    for blank_lines in _BLANK_LINES_OR_END.finditer(content):
        if begin < blank_lines.start():
            yield number, content[begin : blank_lines.start()]
        number += content.count(b"\n", begin, blank_lines.end())
        begin = blank_lines.end()
    if begin < len(content):
        yield number, content[begin:]


_RECORDS = {"file": lambda chunk: [(chunk.first, chunk.content)], "paragraph": _paragraphs, "line": _lines}
"""(number of the first line, content without the last line's end) of each record of a chunk."""


def _parse(
    content: bytes, keys: Sequence[str], path: Path, line: int, max_document_bytes: int, *, plain: bool
) -> Document | BadDocument:
    where = f"{path}:{line}"
    if len(content) > max_document_bytes:
        return BadDocument(where, too_large(max_document_bytes))
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        where = f"{path}:{line + content.count(10, 0, error.start)}"
        return BadDocument(where, f"is not valid UTF-8 (byte 0x{content[error.start]:02x}: {error.reason})")
    if plain:
        return _checked(dict.fromkeys(keys, text), keys, where, max_document_bytes)
    try:
        return _checked(json.loads(text), keys, where, max_document_bytes)
    except json.JSONDecodeError as error:
        fault = error.msg.removesuffix(" starting at")
        return BadDocument(where, f"is not valid JSON ({fault} at column {error.colno})")
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets nested without end
        return BadDocument(where, f"is not JSON that can be read ({error})")


def _checked(record: object, keys: Sequence[str], where: str, max_document_bytes: int) -> Document | BadDocument:
    if not isinstance(record, dict):
        return BadDocument(where, f"expected a JSON object, found {_kind(record)}")
    texts = []
    for key in keys:
        if key not in record:
            found = ", ".join(repr(name) for name in list(record)[:8]) or "none"
            return BadDocument(where, f"has no key {key!r}, which --json-keys names (its keys: {found})")
        text = record[key]
        if not isinstance(text, str):
            return BadDocument(where, f"{key!r} must be a string, not {_kind(text)}")
        if not text:
            return BadDocument(where, f"{key!r} is empty: the document holds no text")
        if len(text) > max_document_bytes:
            return BadDocument(where, too_large(max_document_bytes))
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            return BadDocument(
                where,
                f"{key!r} holds the lone surrogate U+{ord(text[error.start]):04X}, which no UTF-8 text can hold",
            )
        texts.append(text)
    return Document(where, texts)


def _kind(value: object) -> str:
    names = {
        bytes: "bytes",
        dict: "an object",
        list: "a list",
        str: "a string",
        bool: "true or false",
        type(None): "null",
    }
    return names.get(type(value), "a number")


def read_texts(
    files: Sequence[InputFile], keys: Sequence[str], max_document_bytes: int = 1 << 27, log_interval: int = 0
) -> Iterator[str]:
    """Every text of `files`, one after another; UserError at the first that cannot be taken.

    `log_interval`: documents between two progress lines, on stderr; 0: none.
    """
    position = ReadPosition()
    documents = size = 0
    with ProgressLine(log_interval, position) as line:
        for item in read_chunks(files, keys, max_document_bytes, position):
            if isinstance(item, BadDocument):
                raise UserError(str(item))
            for document in parse_chunk(item, keys, max_document_bytes):
                if isinstance(document, BadDocument):
                    raise UserError(str(document))
                documents += 1
                yield from document.texts
            size += item.size
            position.done()
            line.update(documents, size)
