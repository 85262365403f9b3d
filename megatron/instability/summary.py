"""What a run did, read from its metrics.jsonl: columns for figures, and a summary for tables."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megatron.errors import UserError
from megatron.files import file_errors
from megatron.instability.loss_ratio import LARGE_SPIKE, SPIKE
from megatron.instability.statistics import Correlation, FloatArray, pearson, smoothed_loss_ratio
from megatron.instability.zeroshot_results import (
    RESULTS_FILE,
    STRICT_LAMBADA,
    WIKITEXT,
    differences,
    read_results,
)
from megatron.metrics import EXIT_FILE, METRICS_FILE, json_safe, read_lines
from megatron.owner_file import OWNER_FILE, how_ended

ENDS = ("finished", "stopped", "diverged")
"""The statuses in an EXIT_FILE."""


@dataclass(frozen=True)
class RunState:
    """Whether a run goes on."""

    status: Literal["finished", "stopped", "diverged", "died", "running", "starting"]
    """Diverged: a loss or gradient that was not finite ended it. Died: it has ended otherwise. Running: it goes on, or
    has died where that cannot be seen from here; `silent` tells which is likely. Starting: so, without a step yet."""
    reason: str | None = None
    """Why it was stopped, or how it diverged or died."""
    silent: float | None = None
    """Seconds since a running or starting one last wrote to its log."""


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
    tests: dict[str, FloatArray] = field(default_factory=dict)
    """Field -> one value an evaluation on the test split."""
    state: RunState = RunState("finished")
    zeroshot: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Task -> what tools/evaluate_zeroshot.py found of it."""

    def zeroshot_metric(self, task: str, metric: str) -> float | None:
        """A number of a zero-shot result. Raises UserError for a result without it."""
        if task not in self.zeroshot:
            return None
        try:
            return float(self.zeroshot[task][metric])
        except (KeyError, TypeError, ValueError):
            path = self.path and self.path.with_name(RESULTS_FILE)
            raise UserError(f"{path}: expected a number {metric} of {task}, found none: evaluate it again") from None

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

    def step_tokens(self) -> FloatArray:
        """Tokens trained on in each step; NaN where the log does not say."""
        counts, first = self.step("consumed_tokens"), self.step("iteration")[:1] == 1
        before = counts - self.step("seqlen") * self.step("global_batch_size")
        return np.diff(counts, prepend=np.where(first, 0.0, before[:1]))

    def smoothed_loss_ratio(self) -> FloatArray:
        """`statistics.smoothed_loss_ratio` of the steps."""
        return smoothed_loss_ratio(self.step("loss"), self.step_tokens())

    def validation_loss_at(self, tokens: float) -> float | None:
        """Validation loss at `tokens`, linear between validations; None outside of what was validated."""
        counts, losses = self.validation("consumed_tokens"), self.validation("loss")
        known = np.isfinite(counts)
        counts, losses = counts[known], losses[known]
        if not len(counts) or not counts[0] <= tokens <= counts[-1]:
            return None
        return float(np.interp(tokens, counts, losses))


def require_no_parent(directory: Path) -> None:
    """Raise UserError where `directory` is no run itself, but holds some."""
    within = [] if has_begun(directory) else [str(log.parent) for log in sorted(directory.glob(f"*/{METRICS_FILE}"))]
    if within:
        several = f"{len(within)} runs" if len(within) > 1 else "a run"
        raise UserError(f"{directory} holds {several}, and is none itself: give {' '.join(within)}")


