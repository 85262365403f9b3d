"""Files packed with gzip or zstd as streams of bytes; a damaged or cut-off one is an error, never a short file."""

from __future__ import annotations

import gzip
import io
import zlib
from typing import IO

import zstandard

PACKINGS = (".gz", ".zst")
DAMAGED = (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError)
_ZSTD_BLOCK = 1 << 12  # packed bytes at a time: a block can grow more than ten thousand times


def unpacked(raw: IO[bytes], packing: str) -> IO[bytes]:
    """The unpacked bytes of `raw`; `packing` is one of PACKINGS or nothing. Reading raises one of DAMAGED."""
    if packing == ".gz":
        return io.BufferedReader(gzip.GzipFile(fileobj=raw, mode="rb"), 1 << 20)
    if packing == ".zst":
        return _ZstdFrames(raw)  # type: ignore[return-value]
    return raw


class _ZstdFrames:
    """The unpacked bytes of all zstd frames of a file; zstandard's own reader takes a cut-off file for a whole one."""

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw = raw
        self._unpacker: zstandard.ZstdDecompressionObj | None = None
        self._left = b""

    def read(self, size: int) -> bytes:
        """`size` bytes or a little more; fewer only at the end."""
        parts: list[bytes] = []
        wanted = size
        while wanted > 0:
            block = self._left or self._raw.read(_ZSTD_BLOCK)
            if not block:
                if self._unpacker is not None:
                    raise EOFError("it ends inside a zstd frame")
                break
            if self._unpacker is None:
                self._unpacker = zstandard.ZstdDecompressor(max_window_size=1 << 27).decompressobj()
            parts.append(self._unpacker.decompress(block))
            wanted -= len(parts[-1])
            self._left = b""
            if self._unpacker.eof:
                self._left, self._unpacker = self._unpacker.unused_data, None
        return b"".join(parts)
