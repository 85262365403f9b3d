"""The shape of the paper's Table 2: what runs cost and what they came to, beside the printed figures."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.console import format_count
from megatron.errors import UserError
from megatron.instability.summary import Run, summarise
from megatron.instability.zeroshot_results import STRICT_LAMBADA, STRIDE, WIKITEXT
from megatron.model.recipe_tables import PRINTED, read_paper_runs, read_printed_lines

PRINTED_ZEROSHOT = "zeroshot.csv"
"""Beside the recipes: one Printed a line, of Table 2 and Table 6."""
ABSENT = "-"
_MEASURES = ("steps", "tokens", "hours", "WikiText PPL", "LAMBADA acc")
_CHECKPOINT = re.compile(r"iter_(\d+)")


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

    Args:
        runs: one that is called as a recipe, or as RECIPE@STEPS, gets the paper's figures for it.
        recipes: the directory with paper.csv and zeroshot.csv.

    Raises:
        UserError: for a run's zeroshot.json, or a file in `recipes`, that cannot be read.
    """
    printed = {line.name: line for line in read_printed(recipes / PRINTED_ZEROSHOT)}
    costs = {(run.recipe, run.at): (run.steps, run.tokens, run.hours) for run in read_paper_runs(recipes / PRINTED)}
    rows = [["run", "in the paper", *(title for measure in _MEASURES for title in (measure, "printed"))]]
    names = [run.name for run in runs] or list(printed)
    measured = [_measured(run) for run in runs] or [[ABSENT] * len(_MEASURES)] * len(printed)
    for name, ours in zip(names, measured, strict=True):
        theirs = [""] * (1 + len(_MEASURES))
        if line := printed.get(name):
            theirs = [line.paper, *costs.get((line.run, line.at), ("", "", "")), line.wikitext, f"{line.lambada}%"]
        paper, *figures = [cell or ABSENT for cell in theirs]
        rows.append([name, paper, *(cell for pair in zip(ours, figures, strict=True) for cell in pair)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    rows.insert(1, ["-" * width for width in widths])
    lines = (" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(f"| {line} |" for line in lines)


def _measured(run: Run) -> list[str]:
    """A run's own cells, in the order of _MEASURES; hours are those of training, without evaluation."""
    summary = summarise(run)
    results = run.zeroshot
    try:
        perplexity, accuracy = (
            _cell(results[task], metric, style, summary.steps) if task in results else ABSENT
            for task, metric, style in ((WIKITEXT, "adjusted_perplexity", ",.2f"), (STRICT_LAMBADA, "accuracy", ".2%"))
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{run.path}: a zero-shot result is not whole ({error!r}): evaluate that task again") from None
    hours = ABSENT if summary.seconds is None else f"{summary.seconds / 3600:,.2f}"
    return [f"{summary.steps:,}", format_count(summary.tokens), hours, perplexity, accuracy]


def _cell(result: dict[str, Any], metric: str, style: str, steps: int) -> str:
    """A metric, and what of its measurement differs from the rest of the row or from the paper."""
    text = f"{float(result[metric]):{style}}"
    if result.get("overlapping_eval", STRIDE) != STRIDE:
        text += f" (stride {result['overlapping_eval']})"
    at = _CHECKPOINT.fullmatch(Path(result["model"]).name)
    return text if at is None or int(at[1]) == steps else f"{text} (at step {int(at[1]):,})"
