"""The tables of a report in words, in the shapes of the paper's (Li et al. 2022)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron.console import format_count, format_duration
from megatron.instability.groups import Group
from megatron.instability.quality import Target
from megatron.instability.statistics import SMOOTHING_TOKENS, Correlation, Spread
from megatron.instability.summary import RatioSummary, RunState, RunSummary
from megatron.instability.zeroshot_results import STRICT_LAMBADA, WIKITEXT

ABSENT = "-"
MARK = "*"
"""On a number that a footnote says more of."""
NO_RELATION = 0.05
"""A p-value from which on a correlation is called none."""
WEAK, STRONG = 0.3, 0.7
"""Below and from which on, as an absolute value, a correlation is called so."""
SILENT_SECONDS = 600
"""A run whose log has been silent for longer may have died."""

_GROUP_COLUMNS = (
    ("validation_loss", "last validation loss", ".3f"),
    ("perplexity", "last validation perplexity", ",.2f"),
    ("best_perplexity", "best validation perplexity", ",.2f"),
    ("max_loss_ratio", "largest loss ratio", ".3f"),
    ("steps_above_1_2", "steps > 1.2", ",.1f"),
    ("steps_above_1_5", "steps > 1.5", ",.1f"),
    ("max_smoothed_loss_ratio", "largest smoothed ratio", ".3f"),
)
"""Measure, header and format of a column of `groups_table`."""
_BRIEFLY = ("validation_loss", "max_loss_ratio", "steps_above_1_2")
"""Those that a terminal has room for."""


@dataclass(frozen=True)
class Row:
    """A row of cells; `run` is the run's place among the runs where the row is about one."""

    cells: tuple[str, ...]
    run: int | None = None


@dataclass(frozen=True)
class Table:
    """A table as a report shows it."""

    title: str
    note: str
    """What the columns mean, in a sentence or two."""
    header: tuple[str, ...]
    rows: tuple[Row, ...]
    footnotes: tuple[str, ...] = ()
    """A line a run: of its cells with a MARK, or of all its row."""
    bands: tuple[tuple[str, int], ...] = ()
    """Titles above the header, each with the number of columns that it spans."""


def report_tables(summaries: Sequence[RunSummary], targets: Sequence[Target], groups: Sequence[Group]) -> list[Table]:
    """Every table that there is something to say in, in the order of reading."""
    tables = [
        runs_table(summaries),
        *([groups_table(groups, targets, summaries)] if groups else []),
        instability_table(summaries),
        quality_table(summaries),
        correlation_table(summaries),
        peaks_table(summaries),
    ]
    if targets:
        tables.append(targets_table(targets))
    return tables


def runs_table(summaries: Sequence[RunSummary]) -> Table:
    """What each run is and how far it has come."""
    return Table(
        "Runs",
        "Sequence length, batch size and learning rate: the largest that a step had. Tokens a step: from the smallest "
        "to the largest step; where that is a few hundred tokens the loss ratio is noise.",
        ("run", "state", "steps", "tokens", "tokens a step", "length", "batch", "learning rate", "tokens/s"),
        tuple(
            Row(
                (
                    s.name,
                    state_text(s.state),
                    f"{s.steps:,}",
                    format_count(s.tokens),
                    _tokens_a_step(s),
                    number(s.seq_length, ",.0f"),
                    number(s.global_batch_size, ",.0f"),
                    number(s.peak_lr, ".3g"),
                    ABSENT if s.tokens_per_second is None else format_count(s.tokens_per_second),
                ),
                run,
            )
            for run, s in enumerate(summaries)
        ),
    )


