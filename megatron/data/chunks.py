"""Input files as a stream of chunks: JSON lines, plain text and parquet, packed with gzip or zstd or not.

A chunk is some megabytes of whole records, still unparsed, so that parsing (`documents`) can be done by worker
processes; memory is bounded by the chunk, or the largest single document.
"""

from __future__ import annotations

import glob
import os
import re
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from megatron.data.unpacking import DAMAGED, PACKINGS, unpacked
from megatron.errors import UserError

FORMATS = {".jsonl": "jsonl", ".json": "jsonl", ".ndjson": "jsonl", ".txt": "text", ".parquet": "parquet"}
TEXT_UNITS = ("file", "paragraph", "line")
CHUNK_BYTES = 1 << 20
_ROWS_AT_ONCE = 256
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_BLANK_LINES = re.compile(rb"\n\s*\n")
_TO_LAST_BLANK_LINE = re.compile(rb"(?s:.*)\n\s*\n")


@dataclass(frozen=True)
class InputFile:
    """One file to read and what it holds."""

    path: Path
    format: str
    """jsonl, text or parquet."""
    unit: str
    """What of it is one document: file, paragraph, line or row."""
    packing: str
    """.gz, .zst or nothing."""


@dataclass(frozen=True)
class Chunk:
    """Whole records of one file."""

    file: InputFile
    first: int
    """Number of the first record: its line, or its row; from 1."""
    content: Any
    """Bytes; of a parquet file a dict of columns, key to list of values."""
    size: int
    """Bytes, unpacked."""


@dataclass(frozen=True)
class BadDocument:
    """A document that cannot be taken."""

    where: str
    """FILE:LINE"""
    why: str

    def __str__(self) -> str:
        return f"{self.where}: {self.why}"


@dataclass
class ReadPosition:
    """How far a pass over all files has come, in bytes as they stand on the disk."""

    total: int = 0
    finished: int = 0
    items: list[int] = field(default_factory=list)
    """How many chunks and bad documents each finished file has given."""
    _begin: int = 0
    """Where the reading began, if not at the first byte."""
    _open: IO[bytes] | None = field(default=None, repr=False)
    _ends: deque[int | None] = field(default_factory=deque, repr=False)
    """Where the reading was after each chunk and bad document that is not done yet."""
    _done: int | None = 0

    def fraction(self) -> float | None:
        """From 0 to 1, the share that is done of what there was to read; None while it is a pipe, which has no size."""
        done = self._done
        return None if done is None else min(1.0, (done - self._begin) / max(1, self.total - self._begin))

    def begin_here(self) -> None:
        """What lies before has been done by an earlier process."""
        self._begin = self._done = self._here() or 0

    def given(self) -> None:
        """One more chunk or bad document is on its way: reading is ahead of what is done."""
        self._ends.append(self._here())

    def done(self) -> None:
        """The oldest of those on their way is done."""
        self._done = self._ends.popleft()

    def _here(self) -> int | None:
        if self._open is None or self._open.closed:
            return self.finished
        return self.finished + self._open.tell() if self._open.seekable() else None


def find_inputs(
    patterns: Sequence[str], input_format: str | None = None, text_unit: str = TEXT_UNITS[0]
) -> list[InputFile]:
    """The files that `patterns` (paths and globs) name: in their order, each glob's files sorted by name.

    `input_format` is jsonl, text or parquet; without it the names' endings tell. `text_unit`, one of TEXT_UNITS, is
    what is one document in the plain text files. UserError for a pattern without a file, a directory, a file named
    twice, or an ending that tells nothing.
    """
    if not patterns:
        raise UserError("--input: no file is given")
    files: list[InputFile] = []
    seen: dict[Path, str] = {}
    for pattern in patterns:
        names = [pattern] if os.path.lexists(pattern) else sorted(glob.glob(pattern, recursive=True))
        if not names:
            raise UserError(f"--input {pattern}: no such file" + (" matches" if glob.has_magic(pattern) else ""))
        for name in names:
            path = Path(name)
            if path.is_dir():
                raise UserError(f"--input {name}: is a directory; name its files, for example '{path / '*.jsonl'}'")
            if not path.exists():
                raise UserError(f"--input {name}: is a link to a file that does not exist")
            if (real := path.resolve()) in seen:
                raise UserError(f"--input {name}: is named twice (by {seen[real]} and {pattern})")
            seen[real] = pattern
            files.append(_classify(path, input_format, text_unit))
    return files


