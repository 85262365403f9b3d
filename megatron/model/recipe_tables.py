"""The tables of recipes/README.md: what the paper prints of each run, beside what its recipe plans. No torch."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from megatron.arguments import read_config
from megatron.counts import parse_count
from megatron.errors import UserError
from megatron.files import write_atomic
from megatron.model.plan import plan_totals

T = TypeVar("T")
PRINTED = "paper.csv"
"""Beside the recipes: one PaperRun a line."""
HEAD = (
    "| recipe | in the paper | printed steps | planned steps | printed tokens | planned tokens | printed hours |\n"
    "|---|---|---|---|---|---|---|"
)


@dataclass(frozen=True)
class PaperRun:
    """A run of the paper, or its beginning, in the paper's own figures; "" for what it does not print."""

    section: str
    """The table of recipes/README.md that it stands in."""
    recipe: str
    """Its file, without .yaml."""
    at: str
    """Steps after which it is looked at; "" for the end."""
    paper: str
    """Where the paper has it."""
    steps: str
    tokens: str
    hours: str

    def plan(self, directory: Path) -> dict[str, Any]:
        """`plan_totals` of its recipe in `directory`. Raises UserError for a recipe that cannot be planned."""
        return plan_totals(read_config(directory / f"{self.recipe}.yaml"), parse_count(self.at) if self.at else None)

    def row(self, totals: dict[str, Any]) -> str:
        """Its line of a table, with the `totals` that were planned."""
        name = f"{self.recipe} --at {self.at}" if self.at else self.recipe
        steps, tokens = f"{totals['iterations']:,}", f"{totals['consumed_tokens'] / 1e9:.2f}B"
        cells = [name, self.paper, self.steps, steps, self.tokens, tokens, self.hours]
        return f"| {' | '.join(cell or '-' for cell in cells)} |"


def read_paper_runs(path: Path) -> list[PaperRun]:
    """Every line of a paper.csv. Raises UserError, with file:line, for a line that is none."""
    runs = []
    for where, run in read_printed_lines(path, PaperRun):
        for name in ("at", "steps", "tokens", "hours"):
            if value := getattr(run, name):
                _check_number(where, name, value)
        runs.append(run)
    return runs


def read_printed_lines(path: Path, kind: type[T]) -> Iterator[tuple[str, T]]:
    """Each line of a file of what the paper prints, after a head with the fields of the dataclass `kind`: file:line and
    the line. Raises UserError, with file:line, for a line of another length, and where the file cannot be read."""
    names = [field.name for field in fields(kind)]  # type: ignore[arg-type] # a dataclass of texts
    first = True
    try:
        with path.open(encoding="utf-8", newline="") as file:
            lines = csv.reader(file, strict=True)
            for cells in lines:
                where = f"{path}:{lines.line_num}"
                if first and cells == names:
                    continue
                if len(cells) != len(names):
                    raise UserError(f"{where}: expected {len(names)} cells ({', '.join(names)}), found {len(cells)}")
                first = False
                yield where, kind(*cells)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot read what the paper prints: {error}") from None


def _check_number(where: str, name: str, text: str) -> None:
    try:
        parse_count(text)
    except ValueError:
        raise UserError(f"{where}: {name}: expected a number such as 58.8K, or nothing, found {text!r}") from None


def recipe_tables(directory: Path) -> dict[str, str]:
    """Section -> its table in Markdown, from the recipes and the paper.csv in `directory`."""
    tables: dict[str, str] = {}
    for run in read_paper_runs(directory / PRINTED):
        tables[run.section] = f"{tables.get(run.section, HEAD)}\n{run.row(run.plan(directory))}"
    return tables


def marks(section: str) -> tuple[str, str]:
    """The lines before and after a section's table."""
    return f"<!-- {section}: written by tools/list_recipes.py --write -->", f"<!-- end of {section} -->"


def write_tables(readme: Path, tables: dict[str, str]) -> None:
    """Put `tables` in between their marks in `readme`. Raises UserError unless each pair of marks is there once."""
    try:
        text = readme.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{readme}: cannot read the file to write the tables to: {error}") from None
    for section, table in tables.items():
        first, last = (f"{mark}\n" for mark in marks(section))
        before, _, rest = text.partition(first)
        _, end, after = rest.partition(last)
        if not end or text.count(first) != 1 or text.count(last) != 1:
            raise UserError(f"{readme}: expected the lines {first.strip()!r} and then {last.strip()!r}, each once")
        text = f"{before}{first}\n{table}\n\n{last}{after}"
    write_atomic(readme, text)
