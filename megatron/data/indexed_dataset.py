"""Megatron's memory-mapped dataset: PREFIX.bin holds token ids, PREFIX.idx where each sequence begins.

PREFIX.idx, little-endian:

    9 bytes   b"MMIDIDX\\x00\\x00"
    uint64    version, 1
    uint8     code of the tokens' type (_DTYPES)
    uint64    number of sequences, S
    uint64    number of document indices, D + 1
    int32     S   sizes: tokens of each sequence
    int64     S   pointers: byte offset of each sequence in PREFIX.bin
    int64     D+1 document indices: the first sequence of each document, and S at the end

Beside them stands PREFIX.json, our own: counts, largest token id, tokenizer. It may be missing.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import struct
import zlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron.errors import UserError
from megatron.files import crc32_of

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
SIDECAR_SCHEMA = 1

_DTYPES: dict[int, np.dtype[Any]] = {
    1: np.dtype("u1"),
    2: np.dtype("i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    6: np.dtype("<f8"),
    7: np.dtype("<f4"),
    8: np.dtype("<u2"),
}
_CHECKED_AT_ONCE = 1 << 22
"""Sequences or tokens per step of a pass over a whole file: it bounds the memory."""
_SAMPLES = 16
_SAMPLE_BYTES = 4096


def dtype_code(dtype: npt.DTypeLike) -> int:
    """Megatron's code of an integer `dtype`; ValueError for a type that cannot hold token ids in this format."""
    wanted = np.dtype(dtype).newbyteorder("<")
    for code, known in _DTYPES.items():
        if known == wanted and known.kind in "iu":
            return code
    raise ValueError(f"{np.dtype(dtype)} cannot stand in an indexed dataset")


def best_dtype(vocab_size: int) -> np.dtype[Any]:
    """uint16 for a vocabulary below 65,500 tokens, else int32 (Megatron's DType.optimal_dtype)."""
    return np.dtype("<u2") if vocab_size < 65500 else np.dtype("<i4")


def paths_of(prefix: str | Path) -> tuple[Path, Path, Path]:
    """The .bin, .idx and .json of `prefix`. A dot inside the prefix is part of its name."""
    return Path(f"{prefix}.bin"), Path(f"{prefix}.idx"), Path(f"{prefix}.json")