def read_run(directory: Path | str, *, name: str | None = None) -> Run:
    """Read a run directory (or a metrics.jsonl itself), also while the run goes on; it may have no step yet.

    Raises UserError for a missing log, with file:line for a broken line, and for an exit.json that is not one.
    """
    path = Path(directory)
    if path.is_dir() or path.suffix != ".jsonl":
        path = path / METRICS_FILE
    if not path.is_file():
        if not has_begun(path.parent):
            require_no_parent(path.parent)
            raise UserError(f"{path}: no such file; expected the --save directory of a run")
        return Run(name or path.resolve().parent.name, {}, {}, path, state=read_state(path, stepped=False))
    steps: list[dict[str, Any]] = []
    validations: list[dict[str, Any]] = []
    tests: list[dict[str, Any]] = []
    for _, entry in read_lines(path):
        event = entry.get("event", "step")
        column = {"step": steps, "validation": validations, "test": tests}.get(event)
        if column is not None:
            # A run started over in the same directory goes back: what it does again replaces what was there.
            while column and column[-1]["iteration"] >= entry["iteration"]:
                column.pop()
            column.append(entry)
    return Run(
        name or path.resolve().parent.name,
        _columns(path, steps),
        _columns(path, validations),
        path,
        _columns(path, tests),
        read_state(path, stepped=bool(steps)),
        read_results(path.with_name(RESULTS_FILE)),
    )


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
class RatioSummary:
    """A kind of loss ratio over a run. A step whose loss is not finite lies above every threshold."""

    max: float | None
    """The largest; infinite where a loss was not finite, None where there is no ratio."""
    above_1_2: int
    """Steps above 1.2."""
    above_1_5: int
    """Steps above 1.5."""
    share_above_1_2: float | None
    """Of the steps in the log, 0 to 1."""
    share_above_1_5: float | None


@dataclass(frozen=True)
class RunSummary:
    """A run in numbers. None: not in the log."""

    name: str
    state: RunState
    steps: int
    first_step: int | None
    """In the log: 1, but for a run that goes on in another directory than it began in."""
    logged_steps: int
    """Of which counts, extremes and correlations are."""
    tokens: int
    """Tokens trained on."""
    min_step_tokens: float | None
    """Tokens of the smallest step."""
    max_step_tokens: float | None
    seq_length: float | None
    """The longest length that a step had."""
    global_batch_size: float | None
    """The largest batch that a step had, sequences."""
    peak_lr: float | None
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
    best_perplexity: float | None
    """exp(best_validation_loss)."""
    test_perplexity: float | None
    """On the test split, of the last evaluation there."""
    wikitext_perplexity: float | None
    """Zero-shot, adjusted, of WikiText-103."""
    lambada_accuracy: float | None
    """Zero-shot, of whole words."""
    zeroshot_differences: dict[str, str]
    """Of those two, task -> in what it was measured otherwise than the paper's; none where in nothing."""
    loss_ratio: RatioSummary
    """Of Li et al. 2022."""
    position_matched_loss_ratio: RatioSummary
    smoothed_loss_ratio: RatioSummary
    max_adam_variance_norm: float | None
    """Largest l1 norm of sqrt(exp_avg_sq) over the run."""
    max_adam_variance: float | None
    """Largest element of sqrt(exp_avg_sq) over the run."""
    max_adam_momentum_norm: float | None
    """Largest l1 norm of exp_avg over the run."""
    clipped: int
    """Steps whose gradient was clipped."""
    skipped: int
    """Steps skipped for a gradient that was not finite."""
    non_finite: int
    """Steps with a loss of NaN or infinity."""
    first_non_finite: int | None
    """First iteration with a loss of NaN or infinity."""
    variance_norm_correlation: Correlation | None
    """Pearson's r of loss ratio and l1 norm of sqrt(exp_avg_sq)."""
    variance_max_correlation: Correlation | None
    """Pearson's r of loss ratio and largest element of sqrt(exp_avg_sq)."""

    def to_dict(self) -> dict[str, Any]:
        """Values that JSON can hold."""
        return dict(json_safe(asdict(self)))


