"""Raw text to PREFIX_KEY_document.bin/.idx: worker processes parse and encode, this one reads and writes.

The files are the same byte for byte whatever the number of workers, and so is the first error. A long run saves its
point from time to time; the same command goes on from there after a crash, and ends with the same files.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron.data.chunks import (
    CHUNK_BYTES,
    TEXT_UNITS,
    BadDocument,
    Chunk,
    InputFile,
    ReadPosition,
    find_inputs,
    read_chunks,
)
from megatron.data.documents import Document, parse_chunk
from megatron.data.indexed_dataset import best_dtype, paths_of
from megatron.data.indexed_writer import IndexedDatasetWriter, PartLostError, PartWritten
from megatron.data.progress_line import ProgressLine
from megatron.data.resuming import (
    ResumePoint,
    delete_leftovers,
    delete_point,
    describe,
    read_point,
    where_done,
    write_point,
)
from megatron.errors import UserError
from megatron.tokenizer.base import Tokenizer
from megatron.tokenizer.build import TokenizerFiles

SAVE_SECONDS = 30.0
"""A run saves its point this often, so it loses no more to a crash."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreprocessConfig:
    """What tools/preprocess_data.py is asked to do."""

    input: Sequence[str]
    """Files and globs."""
    output_prefix: str
    tokenizer: TokenizerFiles
    json_keys: Sequence[str] = ("text",)
    input_format: str | None = None
    """jsonl, text or parquet; None: by the files' endings."""
    text_unit: str = TEXT_UNITS[0]
    """What is one document in a plain text file: file, paragraph or line."""
    append_eod: bool = False
    workers: int = 1
    log_interval: int = 1000
    """Documents between two progress lines; 0: none."""
    skip_bad: int = 0
    """So many bad documents are passed over and counted; one more is an error."""
    max_document_mb: float = 128
    """Largest document (line, paragraph, text file, row), in 10^6 bytes."""
    overwrite: bool = False
    """Replace a dataset that stands under the output's name."""

    def __post_init__(self) -> None:
        for flag, value in (
            ("--workers", self.workers - 1),
            ("--log-interval", self.log_interval),
            ("--skip-bad", self.skip_bad),
        ):
            if value < 0:
                raise UserError(f"{flag} must be at least {1 if flag == '--workers' else 0}")
        if not 0 < self.max_document_mb <= 1024:
            raise UserError(f"--max-document-mb must be above 0 and at most 1024, not {self.max_document_mb:g}")
        if not self.json_keys or len(set(self.json_keys)) != len(self.json_keys):
            raise UserError(f"--json-keys must be different names, at least one, not {' '.join(self.json_keys)!r}")
        for key in self.json_keys:
            if not key or "/" in key:
                raise UserError(f"--json-keys {key!r} cannot be part of a file name")

    @property
    def max_document_bytes(self) -> int:
        return int(self.max_document_mb * 1e6)


@dataclass
class Summary:
    """What was read and written."""

    prefixes: list[str]
    documents: int = 0
    tokens: int = 0
    """Over all keys, with the end-of-document tokens."""
    input_bytes: int = 0
    """Unpacked."""
    seconds: float = 0.0
    skipped: list[BadDocument] = field(default_factory=list)


@dataclass(frozen=True)
class _Encoded:
    """What a worker gives back for a chunk."""

    size: int
    documents: int
    tokens: list[npt.NDArray[Any]]
    """For each key, `[sum of lengths]`."""
    lengths: list[npt.NDArray[np.int64]]
    """For each key, `[documents]`."""
    bad: list[BadDocument]


def preprocess(config: PreprocessConfig) -> Summary:
    """Encode every document of `config.input` into one dataset for each key.

    UserError where a dataset stands there already, unless it may be replaced; for bad input, naming the file and line;
    and where a worker dies. Then nothing more stands under a final name, and what was saved before is kept under
    temporary ones, for the same command to go on from.
    """
    tokenizer = config.tokenizer.build()
    files = find_inputs(config.input, config.input_format, config.text_unit)
    prefixes = [f"{config.output_prefix}_{key}_document" for key in config.json_keys]
    point_path = Path(f"{prefixes[0]}.progress.tmp")
    run = describe(files, config.json_keys, tokenizer, config.append_eod, config.max_document_bytes)
    point = read_point(point_path, run)
    if point is None and not config.overwrite:  # with a point, this very run has been stopped, perhaps between two keys
        for index in (paths_of(prefix)[1] for prefix in prefixes):
            if index.exists():
                raise UserError(
                    f"{index} is already there: choose another --output-prefix, or replace it with --overwrite"
                )
    try:
        summary = _preprocess(config, tokenizer, files, prefixes, point_path, point or ResumePoint(run))
    except PartLostError as error:
        logger.warning("%s: starting from the beginning", error)
        summary = _preprocess(config, tokenizer, files, prefixes, point_path, ResumePoint(run))
    delete_point(point_path)
    return summary


