"""Runs followed while they go on: each look at a log reads only what has been added to it."""

from __future__ import annotations

import io
import math
import os
import sys
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

from megatron.arguments import read_config
from megatron.config import Config
from megatron.console import ProgressLine
from megatron.errors import UserError
from megatron.files import file_errors
from megatron.instability.summary import has_begun, read_state, require_no_parent
from megatron.metrics import METRICS_FILE, parse_line
from megatron.pacing.plan import target_tokens

READ_BYTES = 8 << 20
"""Read at most so much of a log at a look: the screen stays alive over a long one. About 9,000 steps."""
HISTORY = 1024
"""Values that a `History` keeps at most."""
SILENT_SECONDS = 60.0
"""A log that was not written for so long is worth a word: a long step, a validation, or a death."""


class LogTail:
    """The whole lines that were added to a growing metrics.jsonl since the last look.

    A log that was cut back (a resume renames a shorter one into its place) or is shorter than it was starts again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.behind = False
        """More is there than the last look took."""
        self._file: tuple[int, int] | None = None
        self._offset = 0
        self._lines = 0

    def read(self, limit: int = READ_BYTES) -> tuple[bool, list[dict[str, Any]], str | None]:
        """(whether the log starts again, new entries, what is wrong with a line that was passed over).

        At most `limit` bytes, but no less than a line. Raises UserError where the file is there and cannot be read.
        """
        with file_errors("read", self.path):
            try:
                file = self.path.open("rb")
            except FileNotFoundError:
                restarted = self._start(None)
                return restarted, [], None
            with file:
                status = os.fstat(file.fileno())
                restarted = False
                if self._file != (status.st_dev, status.st_ino) or status.st_size < self._offset:
                    restarted = self._start((status.st_dev, status.st_ino))
                file.seek(self._offset)
                data = file.read(limit)
                if not data.endswith(b"\n") and len(data) == limit:
                    data += file.readline()
        data = data[: data.rfind(b"\n") + 1]  # the rest is being written
        self._offset += len(data)
        self.behind = bool(data) and self._offset < status.st_size
        entries, fault = [], None
        for line in io.BytesIO(data):
            self._lines += 1
            try:
                entries.append(parse_line(line, f"{self.path}:{self._lines}")[1])
            except UserError as error:
                fault = fault or str(error)
        return restarted, entries, fault

    def _start(self, file: tuple[int, int] | None) -> bool:
        """Begin at the top of another file; whether there was one before."""
        was, self._file = self._file, file
        self._offset = self._lines = 0
        self.behind = False
        return was is not None


class History:
    """A growing series as at most `HISTORY` values, each the largest of a stretch: no spike is lost, however short."""

    def __init__(self) -> None:
        self._values: list[float] = []
        self._stretch = 1
        self._filled = 0
        """Values in the last stretch."""
        self.least, self.largest = math.inf, -math.inf
        """Of the finite values; infinite before there is one."""

    def append(self, value: float) -> None:
        """Add a value; NaN counts as infinite."""
        value = math.inf if math.isnan(value) else value
        if math.isfinite(value):
            self.least, self.largest = min(self.least, value), max(self.largest, value)
        if self._values and self._filled < self._stretch:
            self._values[-1] = max(self._values[-1], value)
            self._filled += 1
            return
        if len(self._values) == HISTORY:
            self._values = [max(pair) for pair in zip(self._values[::2], self._values[1::2], strict=True)]
            self._stretch *= 2
        self._values.append(value)
        self._filled = 1

    def stretches(self, count: int) -> list[float]:
        """The series as at most `count` values."""
        values = self._values
        if len(values) <= count:
            return list(values)
        ends = [len(values) * i // count for i in range(count + 1)]
        return [max(values[a:b]) for a, b in pairwise(ends)]


class State(NamedTuple):
    """How a run is doing."""

    word: Literal[
        "waiting", "starting", "reading", "running", "silent", "finished", "stopped", "diverged", "died", "unreadable"
    ]
    """Waiting: there is no run. Starting: it has no step yet. Reading: more of it is there than was read. Silent: it
    goes on or has died, and was last written a while ago."""
    detail: str | None = None


class WatchedRun:
    """What is known of one run at the last look."""

    def __init__(self, path: Path | str) -> None:
        """`path`: its --save directory, or the metrics.jsonl itself; neither need exist yet.

        Raises:
            UserError: for a directory that is no run but holds some.
        """
        path = Path(path)
        self.name = str(path)
        log = path if path.suffix == ".jsonl" and not path.is_dir() else path / METRICS_FILE
        if not log.is_file():
            require_no_parent(log.parent)
        self._tail = LogTail(log)
        self._config = log.with_name("config.yaml")
        self._clear()

    def _clear(self) -> None:
        self.step: dict[str, Any] | None = None
        """The last step in the log."""
        self.validation: dict[str, Any] | None = None
        """The last validation in the log."""
        self.loss, self.seqlen = History(), History()
        self.spikes = 0
        self.goal: int | None = None
        """Tokens at the end of the run; None where its config.yaml does not say."""
        self.full_batch: int | None = None
        """The size of a batch after a warmup of it; None as for `goal`."""
        self._fault: str | None = None
        self._elapsed = 0.0
        self._pace: ProgressLine | None = None

    def look(self) -> None:
        """Take in what the log has got since the last look."""
        try:
            restarted, entries, fault = self._tail.read()
        except UserError as error:
            self._fault = str(error)
            return
        if restarted:
            self._clear()
        self._fault = fault or self._fault
        if entries and self._pace is None:
            if config := _read(self._config):
                self.goal, self.full_batch = target_tokens(config), config.training.global_batch_size
            # The estimates of the run's own progress line, by the clock of its log. It prints nothing.
            self._pace = ProgressLine(
                self.name,
                target_tokens=self.goal,
                log_interval=sys.maxsize,
                stream=io.StringIO(),
                clock=lambda: self._elapsed,
            )
        for entry in entries:
            self._take(entry)

    def look_through(self) -> None:
        """Take in all that the log has."""
        self.look()
        while self._tail.behind:
            self.look()

    @property
    def state(self) -> State:
        """How the run is doing, now."""
        if self._fault is not None:
            return State("unreadable", self._fault)
        if self._tail.behind:
            return State("reading")
        if not self._tail.path.exists() and not has_begun(self._tail.path.parent):
            missing = self._tail.path if self._tail.path.parent.is_dir() else f"directory {self._tail.path.parent}"
            return State("waiting", f"there is no {missing} yet")
        try:
            found = read_state(self._tail.path, stepped=self.step is not None)
        except UserError as error:
            return State("unreadable", str(error))
        if found.silent is not None and found.silent >= SILENT_SECONDS:
            return State("silent", f"last written {_ago(found.silent)} ago")
        return State(found.status, "no step yet" if found.status == "starting" else found.reason)

    @property
    def share(self) -> float | None:
        """How much of the run is done, 0 to 1."""
        tokens = number(self.step, "consumed_tokens")
        return min(1.0, tokens / self.goal) if tokens is not None and self.goal else None

    @property
    def speed(self) -> float | None:
        """Recent tokens a second, in training alone."""
        return self._pace.speed() if self._pace else None

    @property
    def seconds_left(self) -> float | None:
        """Until the end, at the recent pace with what validations and saves take."""
        return self._pace.seconds_left() if self._pace else None

    def _take(self, entry: dict[str, Any]) -> None:
        event = entry.get("event")
        if event == "validation":
            self.validation = entry
        elif event == "spike":
            self.spikes += 1
        elif event is None:
            self.step = entry
            for name, history in (("loss", self.loss), ("seqlen", self.seqlen)):
                if (value := number(entry, name)) is not None:
                    history.append(value)
            elapsed, seconds, tokens = (number(entry, n) for n in ("elapsed_seconds", "seconds", "consumed_tokens"))
            if self._pace is not None and None not in (elapsed, seconds, tokens):
                self._elapsed = elapsed or 0.0
                self._pace.update({"iteration": entry["iteration"], "consumed_tokens": tokens, "seconds": seconds})


def number(entry: Mapping[str, Any] | None, name: str) -> float | None:
    """A field of the log; None where there is no entry, no such field, or no number in it."""
    try:
        return float((entry or {})[name])
    except (KeyError, TypeError, ValueError, OverflowError):
        return None


def _read(path: Path) -> Config | None:
    try:
        return read_config(path)
    except UserError:  # none there, or of another version: the rest can be watched all the same
        return None


def _ago(seconds: float) -> str:
    """In whole minutes, hours or days."""
    size, unit = next(pair for pair in ((86400, "day"), (3600, "hour"), (0, "minute")) if seconds >= pair[0])
    count = int(seconds // (size or 60))
    return f"{count} {unit}{'s' if count != 1 else ''}"
