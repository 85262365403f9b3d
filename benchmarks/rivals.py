"""Contestants in processes of their own, which take turns: none of them has another's settings of the C library, its
memory, or its threads awake beside it.
"""

from __future__ import annotations

import multiprocessing as mp
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

from megatron.errors import UserError

GRACE = 10.0
"""Seconds that a process has to end by itself."""


class Rival:
    """A process that answers calls one at a time."""

    def __init__(self, build: Callable[..., Callable[..., Any]], *arguments: Any) -> None:
        """`build(*arguments)`, in the new process, makes the function that answers."""
        context = mp.get_context("spawn")
        self._calls, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, build, arguments), daemon=True)
        self._process.start()
        other.close()

    def __call__(self, *arguments: Any) -> Any:
        """The answer to `arguments`. Raises UserError with the last line of what went wrong there."""
        self.ask(*arguments)
        return self.answer()

    def ask(self, *arguments: Any) -> None:
        """Begin a call, for several to be answered at once."""
        self._calls.send(arguments)

    def answer(self) -> Any:
        """What the last `ask` comes to; else as a call."""
        try:
            fault, answer = self._calls.recv()
        except EOFError:
            self._process.join()
            status = self._process.exitcode
            raise UserError(f"a contestant's process died with status {status}: too little memory?") from None
        if fault:
            raise UserError(fault)
        return answer

    def close(self) -> None:
        """End the process."""
        self._calls.close()
        self._process.join(timeout=GRACE)
        if self._process.is_alive():
            self._process.kill()


class Rivals(dict[str, Rival]):
    """Contestants by name, ended with the block that made them."""

    def __enter__(self) -> Rivals:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for rival in self.values():
            rival.close()


def _serve(calls: Connection, build: Callable[..., Callable[..., Any]], arguments: Sequence[Any]) -> None:
    function = None
    while True:
        try:
            question = calls.recv()
        except EOFError:
            return
        try:
            function = function or build(*arguments)
            calls.send((None, function(*question)))
        except UserError as error:
            calls.send((str(error), None))
        except Exception as error:
            traceback.print_exc()
            calls.send((f"{type(error).__name__}: {error}", None))