def _preprocess(
    config: PreprocessConfig,
    tokenizer: Tokenizer,
    files: Sequence[InputFile],
    prefixes: list[str],
    point_path: Path,
    point: ResumePoint,
) -> Summary:
    """`preprocess` from `point` on. PartLostError where the files do not hold what it says."""
    dtype = best_dtype(tokenizer.vocab_size)
    summary = Summary(prefixes, documents=point.documents, input_bytes=point.input_bytes)
    position = ReadPosition(items=list(point.items))
    items = sum(point.items) + point.skip
    can_be_read_again = all(file.path.is_file() for file in files)  # a pipe cannot
    parts: Sequence[PartWritten | None] = point.parts or [None] * len(prefixes)
    writers = [
        IndexedDatasetWriter(prefix, dtype, tokenizer, part=part) for prefix, part in zip(prefixes, parts, strict=True)
    ]
    started = saved = time.monotonic()
    kept = False
    try:
        with contextlib.ExitStack() as stack:
            for writer in writers:
                stack.enter_context(writer)
            kept = bool(point.parts)
            if kept:
                logger.warning("%s: going on after the first %s documents", point_path, f"{point.documents:,}")
            else:
                delete_point(point_path)
            delete_leftovers(point_path)
            line = stack.enter_context(ProgressLine(config.log_interval, position))
            _count_bad(summary, point.skipped, config.skip_bad)
            chunks = read_chunks(files, config.json_keys, config.max_document_bytes, position, point.skip)
            for encoded in stack.enter_context(contextlib.closing(_encode_all(chunks, config, tokenizer))):
                _count_bad(summary, encoded.bad, config.skip_bad)
                for writer, tokens, lengths in zip(writers, encoded.tokens, encoded.lengths, strict=True):
                    writer.add_documents(tokens, lengths)
                summary.documents += encoded.documents
                summary.input_bytes += encoded.size
                items += 1
                position.done()
                line.update(summary.documents - point.documents, summary.input_bytes - point.input_bytes)
                if can_be_read_again and time.monotonic() - saved >= SAVE_SECONDS:
                    saved = time.monotonic()
                    summary.seconds = point.seconds + saved - started
                    saved_parts = [writer.save() for writer in writers]
                    write_point(point_path, _point(point.run, position, items, summary, saved_parts))
                    for writer in writers:
                        writer.keep = kept = True
            if summary.documents == 0:
                raise UserError(_nothing(files, summary.skipped))
            summary.tokens = sum(writer.num_tokens for writer in writers)
    except BaseException:
        if kept:
            logger.warning("%s: the same command goes on from what is saved", point_path)
        raise
    summary.seconds = point.seconds + time.monotonic() - started
    return summary


def _point(
    run: dict[str, Any], position: ReadPosition, items: int, summary: Summary, parts: list[PartWritten]
) -> ResumePoint:
    """The point after `items` items, of which `parts` are on the disk."""
    finished, skip = where_done(position.items, items)
    return ResumePoint(
        run,
        items=finished,
        skip=skip,
        documents=summary.documents,
        input_bytes=summary.input_bytes,
        seconds=summary.seconds,
        skipped=summary.skipped,
        parts=parts,
    )


def _count_bad(summary: Summary, bad: Sequence[BadDocument], allowed: int) -> None:
    """Add `bad` to what was skipped; UserError where that is more than allowed."""
    for document in bad:
        summary.skipped.append(document)
        if len(summary.skipped) > allowed:
            raise UserError(_too_many(summary.skipped, allowed))


def _too_many(skipped: list[BadDocument], allowed: int) -> str:
    if allowed == 0:
        return f"{skipped[0]}; mend it, or pass over up to N bad documents with --skip-bad N"
    return f"{skipped[-1]}; this is one more than the {allowed} bad documents that --skip-bad allows"


def _nothing(files: Sequence[InputFile], skipped: list[BadDocument]) -> str:
    number = f"{len(files)} file{'s' if len(files) > 1 else ''}"
    return f"--input: nothing to write from {number}: all were bad, the first: {skipped[0]}"