def sample_crc32(path: Path) -> int:
    """zlib.crc32 over blocks spread evenly over the file, its first and its last bytes among them.

    Other data of the same size is told apart without reading all of it. Raises OSError.
    """
    last = max(0, path.stat().st_size - _SAMPLE_BYTES)
    value = 0
    with path.open("rb", buffering=0) as stream:
        for number in range(_SAMPLES):
            stream.seek(last * number // (_SAMPLES - 1))
            value = zlib.crc32(stream.read(_SAMPLE_BYTES), value)
    return value


@dataclass(frozen=True)
class Sidecar:
    """What PREFIX.json says of the dataset and of the tokenizer that made it."""

    documents: int
    sequences: int
    tokens: int
    dtype: str
    max_token_id: int
    """-1 where there are no tokens."""
    bin_bytes: int
    bin_crc32: int
    """zlib.crc32 of the .bin."""
    bin_sample_crc32: int | None = None
    """`sample_crc32` of the .bin. None in datasets made before it was written, as the next one."""
    idx_crc32: int | None = None
    """zlib.crc32 of the .idx."""
    tokenizer: str | None = None
    tokenizer_fingerprint: str | None = None
    vocab_size: int | None = None
    eod: int | None = None

    def to_json(self) -> str:
        """One JSON object, with the version of its schema and, last, its own digest."""
        return json.dumps({"schema": SIDECAR_SCHEMA, **vars(self), "crc32": self._digest()}, indent=1) + "\n"

    def _digest(self) -> int:
        return zlib.crc32(json.dumps(vars(self)).encode())

    @classmethod
    def read(cls, path: Path) -> Sidecar | None:
        """The sidecar at `path`; None where there is none of this schema, or a damaged one."""
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return None
        if not isinstance(fields, dict) or fields.pop("schema", None) != SIDECAR_SCHEMA:
            return None
        digest = fields.pop("crc32", None)
        counts = ("documents", "sequences", "tokens", "max_token_id", "bin_bytes", "bin_crc32")
        if any(type(fields.get(name)) is not int for name in counts):
            return None
        try:
            sidecar = cls(**fields)
        except TypeError:
            return None
        whole = digest == sidecar._digest() if sidecar.idx_crc32 is not None else digest is None
        return sidecar if whole else None


class IndexedDataset:
    """The tokens of PREFIX.bin, mapped into memory, and the sequences and documents of PREFIX.idx.

    Opening checks that the two files are whole and belong together. The .bin must not be cut short while it is open:
    the operating system then kills the reader (SIGBUS).
    """

    def __init__(self, prefix: str | Path) -> None:
        """Open and check `prefix`; UserError names the file, what was expected, what was found and what to do."""
        self.prefix = Path(prefix)
        self.bin_path, self.idx_path, self.sidecar_path = paths_of(prefix)
        for path in (self.idx_path, self.bin_path):
            if not path.is_file():
                raise UserError(_missing(prefix, path))
        self.dtype, sequences, indices = self._read_header()
        offset = HEADER.size
        index = np.memmap(self.idx_path, mode="r", dtype=np.uint8)

        self.sizes: npt.NDArray[np.int32] = index[offset : offset + 4 * sequences].view("<i4")
        """Tokens of each sequence, `[sequences]`, int32."""
        offset += 4 * sequences
        self._pointers: npt.NDArray[np.int64] = index[offset : offset + 8 * sequences].view("<i8")
        offset += 8 * sequences
        self.documents: npt.NDArray[np.int64] = index[offset : offset + 8 * indices].view("<i8")
        """The first sequence of each document and, last, the number of sequences: `[documents + 1]`, int64."""

        self.num_tokens = self._check_sequences()
        self._check_documents()
        found = self.bin_path.stat().st_size
        expected = self.num_tokens * self.dtype.itemsize
        if found != expected:
            raise UserError(
                f"{self.bin_path}: expected {expected} bytes for the {self.num_tokens} tokens of {self.idx_path.name}, "
                f"found {found}: the two do not belong together or one is cut short; {_AGAIN}"
            )
        self.tokens: npt.NDArray[Any] = (
            np.memmap(self.bin_path, mode="r", dtype=self.dtype) if found else np.empty(0, dtype=self.dtype)
        )
        """All tokens, `[num_tokens]`, of `dtype`, read-only."""
        self.sidecar = self._read_sidecar()
        """PREFIX.json; None where there is none or it describes other files."""

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self.sizes)

    @property
    def document_count(self) -> int:
        """Number of documents."""
        return len(self.documents) - 1

    @cached_property
    def pointers_in_tokens(self) -> npt.NDArray[np.int64]:
        """Where each sequence begins in `tokens`, `[sequences]`, int64."""
        return np.asarray(self._pointers // self.dtype.itemsize)

    @cached_property
    def document_starts(self) -> npt.NDArray[np.int64]:
        """Where each document begins in `tokens`, `[documents]`, int64."""
        return self._document_bounds[:-1]

    @cached_property
    def document_lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each document, `[documents]`, int64."""
        return np.diff(self._document_bounds)

    @cached_property
    def _document_bounds(self) -> npt.NDArray[np.int64]:
        return np.append(self.pointers_in_tokens, self.num_tokens)[self.documents]

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the .idx and the size of the .bin, in hexadecimal: equal for equal cuts into documents."""
        digest = hashlib.sha256()
        with self.idx_path.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
        digest.update(str(self.bin_path.stat().st_size).encode())
        return digest.hexdigest()

    def read(self, sequence: int) -> npt.NDArray[Any]:
        """All tokens of a sequence: a view, read-only. For other programs: training reads documents."""
        start = int(self._pointers[sequence]) // self.dtype.itemsize
        return self.tokens[start : start + int(self.sizes[sequence])]

    def read_document(self, document: int) -> npt.NDArray[Any]:
        """All tokens of a document: a view, read-only."""
        start, length = int(self.document_starts[document]), int(self.document_lengths[document])
        return self.tokens[start : start + length]

    def max_token_id(self) -> int:
        """The largest token id, -1 without tokens: from PREFIX.json, or else by reading all tokens.

        UserError for a negative one, where all are read.
        """
        if self.sidecar is not None:
            return self.sidecar.max_token_id
        largest = -1
        for start in range(0, self.num_tokens, _CHECKED_AT_ONCE):
            tokens = self.tokens[start : start + _CHECKED_AT_ONCE]
            if (smallest := int(tokens.min())) < 0:
                raise UserError(f"{self.bin_path}: expected token ids from 0, found {smallest}; {_AGAIN}")
            largest = max(largest, int(tokens.max()))
        return largest

    def _read_sidecar(self) -> Sidecar | None:
        """The sidecar, if it is that of these two files; UserError where it is that of one of them only."""
        sidecar = Sidecar.read(self.sidecar_path)
        if sidecar is None:
            return None
        here = (self.document_count, len(self), self.num_tokens, self.bin_path.stat().st_size)
        described = (sidecar.documents, sidecar.sequences, sidecar.tokens, sidecar.bin_bytes)
        counts = here == described and sidecar.dtype == self.dtype.name
        if sidecar.idx_crc32 is None:
            return sidecar if counts else None
        of_index = crc32_of(self.idx_path) == f"{sidecar.idx_crc32:08x}"
        of_tokens = sample_crc32(self.bin_path) == sidecar.bin_sample_crc32
        if of_index != of_tokens:
            other = self.bin_path if of_index else self.idx_path
            raise UserError(
                f"{other}: expected the file that {self.sidecar_path.name} describes, found another or a damaged one: "
                f"the three files of {self.prefix} do not belong together; put the right one back, or {_AGAIN}"
            )
        return sidecar if of_index and counts else None

    def _read_header(self) -> tuple[np.dtype[Any], int, int]:
        """(type of the tokens, number of sequences, number of document indices), checked against the file's size."""
        found = self.idx_path.stat().st_size
        with self.idx_path.open("rb") as stream:
            header = stream.read(HEADER.size)
        if header[: len(MAGIC)] != MAGIC[: len(header)]:
            raise UserError(
                f"{self.idx_path}: expected to begin with {MAGIC!r}, found {header[: len(MAGIC)]!r}: "
                "it is no index of Megatron's mmap format; give the prefix of data made by tools/preprocess_data.py"
            )
        if len(header) < HEADER.size:
            raise UserError(
                f"{self.idx_path}: expected a header of {HEADER.size} bytes, found {found}: cut short; {_AGAIN}"
            )
        _, version, code, sequences, indices = HEADER.unpack(header)
        if version != VERSION:
            raise UserError(f"{self.idx_path}: expected format version {VERSION}, found {version}; {_AGAIN}")
        dtype = _DTYPES.get(code)
        if dtype is None or dtype.kind not in "iu":
            known = ", ".join(f"{key} ({value.name})" for key, value in _DTYPES.items() if value.kind in "iu")
            named = f"{code} ({dtype.name})" if dtype else str(code)
            raise UserError(f"{self.idx_path}: expected a token type of {known}, found {named}; {_AGAIN}")
        expected = HEADER.size + 12 * sequences + 8 * indices
        if found != expected:
            modes = "; it holds sequence modes (multimodal data), which this trainer does not read"
            why = modes if found == expected + sequences and sequences else f"; {_AGAIN}"
            raise UserError(
                f"{self.idx_path}: expected {expected} bytes for {sequences} sequences and {indices} document indices, "
                f"found {found}{why}"
            )
        if indices == 0:
            raise UserError(f"{self.idx_path}: expected at least one document index, found none; {_AGAIN}")
        return dtype, sequences, indices

    def _check_sequences(self) -> int:
        """Check that each sequence begins where the one before it ends; the number of tokens."""
        position = 0
        for start in range(0, len(self.sizes), _CHECKED_AT_ONCE):
            sizes = self.sizes[start : start + _CHECKED_AT_ONCE].astype(np.int64)
            if (negative := np.flatnonzero(sizes < 0)).size:
                which = int(negative[0])
                raise UserError(
                    f"{self.idx_path}: sequence {start + which}: expected a size from 0, found {sizes[which]}; {_AGAIN}"
                )
            ends = position + np.cumsum(sizes)
            expected = (ends - sizes) * self.dtype.itemsize
            pointers = self._pointers[start : start + _CHECKED_AT_ONCE]
            if (wrong := np.flatnonzero(pointers != expected)).size:
                which = int(wrong[0])
                raise UserError(
                    f"{self.idx_path}: sequence {start + which}: expected to begin at byte {expected[which]}, "
                    f"where the one before it ends, found {pointers[which]}; {_AGAIN}"
                )
            position = int(ends[-1])
        return position

    def _check_documents(self) -> None:
        """Check that the document indices begin at 0, never go back, and end with the number of sequences."""
        first, last = int(self.documents[0]), int(self.documents[-1])
        if first != 0:
            raise UserError(f"{self.idx_path}: expected the first document index to be 0, found {first}; {_AGAIN}")
        if last != len(self.sizes):
            raise UserError(
                f"{self.idx_path}: expected the last document index to be the number of sequences, {len(self.sizes)}, "
                f"found {last}; {_AGAIN}"
            )
        for start in range(0, len(self.documents), _CHECKED_AT_ONCE):
            steps = np.diff(self.documents[start : start + _CHECKED_AT_ONCE + 1])
            if (back := np.flatnonzero(steps < 0)).size:
                which = start + int(back[0])
                raise UserError(
                    f"{self.idx_path}: document index {which + 1}: expected at least {self.documents[which]}, "
                    f"found {self.documents[which + 1]}; {_AGAIN}"
                )


_AGAIN = "make the data again with tools/preprocess_data.py"


def _missing(prefix: str | Path, path: Path) -> str:
    """The message for a file of the dataset that is not there, with the likely reason."""
    text = str(prefix)
    if text.endswith((".bin", ".idx", ".json")):
        return f"{text}: give the data's prefix without its ending: {text.rpartition('.')[0]}"
    there = sorted(found.name.removesuffix(".idx") for found in path.parent.glob("*.idx"))
    name = path.name.removesuffix(path.suffix)
    near = [other for other in there if other.startswith(f"{name}_") and other.endswith("_document")]
    near = [other for other in near or difflib.get_close_matches(name, there, n=2, cutoff=0.85) if other != name]
    hint = f"; did you mean {path.with_name(near[0])}?" if near else ""
    kind = "is not a file" if path.exists() else "does not exist"
    return f"{path}: {kind}; expected PREFIX.bin and PREFIX.idx made by tools/preprocess_data.py{hint}"
