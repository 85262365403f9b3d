"""Requests to stop: noted here, answered by the loop at the end of a step."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
SIGNALLED_BY = "SIGNALLED_BY"
"""Environment variable with the name of a launcher that passes every signal on as SIGUSR1, whichever it got itself."""
POLL_SECONDS = 1.0
"""How often the stop file is looked for: on some file systems that takes milliseconds."""


class StopRequest:
    """Catches SIGTERM, SIGINT and SIGUSR1 while it is entered. A second SIGINT ends the program at once.

    A time limit and a file that people may create are requests too.
    """

    def __init__(
        self,
        *,
        minutes: float | None = None,
        file: Path | None = None,
        saves: bool = True,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        """`say` is called from the handler of a signal, with what happens now; `saves`: the stop is saved."""
        self._reason: str | None = None
        self._interrupts = 0
        self._previous: dict[signal.Signals, object] = {}
        self._minutes = minutes
        self._deadline = None if minutes is None else time.monotonic() + 60 * minutes
        self._file = file
        self._next_look = 0.0
        self._saves = saves
        self._say = say

    @property
    def reason(self) -> str | None:
        """What asked to stop: the name of a signal, a flag or a file; None as long as nothing has."""
        now = time.monotonic()
        if self._reason is None and self._deadline is not None and now >= self._deadline:
            self._reason = f"--exit-duration-in-mins {self._minutes:g}"
        if self._reason is None and self._file is not None and now >= self._next_look:
            self._next_look = now + POLL_SECONDS
            if self._file.exists():
                self._reason = f"the file {self._file}"
        return self._reason

    def answered(self) -> None:
        """The run has stopped: take the stop file away, else the next start would stop too."""
        if self._file is not None:
            self._file.unlink(missing_ok=True)

    def __enter__(self) -> StopRequest:
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            raise KeyboardInterrupt
        first, self._reason = self._reason is None, signal.Signals(number).name
        if number == signal.SIGUSR1 and SIGNALLED_BY in os.environ:
            self._reason += f" from {os.environ[SIGNALLED_BY]}"
        if first or number == signal.SIGINT:
            text = f"{self._reason}: stopping after this step, then {'saving' if self._saves else 'ending: no --save'}"
            if number == signal.SIGINT:
                text += " (again: stop now, and lose the steps since the last checkpoint)"
            self._say(text)
