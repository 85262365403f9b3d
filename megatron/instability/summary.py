"""What a run did, read from its metrics.jsonl: columns for figures, and a summary for tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron.errors import UserError
from megatron.instability.loss_ratio import LARGE_SPIKE, SPIKE
from megatron.metrics import METRICS_FILE, json_safe, read_lines

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Run:
    """The log of a run as columns. A value that was not computed (null, or no such field) is NaN."""

    name: str
    """How tables and legends call it."""
    steps: dict[str, FloatArray]
    """Field -> one value a step."""
    validations: dict[str, FloatArray]
    """Field -> one value a validation."""
    path: Path | None = field(default=None)
    """The file it was read from."""

    @property
    def step_count(self) -> int:
        """Steps in the log."""
        return len(self.steps.get("iteration", ()))

    def step(self, name: str) -> FloatArray:
        """Column `name` of the steps, all NaN if the log has no such field."""
        return self.steps.get(name, np.full(self.step_count, np.nan))

    def validation(self, name: str) -> FloatArray:
        """Column `name` of the validations, all NaN if the log has no such field."""
        return self.validations.get(name, np.full(len(self.validations.get("iteration", ())), np.nan))

    def validation_loss_at(self, tokens: float) -> float | None:
        """Validation loss at `tokens`, linear between validations; None outside of what was validated."""
        counts, losses = self.validation("consumed_tokens"), self.validation("loss")
        known = np.isfinite(counts)
        counts, losses = counts[known], losses[known]
        if not len(counts) or not counts[0] <= tokens <= counts[-1]:
            return None
        return float(np.interp(tokens, counts, losses))


def read_run(directory: Path | str, *, name: str | None = None) -> Run:
    """Read a run directory (or a metrics.jsonl itself), also while the run goes on.

    Raises UserError for a missing or empty log and, with file:line, for a broken line.
    """
    path = Path(directory)
    if path.is_dir() or path.suffix != ".jsonl":
        path = path / METRICS_FILE
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected the --save directory of a run")
    steps: list[dict[str, Any]] = []
    validations: list[dict[str, Any]] = []
    for _, entry in read_lines(path):
        event = entry.get("event", "step")
        column = {"step": steps, "validation": validations}.get(event)
        if column is not None:
            # A run started over in the same directory goes back: what it does again replaces what was there.
            while column and column[-1]["iteration"] >= entry["iteration"]:
                column.pop()
            column.append(entry)
    if not steps:
        raise UserError(f"{path}: holds no step yet; start the run, or wait for its first step")
    return Run(name or path.resolve().parent.name, _columns(path, steps), _columns(path, validations), path)


def read_runs(arguments: Sequence[str]) -> list[Run]:
    """Read several runs, each given as a directory or NAME=DIRECTORY; names are made to differ.

    Runs without a name that share the last part of their paths are called by as many parts as tell them apart.
    """
    given = [_split_name(argument) for argument in arguments]
    parts = [Path(directory).resolve().parts for _, directory in given]
    depth = 1
    while depth < max(map(len, parts)) and len({p[-depth:] for p in parts}) < len(set(parts)):
        depth += 1
    names = [name or "/".join(p[-depth:]) for (name, _), p in zip(given, parts, strict=True)]
    repeated = {name for name in names if names.count(name) > 1}
    if repeated:
        raise UserError(f"two runs are called {sorted(repeated)[0]}: give each once, or as NAME=DIRECTORY")
    return [read_run(directory, name=name) for name, (_, directory) in zip(names, given, strict=True)]


def _split_name(argument: str) -> tuple[str, str]:
    name, separator, directory = argument.partition("=")
    return (name, directory) if separator and not Path(argument).exists() else ("", argument)


@dataclass(frozen=True)
class RunSummary:
    """A run in numbers. None: not in the log."""

    name: str
    steps: int
    tokens: int
    """Tokens trained on."""
    seconds: float | None
    """Training time without evaluation."""
    elapsed: float | None
    """Wall time with evaluation."""
    tokens_per_second: float | None
    """Tokens over training time, the whole run."""
    validation_tokens: int | None
    """Tokens at the last validation."""
    validation_loss: float | None
    """Of the last validation, nats a token, at full length."""
    perplexity: float | None
    """exp(validation_loss)."""
    best_validation_loss: float | None
    max_loss_ratio: float | None
    """Largest loss ratio (Li et al. 2022); infinite where a loss was not finite."""
    loss_ratio_above_1_2: int
    """Steps with a loss ratio above 1.2."""
    loss_ratio_above_1_5: int
    """Steps with a loss ratio above 1.5."""
    max_position_matched_loss_ratio: float | None
    position_matched_above_1_2: int
    max_adam_variance: float | None
    """Largest element of sqrt(exp_avg_sq) over the run."""
    clipped: int
    """Steps whose gradient was clipped."""
    skipped: int
    """Steps skipped for a gradient that was not finite."""
    first_non_finite: int | None
    """First iteration with a loss of NaN or infinity."""
    variance_norm_correlation: float | None
    """Pearson r of loss ratio and l1 norm of sqrt(exp_avg_sq)."""
    variance_max_correlation: float | None
    """Pearson r of loss ratio and largest element of sqrt(exp_avg_sq)."""

    def to_dict(self) -> dict[str, Any]:
        """Values that JSON can hold."""
        return dict(json_safe(asdict(self)))


def summarise(run: Run) -> RunSummary:
    """The numbers of a run, from its log alone."""
    tokens = int(_last(run.step("consumed_tokens")) or 0)
    seconds = _last(run.step("seconds"))
    broken = run.step("iteration")[~np.isfinite(run.step("loss"))]
    ratio, matched = _ratios(run, "loss_ratio"), _ratios(run, "position_matched_loss_ratio")
    losses = run.validation("loss")
    loss = _last(losses, finite=False)
    validated = _last(run.validation("consumed_tokens"))
    return RunSummary(
        name=run.name,
        steps=int(_last(run.step("iteration")) or 0),
        tokens=tokens,
        seconds=seconds,
        elapsed=_wall_time(run),
        tokens_per_second=tokens / seconds if seconds else None,
        validation_tokens=None if validated is None else int(validated),
        validation_loss=loss,
        perplexity=None if loss is None else _perplexity(loss),
        best_validation_loss=_reduce(np.min, losses),
        max_loss_ratio=_reduce(np.max, ratio),
        loss_ratio_above_1_2=_count_above(ratio, SPIKE),
        loss_ratio_above_1_5=_count_above(ratio, LARGE_SPIKE),
        max_position_matched_loss_ratio=_reduce(np.max, matched),
        position_matched_above_1_2=_count_above(matched, SPIKE),
        max_adam_variance=_reduce(np.max, run.step("adam_variance_max")),
        clipped=int(np.nansum(run.step("clipped"))),
        skipped=int(np.nansum(run.step("skipped"))),
        first_non_finite=int(broken[0]) if len(broken) else None,
        variance_norm_correlation=pearson(ratio, run.step("adam_variance_norm")),
        variance_max_correlation=pearson(ratio, run.step("adam_variance_max")),
    )


def pearson(first: FloatArray, second: FloatArray) -> float | None:
    """Pearson's r over the steps where both are finite; None with fewer than 3, or where one does not vary."""
    known = np.isfinite(first) & np.isfinite(second)
    if known.sum() < 3:
        return None
    x, y = first[known] - first[known].mean(), second[known] - second[known].mean()
    spread = math.sqrt(float(x @ x)) * math.sqrt(float(y @ y))
    return float(np.clip(x @ y / spread, -1.0, 1.0)) if spread > 0 else None