def instability_table(summaries: Sequence[RunSummary]) -> Table:
    """The paper's Table 1, its Table 4 in the third column, and two ratios beside it."""
    smoothed = f"smoothed over {format_count(SMOOTHING_TOKENS)} tokens"
    return Table(
        "Training instability (as the paper's Table 1)",
        "Loss ratio: the step's loss over the least loss of all earlier steps. The paper counts those above 1.2, a "
        "loss a fifth above the best before it: its unstable runs had many. Here: the steps above a threshold, their "
        "share of all steps, and the largest ratio; a step whose loss is not finite lies above every threshold. Same "
        "positions: against the best at the same positions of the sequence, which a growing length does not confound. "
        "Smoothed: the ratio of a moving average over so many tokens, which small steps do not drown in noise.",
        ("run", "steps > 1.2", "steps > 1.5", "largest", "steps > 1.2", "largest", "steps > 1.2", "largest"),
        tuple(
            Row(
                (
                    s.name,
                    _above_1_2(s.loss_ratio),
                    _count(s.loss_ratio.above_1_5, s.loss_ratio.share_above_1_5),
                    number(s.loss_ratio.max, ".3f"),
                    _above_1_2(s.position_matched_loss_ratio),
                    number(s.position_matched_loss_ratio.max, ".3f"),
                    _above_1_2(s.smoothed_loss_ratio),
                    number(s.smoothed_loss_ratio.max, ".3f"),
                ),
                run,
            )
            for run, s in enumerate(summaries)
        ),
        later_logs(summaries),
        bands=(("", 1), ("loss ratio", 3), ("same positions", 2), (smoothed, 2)),
    )


def quality_table(summaries: Sequence[RunSummary]) -> Table:
    """The paper's Table 2, with the validation perplexity; test split and zero-shot only where they were evaluated."""
    extra: list[tuple[str, Callable[[RunSummary], str]]] = [
        ("test perplexity", lambda s: number(s.test_perplexity, ",.2f")),
        ("WikiText-103 perplexity, zero-shot", lambda s: zeroshot_cells(s)[0]),
        ("LAMBADA accuracy, zero-shot", lambda s: zeroshot_cells(s)[1]),
    ]
    extra = [column for column in extra if any(column[1](s) != ABSENT for s in summaries)]
    first = summaries[0]

    def against(this: RunSummary, of_first: float | None, of_this: float | None) -> str:
        finished = first.state.status == this.state.status == "finished"
        return _against(of_first / of_this) if this is not first and finished and of_first and of_this else ""

    return Table(
        "Cost and quality (as the paper's Table 2)",
        "In brackets, where both are finished: against the first run's. Training time is without evaluation and "
        "saving, wall time with everything.",
        (
            "run",
            "steps",
            "tokens",
            "training time",
            "wall time",
            "best validation perplexity",
            "last validation perplexity",
            *(header for header, _ in extra),
        ),
        tuple(
            Row(
                (
                    s.name,
                    f"{s.steps:,}",
                    format_count(s.tokens) + against(s, first.tokens, s.tokens),
                    duration(s.seconds) + against(s, first.seconds, s.seconds),
                    duration(s.elapsed) + against(s, first.elapsed, s.elapsed),
                    number(s.best_perplexity, ",.2f"),
                    number(s.perplexity, ",.2f"),
                    *(cell(s) for _, cell in extra),
                ),
                run,
            )
            for run, s in enumerate(summaries)
        ),
        zeroshot_footnotes(summaries) + later_logs(summaries),
    )


def correlation_table(summaries: Sequence[RunSummary]) -> Table:
    """The paper's Table 3, for every run."""
    return Table(
        "Loss ratio against Adam's variance (as the paper's Table 3)",
        "Pearson's r over n steps, and p, the chance of an r as far from 0 by accident if steps were independent. They "
        "are not, as Adam's variance is a moving average: p is too small. Relation: none found where p is "
        f"{NO_RELATION:g} or more; else weak below an r of {WEAK:g}, strong from {STRONG:g} on, moderate between, and "
        "inverse below 0.",
        ("run", "r", "p", "relation", "r", "p", "relation", "n"),
        tuple(
            Row(
                (s.name, *_relation(s.variance_norm_correlation), *_relation(s.variance_max_correlation), _pairs(s)),
                run,
            )
            for run, s in enumerate(summaries)
        ),
        bands=(("", 1), ("variance norm", 3), ("largest element of the variance", 3), ("", 1)),
    )


