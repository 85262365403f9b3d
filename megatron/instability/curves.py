"""How runs are drawn: their colours, the panels, axes and units."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from megatron.instability.groups import setting_of
from megatron.instability.statistics import FloatArray
from megatron.instability.summary import Run

COLOURS = ("#004488", "#E8A317", "#BB5566", "#000000", "#66AACC", "#777777", "#228833", "#AA3377")
"""By order of the runs. The first three differ in lightness too: they stay apart in grey and to colour-blind eyes."""
DASHES: tuple[Any, ...] = ("solid", (0, (4, 1.5)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)))
"""Of every eight runs in turn, so that 32 can be told apart."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p")
SMOOTHING = 0.02
"""Smoothed lines average over this share of a run's steps, half before and half after."""
NEAR = 0.02
"""Share of an axis within which what is cut off gets one triangle."""
INK, EDGE, GRID, TICK, FAINT = "#333333", "#888888", "#E6E6E6", "#555555", "#767676"

STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 8,
    "text.color": INK,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 8,
    "axes.labelcolor": INK,
    "axes.edgecolor": EDGE,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": TICK,
    "ytick.color": TICK,
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
    """Column of the log, or one of `_DERIVED`."""
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
    mark_non_finite: bool = False
    """A cross at the top where a run's loss was first not finite."""
    from_zero: bool = False
    """The y-axis starts at 0."""
    stairs: bool = False
    """A value holds until the next one: no slope between the two, also where a curve is thinned out."""


_DERIVED: dict[str, Callable[[Run], FloatArray]] = {
    "perplexity": lambda run: np.exp(np.minimum(run.validation("loss"), 700.0)),
    "smoothed_loss_ratio": Run.smoothed_loss_ratio,
}


def places_of(runs: Sequence[Run]) -> list[int]:
    """Where each run stands in the row of colours: seeds of one setting share a place."""
    settings = list(dict.fromkeys(setting_of(run.name) for run in runs))
    return [settings.index(setting_of(run.name)) for run in runs]


def legend_of(runs: Sequence[Run]) -> list[tuple[int, str]]:
    """Place and name of every setting; of one with several seeds the name without them."""
    named: dict[int, list[str]] = {}
    for place, run in zip(places_of(runs), runs, strict=True):
        named.setdefault(place, []).append(run.name)
    return [
        (place, names[0] if len(names) == 1 else f"{setting_of(names[0])} ({len(names)} seeds)")
        for place, names in named.items()
    ]


def colour_of(index: int) -> str:
    """The colour of a run at this place."""
    return COLOURS[index % len(COLOURS)]


