"""Figures of runs side by side, drawn from their logs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from megatron.errors import UserError
from megatron.instability.loss_ratio import SPIKE
from megatron.instability.summary import FloatArray, Run

COLOURS = ("#004488", "#E8A317", "#BB5566", "#000000", "#66AACC", "#777777")
"""By order of the runs. The first three differ in lightness too: they stay apart in grey and to colour-blind eyes."""
MARKERS = ("o", "s", "^", "D", "v", "P")
SMOOTHING = 0.02
"""Smoothed lines average over this share of a run's steps, half before and half after."""

STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 8,
    "axes.labelcolor": "#333333",
    "axes.edgecolor": "#888888",
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.6,
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "lines.linewidth": 1.5,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "legend.fontsize": 9,
    "figure.facecolor": "white",
}


@dataclass(frozen=True)
class Panel:
    """One plot: what is on its axes and how it is drawn."""

    title: str
    y: str
    """Column of the log."""
    label: str
    """Label of the y-axis, with its unit."""
    x: str = "consumed_tokens"
    validation: bool = False
    """Take the validations' columns, not the steps'."""
    smooth: bool = False
    """Draw the values light and their moving average on top."""
    thin: bool = False
    """A thin line, for values that jump from step to step."""
    log: bool = False
    """Logarithmic y-axis."""
    threshold: float | None = None
    """A dashed horizontal line here."""


PANELS = (
    Panel("Training loss at the step's length", "loss", "loss (nats/token)", smooth=True),
    Panel("Validation loss by tokens", "loss", "loss (nats/token)", validation=True),
    Panel("Validation loss by time", "loss", "loss (nats/token)", x="seconds", validation=True),
    Panel("Sequence length", "seqlen", "tokens"),
    Panel("Learning rate", "lr", "learning rate"),
    Panel("Loss ratio, all positions", "loss_ratio", "ratio to best so far", thin=True, threshold=SPIKE),
    Panel("Adam variance, norm", "adam_variance_norm", r"$\Vert\sqrt{v}\,\Vert_1$", log=True),
    Panel("Adam variance, largest element", "adam_variance_max", r"$\max\,\sqrt{v}$", thin=True, log=True),
    Panel(
        "Loss ratio, same positions", "position_matched_loss_ratio", "ratio to best so far", thin=True, threshold=SPIKE
    ),
)


def figure_comparison(runs: Sequence[Run], path: Path | str | None) -> Figure:
    """Draw the runs in nine panels over tokens and time; save it as PNG (900 pixels wide on a page, 1800 in the file).

    A run's colour follows from its place in `runs`. Returns the figure; `path=None` does not save it. Raises
    UserError if `path` cannot be written.
    """
    with matplotlib.rc_context(STYLE):
        spacing = ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.05, wspace=0.02, hspace=0.03)
        figure = Figure(figsize=(9, 7.4), layout=spacing)
        FigureCanvasAgg(figure)
        axes = figure.subplots(3, 3)
        for axis, panel in zip(axes.flat, PANELS, strict=True):
            _draw(axis, panel, runs)
        _share_loss_range(axes[0], runs)
        _share_ratio_range(axes[1][2], axes[2][2])
        figure.legend(handles=_legend(runs), loc="outside upper center", ncols=min(len(runs), 4), handlelength=2.4)
        if path is not None:
            _save(figure, Path(path))
    return figure


