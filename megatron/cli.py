"""The command that an installation has: megatron-slw COMMAND [flags].

A command is a program of the repository under a short name, with its flags, its messages and its status. One dispatcher
stands for all: one name in PATH, and a list of what there is. A program is imported when it is called, so that those
without a model start without torch.
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import NoReturn

from megatron import __version__
from megatron.errors import EXIT_FAILURE, EXIT_FINISHED, CommandLineError, run

PACKAGE = Path(__file__).resolve().parent

COMMANDS = {
    "pretrain": "pretrain_gpt2.py",
    "plan": "tools/plan_run.py",
    "train-tokenizer": "tools/train_tokenizer.py",
    "preprocess": "tools/preprocess_data.py",
    "inspect": "tools/inspect_data.py",
    "collect-stdlib": "tools/collect_stdlib.py",
    "watch": "tools/watch_run.py",
    "compare": "tools/compare_runs.py",
    "tune": "tools/tune_pacing.py",
    "evaluate": "tools/evaluate_zeroshot.py",
    "table2": "tools/table2.py",
    "generate": "tools/generate_samples_gpt2.py",
    "convert": "tools/convert_checkpoint.py",
    "verify": "tools/verify_checkpoint.py",
    "recipes": "tools/list_recipes.py",
}
"""Command -> its program in the repository."""


def find(path: str) -> Path:
    """A file or folder of the repository: inside of this package where setup.py has put it there, else beside it."""
    inside = PACKAGE / path
    return inside if inside.exists() else PACKAGE.parent / path


def usage() -> str:
    """The commands, each with the summary in its program's docstring."""
    lines = [
        "usage: megatron-slw COMMAND [flags]",
        "       megatron-slw COMMAND --help",
        "       megatron-slw --version",
        "",
        "GPT pre-training with sequence length warmup. Each command is a program of the repository, under whose name",
        "the documentation and messages speak of it.",
        "",
    ]
    for command, program in COMMANDS.items():
        lines += [f"  {command:<16} {_summary(find(program))}", f"  {'':<16} ({program})"]
    return "\n".join([*lines, "", f"The paper's recipes are in {find('recipes')}"])


def _summary(program: Path) -> str:
    """What the program's docstring begins with, up to the first colon or full stop; the program is not run."""
    docstring = ast.get_docstring(ast.parse(program.read_text(encoding="utf-8"))) or ""
    return re.split(r"[.:](?:\s|$)", docstring, maxsplit=1)[0]


def load(command: str) -> ModuleType:
    """Import the program of a command.

    Raises:
        CommandLineError: there is no such command.
    """
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, n=1)
        advice = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(COMMANDS)}"
        raise CommandLineError(f"unknown command {command!r}: {advice}")
    path = find(COMMANDS[command])
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} cannot be imported")
    program = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    places = list(sys.path)
    spec.loader.exec_module(program)
    # A tool puts the folder above its own first, to run from a bare source tree. In an installation that is this
    # package, whose `data`, `tokenizer` or `metrics` would hide what others call so.
    sys.path[:] = places
    return program


def main() -> int | None:
    """Run the command that the command line names, and hand on its status."""
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return EXIT_FINISHED if words else EXIT_FAILURE
    if words[0] == "--version":
        print(f"megatron-slw {__version__}")
        return EXIT_FINISHED
    program = load(words[0])
    sys.argv = [f"megatron-slw {words[0]}", *words[1:]]
    status: int | None = program.main()
    return status


def entry() -> NoReturn:
    """What the installed command calls."""
    run(main)