def summarise(run: Run) -> RunSummary:
    """The numbers of a run, from its log alone."""
    tokens = int(_last(run.step("consumed_tokens")) or 0)
    seconds = _last(run.step("seconds"))
    broken = run.step("iteration")[~np.isfinite(run.step("loss"))]
    ratio = _ratios(run, "loss_ratio")
    losses = run.validation("loss")
    # A run that diverged has no loss at its end, whatever its last validation before that was.
    loss = math.nan if run.state.status == "diverged" else _last(losses, finite=False)
    best = _reduce(np.min, losses)
    test_loss = _last(run.tests.get("loss", np.empty(0)), finite=False)
    validated = _last(run.validation("consumed_tokens"))
    steps = int(_last(run.step("iteration")) or 0)
    differ = {task: differences(task, run.zeroshot[task], steps) for task in (WIKITEXT, STRICT_LAMBADA)
              if task in run.zeroshot}  # fmt: skip
    return RunSummary(
        name=run.name,
        state=run.state,
        steps=steps,
        first_step=int(run.step("iteration")[0]) if run.step_count else None,
        logged_steps=run.step_count,
        tokens=tokens,
        min_step_tokens=_reduce(np.min, run.step_tokens()),
        max_step_tokens=_reduce(np.max, run.step_tokens()),
        seq_length=_reduce(np.max, run.step("seqlen")),
        global_batch_size=_reduce(np.max, run.step("global_batch_size")),
        peak_lr=_reduce(np.max, run.step("lr")),
        seconds=seconds,
        elapsed=_wall_time(run),
        tokens_per_second=tokens / seconds if seconds else None,
        validation_tokens=None if validated is None else int(validated),
        validation_loss=loss,
        perplexity=perplexity_of(loss),
        best_validation_loss=best,
        best_perplexity=perplexity_of(best),
        test_perplexity=perplexity_of(test_loss),
        wikitext_perplexity=run.zeroshot_metric(WIKITEXT, "adjusted_perplexity"),
        lambada_accuracy=run.zeroshot_metric(STRICT_LAMBADA, "accuracy"),
        zeroshot_differences={task: text for task, text in differ.items() if text},
        loss_ratio=_ratio_summary(ratio),
        position_matched_loss_ratio=_ratio_summary(_ratios(run, "position_matched_loss_ratio")),
        smoothed_loss_ratio=_ratio_summary(run.smoothed_loss_ratio()),
        max_adam_variance_norm=_reduce(np.max, run.step("adam_variance_norm")),
        max_adam_variance=_reduce(np.max, run.step("adam_variance_max")),
        max_adam_momentum_norm=_reduce(np.max, run.step("adam_momentum_norm")),
        clipped=int(np.nansum(run.step("clipped"))),
        skipped=int(np.nansum(run.step("skipped"))),
        non_finite=len(broken),
        first_non_finite=int(broken[0]) if len(broken) else None,
        variance_norm_correlation=pearson(ratio, run.step("adam_variance_norm")),
        variance_max_correlation=pearson(ratio, run.step("adam_variance_max")),
    )


def perplexity_of(loss: float | None) -> float | None:
    """exp(loss), infinite where it is too large for a float."""
    if loss is None:
        return None
    return math.inf if loss > 700 else math.exp(loss)


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


def _ratio_summary(ratios: FloatArray) -> RatioSummary:
    known = ratios[~np.isnan(ratios)]
    counts = [int((known > threshold).sum()) for threshold in (SPIKE, LARGE_SPIKE)]
    shares = [count / len(ratios) if len(known) else None for count in counts]
    return RatioSummary(_reduce(np.max, known), *counts, *shares)


def _wall_time(run: Run) -> float | None:
    """The latest `elapsed_seconds` of steps and validations: a last validation comes after the last step."""
    times = [t for t in (_last(run.step("elapsed_seconds")), _last(run.validation("elapsed_seconds"))) if t is not None]
    return max(times) if times else None


def has_begun(directory: Path) -> bool:
    """Whether a run has begun in `directory`: it may have no log yet."""
    return any((directory / name).is_file() for name in (OWNER_FILE, "config.yaml"))


def read_state(log: Path, *, stepped: bool) -> RunState:
    """What exit.json beside the log `log` says of the run; without one it has not ended in order, and owner.json may
    tell whether it has ended. `stepped`: there is a step in the log."""
    died = how_ended(log.parent)  # looked at first: who ends in order signs off after exit.json is written
    path = log.with_name(EXIT_FILE)
    with file_errors("read", path):
        if not path.exists():
            if died:
                return RunState("died", died)
            silent = max(0.0, time.time() - log.stat().st_mtime) if log.exists() else None
            return RunState("running" if stepped else "starting", silent=silent)
        content = path.read_bytes()
    try:
        entry = json.loads(content)
        status, reason = entry["status"], entry["reason"]
    except (ValueError, TypeError, KeyError, RecursionError):
        status = reason = None
    if status not in ENDS or not isinstance(reason, str | None):
        raise UserError(
            f'{path}: expected {{"status": one of {", ".join(ENDS)}, ...}}, found {content[:60]!r}; delete it'
        )
    return RunState(status, reason)