def moving_average(values: FloatArray, window: int) -> FloatArray:
    """Mean over `window` values centred on each, fewer at both ends; NaN and infinities are left out of it."""
    finite = np.isfinite(values)
    sums = np.concatenate(([0.0], np.cumsum(np.where(finite, values, 0.0))))
    counts = np.concatenate(([0], np.cumsum(finite)))
    index = np.arange(len(values))
    # As far to the left as to the right, so that a steep curve is not bent at its ends.
    reach = np.minimum(np.minimum(window // 2, index), len(values) - 1 - index)
    low, high = index - reach, index + reach + 1
    total, count = sums[high] - sums[low], counts[high] - counts[low]
    return np.where(finite, total / np.maximum(count, 1), np.nan)


def _draw(axis: Axes, panel: Panel, runs: Sequence[Run]) -> None:
    x_scale, x_label = _x_axis(panel.x, runs)
    y_scale, y_label = _learning_rate_axis(runs) if panel.y == "lr" else (1.0, panel.label)
    seen = False
    for index, run in enumerate(runs):
        column = run.validation if panel.validation else run.step
        x, y = column(panel.x) / x_scale, column(panel.y) / y_scale
        known = np.isfinite(x) & ~np.isnan(y)
        x, y = x[known], np.where(np.isfinite(y[known]), y[known], np.nan)
        if not len(x):
            continue
        seen = True
        colour, order = COLOURS[index % len(COLOURS)], 3 + index
        width = max(1.2, 2.4 - 1.1 * index)  # where lines coincide, the earlier run shows on both sides of the later
        if panel.smooth:
            axis.plot(x, y, color=colour, alpha=0.22, linewidth=0.6, zorder=2)
            y = moving_average(y, max(1, round(SMOOTHING * len(y))))
        if panel.validation:
            marker, size = MARKERS[index % len(MARKERS)], 4.6 if index == 0 else 3.0
            axis.plot(x, y, color=colour, marker=marker, markersize=size, linewidth=width, zorder=order, label=run.name)
        else:
            axis.plot(x, y, color=colour, linewidth=0.8 if panel.thin else width, zorder=order, label=run.name)
    if panel.threshold is not None and seen:
        axis.axhline(panel.threshold, color="#555555", linewidth=0.8, linestyle=(0, (4, 3)), zorder=10)
    if not seen:
        axis.text(0.5, 0.5, "not in the logs", transform=axis.transAxes, ha="center", va="center", color="#777777")
    elif panel.log:
        _log_axis(axis)
    axis.set(title=panel.title, ylabel=y_label, xlabel=x_label)
    axis.set_xlim(left=0)
    if panel.y in {"seqlen", "lr"}:
        axis.set_ylim(bottom=0)


def _x_axis(name: str, runs: Sequence[Run]) -> tuple[float, str]:
    """Divisor and label of the x-axis: the unit that keeps the largest run at 1 to 1000 or so."""
    largest = max((float(np.nanmax(v)) for run in runs if np.isfinite(v := run.step(name)).any()), default=1.0)
    if name == "seconds":
        for scale, unit in ((3600.0, "hours"), (60.0, "minutes")):
            if largest > 2 * scale:
                return scale, f"training time ({unit})"
        return 1.0, "training time (seconds)"
    for scale, unit in ((1e9, "B tokens"), (1e6, "M tokens"), (1e3, "K tokens")):
        if largest >= scale:
            return scale, f"trained on ({unit})"
    return 1.0, "trained on (tokens)"


def _learning_rate_axis(runs: Sequence[Run]) -> tuple[float, str]:
    """Divisor and label of the y-axis: the power of ten stands in the label, not above the axis."""
    largest = max((float(np.nanmax(v)) for run in runs if np.isfinite(v := run.step("lr")).any()), default=1.0)
    exponent = math.floor(math.log10(largest)) if largest > 0 else 0
    return 10.0**exponent, f"learning rate ($10^{{{exponent}}}$)" if exponent else "learning rate"


def _log_axis(axis: Axes) -> None:
    """Logarithmic, with ticks at 1, 2 and 5 written out: most runs span less than a power of ten."""
    axis.set_yscale("log")
    low, high = axis.get_ylim()
    fine = (1.0, 2.0, 5.0) if high > 12 * low else (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0)
    axis.yaxis.set_major_locator(LogLocator(subs=fine if high < 1000 * low else (1.0,)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.4g}" if value >= 1e-4 else f"{value:.0e}"))
    axis.yaxis.set_minor_formatter(NullFormatter())


def _share_loss_range(axes: Sequence[Axes], runs: Sequence[Run]) -> None:
    """One range for the three loss panels: from the lowest loss to just above the highest validation loss.

    The first steps of training lie above it, where the loss falls steeply and says little.
    """
    validated = np.concatenate([run.validation("loss") for run in runs])
    trained = np.concatenate(
        [moving_average(run.step("loss"), max(1, round(SMOOTHING * run.step_count))) for run in runs]
    )
    validated, trained = validated[np.isfinite(validated)], trained[np.isfinite(trained)]
    if not len(validated) or not len(trained):
        return
    low = min(validated.min(), trained.min())
    high = max(validated.max(), float(np.quantile(trained, 0.95)))
    if high > low:
        for axis in axes:
            axis.set_ylim(low - 0.05 * (high - low), high + 0.08 * (high - low))


def _share_ratio_range(*axes: Axes) -> None:
    """One range for both loss ratios, so that they can be compared by eye."""
    drawn = [axis.get_ylim() for axis in axes if axis.get_lines()]
    if drawn:
        for axis in axes:
            axis.set_ylim(min(low for low, _ in drawn), max(high for _, high in drawn))


def _legend(runs: Sequence[Run]) -> list[Line2D]:
    return [
        Line2D([], [], color=COLOURS[i % len(COLOURS)], marker=MARKERS[i % len(MARKERS)], markersize=4, label=run.name)
        for i, run in enumerate(runs)
    ]


def _save(figure: Figure, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=200)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot write the figure: {error}") from error
