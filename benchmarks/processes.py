"""Commands run as processes of their own: how long they take, what memory they need, what they print."""

from __future__ import annotations

import os
import re
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron.errors import UserError

SAMPLE_SECONDS = 0.02
"""Memory is looked at this often."""
LINES_SHOWN = 5


@dataclass(frozen=True)
class Finished:
    """A command that has run to its end."""

    seconds: float
    """From its start to its end."""
    lines: list[tuple[float, str]]
    """What it printed: seconds after its start, line."""
    largest_bytes: int
    """Largest resident size that one of its processes had at any time (0 where there is no /proc)."""
    sum_bytes: int
    """Largest sum over all its processes at one time; pages that they share count in each."""

    def seconds_until(self, start: str) -> float:
        """Seconds until it printed the first line that begins with `start`. Raises UserError where it did not."""
        for seconds, line in self.lines:
            if line.startswith(start):
                return seconds
        raise UserError(f"expected a line that begins with {start!r}, found {[line for _, line in self.lines]}")

    def search(self, pattern: str) -> re.Match[str]:
        """The first match of `pattern` in what it printed. Raises UserError where there is none."""
        match = re.search(pattern, "\n".join(line for _, line in self.lines))
        if match is None:
            raise UserError(f"expected {pattern!r} in what was printed, found {[line for _, line in self.lines]}")
        return match


def run_command(command: Sequence[str], *, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> Finished:
    """Run `command`, with `env` added to the environment. Raises UserError, with its last lines, where it fails."""
    started = time.perf_counter()
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env={**os.environ, **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
    )
    memory = _Memory(process.pid)
    try:
        lines = [(time.perf_counter() - started, line.rstrip("\n")) for line in process.stdout or ()]
        status = process.wait()
    finally:
        process.kill()
        memory.stop()
    seconds = time.perf_counter() - started
    if status != 0:
        last = " / ".join(line for _, line in lines[-LINES_SHOWN:])
        raise UserError(f"{' '.join(command)}: ended with status {status}: {last}")
    return Finished(seconds, lines, memory.largest, memory.sum)


class _Memory:
    """Looks at the memory of a process and of all that it starts, from a thread, until `stop`.

    Not getrusage: a child begins with the size that its parent had when it was forked.
    """

    def __init__(self, pid: int) -> None:
        self.largest = 0
        self.sum = 0
        self._pid = pid
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(SAMPLE_SECONDS):
            together = 0
            for pid in _tree(self._pid):
                highest, now = _resident(pid)
                self.largest = max(self.largest, highest)
                together += now
            self.sum = max(self.sum, together)


def _tree(pid: int) -> list[int]:
    """The process and its descendants that are alive."""
    children: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children += [int(child) for child in path.read_text().split()]
        except OSError:  # it has ended meanwhile
            continue
    return [pid, *(below for child in children for below in _tree(child))]


def _resident(pid: int) -> tuple[int, int]:
    """Bytes of memory that the process has held at most, and holds now; 0 where it has ended or there is no /proc."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0, 0
    found = dict(re.findall(r"^(VmHWM|VmRSS):\s+(\d+) kB$", status, re.MULTILINE))
    return 1024 * int(found.get("VmHWM", 0)), 1024 * int(found.get("VmRSS", 0))
