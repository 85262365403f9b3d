"""The progress of a pass over files: documents, MB/s and the time left, on stderr."""

from __future__ import annotations

import sys
import time
from math import floor
from types import TracebackType
from typing import TextIO

from megatron.data.chunks import ReadPosition

_TERMINAL_SECONDS = 0.2


class ProgressLine:
    """One line kept up to date on a terminal; elsewhere a plain line every `interval` documents (0: none)."""

    def __init__(self, interval: int, position: ReadPosition, stream: TextIO | None = None) -> None:
        self._interval = interval
        self._position = position
        self._stream = stream or sys.stderr
        self._in_place = self._stream.isatty()
        self._started = time.monotonic()
        self._next = interval
        self._last_time = 0.0
        self._shown = False

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._shown and self._in_place:
            self._stream.write("\n")
            self._stream.flush()

    def update(self, documents: int, size: int) -> None:
        """Say where the pass is: `documents` done, `size` bytes of unpacked text, both since the beginning."""
        if self._interval == 0:
            return
        now = time.monotonic()
        if self._in_place:
            if now - self._last_time < _TERMINAL_SECONDS:
                return
        elif documents < self._next:
            return
        self._next = (documents // self._interval + 1) * self._interval
        self._last_time = now
        self._shown = True
        text = self._describe(documents, size, now - self._started)
        self._stream.write(f"\r{text}\x1b[K" if self._in_place else f"{text}\n")
        self._stream.flush()

    def _describe(self, documents: int, size: int, seconds: float) -> str:
        fraction = self._position.fraction()
        left = f", {floor(100 * fraction)}% done, {clock(seconds / fraction - seconds)} left" if fraction else ""
        return f"{documents:,} documents, {size / 1e6:,.1f} MB, {size / 1e6 / max(seconds, 1e-9):.2f} MB/s{left}"


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
