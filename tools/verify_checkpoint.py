"""Check checkpoints on the disk: that no byte has changed, that no tensor has a gap, that every value is finite.

    python tools/verify_checkpoint.py runs/slw

Of a run, or of its checkpoints, all are checked, newest first. A whole one is one line; of a damaged one each fault is
a line. The status is 0 only where all are whole; what a crash has left unfinished is told of on stderr and not counted.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from the source tree, installed or not

from megatron.checkpointing.commit import checkpoints_in, named_checkpoints
from megatron.checkpointing.verification import verify_checkpoint
from megatron.errors import EXIT_FAILURE, EXIT_FINISHED, UserError, run
from megatron.flags import Parser, some_path


def parse_arguments() -> argparse.Namespace:
    """The flags."""
    parser = Parser(description=__doc__)
    parser.add_argument("directory", type=some_path, metavar="DIR", help="a run, its checkpoints, or one of them")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    return parser.parse_args()


def main() -> int:
    """Print what was found."""
    arguments = parse_arguments()
    directory = arguments.directory
    paths = named_checkpoints(checkpoints_in(directory), lambda line: print(line, file=sys.stderr))
    if not paths:
        raise UserError(f"{directory}: no checkpoint found there; give a run, its checkpoints or one of them")
    verdicts = []
    for path in paths:
        verdicts.append(verify_checkpoint(path))
        if not arguments.json:
            print("\n".join(verdicts[-1].lines()), flush=True)
    whole = not any(verdict.faults for verdict in verdicts)
    if arguments.json:
        print(json.dumps({"whole": whole, "checkpoints": [asdict(verdict) for verdict in verdicts]}, indent=1))
    return EXIT_FINISHED if whole else EXIT_FAILURE


if __name__ == "__main__":
    run(main)
