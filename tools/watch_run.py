"""Watch runs on a terminal, from their logs: tools/watch_run.py runs/baseline runs/slw

Drawn anew every second until all have finished or diverged; Ctrl-C ends it. It only reads: any number of people may
watch, over ssh too, and a run that does not exist yet is waited for. Into a file or a pipe, or with --once, it prints
the present state and ends. NO_COLOR=1 turns colours off.
"""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

# Run from a source tree, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console

from megatron.errors import UserError, run
from megatron.flags import Parser
from megatron.instability.dashboard import Dashboard, watch
from megatron.instability.watching import WatchedRun

MIN_INTERVAL, MAX_INTERVAL = 0.05, 3600


def seconds(text: str) -> float:
    """The argument of --interval."""
    with suppress(ValueError):
        if MIN_INTERVAL <= (value := float(text)) <= MAX_INTERVAL:
            return value
    raise argparse.ArgumentTypeError(f"expected seconds from {MIN_INTERVAL} to {MAX_INTERVAL}, found {text!r}")


def main() -> None:
    """Print once, or keep drawing."""
    parser = Parser(description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="--save directory of a run, or its metrics.jsonl")
    parser.add_argument("--once", action="store_true", help="print the present state and end")
    parser.add_argument("--interval", type=seconds, default=1.0, metavar="SECONDS", help="time between two looks")
    arguments = parser.parse_args()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # the name of a run may hold what the terminal cannot show
    console = Console(highlight=False)
    runs = [WatchedRun(path) for path in arguments.runs]
    if sys.stdout.isatty() and os.environ.get("TERM") != "dumb" and not arguments.once:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # leave the terminal as it was
        watch(runs, console, interval=arguments.interval)
        return
    for watched, path in zip(runs, arguments.runs, strict=True):
        if arguments.once and not os.path.exists(path):
            raise UserError(f"{path}: no such directory yet; expected the --save directory of a run")
        watched.look_through()
    console.print(Dashboard(runs, whole=True))


if __name__ == "__main__":
    run(main)
