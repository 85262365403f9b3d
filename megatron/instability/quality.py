"""Tokens and time to reach a validation perplexity, as in the tables of Li et al. (2021, Tables 3 and 5)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from megatron.errors import UserError
from megatron.instability.summary import Run, perplexity_of
from megatron.metrics import json_safe


@dataclass(frozen=True)
class Arrival:
    """The first validation of a run at or below a perplexity. None: it did not reach it, or the log does not say."""

    run: str
    iteration: int | None = None
    tokens: int | None = None
    seconds: float | None = None
    """Training time without evaluation."""
    elapsed: float | None = None
    """Wall time with evaluation."""
    token_saving: float | None = None
    """Tokens of the first run over those of this one: above 1 it needed fewer. None of the first itself."""
    time_saving: float | None = None
    """The same of `seconds`."""
    elapsed_saving: float | None = None
    """The same of `elapsed`."""

    @property
    def reached(self) -> bool:
        """Whether the run came there."""
        return self.iteration is not None


@dataclass(frozen=True)
class Target:
    """A validation perplexity, and when each run reached it."""

    label: str
    perplexity: float
    arrivals: tuple[Arrival, ...]

    def to_dict(self) -> dict[str, Any]:
        """Values that JSON can hold."""
        return dict(json_safe(asdict(self)))


def time_to_quality(runs: Sequence[Run], perplexities: Sequence[float] = ()) -> list[Target]:
    """When each run reached the given perplexities, the first run's best and, where better, the best of all.

    There is no interpolation between validations: a saving below the distance of two says nothing. Raises UserError
    for a perplexity that none can have.
    """
    for perplexity in perplexities:
        if not 1 < perplexity < math.inf:
            raise UserError(f"--target-perplexity {perplexity:g}: expected a number above 1")
    targets = [(f"perplexity {perplexity:g}", math.log(perplexity)) for perplexity in perplexities]
    bests = {run.name: loss for run in runs if (loss := _best(run)) is not None}
    if bests:
        first, leader = runs[0].name, min(bests, key=bests.__getitem__)
        if first in bests:
            targets.append((f"best of {first}", bests[first]))
        if leader != first and bests[leader] < bests.get(first, math.inf):
            targets.append((f"best of {leader}", bests[leader]))
    return [Target(label, perplexity_of(loss) or math.inf, _arrivals(runs, loss)) for label, loss in targets]


def _best(run: Run) -> float | None:
    losses = run.validation("loss")
    losses = losses[np.isfinite(losses)]
    return float(losses.min()) if len(losses) else None


def _arrivals(runs: Sequence[Run], loss: float) -> tuple[Arrival, ...]:
    first = _arrive(runs[0], loss, Arrival(""))
    return (first, *(_arrive(run, loss, first) for run in runs[1:]))


def _arrive(run: Run, loss: float, first: Arrival) -> Arrival:
    there = np.flatnonzero(run.validation("loss") <= loss)
    if not len(there):
        return Arrival(run.name)

    def value(name: str) -> float | None:
        found = float(run.validation(name)[there[0]])
        return found if math.isfinite(found) else None

    tokens, seconds, elapsed = (value(name) for name in ("consumed_tokens", "seconds", "elapsed_seconds"))
    return Arrival(
        run.name,
        iteration=int(run.validation("iteration")[there[0]]),
        tokens=None if tokens is None else int(tokens),
        seconds=seconds,
        elapsed=elapsed,
        token_saving=_saving(first.tokens, tokens),
        time_saving=_saving(first.seconds, seconds),
        elapsed_saving=_saving(first.elapsed, elapsed),
    )


def _saving(first: float | None, other: float | None) -> float | None:
    return first / other if first is not None and other else None