def peaks_table(summaries: Sequence[RunSummary]) -> Table:
    """Extremes of Adam's state, and the steps that went wrong."""
    return Table(
        "Peaks and faults",
        "The largest value over the run: of the l1 norm and the largest element of √v, v Adam's second moment, and of "
        "the l1 norm of its first moment, the momentum. Then the steps that went wrong.",
        (
            "run",
            "variance norm",
            "variance element",
            "momentum norm",
            "clipped steps",
            "skipped steps",
            "non-finite steps",
            "first of them",
        ),
        tuple(
            Row(
                (
                    s.name,
                    number(s.max_adam_variance_norm, ".4g"),
                    number(s.max_adam_variance, ".3g"),
                    number(s.max_adam_momentum_norm, ".4g"),
                    f"{s.clipped:,}",
                    f"{s.skipped:,}",
                    f"{s.non_finite:,}",
                    ABSENT if s.first_non_finite is None else f"step {s.first_non_finite:,}",
                ),
                run,
            )
            for run, s in enumerate(summaries)
        ),
        later_logs(summaries),
    )


def targets_table(targets: Sequence[Target]) -> Table:
    """Table 5 of the 2021 text: tokens and time to reach the same validation perplexity."""
    rows = []
    for target in targets:
        for run, arrival in enumerate(target.arrivals):
            where = (f"{target.perplexity:,.2f} ({target.label})", arrival.run)
            if not arrival.reached:
                rows.append(Row((*where, "did not reach", "did not reach", "did not reach"), run))
                continue
            tokens = ABSENT if arrival.tokens is None else format_count(arrival.tokens)
            cells = (
                tokens + _against(arrival.token_saving),
                duration(arrival.seconds) + _against(arrival.time_saving),
                duration(arrival.elapsed) + _against(arrival.elapsed_saving),
            )
            rows.append(Row((*where, *cells), run))
    return Table(
        "Tokens and time to the same validation perplexity (as Table 5 of the paper's text of 2021)",
        "At the first validation at or below the target, not interpolated. In brackets: against the first run's.",
        ("target", "run", "tokens", "training time", "wall time"),
        tuple(rows),
    )


def groups_table(
    groups: Sequence[Group],
    targets: Sequence[Target] = (),
    summaries: Sequence[RunSummary] = (),
    *,
    brief: bool = False,
) -> Table:
    """Mean and spread over the runs of a setting, as the seeds of the paper's Appendix A.2.1.

    `summaries`, for the footnotes, are those of the runs.
    """
    columns = [column for column in _GROUP_COLUMNS if not brief or column[0] in _BRIEFLY]

    def cells(group: Group) -> tuple[str, ...]:
        count = len(group.runs)
        return (
            group.name,
            str(count),
            *(spread_text(group.spreads[measure], style, count) for measure, _, style in columns),
            *(f"{group.reached[target.label]} of {count}" for target in targets),
        )

    return Table(
        "Seeds",
        "Mean ± standard deviation (n - 1 below) and, in brackets, least to largest over the n runs that differ only "
        "in their seed; n again where not every run has the number.",
        (
            "group",
            "n",
            *(title for _, title, _ in columns),
            *(f"reached {target.perplexity:,.2f}" for target in targets),
        ),
        tuple(Row(cells(group)) for group in groups),
        later_logs(summaries),
    )


def zeroshot_cells(summary: RunSummary) -> tuple[str, str]:
    """WikiText-103's perplexity and LAMBADA's accuracy, with a MARK where `zeroshot_footnotes` says more of it."""
    marks = [f" {MARK}" if task in summary.zeroshot_differences else "" for task in (WIKITEXT, STRICT_LAMBADA)]
    return number(summary.wikitext_perplexity, ",.2f") + marks[0], number(summary.lambada_accuracy, ".2%") + marks[1]


