"""Runs that differ only in their seed: one row a group, with mean and spread."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any

from megatron.errors import UserError
from megatron.instability.quality import Target
from megatron.instability.statistics import Spread, spread
from megatron.instability.summary import RunSummary
from megatron.metrics import json_safe

SEED = re.compile(r"[-_]seed\d+$", re.IGNORECASE)
"""The end of a run's name that its group does not have: slw-seed1234 and slw_seed1235 are both slw."""


def setting_of(name: str) -> str:
    """The name of a run without its seed."""
    return SEED.sub("", name)


MEASURES: dict[str, Callable[[RunSummary], float | None]] = {
    "validation_loss": lambda s: s.validation_loss,
    "perplexity": lambda s: s.perplexity,
    "best_perplexity": lambda s: s.best_perplexity,
    "max_loss_ratio": lambda s: s.loss_ratio.max,
    "steps_above_1_2": lambda s: None if s.loss_ratio.max is None else s.loss_ratio.above_1_2,
    "steps_above_1_5": lambda s: None if s.loss_ratio.max is None else s.loss_ratio.above_1_5,
    "max_position_matched_loss_ratio": lambda s: s.position_matched_loss_ratio.max,
    "max_smoothed_loss_ratio": lambda s: s.smoothed_loss_ratio.max,
    "max_adam_variance": lambda s: s.max_adam_variance,
    "seconds": lambda s: s.seconds,
}
"""What is spread over a group's runs."""


@dataclass(frozen=True)
class Group:
    """Runs of one setting."""

    name: str
    runs: tuple[str, ...]
    spreads: dict[str, Spread | None]
    """By `MEASURES`; None where no run has the number."""
    reached: dict[str, int]
    """Target's label -> how many of the runs reached it."""
    tokens_to: dict[str, Spread | None]
    """Target's label -> tokens, over the runs that reached it."""

    def to_dict(self) -> dict[str, Any]:
        """Values that JSON can hold."""
        return dict(json_safe(asdict(self)))


def group_runs(summaries: Sequence[RunSummary], targets: Sequence[Target], patterns: Sequence[str] = ()) -> list[Group]:
    """The groups of the runs, in their order; none where every group would be a single run.

    `patterns` are GROUP=PATTERN, with a shell pattern of run names; a run that none matches belongs to its name without
    `SEED`. Raises UserError for a pattern that is none or matches no run, and for a run that two groups match.
    """
    given = [_split(pattern) for pattern in patterns]
    members: dict[str, list[RunSummary]] = {}
    for summary in summaries:
        matching = sorted({name for name, pattern in given if fnmatchcase(summary.name, pattern)})
        if len(matching) > 1:
            raise UserError(f"--group: the run {summary.name} matches both {matching[0]} and {matching[1]}")
        members.setdefault(matching[0] if matching else setting_of(summary.name), []).append(summary)
    for name, pattern in given:
        if not any(fnmatchcase(summary.name, pattern) for summary in summaries):
            names = ", ".join(summary.name for summary in summaries)
            raise UserError(f"--group {name}={pattern}: matches no run; they are called {names}")
    if all(len(group) == 1 for group in members.values()):
        return []
    return [_group(name, group, targets) for name, group in members.items()]


def _split(pattern: str) -> tuple[str, str]:
    name, separator, pattern_of_names = pattern.partition("=")
    if not (name and separator and pattern_of_names):
        raise UserError(f"--group {pattern}: expected GROUP=PATTERN, such as slw='slw-*'")
    return name, pattern_of_names


def _group(name: str, summaries: Sequence[RunSummary], targets: Sequence[Target]) -> Group:
    names = {summary.name for summary in summaries}
    arrivals = {t.label: [a.tokens for a in t.arrivals if a.run in names and a.reached] for t in targets}
    return Group(
        name,
        tuple(summary.name for summary in summaries),
        {measure: spread(value(summary) for summary in summaries) for measure, value in MEASURES.items()},
        {label: len(tokens) for label, tokens in arrivals.items()},
        {label: spread(tokens) for label, tokens in arrivals.items()},
    )
