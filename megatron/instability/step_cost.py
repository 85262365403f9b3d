"""What a training step costs, fitted to the logs of runs, for the planner."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron.arguments import read_config
from megatron.config import Config, ModelConfig, require
from megatron.instability.statistics import FloatArray
from megatron.instability.summary import Run
from megatron.model.cost import HOUR, StepCost

GROUP = 5
"""Steps of which one median is taken, at least: two of them may be outliers."""


@dataclass(frozen=True)
class CostFit:
    """A step cost, and how well it describes the steps that it was fitted to."""

    cost: StepCost
    steps: int
    measured_seconds: float
    """Of all these steps, outliers too."""
    fitted_seconds: float
    """What the fit says of the same steps."""
    median_error: float
    """Half of the steps lie within this share of their own time."""

    def to_dict(self) -> dict[str, Any]:
        """JSON values, without the cost."""
        values = asdict(self)
        del values["cost"]
        return values

    def __str__(self) -> str:
        """In words, with the --cost to give."""
        return (
            f"fitted to            {self.steps:,} steps: half of them lie within {self.median_error:.1%} of it, and "
            f"the {self.measured_seconds / HOUR:,.4g} h of all are {self.fitted_seconds / HOUR:,.4g} h by it\n"
            f"to give again        --cost {self.cost}"
        )


def fit_step_cost(runs: Sequence[Run], config: Config) -> CostFit:
    """The cost of a step in `runs`, for the batch of `config`.

    Steps that compile, wait for a disk or share the machine take many times as long as others, so medians of steps of
    equal length (where a length has few steps, of neighbouring ones) are fitted, by least squares. No part of a cost
    is negative: where the line would be, that part is 0. The first step of a log is left out.

    Raises:
        UserError: where a run is of another model, has no times, or all have steps of one length only.
    """
    steps = [_steps(run, config.model) for run in runs]
    tokens, seconds = np.concatenate([t for t, _ in steps]), np.concatenate([s for _, s in steps])
    names = ", ".join(str(run.path or run.name) for run in runs)
    groups = _groups(tokens)
    sizes = f"{count} sizes" if (count := len(np.unique(tokens))) != 1 else "one size"
    require(
        len(groups) >= 2,
        f"--fit {names}: expected at least {GROUP} steps with a time at each of two sequence lengths or batch sizes, "
        f"found {len(tokens):,} steps of {sizes}: give the log of a longer run with "
        "--seqlen-warmup (by truncation: otherwise every step has as many tokens), or of two runs",
    )
    fixed, per_token = _least_squares(
        np.array([np.median(tokens[group]) for group in groups]),
        np.array([np.median(seconds[group]) for group in groups]),
        np.array([float(len(group)) for group in groups]),
    )
    fitted = fixed + per_token * tokens
    return CostFit(
        StepCost(fixed, per_token * config.training.global_batch_size),
        len(tokens),
        float(seconds.sum()),
        float(fitted.sum()),
        float(np.median(np.abs(fitted - seconds) / seconds)),
    )


def _steps(run: Run, model: ModelConfig) -> tuple[FloatArray, FloatArray]:
    """Tokens and seconds of the steps of a run, but for the first and those after a gap in the log."""
    _check_model(run, model)
    tokens = run.step_tokens()[1:]
    seconds = np.diff(run.step("seconds"))
    usable = (np.diff(run.step("iteration")) == 1) & (tokens > 0) & (seconds > 0)  # False where one is NaN
    return tokens[usable], seconds[usable]


def _check_model(run: Run, model: ModelConfig) -> None:
    """Raise UserError where the configuration beside the log says that the run is of another shape than `model`."""
    path = run.path and run.path.with_name("config.yaml")
    if path is None or not path.is_file():
        return
    found = read_config(path, "model").model
    shapes = [f"{m.num_layers} layers of {m.hidden_size}" for m in (model, found)]
    require(
        shapes[0] == shapes[1],
        f"--fit {run.path}: expected a run of the model that is planned, {shapes[0]}, found {shapes[1]} in {path}",
    )


def _groups(tokens: FloatArray) -> list[NDArray[np.intp]]:
    """Steps of like length: their indices, GROUP or more of them, those of one length together."""
    cuts = [0]
    for end in np.cumsum(np.unique(tokens, return_counts=True)[1]):
        if end - cuts[-1] >= GROUP:
            cuts.append(int(end))
    return np.split(np.argsort(tokens, kind="stable"), cuts[1:-1])  # what is left at the end joins the last group


def _least_squares(x: FloatArray, y: FloatArray, weights: FloatArray) -> tuple[float, float]:
    """a and b of the line a + b * x through the points (x, y), y > 0, neither negative."""
    mean_x, mean_y = np.average(x, weights=weights), np.average(y, weights=weights)
    slope = np.sum(weights * (x - mean_x) * (y - mean_y)) / np.sum(weights * (x - mean_x) ** 2)
    if slope < 0:
        return float(mean_y), 0.0
    if slope * mean_x > mean_y:
        return 0.0, float(np.sum(weights * x * y) / np.sum(weights * x * x))
    return float(mean_y - slope * mean_x), float(slope)
