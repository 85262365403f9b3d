"""Faults that a user can mend: one exception class, one way to end the program with it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import NoReturn

EXIT_FINISHED = 0
EXIT_FAILURE = 1
EXIT_STOPPED = 75
"""The run was asked to stop and has saved: start it again with --load to go on (EX_TEMPFAIL of sysexits.h)."""
EXIT_INTERRUPTED = 130
"""Interrupted at once, as by a second Ctrl-C (128 + SIGINT)."""


class UserError(Exception):
    """A fault in what the user gave: a flag, a file, a document.

    The message is one line that names the flag or the file (with its line), what was expected,
    what was found and what to do.
    """


class CommandLineError(UserError):
    """A fault in the command line, which every process of a node has been given alike."""


class SharedError(UserError):
    """What another rank has failed with and reports itself; this one only leaves."""


def run(main: Callable[[], int | None]) -> NoReturn:
    """Run `main` and leave with its status; what a user can mend becomes one line on stderr, without a traceback.

    Of several processes that torchrun started each names its rank, and none repeats what another says.
    """
    several = int(os.environ.get("WORLD_SIZE") or 1) > 1
    who = f"[rank {os.environ.get('RANK')}] " if several else ""
    try:
        status = main()
    except SharedError:
        sys.exit(EXIT_FAILURE)
    except UserError as error:
        repeated = isinstance(error, CommandLineError) and several and os.environ.get("LOCAL_RANK") != "0"
        if not repeated:
            print(f"error: {who}{error}", file=sys.stderr)
        sys.exit(EXIT_FAILURE)
    except MemoryError as error:
        print(
            f"error: {who}out of memory ({error}): make the model, the batch or the sequences smaller", file=sys.stderr
        )
        sys.exit(EXIT_FAILURE)
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:
        sys.exit(EXIT_FAILURE)
    sys.exit(EXIT_FINISHED if status is None else status)
