"""What a run says on the terminal: one live line, or plain lines where the output is a file or a pipe."""

from __future__ import annotations

import math
import os
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from itertools import pairwise
from statistics import fmean, median
from types import TracebackType
from typing import Any, NamedTuple, TextIO, TypeGuard

REDRAW_SECONDS = 0.1
"""The live line is drawn at most this often: a step may take a millisecond."""
WINDOW_SECONDS = 30.0
"""The speed is that of the last 30 seconds, or of the last tenth of the run where that is longer, or of as many steps
as make a median."""
WINDOW_SAMPLES = 200
MEDIAN_SAMPLES = 11
STALL = 2.0
"""Time for a token beyond so many times its median says nothing of the steps to come."""


class _Sample(NamedTuple):
    clock: float
    seconds: float
    tokens: int
    iterations: int


class ProgressLine:
    """The progress of one run, on a terminal in place, elsewhere as one line every `log_interval` steps.

    The time left follows from the tokens left, not the steps: under sequence length warmup late steps hold many
    times the tokens of early ones. As short steps also run at another speed than long ones, the speed is taken
    from a recent window only, and a stalled step in it counts little. What evaluation and saving add comes from all of
    this process: they are few, so that in a window each would be too much or nothing.

    The loss is the mean over the last `log_interval` steps, those that are not finite aside; of a step that itself is
    not finite it is that step's. Skipped steps are counted from the start of this process, those rolled back aside.
    """

    def __init__(
        self,
        name: str,
        *,
        target_tokens: int | None,
        full_batch: int | None = None,
        log_interval: int = 100,
        silent: bool = False,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`target_tokens` is what the run will have trained on at its end (None: unknown, no percentage and no ETA).
        `full_batch` is the size that a batch has after a warmup: a smaller one is shown.

        `silent` (ranks other than 0) makes every method do nothing. `stream` defaults to standard output.
        """
        self._name = name
        self.target_tokens = target_tokens
        self.last_step: int | None = None
        """The step that the run ends with, where it is known."""
        self._full_batch = full_batch or 0
        self._log_interval = log_interval
        self._silent = silent
        self._stream = sys.stdout if stream is None else stream
        self._clock = clock
        self._live = self._stream.isatty() and os.environ.get("TERM") != "dumb"
        self._start = clock()
        self._drawn = -math.inf
        self._line = ""
        self._first: _Sample | None = None
        self._window: deque[_Sample] = deque()
        self._losses: deque[float] = deque(maxlen=log_interval)
        self._skipped: list[int] = []
        self._last: Mapping[str, Any] | None = None
        self._last_printed: int | None = None

    def update(self, step: Mapping[str, Any]) -> None:
        """Show one optimizer step, the object of metrics.jsonl: iteration, consumed_tokens, loss, seqlen, lr, ...

        `seconds`, the training time so far without evaluation, makes the speed shown that of training alone.
        """
        if self._silent:
            return
        now = self._clock()
        self._observe(now, step)
        if self._last is not None and step["iteration"] <= self._last["iteration"]:
            self._losses.clear()  # a rollback has undone them
            self._skipped = [skipped for skipped in self._skipped if skipped < step["iteration"]]
        if step.get("loss") is not None:
            self._losses.append(step["loss"])
        if step.get("skipped"):
            self._skipped.append(step["iteration"])
        self._last = step
        if self._live:
            if now - self._drawn >= REDRAW_SECONDS:
                self._draw(now)
        elif step["iteration"] % self._log_interval == 0:
            self._print_step(step)

    def validation(self, entry: Mapping[str, Any], *, event: str = "validation") -> None:
        """Print the result of an evaluation: iteration, consumed_tokens, loss, perplexity."""
        parts = [event, f"step {entry['iteration']:,}"]
        if entry.get("consumed_tokens") is not None:
            parts.append(f"{format_count(entry['consumed_tokens'])} tokens")
        parts.append(f"loss {entry['loss']:.4f}")
        if entry.get("perplexity") is not None:
            parts.append(f"perplexity {entry['perplexity']:,.2f}")
        self.message(" | ".join(parts))

    def message(self, text: str) -> None:
        """Print a line of its own; the live line stays below it."""
        if self._silent:
            return
        erase = "\r\x1b[2K" if self._line else ""
        self._write(f"{erase}{text}\n{self._line}")

    def message_at_once(self, text: str) -> None:
        """As `message`, from a signal handler: past the stream's buffer, which the program may be writing to just now.

        A stream without a file descriptor is passed over, and so is one that nobody reads any more.
        """
        if not self._silent:
            erase = "\r\x1b[2K" if self._live else ""
            with suppress(OSError, ValueError):
                os.write(self._stream.fileno(), f"{erase}{text}\n{self._line}".encode(errors="replace"))

    def speed(self) -> float | None:
        """Recent tokens per second of training time; None before the second step."""
        steps = list(self._steps())
        seconds = sum(step.seconds for step in steps)
        return sum(step.tokens for step in steps) / seconds if seconds > 0 else None

    def step_seconds(self) -> float | None:
        """Recent training time of a step; None before the second step."""
        steps = list(self._steps())
        iterations = sum(step.iterations for step in steps)
        return sum(step.seconds for step in steps) / iterations if iterations > 0 else None

    def seconds_left(self) -> float | None:
        """Seconds of wall time until the target, at the recent pace, with what evaluation and saving add."""
        steps = list(self._steps())
        if self.target_tokens is None or self._first is None or not steps:
            return None
        most = STALL * median(step.seconds / step.tokens for step in steps)
        seconds = sum(min(step.seconds, most * step.tokens) for step in steps)
        tokens = sum(step.tokens for step in steps)
        first, last = self._first, self._window[-1]
        trained = last.seconds - first.seconds
        wall = (last.clock - first.clock) / trained if trained > 0 else 1.0
        return max(0, self.target_tokens - last.tokens) * seconds / tokens * max(1.0, wall)

    def print_last(self) -> None:
        """Elsewhere than on a terminal: print the last step now, if it was not due."""
        last = None if self._silent or self._live else self._last
        if last is not None and last["iteration"] != self._last_printed:
            self._print_step(last)

    def close(self) -> None:
        """End the live line; elsewhere print the last step, if it is not there yet."""
        if self._silent or self._last is None:
            return
        if self._live:
            self._draw(self._clock())
            self._write("\n")
            self._line = ""
        elif self._last["iteration"] != self._last_printed:
            self._print_step(self._last)
        self._last = None

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _observe(self, now: float, step: Mapping[str, Any]) -> None:
        seconds = step.get("seconds")
        sample = _Sample(
            now, now if seconds is None else float(seconds), int(step["consumed_tokens"]), int(step["iteration"])
        )
        self._first = self._first or sample
        span = max(WINDOW_SECONDS, 0.1 * (now - self._start))
        window = self._window
        # The newest sample is replaced until it is far enough from the one before it: the window stays small.
        if len(window) >= 2 and window[-1].clock - window[-2].clock < span / WINDOW_SAMPLES:
            window[-1] = sample
        else:
            window.append(sample)
        while len(window) > MEDIAN_SAMPLES + 1 and now - window[1].clock >= span:
            window.popleft()

    def _steps(self) -> Iterator[_Sample]:
        """What each sample of the window has added; none where a rollback went back."""
        for before, after in pairwise(self._window):
            step = _Sample(
                after.clock - before.clock,
                after.seconds - before.seconds,
                after.tokens - before.tokens,
                after.iterations - before.iterations,
            )
            if step.tokens > 0 and step.seconds >= 0:
                yield step

    def _fields(self, step: Mapping[str, Any]) -> tuple[str, list[str]]:
        """The step, and the fields after it: what a narrow terminal can best do without comes last."""

        def value(key: str, label: str, style: str) -> list[str]:
            return [] if step.get(key) is None else [f"{label} {step[key]:{style}}"]

        done, ahead = format_count(step["consumed_tokens"]), []
        if _finite(step.get("loss")):
            step = {**step, "loss": fmean(filter(math.isfinite, self._losses))}
        if self.target_tokens:
            share = min(1.0, step["consumed_tokens"] / self.target_tokens)
            ahead = [f"{math.floor(100 * share)}% ETA {format_duration(self.seconds_left())}"]
            done += f"/{format_count(self.target_tokens)}"
        growing = (step.get("global_batch_size") or math.inf) < self._full_batch
        speed, pace = self.speed(), self.step_seconds()
        last = "" if self.last_step is None else f"/{self.last_step:,}"
        return f"step {step['iteration']:,}{last}", [
            *ahead,
            *value("loss", "loss", ".4f"),
            *value("seqlen", "seqlen", "d"),
            *(value("global_batch_size", "batch", "d") if growing else []),
            *([f"{len(self._skipped)} skipped"] if self._skipped else []),
            *([] if speed is None else [f"{format_count(speed)} tok/s"]),
            f"{done} tokens",
            *value("lr", "lr", ".2e"),
            *value("grad_norm", "grad norm", ".2f"),
            *([] if pace is None else [f"{1000 * pace:,.{1 if pace < 0.1 else 0}f} ms/step"]),
        ]

    def _print_step(self, step: Mapping[str, Any]) -> None:
        self._last_printed = step["iteration"]
        number, fields = self._fields(step)
        self._write(" | ".join([number, *fields]) + "\n")

    def _draw(self, now: float) -> None:
        if self._last is None:
            return
        self._drawn = now
        # One column is left free: a full line makes some terminals wrap, and then "\r" returns to the wrong row.
        width = max(1, shutil.get_terminal_size().columns - 1)
        number, fields = self._fields(self._last)
        fields.insert(1 if self.target_tokens else 0, number)
        text = self._name
        for field in fields:
            if len(text) + len(field) + 3 > width:
                break
            text += f" | {field}"
        self._line = text[:width]
        self._write(f"\r\x1b[2K{self._line}")

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
            self._stream.flush()
        except BrokenPipeError:  # the reader (head, a closed terminal) has left; the run goes on, and so does its log
            self._silent = True
            if self._stream is sys.stdout:
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the flush at exit fails


def _finite(value: float | None) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)


def format_count(number: float) -> str:
    """Three significant digits and a unit: 4_200_000 -> 4.20M. Below 1000 a whole number: 999.4 -> 999."""
    number = float(number)
    if not math.isfinite(number):
        return str(number)
    if round(abs(number)) < 1000:
        return f"{number:.0f}"
    for unit in ("K", "M", "B", "T"):
        number /= 1000
        if abs(number) < 999.5 or unit == "T":
            break
    digits = 2 if abs(number) < 9.995 else 1 if abs(number) < 99.95 else 0
    return f"{number:.{digits}f}{unit}"


def format_duration(seconds: float | None) -> str:
    """Seconds as 02:31, 1:02:31 or 3d 01:02:31; --:-- where unknown."""
    if seconds is None or not math.isfinite(seconds):
        return "--:--"
    minutes, second = divmod(round(max(0.0, seconds)), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d {hour:02}:{minute:02}:{second:02}"
    return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute:02}:{second:02}"


def repetition(samples: int, epoch: int, *, validated: bool = True) -> list[str]:
    """A note where a run of `samples` reads a corpus of `epoch` samples twice or more: truncated ones count as whole
    ones do, as each time it is the same beginning that is read again."""
    then = "watch the validation loss, which rises" if validated else "there is no validation, whose loss would rise"
    if not epoch or samples < 2 * epoch:
        return []
    return [
        f"{format_count(samples)} samples are {format_count(samples / epoch)} passes over the {format_count(epoch)} "
        f"of this corpus: {then} once they are learnt by heart"
    ]
