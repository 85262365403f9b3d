"""Find the start and duration of sequence length warmup by short trials: docs/tuning.md.

    python tools/tune_pacing.py --config my.yaml --data-path data/corpus_text_document --output runs/tuning

Takes every flag of pretrain_gpt2.py too. Interrupted, the same command goes on where it was.
"""

from __future__ import annotations

import dataclasses
import shlex
import signal
import sys
from pathlib import Path
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from the source tree, installed or not

from megatron.arguments import build_parser, field_docs, parse_config
from megatron.cli import find
from megatron.errors import EXIT_FINISHED, EXIT_STOPPED, UserError, run
from megatron.flags import Parser, finite_number, output_directory, some_text, whole_number
from megatron.instability.trials import Tuner
from megatron.instability.tuning import Criterion, SearchOptions

PROGRAM = find("pretrain_gpt2.py")


def add_own_flags(parser: Parser) -> None:
    """The tuner's flags, beside those of the run."""
    parser.add_argument(
        "--output", type=output_directory, metavar="DIR", help="where trials, journal and results go (required)"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the trials and their commands, run nothing")
    parser.add_argument(
        "--launcher",
        metavar="COMMAND",
        type=some_text,
        help="what starts pretrain_gpt2.py, such as 'torchrun --nproc-per-node 8' (default: this Python)",
    )
    criterion, search = field_docs(Criterion), field_docs(SearchOptions)
    parser.add_argument(
        "--tolerance", type=finite_number, default=Criterion.tolerance, metavar="X", help=criterion["tolerance"]
    )
    for field in dataclasses.fields(SearchOptions):
        is_float = isinstance(field.default, float)
        parser.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=finite_number if is_float else whole_number,
            default=field.default,
            metavar="X" if is_float else "N",
            help=search[field.name],
        )


def stop(*_: object) -> NoReturn:
    """On SIGTERM: leave in order, which stops the trial under way and saves it."""
    sys.exit(EXIT_STOPPED)


def main() -> int:
    """Parse the command line and tune."""
    config, arguments = parse_config(build_parser(__doc__, add_own_flags), sys.argv[1:])
    if arguments.output is None:
        raise UserError("--output DIR is needed: where trials, journal and results go")
    if not arguments.config:
        raise UserError("--config RECIPE is needed: the run to be tuned")
    try:
        launcher = [sys.executable] if arguments.launcher is None else shlex.split(arguments.launcher)
    except ValueError as error:
        raise UserError(f"--launcher {arguments.launcher}: {error}") from None
    tuner = Tuner(
        config=config,
        options=SearchOptions(**{f.name: getattr(arguments, f.name) for f in dataclasses.fields(SearchOptions)}),
        criterion=Criterion(tolerance=arguments.tolerance),
        directory=arguments.output,
        program=(*launcher, str(PROGRAM)),
        report=lambda line: print(line, flush=True),
    )
    if arguments.dry_run:
        tuner.dry_run()
        return EXIT_FINISHED
    signal.signal(signal.SIGTERM, stop)
    return tuner.run()


if __name__ == "__main__":
    run(main)
