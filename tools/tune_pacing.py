"""Find the start and duration of sequence length warmup by short trials: docs/tuning.md.

    python tools/tune_pacing.py --config my.yaml --data-path data/corpus_text_document --output runs/tuning

Takes every flag of pretrain_gpt2.py too. Interrupted, the same command goes on where it was.
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import signal
import sys
from pathlib import Path
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from the source tree, installed or not

from megatron.arguments import Parser, build_parser, field_docs, parse_config
from megatron.cli import find
from megatron.errors import EXIT_FINISHED, EXIT_STOPPED, UserError, run
from megatron.instability.trials import Tuner
from megatron.instability.tuning import Criterion, SearchOptions

PROGRAM = find("pretrain_gpt2.py")


def build_tuner_parser() -> Parser:
    """The flags of a run, and the tuner's."""
    parser = build_parser("tune_pacing.py", __doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    group = parser.add_argument_group("Tuner")
    group.add_argument("--output", type=Path, metavar="DIR", help="where trials, journal and results go (required)")
    group.add_argument("--dry-run", action="store_true", help="print the trials and their commands, run nothing")
    group.add_argument(
        "--launcher",
        default=sys.executable,
        metavar="COMMAND",
        help="what starts pretrain_gpt2.py, such as 'torchrun --nproc-per-node 8' (default: this Python)",
    )
    docs = field_docs(SearchOptions)
    group.add_argument("--tolerance", type=float, default=Criterion.tolerance, metavar="X",
                       help=f"{field_docs(Criterion)['tolerance']} [{Criterion.tolerance}]")  # fmt: skip
    for field in dataclasses.fields(SearchOptions):
        kind = float if isinstance(field.default, float) else int
        default = "" if field.default is None else f" [{field.default:.3g}]"
        group.add_argument(
            f"--{field.name.replace('_', '-')}", type=kind, default=field.default, metavar="X",
            help=docs[field.name] + default,
        )  # fmt: skip
    return parser


def stop(*_: object) -> NoReturn:
    """On SIGTERM: leave in order, which stops the trial under way and saves it."""
    sys.exit(EXIT_STOPPED)


def main() -> int:
    """Parse the command line and tune."""
    parser = build_tuner_parser()
    config, arguments = parse_config(parser, sys.argv[1:])
    if arguments.output is None:
        raise UserError("--output DIR is needed: where trials, journal and results go")
    if not arguments.config:
        raise UserError("--config RECIPE is needed: the run to be tuned")
    try:
        launcher = shlex.split(arguments.launcher)
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