def _ratios(run: Run, name: str) -> FloatArray:
    """A column of ratios; infinite at steps whose loss was not finite, as LossRatio counts them."""
    ratios = run.step(name)
    if np.isnan(ratios).all():
        return ratios  # not logged, or a single step
    return np.where(np.isfinite(run.step("loss")), ratios, np.inf)


def _columns(path: Path, entries: list[dict[str, Any]]) -> dict[str, FloatArray]:
    """Numeric fields as arrays; loss_by_position becomes fields such as loss_by_position/8-15."""
    rows = [_flat(entry) for entry in entries]
    names = {name: None for row in rows for name in row}
    try:
        return {name: np.array([_number(row.get(name)) for row in rows], dtype=np.float64) for name in names}
    except (ValueError, TypeError, OverflowError) as error:
        raise UserError(f"{path}: expected numbers, found {error}") from error


def _flat(entry: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in entry.items():
        if isinstance(value, Mapping):
            flat.update({f"{key}/{name}": item for name, item in value.items()})
        elif key != "event" and not isinstance(value, list):
            flat[key] = value
    return flat


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _last(values: FloatArray, *, finite: bool = True) -> float | None:
    """The last value that is there; with `finite` off, the last one whatever it is."""
    if finite:
        values = values[np.isfinite(values)]
    return float(values[-1]) if len(values) else None


def _reduce(function: Callable[[FloatArray], Any], values: FloatArray) -> float | None:
    """min or max over the values that are there."""
    values = values[~np.isnan(values)]
    return float(function(values)) if len(values) else None


def _count_above(values: FloatArray, threshold: float) -> int:
    return int((values[~np.isnan(values)] > threshold).sum())


def _wall_time(run: Run) -> float | None:
    """The latest `elapsed_seconds` of steps and validations: a last validation comes after the last step."""
    times = [t for t in (_last(run.step("elapsed_seconds")), _last(run.validation("elapsed_seconds"))) if t is not None]
    return max(times) if times else None


def _perplexity(loss: float) -> float:
    return math.inf if loss > 700 else math.exp(loss)
