"""The shape of the paper's Table 2: what runs cost and what they came to, beside the printed figures."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron.console import format_count
from megatron.counts import parse_count
from megatron.instability.summary import Run, RunSummary, summarise
from megatron.instability.tables import ABSENT, MARK, zeroshot_cells, zeroshot_footnotes
from megatron.model.recipe_tables import PRINTED, read_paper_runs, read_printed_lines

PRINTED_ZEROSHOT = "zeroshot.csv"
"""Beside the recipes: one Printed a line, of Table 2 and Table 6."""
_MEASURES = ("steps", "tokens", "hours", "WikiText PPL", "LAMBADA acc")


@dataclass(frozen=True)
class Printed:
    """A model in the paper's zero-shot tables, in the paper's own figures."""

    run: str
    """Its recipe, without .yaml; or a name, where it is none of the paper's runs."""
    at: str
    """Steps after which it is looked at; "" for the end."""
    paper: str
    """Where the paper has it."""
    wikitext: str
    """Adjusted perplexity."""
    lambada: str
    """Accuracy, percent."""

    @property
    def name(self) -> str:
        """What a run is called that is to stand beside it."""
        return f"{self.run}@{self.at}" if self.at else self.run


def read_printed(path: Path) -> list[Printed]:
    """Every line of a zeroshot.csv. Raises UserError, with file:line, for a line that is none."""
    return [line for _, line in read_printed_lines(path, Printed)]


def table2(runs: Sequence[Run], recipes: Path) -> str:
    """A Markdown table with a row a run; without runs, all that the paper prints.

    Under it a line for each run whose zero-shot numbers were not measured as the paper's were, that is of another
    length than the paper's, or whose name is almost that of one of its runs.

    Args:
        runs: one that is called as a recipe, or as RECIPE@STEPS, gets the paper's figures for it.
        recipes: the directory with paper.csv and zeroshot.csv.

    Raises:
        UserError: for a run's zeroshot.json, or a file in `recipes`, that cannot be read.
    """
    printed = {line.name: line for line in read_printed(recipes / PRINTED_ZEROSHOT)}
    costs = {(run.recipe, run.at): (run.steps, run.tokens, run.hours) for run in read_paper_runs(recipes / PRINTED)}
    rows = [["run", "in the paper", *(title for measure in _MEASURES for title in (measure, "printed"))]]
    summaries = [summarise(run) for run in runs]
    names = [run.name for run in runs] or list(printed)
    steps = dict.fromkeys(printed, "")
    steps |= {f"{recipe}@{at}" if at else recipe: cost[0] for (recipe, at), cost in costs.items()}
    measured = [_measured(summary, steps.get(summary.name, "")) for summary in summaries] or [
        [ABSENT] * len(_MEASURES)
    ] * len(printed)
    for name, ours in zip(names, measured, strict=True):
        theirs = [""] * (1 + len(_MEASURES))
        if line := printed.get(name):
            theirs = [line.paper, *costs.get((line.run, line.at), ("", "", "")), line.wikitext, f"{line.lambada}%"]
        paper, *figures = [cell or ABSENT for cell in theirs]
        rows.append([name, paper, *(cell for pair in zip(ours, figures, strict=True) for cell in pair)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    rows.insert(1, ["-" * width for width in widths])
    lines = (" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    notes = [*zeroshot_footnotes(summaries), *filter(None, (_doubt(summary, steps) for summary in summaries))]
    return "\n".join([*(f"| {line} |" for line in lines), *([""] if notes else []), *notes])


def _other_length(steps: int, printed: str) -> bool:
    """Whether a run's steps are not those that the paper prints, rounded to a few digits; "" is no number."""
    return printed != "" and abs(steps - parse_count(printed)) > 0.02 * parse_count(printed)


def _doubt(summary: RunSummary, steps: Mapping[str, str]) -> str:
    """What there is to say of a run's name and length, "" where nothing. `steps`: the paper's, by its runs' names."""
    name, printed = summary.name, steps.get(summary.name)
    if printed is not None:
        other = _other_length(summary.steps, printed)
        return f"{MARK} {name}: {summary.steps:,} steps, the paper's run has {printed}" if other else ""
    recipe, _, at = name.partition("@")
    if at and recipe in steps:
        known = ", ".join(sorted(other for other in steps if other.startswith(f"{recipe}@")))
        return f"{name}: the paper prints nothing of that step" + (f"; what it prints: {known}" if known else "")
    near = difflib.get_close_matches(name, steps, n=1, cutoff=0.85)
    return f"{name}: the paper has no run of that name; did you mean {near[0]}?" if near else ""


def _measured(summary: RunSummary, printed: str) -> list[str]:
    """A run's own cells, in the order of _MEASURES; hours are those of training, without evaluation.

    `printed` are the steps of the paper's run of that name, "" without one.
    """
    mark = f" {MARK}" if _other_length(summary.steps, printed) else ""
    hours = ABSENT if summary.seconds is None else f"{summary.seconds / 3600:,.2f}"
    return [f"{summary.steps:,}{mark}", format_count(summary.tokens), hours, *zeroshot_cells(summary)]