def zeroshot_footnotes(summaries: Sequence[RunSummary]) -> tuple[str, ...]:
    """A line for each run whose zero-shot numbers were not measured as the paper's were."""
    return tuple(
        f"{MARK} {summary.name}: " + "; ".join(f"{task} {text}" for task, text in summary.zeroshot_differences.items())
        for summary in summaries
        if summary.zeroshot_differences
    )


def later_logs(summaries: Sequence[RunSummary]) -> tuple[str, ...]:
    """A line for each run whose first steps are in the log of another."""
    return tuple(
        f"{s.name}: its log begins with step {s.first_step:,}; counts, largest and best values are of the "
        f"{s.logged_steps:,} steps in it"
        for s in summaries
        if s.first_step is not None and s.first_step > 1
    )


def state_text(state: RunState) -> str:
    """Such as "running", or "running or died: log silent for 25:00"."""
    if state.status in ("stopped", "died") and state.reason:
        return f"{state.status} ({state.reason})"
    if state.silent is not None and state.silent > SILENT_SECONDS:
        return f"{state.status} or died: log silent for {format_duration(state.silent)}"
    return state.status


def spread_text(spread: Spread | None, style: str, runs: int) -> str:
    """Such as 20.11 ± 0.05 (20.06 to 20.15), with n where fewer than `runs` have the number."""
    if spread is None:
        return ABSENT
    fewer = "" if spread.n == runs else f", n = {spread.n}"
    if spread.n == 1:
        return number(spread.mean, style) + fewer
    deviation = "" if spread.std is None else f" ± {number(spread.std, style)}"
    return (
        f"{number(spread.mean, style)}{deviation} ({number(spread.min, style)} to {number(spread.max, style)}){fewer}"
    )


def number(value: float | None, style: str) -> str:
    """A number by a format, ABSENT where there is none."""
    return ABSENT if value is None else format(value, style)


def duration(seconds: float | None) -> str:
    """Seconds as hours, minutes and seconds; ABSENT where unknown."""
    return ABSENT if seconds is None else format_duration(seconds)


def _tokens_a_step(summary: RunSummary) -> str:
    if summary.min_step_tokens is None or summary.max_step_tokens is None:
        return ABSENT
    low, high = format_count(summary.min_step_tokens), format_count(summary.max_step_tokens)
    return low if low == high else f"{low} to {high}"


def _above_1_2(ratio: RatioSummary) -> str:
    return _count(ratio.above_1_2, ratio.share_above_1_2)


def _count(count: int, share: float | None) -> str:
    return ABSENT if share is None else f"{count:,} ({share:.2%})"


def _against(saving: float | None) -> str:
    """In brackets, `saving` the first run's number over this one's: 2.0 is 50% less, 0.8 is 25% more."""
    if saving is None or not math.isfinite(saving):
        return ""
    share = 1 / saving
    if share >= 2:
        return f" ({share:.1f} times)"
    percent = f"{abs(share - 1):.0%}"
    return " (the same)" if percent == "0%" else f" ({percent} {'more' if share > 1 else 'less'})"


def _relation(correlation: Correlation | None) -> tuple[str, str, str]:
    """r, p, and what they say."""
    if correlation is None:
        return ABSENT, ABSENT, ABSENT
    r, p = correlation.r, correlation.p
    words = "weak" if abs(r) < WEAK else "strong" if abs(r) >= STRONG else "moderate"
    words = "none found" if p >= NO_RELATION else f"{words}, inverse" if r < 0 else words
    return f"{r:.2f}", f"{p:.3f}" if p >= 0.001 else "< 1e-300" if p == 0 else f"{p:.1e}", words


def _pairs(summary: RunSummary) -> str:
    pairs = {c.n for c in (summary.variance_norm_correlation, summary.variance_max_correlation) if c is not None}
    return " / ".join(f"{n:,}" for n in sorted(pairs)) or ABSENT
