"""Where a preprocessing run stands, kept beside its unfinished output so that the same command can go on from there."""

from __future__ import annotations

import glob
import importlib.metadata
import json
import logging
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron.data.chunks import CHUNK_BYTES, BadDocument, InputFile
from megatron.data.indexed_writer import PartWritten
from megatron.files import file_errors, write_atomic
from megatron.tokenizer.base import Tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ResumePoint:
    """So many items (chunks and bad documents) of the input are done, and their tokens are on the disk."""

    run: dict[str, Any]
    """`describe` of the run: only one that is described alike may go on from here."""
    items: list[int] = field(default_factory=list)
    """Items of each input file that is done, in the order of the files."""
    skip: int = 0
    """Items that are done of the file after those."""
    documents: int = 0
    input_bytes: int = 0
    """Unpacked."""
    seconds: float = 0.0
    skipped: list[BadDocument] = field(default_factory=list)
    parts: list[PartWritten] = field(default_factory=list)
    """One for each key; none at the beginning."""

    def to_json(self) -> str:
        """One JSON object, with the CRC-32 of what it says."""
        point = asdict(self)
        return json.dumps({"crc32": zlib.crc32(json.dumps(point).encode()), "point": point}) + "\n"


def describe(
    files: Sequence[InputFile], keys: Sequence[str], tokenizer: Tokenizer, append_eod: bool, max_document_bytes: int
) -> dict[str, Any]:
    """All that the output and its cut into items follow from, by the name it has in a message."""
    inputs = [(file, file.path.stat()) for file in files]
    return {
        "input": [[str(f.path), f.format, f.unit, f.packing, s.st_size, s.st_mtime_ns] for f, s in inputs],
        "--json-keys": list(keys),
        "tokenizer": [tokenizer.name, tokenizer.fingerprint, tokenizer.vocab_size, tokenizer.eod],
        "--append-eod": append_eod,
        "--max-document-mb": max_document_bytes,
        "version": [CHUNK_BYTES, *map(importlib.metadata.version, ("pyarrow", "tokenizers", "tiktoken"))],
    }


def where_done(counts: Sequence[int], items: int) -> tuple[list[int], int]:
    """(items of each file that is done, items that are done of the next) after `items` in all.

    `counts` are the items of each file that has been read to its end: reading is ahead of what is done.
    """
    for number, count in enumerate(counts):
        if count > items:
            return list(counts[:number]), items
        items -= count
    return list(counts), items


def read_point(path: Path, run: dict[str, Any]) -> ResumePoint | None:
    """The point that a stopped run has left in `path`; None, and a warning, where `run` may not go on from it.

    UserError where the file cannot be read.
    """
    if not path.exists():
        return None
    with file_errors("read", path):
        content = path.read_bytes()
    try:
        parsed = json.loads(content)
        fields = parsed["point"]
        if zlib.crc32(json.dumps(fields).encode()) != parsed["crc32"]:
            raise ValueError("its content does not match its digest")
        skipped = [BadDocument(**bad) for bad in fields.pop("skipped")]
        parts = [PartWritten(**part) for part in fields.pop("parts")]
        point = ResumePoint(**fields, skipped=skipped, parts=parts)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        logger.warning("%s: damaged (%s): starting from the beginning", path, error)
        return None
    if changed := [name for name in run if run[name] != point.run.get(name)]:
        logger.warning("%s: not the same %s as before: starting from the beginning", path, ", ".join(changed))
        return None
    return point


def write_point(path: Path, point: ResumePoint) -> None:
    """Replace `path` with `point`. UserError where that cannot be written."""
    write_atomic(path, point.to_json())


def delete_point(path: Path) -> None:
    """Delete `path`, if it is there. UserError where that cannot be done."""
    with file_errors("delete", path):
        path.unlink(missing_ok=True)


def delete_leftovers(path: Path) -> None:
    """Delete what a process that was killed in `write_point` has left beside `path`. UserError as `delete_point`."""
    with file_errors("delete", path):
        for left in path.parent.glob(f".{glob.escape(path.name)}.tmp-*"):
            left.unlink(missing_ok=True)