class _Encoder:
    """Parses and encodes chunks; one in each worker process."""

    def __init__(self, config: PreprocessConfig, tokenizer: Tokenizer) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._dtype = best_dtype(tokenizer.vocab_size)

    def encode(self, item: Chunk | BadDocument) -> _Encoded:
        """The tokens of a chunk's good documents, and its bad ones (one more than are allowed, at most)."""
        config = self._config
        keys = range(len(config.json_keys))
        if isinstance(item, BadDocument):
            empty = np.empty(0, dtype=np.int64)
            return _Encoded(0, 0, [empty.astype(self._dtype) for _ in keys], [empty for _ in keys], [item])
        tokens: list[list[npt.NDArray[Any]]] = [[] for _ in keys]
        lengths: list[list[int]] = [[] for _ in keys]
        bad: list[BadDocument] = []
        eod = np.array([self._tokenizer.eod] if config.append_eod else [], dtype=self._dtype)
        for document in parse_chunk(item, config.json_keys, config.max_document_bytes):
            encoded = document if isinstance(document, BadDocument) else self._encode_document(document)
            if isinstance(encoded, BadDocument):
                bad.append(encoded)
                if len(bad) > config.skip_bad:
                    break
                continue
            for key, ids in enumerate(encoded):
                tokens[key] += [ids, eod]
                lengths[key].append(ids.size + eod.size)
        return _Encoded(
            item.size,
            len(lengths[0]),
            [np.concatenate([eod[:0], *parts]) for parts in tokens],
            [np.array(counts, dtype=np.int64) for counts in lengths],
            bad,
        )

    def _encode_document(self, document: Document) -> list[npt.NDArray[Any]] | BadDocument:
        """The tokens of each text, without the end of the document."""
        encoded = []
        for text in document.texts:
            ids = self._tokenizer.encode_array(text)
            if ids.size == 0:
                return BadDocument(document.where, "the tokenizer makes no tokens of its text")
            # every id is below vocab_size, for which best_dtype has chosen the type: nothing wraps around here
            encoded.append(ids.astype(self._dtype))
        return encoded


def _encode_all(
    chunks: Iterable[Chunk | BadDocument], config: PreprocessConfig, tokenizer: Tokenizer
) -> Generator[_Encoded, None, None]:
    """The encoded chunks in their order; with one worker in this process, with more in as many others."""
    if config.workers == 1:
        yield from map(_Encoder(config, tokenizer).encode, chunks)
        return
    # Not multiprocessing.Pool, which waits for ever when a worker is killed. Spawned, not forked: the libraries that
    # are loaded here have threads.
    executor = ProcessPoolExecutor(
        config.workers, multiprocessing.get_context("spawn"), _start_worker, (config, tokenizer)
    )
    waiting: deque[tuple[Future[_Encoded], Chunk | BadDocument]] = deque()
    in_flight = 0
    try:
        for item in chunks:
            size = item.size if isinstance(item, Chunk) else 0
            while waiting and (len(waiting) > 2 * config.workers or in_flight + size > _in_flight_bytes(config)):
                in_flight -= waiting[0][1].size if isinstance(waiting[0][1], Chunk) else 0
                yield _result(*waiting.popleft())
            waiting.append((_submit(executor, item), item))
            in_flight += size
        while waiting:
            yield _result(*waiting.popleft())
    finally:
        _unblock(executor)
        executor.shutdown(wait=True, cancel_futures=True)


def _unblock(executor: ProcessPoolExecutor) -> None:
    """Before Python 3.11.5 an executor whose worker was killed may wait for ever, for its own thread to write what no
    worker reads (python/cpython#94777): as the later ones do, close the end that nobody reads from."""
    queue = getattr(executor, "_call_queue", None)
    if sys.version_info < (3, 11, 5) and getattr(executor, "_broken", False) and queue is not None:
        with contextlib.suppress(OSError):
            queue._reader.close()


def _in_flight_bytes(config: PreprocessConfig) -> int:
    """Bytes of unpacked text that may be on their way to workers at once."""
    return 4 * CHUNK_BYTES * (2 * config.workers + 1)


def _submit(executor: ProcessPoolExecutor, item: Chunk | BadDocument) -> Future[_Encoded]:
    try:
        return executor.submit(_encode_in_worker, item)
    except BrokenProcessPool:
        raise UserError(_died(item)) from None


def _result(future: Future[_Encoded], item: Chunk | BadDocument) -> _Encoded:
    try:
        return future.result()
    except BrokenProcessPool:
        raise UserError(_died(item)) from None


def _died(item: Chunk | BadDocument) -> str:
    where = f"{item.file.path} from record {item.first}" if isinstance(item, Chunk) else item.where
    return (
        f"a worker process died (killed, perhaps for want of memory) at or after {where}; no dataset was written; "
        "start again, with fewer --workers if memory is short"
    )


_worker_encoder: _Encoder | None = None


def _start_worker(config: PreprocessConfig, tokenizer: Tokenizer) -> None:
    """Run once in each worker process: keep the tokenizer, and leave with the parent, however it ends."""
    global _worker_encoder  # noqa: PLW0603  (the executor hands a worker's state over in no other way)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker_encoder = _Encoder(config, tokenizer)


def _leave_with_parent() -> None:
    """A parent killed by SIGKILL tells nobody; without this its workers would wait for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _encode_in_worker(item: Chunk | BadDocument) -> _Encoded:
    if _worker_encoder is None:
        raise RuntimeError("the worker has not been started")
    return _worker_encoder.encode(item)
