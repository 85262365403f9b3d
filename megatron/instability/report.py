"""Runs side by side in words: a table and a sentence on which came out ahead, whichever it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress

from megatron.arguments import flat, read_config
from megatron.console import format_count, format_duration
from megatron.errors import UserError
from megatron.instability.groups import Group
from megatron.instability.summary import Run, RunSummary, summarise
from megatron.instability.tables import ABSENT, duration, number

EQUAL_TOKENS = 0.01
"""Runs whose last validations lie within this share of each other are compared there, at their ends."""

TASK = ("data_path", "split", "vocab_file", "merge_file", "tokenizer_file", "seq_length")
"""Settings that decide on what text, in which tokens and at what length a run is validated."""
TIME_CAUTION = (
    "Times count only where nothing else ran on the machine: on a shared one even a large difference says little."
)

ROWS: tuple[tuple[str, Callable[[RunSummary], str]], ...] = (
    ("state", lambda s: s.state.status),
    ("steps", lambda s: f"{s.steps:,}"),
    ("tokens", lambda s: format_count(s.tokens)),
    ("wall time", lambda s: duration(s.elapsed)),
    ("wall time without evaluation", lambda s: duration(s.seconds)),
    ("tokens/s", lambda s: ABSENT if s.tokens_per_second is None else format_count(s.tokens_per_second)),
    ("validation loss", lambda s: number(s.validation_loss, ".4f")),
    ("validation perplexity", lambda s: number(s.perplexity, ",.2f")),
    ("best validation perplexity", lambda s: number(s.best_perplexity, ",.2f")),
    ("largest loss ratio", lambda s: number(s.loss_ratio.max, ".3f")),
    ("steps with loss ratio > 1.2", lambda s: f"{s.loss_ratio.above_1_2:,}"),
    ("largest ratio at same positions", lambda s: number(s.position_matched_loss_ratio.max, ".3f")),
    ("largest smoothed ratio", lambda s: number(s.smoothed_loss_ratio.max, ".3f")),
    ("largest variance element", lambda s: number(s.max_adam_variance, ".3g")),
    ("clipped steps", lambda s: f"{s.clipped:,}"),
    ("skipped steps", lambda s: f"{s.skipped:,}"),
)
BRIEFLY = {
    *("steps", "tokens", "wall time", "tokens/s", "validation loss", "validation perplexity"),
    "steps with loss ratio > 1.2",
}
"""The rows to begin with."""


def comparison_table(summaries: Sequence[RunSummary], *, markdown: bool = False, brief: bool = False) -> str:
    """A row a measure, a column a run: aligned plain text, or a Markdown table; `brief`: the rows to begin with."""
    cells = [["", *(summary.name for summary in summaries)]]
    rows = [(label, value) for label, value in ROWS if label in BRIEFLY or not brief]
    return aligned(cells + [[label, *(value(summary) for summary in summaries)] for label, value in rows], markdown)


def aligned(cells: Sequence[Sequence[str]], markdown: bool = False) -> str:
    """Rows of equally many cells, the header first, as plain text or as a Markdown table."""
    widths = [max(3, *(len(row[column]) for row in cells)) for column in range(len(cells[0]))]  # Markdown's least rule
    lines = []
    for row in cells:
        first, *rest = (
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("| " + " | ".join([first, *rest]) + " |" if markdown else "  ".join([first, *rest]).rstrip())
    if markdown:
        rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
        lines.insert(1, "| " + " | ".join(rule) + " |")
    else:
        lines.insert(1, "-" * (sum(widths) + 2 * (len(widths) - 1)))
    return "\n".join(lines)


def verdict(runs: Sequence[Run], groups: Sequence[Group] = ()) -> str:
    """Sentences that compare every run with the first: validation loss at equal tokens, then time; and what they are
    worth, with `groups` by how far seeds of one setting lie apart.

    Runs that ended at different tokens are compared at the last tokens that both were validated at. A run that ended
    before its sequence length was full has a sentence of its own.
    """
    if len(runs) < 2:
        return ""
    first, *others = runs
    lines = [f"{_loss_sentence(first, other)} {_time_sentence(first, other)}" for other in others]
    lines += [sentence for other in others if (sentence := _texts_sentence(first, other))]
    lines += [sentence for sentence in map(_length_sentence, runs) if sentence]
    return "\n".join([*lines, _seeds_sentence(groups), TIME_CAUTION])


def _seeds_sentence(groups: Sequence[Group]) -> str:
    losses = [spread for group in groups if (spread := group.spreads["validation_loss"]) is not None]
    gaps = [spread.max - spread.min for spread in losses if spread.n > 1 and math.isfinite(spread.max - spread.min)]
    if not gaps:
        return (
            "These are single runs: another seed would give another loss, by how much is not known here. A small gap "
            "says little."
        )
    return (
        f"Runs that differ only in their seed lie up to {max(gaps):.4f} apart in their last validation loss: of two "
        "single runs a smaller gap says nothing."
    )


def _texts_sentence(first: Run, other: Run) -> str:
    """What makes the validation losses of two runs those of different tasks, by the config.yaml beside their logs."""
    found = []
    for run in (first, other):
        path = run.path and run.path.with_name("config.yaml")
        if path is None or not path.is_file():
            return ""
        try:
            found.append(flat(read_config(path, "model", "tokenizer", "data")))
        except UserError:  # the configuration of another version
            return ""
    differ = [f"--{name.replace('_', '-')}" for name in TASK if found[0][name] != found[1][name]]
    if not differ:
        return ""
    return (
        f"{first.name} and {other.name} differ in {' and '.join(differ)}: where that is another text, tokenizer or "
        "length, their losses cannot be compared."
    )


def _length_sentence(run: Run) -> str:
    """Where a run has ended before its sequence length reached --seq-length of the config.yaml beside its log."""
    longest, path = summarise(run).seq_length, run.path and run.path.with_name("config.yaml")
    if longest is None or path is None or not path.is_file() or run.state.status == "running":
        return ""
    with suppress(UserError):  # the configuration of another version
        full = read_config(path, "model").model.seq_length
        if longest < full:
            return (
                f"{run.name} ended at sequence length {longest:.0f}, before its warmup reached --seq-length {full}, at "
                "which it is validated: no fair comparison; give it more tokens, or a shorter warmup."
            )
    return ""


def _loss_sentence(first: Run, other: Run) -> str:
    ends = [summarise(run) for run in (first, other)]
    tokens = [end.validation_tokens for end in ends]
    if tokens[0] is None or tokens[1] is None:
        return f"{first.name} and {other.name} cannot be compared: a validation is missing."
    shared = min(tokens[0], tokens[1])
    where = f"at {format_count(shared)} tokens"
    if max(tokens[0], tokens[1]) <= (1 + EQUAL_TOKENS) * shared:
        losses = [end.validation_loss for end in ends]
    else:
        losses = [run.validation_loss_at(shared) for run in (first, other)]
        if not all(shared in run.validation("consumed_tokens") for run in (first, other)):
            where += ", between two validations"
    if losses[0] is None or losses[1] is None:
        return f"{first.name} and {other.name} were not validated at the same tokens."
    return _compare_losses((first.name, other.name), (losses[0], losses[1]), where)


def _compare_losses(names: tuple[str, str], losses: tuple[float, float], where: str) -> str:
    finite = [loss - loss == 0 for loss in losses]
    if not any(finite):
        return f"Neither {names[0]} nor {names[1]} has a finite validation loss {where}."
    if not all(finite):
        lower = 0 if finite[0] else 1
        return f"{names[1 - lower]} diverged; {names[lower]} has validation loss {losses[lower]:.4f} {where}."
    lower = 0 if losses[0] <= losses[1] else 1
    gap = losses[1 - lower] - losses[lower]
    if round(gap, 4) == 0:
        return f"{names[0]} and {names[1]} have the same validation loss {where} ({losses[0]:.4f})."
    return (
        f"{names[lower]} has a lower validation loss than {names[1 - lower]} {where}: "
        f"{losses[lower]:.4f} against {losses[1 - lower]:.4f} ({gap:.4f} lower)."
    )


def _time_sentence(first: Run, other: Run) -> str:
    """Training time for the tokens that both have trained on."""
    ends = [summarise(run) for run in (first, other)]
    speeds = [end.tokens_per_second for end in ends]
    if not speeds[0] or not speeds[1]:
        return "Their times are not in the logs."
    shared = min(end.tokens for end in ends)
    times = [_seconds_at(run, shared) for run in (first, other)]
    faster = 0 if times[0] <= times[1] else 1
    saved = 1 - times[faster] / times[1 - faster]
    names = (first.name, other.name)
    if saved < 0.03:  # less than a machine's own drift
        return f"Both took about {format_duration(times[0])} to train on {format_count(shared)} tokens."
    return (
        f"{names[faster]} took less time to train on {format_count(shared)} tokens: {format_duration(times[faster])} "
        f"against {format_duration(times[1 - faster])} ({saved:.0%} less, evaluation not counted)."
    )


def _seconds_at(run: Run, tokens: float) -> float:
    counts, seconds = run.step("consumed_tokens"), run.step("seconds")
    return float(seconds[min(int(counts.searchsorted(tokens)), len(seconds) - 1)])
