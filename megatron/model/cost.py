"""How long a planned run will take: a step costs a fixed time, and a time for each token. No torch."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from typing import Any

from megatron.config import Config

HOUR = 3600.0


@dataclass(frozen=True)
class StepCost:
    """Seconds of a training step on some machine: fixed + per_length * sequence length, at --global-batch-size.

    A smaller batch costs `per_length` in its share: what counts are the step's tokens. Fitted to the printed hours of
    the paper's 1.5B runs at batch 512, fixed is 0.65 s: at short lengths it decides.
    """

    fixed: float
    """Launches, communication, optimizer: paid at every length."""
    per_length: float
    """For one token more in each sequence of the full batch."""

    def __str__(self) -> str:
        """As --cost takes it."""
        return f"{self.fixed:.4g},{self.per_length:.4g}"


def cost_argument(text: str) -> StepCost:
    """The argument of --cost, A,B in seconds. Raises argparse.ArgumentTypeError unless both are times."""
    try:
        fixed, per_length = (float(word) for word in text.split(","))
        if not (min(fixed, per_length) >= 0 and 0 < fixed + per_length < math.inf):
            raise ValueError(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            "expected A,B, the seconds of a step A + B * sequence length, such as 0.65,0.0034; neither negative, "
            f"not both 0; found {text!r}"
        ) from None
    return StepCost(fixed, per_length)


def plan_time(config: Config, totals: dict[str, Any], cost: StepCost) -> dict[str, Any]:
    """Hours of training of what `plan_totals` planned, as JSON values; evaluation and saving come on top.

    The cost is linear in a step's tokens, so the totals are enough, whatever the schedules are.
    """
    fixed = cost.fixed * totals["iterations"] / HOUR
    growing = cost.per_length * totals["consumed_tokens"] / config.training.global_batch_size / HOUR
    return {
        "fixed_seconds": cost.fixed,
        "seconds_per_length": cost.per_length,
        "hours": fixed + growing,
        "fixed_hours": fixed,
    }


def time_table(time: dict[str, Any]) -> str:
    """What `plan_time` found."""
    return (
        f"training time        {time['hours']:,.4g} h without evaluation and saving, {time['fixed_hours']:,.4g} h of "
        f"them the fixed cost of steps\n"
        f"cost of a step       {time['fixed_seconds']:.4g} s + {time['seconds_per_length']:.4g} s * sequence length"
    )