def _classify(path: Path, input_format: str | None, text_unit: str) -> InputFile:
    packing = path.suffix.lower() if path.suffix.lower() in PACKINGS else ""
    ending = (Path(path.stem) if packing else path).suffix.lower()
    found = input_format or FORMATS.get(ending)
    if found is None:
        raise UserError(
            f"--input {path}: its ending does not tell what it holds; expected {', '.join(FORMATS)}, each also with "
            f"{' or '.join(PACKINGS)}; rename it or give --input-format"
        )
    if found == "parquet" and packing:
        raise UserError(f"--input {path}: a parquet file packed with {packing} cannot be read; unpack it")
    return InputFile(path, found, {"jsonl": "line", "text": text_unit, "parquet": "row"}[found], packing)


def read_chunks(
    files: Sequence[InputFile],
    keys: Sequence[str],
    max_document_bytes: int,
    position: ReadPosition,
    skip: int = 0,
) -> Iterator[Chunk | BadDocument]:
    """The records of all files in their order; a record that is much larger than `max_document_bytes`, and a file
    without any, as a BadDocument in its place; `position.done()` is for the caller to call after each of them.
    UserError for a file that cannot be read or unpacked.

    To go on where an earlier reading was: the files that `position.items` counts already are not opened, and the
    first `skip` items of the next one are read and not given.
    """
    position.total = sum(file.path.stat().st_size for file in files)
    before = len(position.items)
    position.finished = sum(file.path.stat().st_size for file in files[:before])
    position.begin_here()
    for file in files[before:]:
        try:
            with file.path.open("rb") as raw:
                position._open = raw
                number = 0
                for number, item in enumerate(_items(file, raw, keys, max_document_bytes), start=1):
                    if number > skip:
                        position.given()
                        yield item
                    elif number == skip:
                        position.begin_here()
                position.items.append(number)
                skip = 0
        except DAMAGED as error:
            raise UserError(f"{file.path}: is damaged or cut short, it cannot be unpacked ({error})") from None
        except OSError as error:
            raise UserError(f"{file.path}: cannot be read ({error.strerror or error})") from None
        position.finished += file.path.stat().st_size
        position._open = None


def _items(
    file: InputFile, raw: IO[bytes], keys: Sequence[str], max_document_bytes: int
) -> Iterator[Chunk | BadDocument]:
    """The chunks and bad documents of one file, at least one."""
    empty = True
    for item in _READERS[file.unit](file, raw, keys, max_document_bytes):
        if not _is_blank(item):
            empty = False
            yield item
    if empty:
        yield BadDocument(str(file.path), "the file is empty: it holds no document")


def _is_blank(item: Chunk | BadDocument) -> bool:
    content = item.content if isinstance(item, Chunk) else None
    return isinstance(content, bytes) and (not content or content.isspace())