def dashes_of(index: int) -> Any:
    """The line style of a run at this place, as matplotlib takes it."""
    return DASHES[index // len(COLOURS) % len(DASHES)]


def marker_of(index: int) -> str:
    """The marker of a run at this place."""
    return MARKERS[index % len(MARKERS)]


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


def envelope(x: FloatArray, y: FloatArray, points: int) -> tuple[FloatArray, FloatArray]:
    """A curve of about `points` points that looks like (x, y): of every stretch its least and its largest value.

    No spike is lost, however short, and a NaN still breaks the line. A curve that is short enough stays as it is.
    """
    if len(y) <= points:
        return x, y
    keep = {0, len(y) - 1}
    for stretch in np.array_split(np.arange(len(y)), max(1, points // 2)):
        part = y[stretch]
        if np.isnan(part).any():
            keep.add(int(stretch[np.isnan(part).argmax()]))
        if not np.isnan(part).all():
            keep.update((int(stretch[np.nanargmin(part)]), int(stretch[np.nanargmax(part)])))
    kept = sorted(keep)
    return x[kept], y[kept]


def draw_panel(axis: Axes, panel: Panel, runs: Sequence[Run], *, points: int | None = None) -> None:
    """Draw the runs; with `points`, a curve of more becomes its `envelope`."""
    x_scale, x_label = _x_axis(panel.x, runs)
    y_scale, y_label = _learning_rate_axis(runs) if panel.y == "lr" else (1.0, panel.label)
    seen = False
    for index, run in zip(places_of(runs), runs, strict=True):
        column = run.validation if panel.validation else run.step
        derived = _DERIVED.get(panel.y)
        x, y = column(panel.x) / x_scale, (column(panel.y) if derived is None else derived(run)) / y_scale
        known = np.isfinite(x) & ~np.isnan(y)
        x, y = x[known], np.where(np.isfinite(y[known]), y[known], np.nan)
        if panel.mark_non_finite:
            _mark_non_finite(axis, run, panel.x, x_scale, colour_of(index))
        if not len(x):
            continue
        seen = True
        colour, order = colour_of(index), 3 + index
        width = max(1.2, 2.4 - 1.1 * index)  # where lines coincide, the earlier run shows on both sides of the later
        if panel.smooth:
            axis.plot(*_thin(x, y, points), color=colour, alpha=0.22, linewidth=0.6, zorder=2)
            y = moving_average(y, max(1, round(SMOOTHING * len(y))))
        x, y = _thin(x, y, points)
        style = {"color": colour, "linestyle": dashes_of(index), "zorder": order, "label": run.name}
        style["drawstyle"] = "steps-post" if panel.stairs else "default"
        if panel.validation:
            size = 4.6 if index == 0 else 3.0
            axis.plot(x, y, marker=marker_of(index), markersize=size, linewidth=width, **style)
        else:
            axis.plot(x, y, linewidth=0.8 if panel.thin else width, **style)
    if panel.threshold is not None and seen:
        axis.axhline(panel.threshold, color=TICK, linewidth=0.8, linestyle=(0, (4, 3)), zorder=2.5)
    if not seen:
        axis.text(0.5, 0.5, "not in the logs", transform=axis.transAxes, ha="center", va="center", color=FAINT)
    elif panel.log:
        _log_axis(axis)
    axis.set(title=panel.title, ylabel=y_label, xlabel=x_label)
    if panel.x == "iteration" and x_scale == 1:
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))  # no half steps
    low, high = axis.get_xlim()
    # From zero on, but for validations that begin late: they would be pressed into a corner.
    axis.set_xlim(low if panel.validation and low > high / 2 else 0, high)
    if panel.from_zero:
        axis.set_ylim(bottom=0)


def mark_cut(axis: Axes) -> None:
    """Mark where curves go on above the axis: a triangle at its upper edge, and how far the highest goes."""
    (left, right), (_, top) = axis.get_xlim(), axis.get_ylim()
    above: dict[str, list[tuple[float, float]]] = {}
    for line in axis.get_lines():
        x, y = (np.asarray(values, dtype=np.float64) for values in line.get_data())
        above.setdefault(str(line.get_color()), []).extend(zip(x[y > top], y[y > top], strict=True))
    for colour, points in above.items():
        points.sort()
        peaks: list[tuple[float, float]] = []
        before = -math.inf
        for place, height in points:
            if place - before > NEAR * (right - left):
                peaks.append((place, height))
            elif height > peaks[-1][1]:
                peaks[-1] = (place, height)
            before = place
        for place, _ in peaks:
            axis.plot(
                [place], [1.0], "^", transform=axis.get_xaxis_transform(), color=colour, markersize=6,
                markeredgecolor="white", markeredgewidth=0.6, clip_on=False, zorder=20,
            )  # fmt: skip
    heights = [height for points in above.values() for _, height in points]
    if heights:
        axis.text(
            0.99, 0.9, f"▲ cut off here, up to {max(heights):.3g}", transform=axis.transAxes, ha="right", va="top",
            fontsize=7, color=FAINT,
        )  # fmt: skip


def _thin(x: FloatArray, y: FloatArray, points: int | None) -> tuple[FloatArray, FloatArray]:
    return (x, y) if points is None else envelope(x, y, points)


def _mark_non_finite(axis: Axes, run: Run, x: str, x_scale: float, colour: str) -> None:
    broken = run.step(x)[~np.isfinite(run.step("loss"))]
    if len(broken) and math.isfinite(broken[0]):
        place = axis.get_xaxis_transform()
        axis.plot(broken[:1] / x_scale, [0.96], "x", transform=place, color=colour, markersize=6, markeredgewidth=2)


def _x_axis(name: str, runs: Sequence[Run]) -> tuple[float, str]:
    """Divisor and label of the x-axis: the unit that keeps the largest run at 1 to 1000 or so."""
    largest = max((float(np.nanmax(v)) for run in runs if np.isfinite(v := run.step(name)).any()), default=1.0)
    if name == "iteration":
        return (1e3, "steps (thousands)") if largest >= 10_000 else (1.0, "steps")
    if name in {"seconds", "elapsed_seconds"}:
        kind = "training time" if name == "seconds" else "wall time"
        for scale, unit in ((3600.0, "hours"), (60.0, "minutes")):
            if largest > 2 * scale:
                return scale, f"{kind} ({unit})"
        return 1.0, f"{kind} (seconds)"
    for scale, unit in ((1e9, "B tokens"), (1e6, "M tokens"), (1e3, "K tokens")):
        if largest >= scale:
            return scale, f"trained on ({unit})"
    return 1.0, "trained on (tokens)"


def _learning_rate_axis(runs: Sequence[Run]) -> tuple[float, str]:
    """Divisor and label of the y-axis: the power of ten stands in the label, not above the axis."""
    largest = max((float(np.nanmax(v)) for run in runs if np.isfinite(v := run.step("lr")).any()), default=1.0)
    exponent = math.floor(math.log10(largest)) if largest > 0 else 0
    raised = str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return 10.0**exponent, f"learning rate (10{raised})" if exponent else "learning rate"


def _log_axis(axis: Axes) -> None:
    """Logarithmic, with ticks at 1, 2 and 5 written out: most runs span less than a power of ten."""
    axis.set_yscale("log")
    low, high = axis.get_ylim()
    fine = (1.0, 2.0, 5.0) if high > 12 * low else (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0)
    axis.yaxis.set_major_locator(LogLocator(subs=fine if high < 1000 * low else (1.0,)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))
    axis.yaxis.set_minor_formatter(NullFormatter())


def _tick(value: float) -> str:
    if value >= 1000:
        return f"{value:,.0f}" if value < 1e7 else f"{value:.0e}"
    return f"{value:.4g}" if value >= 1e-4 else f"{value:.0e}"
