"""Faults that a user can mend: one exception class, one way to end the program with it."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

EXIT_FINISHED = 0
EXIT_FAILURE = 1
EXIT_STOPPED = 75
"""The run was asked to stop and has saved: start it again with --load to go on (EX_TEMPFAIL of sysexits.h)."""
EXIT_INTERRUPTED = 130
"""Interrupted at once, as by a second Ctrl-C (128 + SIGINT)."""
SPEAK_SECONDS = 30.0
"""How long a process whose fault another one reports waits for that one, which may still be starting."""

MEMORY_ADVICE = (
    "lower --micro-batch-tokens, or see what --recompute-granularity full and tools/plan_run.py --gpu-memory do"
)


class UserError(Exception):
    """A fault in what the user gave: a flag, a file, a document.

    The message is one line that names the flag or the file (with its line), what was expected,
    what was found and what to do.
    """


class CommandLineError(UserError):
    """A fault in the command line, which every process of a node has been given alike."""


class SharedError(UserError):
    """What another rank has failed with and reports itself; this one only leaves."""


def note(text: str) -> None:
    """Say `text` on stderr, of several processes the first alone: all of them have been given the same."""
    if os.environ.get("RANK", "0") == "0":
        print(f"note: {text}", file=sys.stderr)


def _let_speak() -> None:
    """Wait to be ended: as soon as one process leaves torchrun ends the others, the one with the message among them."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(SPEAK_SECONDS)


def _say(text: str, error: BaseException) -> None:
    """One line on stderr, with the notes of `error`."""
    print("; ".join([f"error: {text}", *getattr(error, "__notes__", [])]), file=sys.stderr)


def run(main: Callable[[], int | None]) -> NoReturn:
    """Run `main` and leave with its status; what a user can mend becomes one line on stderr, without a traceback unless
    MEGATRON_DEBUG is set in the environment.

    Of several processes that torchrun started each names its rank, and none repeats what another says.
    """
    several = int(os.environ.get("WORLD_SIZE") or 1) > 1
    who = f"[rank {os.environ.get('RANK')}] " if several else ""
    status: int | None = EXIT_FAILURE
    try:
        status = main()
    except SharedError:
        _let_speak()
    except UserError as error:
        if isinstance(error, CommandLineError) and several and os.environ.get("LOCAL_RANK", "0") != "0":
            _let_speak()
        else:
            _say(f"{who}{error}", error)
            if os.environ.get("MEGATRON_DEBUG"):
                traceback.print_exc()
    except MemoryError as error:
        _say(f"{who}out of memory ({error}): {MEMORY_ADVICE}", error)
    except KeyboardInterrupt as interrupt:
        _say("interrupted", interrupt)
        status = EXIT_INTERRUPTED
    except BrokenPipeError:
        pass
    except Exception as error:
        # torch's, which is not imported here: of a GPU, and of the CPU.
        if type(error).__name__ == "OutOfMemoryError":
            _say(f"{who}out of GPU memory ({error}): {MEMORY_ADVICE}", error)
        elif isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error):
            _say(f"{who}out of memory ({str(error).rpartition('DefaultCPUAllocator: ')[2]}): {MEMORY_ADVICE}", error)
        elif several:
            traceback.print_exc()
        else:
            raise
    status = EXIT_FINISHED if status is None else status
    if several:
        # After a fault an orderly exit would wait for collectives that never end. Without one a thread of gloo aborts
        # it now and then (SIGABRT), when all is done.
        with suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