def _read_separated(
    file: InputFile, raw: IO[bytes], keys: Sequence[str], max_document_bytes: int
) -> Iterator[Chunk | BadDocument]:
    """Chunks that end where a line ends, or where a paragraph has ended."""
    stream = unpacked(raw, file.packing)
    line = 1  # in which `rest` begins, or else `block`
    rest: list[bytes] = []  # the record begun in the blocks before
    rest_size = 0
    blank = True  # whether the line that `block` goes on with has been blank so far
    skipping = False  # inside a record that is too large
    block = stream.read(CHUNK_BYTES).removeprefix(_BYTE_ORDER_MARK)
    while block:
        if skipping:
            end = _end_of_record(file.unit, block, blank, last=False)
            line += block.count(b"\n", 0, end or len(block))
            skipping = end == 0
            blank = _ends_blank(block[: end or len(block)], blank)
            block = block[end or len(block) :]
        cut = _end_of_record(file.unit, block, blank, last=True)
        if cut:
            content = b"".join([*rest, block[:cut]])
            yield Chunk(file, line, content, len(content))
            line += content.count(b"\n")
            rest, rest_size = [], 0
        rest.append(block[cut:])
        rest_size += len(block) - cut
        blank = _ends_blank(block, blank)
        # What is less too large `_parse` finds; the blank line that may end a record is none of its size.
        if rest_size > max_document_bytes + CHUNK_BYTES and not blank:
            yield BadDocument(f"{file.path}:{line}", too_large(max_document_bytes))
            line += sum(part.count(b"\n") for part in rest)
            rest, rest_size, skipping = [], 0, True
        block = stream.read(CHUNK_BYTES)
    if rest_size:
        yield Chunk(file, line, b"".join(rest), rest_size)


def _end_of_record(unit: str, block: bytes, blank: bool, *, last: bool) -> int:
    """Where the first or the last record that ends in `block` has ended, its line end and blank lines included; or 0.

    `blank`: whether the line that `block` goes on with has been blank so far.
    """
    if unit == "line":
        return (block.rfind(b"\n") if last else block.find(b"\n")) + 1
    lead = b"\n" if blank else b""  # stands for the line end before it
    match = _TO_LAST_BLANK_LINE.match(lead + block) if last else _BLANK_LINES.search(lead + block)
    return match.end() - len(lead) if match else 0


def _ends_blank(block: bytes, blank: bool) -> bool:
    """Whether the last line of `block`, unfinished, is blank so far; `blank` as for `_end_of_record`."""
    begin = block.rfind(b"\n") + 1
    return (begin > 0 or blank) and (begin == len(block) or block[begin:].isspace())


def _read_text(
    file: InputFile, raw: IO[bytes], keys: Sequence[str], max_document_bytes: int
) -> Iterator[Chunk | BadDocument]:
    stream = unpacked(raw, file.packing)
    parts: list[bytes] = []
    size = 0
    while block := stream.read(CHUNK_BYTES):
        parts.append(block)
        size += len(block)
        if size > max_document_bytes:
            yield BadDocument(f"{file.path}:1", too_large(max_document_bytes) + _ONE_DOCUMENT)
            return
    if size:
        yield Chunk(file, 1, b"".join(parts).removeprefix(_BYTE_ORDER_MARK), size)


def _read_parquet(
    file: InputFile, raw: IO[bytes], keys: Sequence[str], max_document_bytes: int
) -> Iterator[Chunk | BadDocument]:
    import pyarrow  # noqa: PLC0415  (slow to load, and needed for these files only)
    import pyarrow.parquet  # noqa: PLC0415

    try:
        table = pyarrow.parquet.ParquetFile(raw, pre_buffer=False)
        if missing := [key for key in keys if key not in table.schema_arrow.names]:
            raise UserError(
                f"{file.path}: has no column {missing[0]!r}, which --json-keys names; "
                f"it has {', '.join(table.schema_arrow.names)}"
            )
        row = 1
        for batch in table.iter_batches(batch_size=_ROWS_AT_ONCE, columns=list(keys), use_threads=False):
            rows = max(1, batch.num_rows * CHUNK_BYTES // max(1, batch.nbytes))
            for start in range(0, batch.num_rows, rows):
                part = batch.slice(start, rows)
                yield Chunk(file, row, {key: part.column(key).to_pylist() for key in keys}, part.nbytes)
                row += part.num_rows
    except pyarrow.ArrowException as error:
        raise UserError(f"{file.path}: is no parquet file or is damaged ({error})") from None


_READERS = {"file": _read_text, "paragraph": _read_separated, "line": _read_separated, "row": _read_parquet}
_ONE_DOCUMENT = "; the whole text file is one: cut it with --text-unit paragraph or line"


def too_large(max_document_bytes: int) -> str:
    """Why such a document is bad."""
    return f"the document is larger than --max-document-mb {max_document_bytes / 1e6:g}"
