"""Writing Megatron's memory-mapped dataset (see indexed_dataset.py) so that no crash leaves a half-written one."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from megatron.data.indexed_dataset import HEADER, MAGIC, VERSION, Sidecar, dtype_code, paths_of, sample_crc32
from megatron.errors import UserError
from megatron.files import crc32_of, file_errors, fsync_directory
from megatron.tokenizer.base import Tokenizer


@dataclass(frozen=True)
class PartWritten:
    """The beginning of a dataset that `IndexedDatasetWriter.save` has brought to the disk, under temporary names."""

    documents: int
    """Of one sequence each."""
    tokens: int
    max_token_id: int
    bin_crc32: int
    sizes_crc32: int
    """zlib.crc32 of the documents' sizes, as they stand in the .idx."""


class PartLostError(Exception):
    """The temporary files do not hold the part to go on from."""


class IndexedDatasetWriter:
    """Collects documents and, when the `with` block ends without an error, puts PREFIX.bin, .json and .idx in place.

    All is written under temporary names (`PREFIX.bin.tmp`), which a second writer of the same prefix finds locked, and
    which go when the block ends with an error, unless `keep` is set; what a killed process leaves of them, the next
    one overwrites or goes on from. An old .idx goes before the new .bin comes, and the new .idx comes last: an
    .idx never stands beside another's .bin.
    """

    def __init__(
        self,
        prefix: str | Path,
        dtype: npt.DTypeLike,
        tokenizer: Tokenizer | None = None,
        *,
        part: PartWritten | None = None,
    ) -> None:
        """Write `prefix` with tokens of `dtype`; what `tokenizer` is goes into PREFIX.json.

        With `part`, which an earlier writer's `save` returned, go on after it; entering then raises PartLostError where
        it is not on the disk any more. ValueError for a dtype that the format does not have.
        """
        self.prefix = Path(prefix)
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self._code = dtype_code(dtype)
        self._tokenizer = tokenizer
        self._bin_path, self._idx_path, self._sidecar_path = paths_of(prefix)
        self._bin: IO[bytes] | None = None
        self._sizes: list[npt.NDArray[np.int32]] = []
        self._documents: list[npt.NDArray[np.int64]] = [np.zeros(1, dtype=np.int64)]
        self._crc = 0
        self._part = part
        self.keep = part is not None
        """Whether the temporary files stay when the block ends with an error."""
        self._sizes_crc = 0
        self._single_sequences = True
        self._saved = 0  # how many of `_sizes` stand in the .idx.tmp
        self.max_token_id = -1
        self.num_sequences = 0
        self.num_documents = 0
        self.num_tokens = 0

    def __enter__(self) -> IndexedDatasetWriter:
        with file_errors("write", self._bin_path):
            self._bin_path.parent.mkdir(parents=True, exist_ok=True)
            self._bin = _open_locked(_temporary(self._bin_path))
            try:
                if self._part is None:
                    self._bin.truncate(0)
                    _temporary(self._idx_path).unlink(missing_ok=True)
                else:
                    self._go_on(self._part)
            except BaseException:
                self._bin.close()
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        stream = self._stream
        finished = False
        try:
            if kind is None:
                self._commit()
                finished = True
        finally:
            if not finished and not self.keep:  # the .bin.tmp last: it carries the lock
                for path in (self._idx_path, self._sidecar_path, self._bin_path):
                    _temporary(path).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # a full disk has been reported before
                stream.close()

    def add_document(self, tokens: npt.ArrayLike, sequence_sizes: Sequence[int] | None = None) -> None:
        """Add one document, as one sequence or cut into sequences of the given sizes: for programs that have tokens of
        their own. Preprocessing adds many at once.

        ValueError where a token id does not fit `dtype`, or the sizes do not add up to the tokens.
        """
        flat = np.asarray(tokens)
        sizes = np.array([flat.size] if sequence_sizes is None else sequence_sizes, dtype=np.int64)
        self._add(flat, sizes, np.array([self.num_sequences + sizes.size], dtype=np.int64))

    def add_documents(self, tokens: npt.ArrayLike, sizes: npt.ArrayLike) -> None:
        """Add many documents of one sequence each: all their tokens, `[sum(sizes)]`, and the size of each."""
        lengths = np.asarray(sizes, dtype=np.int64)
        self._add(np.asarray(tokens), lengths, self.num_sequences + np.arange(1, lengths.size + 1, dtype=np.int64))

    def _add(self, tokens: npt.NDArray[Any], sizes: npt.NDArray[np.int64], documents: npt.NDArray[np.int64]) -> None:
        if tokens.ndim != 1 or (tokens.size and tokens.dtype.kind not in "iu"):
            raise ValueError(f"expected a row of integer token ids, found {tokens.dtype} {list(tokens.shape)}")
        if sizes.size and (sizes.min() < 0 or sizes.max() >= 2**31):
            raise ValueError(f"a sequence must have from 0 to 2**31 - 1 tokens, not {sizes.min()} to {sizes.max()}")
        if int(sizes.sum()) != tokens.size:
            raise ValueError(f"the sizes of the sequences add up to {sizes.sum()}, but there are {tokens.size} tokens")
        if tokens.size:
            smallest, largest = int(tokens.min()), int(tokens.max())
            limit = int(np.iinfo(self.dtype).max)
            if smallest < 0 or largest > limit:  # astype would wrap them around without a word
                wrong = smallest if smallest < 0 else largest
                raise ValueError(f"token id {wrong} does not fit {self.dtype.name}, which holds 0 to {limit}")
            self.max_token_id = max(self.max_token_id, largest)
        content = np.ascontiguousarray(tokens, dtype=self.dtype).tobytes()
        self._crc = zlib.crc32(content, self._crc)
        with file_errors("write", self._bin_path):
            self._stream.write(content)
        self._sizes.append(sizes.astype(np.int32))
        self._documents.append(documents)
        self._single_sequences &= sizes.size == documents.size
        self.num_sequences += sizes.size
        self.num_documents += documents.size
        self.num_tokens += tokens.size

    def save(self) -> PartWritten:
        """Bring what has been added to the disk: a later writer can go on from it, if the temporary files stay.

        ValueError where a document is not of one sequence.
        """
        if not self._single_sequences:
            raise ValueError("only documents of one sequence each can be saved in part")
        index = _temporary(self._idx_path)
        with file_errors("write", self._bin_path):
            self._stream.flush()
            os.fsync(self._stream.fileno())
        with file_errors("write", self._idx_path), index.open("ab") as stream:
            if stream.tell() == 0:
                stream.write(bytes(HEADER.size))
            for sizes in self._sizes[self._saved :]:
                content = sizes.astype("<i4").tobytes()
                self._sizes_crc = zlib.crc32(content, self._sizes_crc)
                stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        self._saved = len(self._sizes)
        return PartWritten(self.num_documents, self.num_tokens, self.max_token_id, self._crc, self._sizes_crc)

    def _go_on(self, part: PartWritten) -> None:
        """Cut the temporary files back to `part` and take it up, if they hold it."""
        tokens, index = _temporary(self._bin_path), _temporary(self._idx_path)
        sizes_end = HEADER.size + 4 * part.documents
        if not index.exists():
            raise PartLostError(f"{index} is missing")
        for path, size in ((tokens, part.tokens * self.dtype.itemsize), (index, sizes_end)):
            if path.stat().st_size < size:
                raise PartLostError(f"{path} is shorter than it was")
            os.truncate(path, size)
        sizes = np.fromfile(index, dtype="<i4", offset=HEADER.size)
        for path, found, expected in (
            (tokens, crc32_of(tokens), part.bin_crc32),
            (index, f"{zlib.crc32(sizes.tobytes()):08x}", part.sizes_crc32),
        ):
            if found != f"{expected:08x}":
                raise PartLostError(f"{path} is not what it was")
        self._sizes, self._saved = [sizes], 1
        self._documents.append(np.arange(1, part.documents + 1, dtype=np.int64))
        self._crc, self._sizes_crc = part.bin_crc32, part.sizes_crc32
        self.num_documents = self.num_sequences = part.documents
        self.num_tokens, self.max_token_id = part.tokens, part.max_token_id

    @property
    def _stream(self) -> IO[bytes]:
        if self._bin is None:
            raise ValueError("the writer is not open: use it in a `with` statement")
        return self._bin

    def _commit(self) -> None:
        """Make everything durable under its temporary name, then put it in place, the .idx last."""
        with file_errors("write", self._bin_path):
            self._stream.flush()
            os.fsync(self._stream.fileno())
        with file_errors("write", self._idx_path):
            idx_crc32 = _write_durably(_temporary(self._idx_path), self._index())
        with file_errors("write", self._sidecar_path):
            sidecar = self._sidecar(sample_crc32(_temporary(self._bin_path)), idx_crc32)
            _write_durably(_temporary(self._sidecar_path), [sidecar.to_json().encode()])
        with file_errors("write", self._idx_path):
            self._idx_path.unlink(missing_ok=True)
            fsync_directory(self._idx_path.parent)
            for path in (self._bin_path, self._sidecar_path, self._idx_path):
                _temporary(path).rename(path)
                fsync_directory(path.parent)

    def _index(self) -> Iterator[bytes]:
        """The content of the .idx, in parts."""
        yield HEADER.pack(MAGIC, VERSION, self._code, self.num_sequences, self.num_documents + 1)
        for sizes in self._sizes:
            yield sizes.astype("<i4").tobytes()
        position = 0
        for sizes in self._sizes:
            ends = position + np.cumsum(sizes, dtype=np.int64)
            yield ((ends - sizes) * self.dtype.itemsize).astype("<i8").tobytes()
            position = int(ends[-1]) if ends.size else position
        for documents in self._documents:
            yield documents.astype("<i8").tobytes()

    def _sidecar(self, bin_sample_crc32: int, idx_crc32: int) -> Sidecar:
        tokenizer = self._tokenizer
        return Sidecar(
            documents=self.num_documents,
            sequences=self.num_sequences,
            tokens=self.num_tokens,
            dtype=self.dtype.name,
            max_token_id=self.max_token_id,
            bin_bytes=self.num_tokens * self.dtype.itemsize,
            bin_crc32=self._crc,
            bin_sample_crc32=bin_sample_crc32,
            idx_crc32=idx_crc32,
            tokenizer=tokenizer.name if tokenizer else None,
            tokenizer_fingerprint=tokenizer.fingerprint if tokenizer else None,
            vocab_size=tokenizer.vocab_size if tokenizer else None,
            eod=tokenizer.eod if tokenizer else None,
        )


def _temporary(path: Path) -> Path:
    return path.with_name(path.name + ".tmp")


def _open_locked(path: Path) -> IO[bytes]:
    """Open `path` for appending, for this process alone; UserError where another writes it."""
    stream = path.open("ab")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        stream.close()
        raise UserError(f"{path}: another process is writing it; give another --output-prefix or wait for it") from None
    except OSError as error:
        if error.errno not in (errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS):  # file systems that have no locks
            stream.close()
            raise
    if not path.exists() or not os.path.samestat(os.fstat(stream.fileno()), path.stat()):
        stream.close()  # the other has renamed it between our opening and our locking: it is now a finished .bin
        raise UserError(f"{path}: another process has just finished it; start again")
    return stream


def _write_durably(path: Path, parts: Iterable[bytes]) -> int:
    """Write `path` over what it holds, which stays until it is written over; the CRC-32 of its content."""
    crc = 0
    with path.open("r+b" if path.exists() else "wb") as stream:
        for part in parts:
            stream.write(part)
            crc = zlib.crc32(part, crc)
        stream.truncate()
        stream.flush()
        os.fsync(stream.fileno())
    return crc
