"""Figures of runs side by side, drawn from their logs: one PNG, and the SVGs of a report."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D

from megatron.errors import UserError
from megatron.files import make_parent
from megatron.instability.curves import (
    COLOURS,
    EDGE,
    FAINT,
    GRID,
    INK,
    STYLE,
    TICK,
    Panel,
    colour_of,
    dashes_of,
    draw_panel,
    legend_of,
    mark_cut,
    marker_of,
)
from megatron.instability.loss_ratio import SPIKE
from megatron.instability.summary import Run

TRAINING_LOSS = Panel("Training loss at the step's length", "loss", "loss (nats/token)", smooth=True)
SEQUENCE_LENGTH = Panel("Sequence length", "seqlen", "tokens", from_zero=True, stairs=True)
LEARNING_RATE = Panel("Learning rate", "lr", "learning rate", from_zero=True)
LOSS_RATIO = Panel("Loss ratio, all positions", "loss_ratio", "ratio to best so far", thin=True, threshold=SPIKE)
MATCHED_RATIO = replace(LOSS_RATIO, title="Loss ratio, same positions", y="position_matched_loss_ratio")
VARIANCE_NORM = Panel("Adam variance, norm", "adam_variance_norm", "‖√v‖₁", log=True)
VARIANCE_MAX = Panel("Adam variance, largest element", "adam_variance_max", "max √v", thin=True, log=True)

PANELS = (
    TRAINING_LOSS,
    Panel("Validation loss by tokens", "loss", "loss (nats/token)", validation=True),
    Panel("Validation loss by time", "loss", "loss (nats/token)", x="seconds", validation=True),
    SEQUENCE_LENGTH,
    LEARNING_RATE,
    LOSS_RATIO,
    VARIANCE_NORM,
    VARIANCE_MAX,
    MATCHED_RATIO,
)


def figure_comparison(runs: Sequence[Run], path: Path | str | None) -> Figure:
    """Draw the runs in nine panels over tokens and time; save it as PNG (900 pixels wide on a page, 1800 in the file).

    A run's colour follows from its place in `runs`; seeds of one setting share it. Returns the figure; `path=None`
    does not save it. Raises UserError if `path` cannot be written.
    """
    with matplotlib.rc_context(STYLE):
        spacing = ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.05, wspace=0.02, hspace=0.03)
        legend = legend_of(runs)
        columns = min(len(legend), max(1, 100 // (8 + max(len(name) for _, name in legend))), 4)
        figure = Figure(figsize=(9, 7.4 + 0.2 * ((len(legend) - 1) // columns)), layout=spacing)
        FigureCanvasAgg(figure)
        axes = figure.subplots(3, 3)
        for axis, panel in zip(axes.flat, PANELS, strict=True):
            draw_panel(axis, panel, runs)
        _limit_loss(axes[0][0], runs)
        _share_range(axes[1][2], axes[2][2])
        figure.legend(handles=_legend(runs), loc="outside upper center", ncols=columns, handlelength=2.4)
        if path is not None:
            _save(figure, Path(path))
    return figure


@dataclass(frozen=True)
class ReportFigure:
    """A figure of a report: a panel for each of `panels` and each x-axis."""

    title: str
    caption: str
    panels: tuple[Panel, ...]
    x: tuple[str, ...] = ("iteration", "consumed_tokens")
    """Columns of the log, one an x-axis."""


_RATIO = replace(LOSS_RATIO, mark_non_finite=True)
REPORT_FIGURES = (
    ReportFigure(
        "Schedules",
        "What each step used.",
        (
            replace(SEQUENCE_LENGTH, label="length (tokens)"),
            Panel("Batch size", "global_batch_size", "sequences", from_zero=True, stairs=True),
            LEARNING_RATE,
        ),
    ),
    ReportFigure(
        "Validation perplexity",
        "At full length, by steps, tokens, time without and with evaluation (as the paper's Figures 4(a), 4(b) and 5).",
        (Panel("", "perplexity", "validation perplexity", validation=True, log=True),),
        ("iteration", "consumed_tokens", "seconds", "elapsed_seconds"),
    ),
    ReportFigure(
        "Training loss",
        "At the step's own length: light every step, on top the moving average over 2% of the steps; a cross where a "
        "loss was first not finite (as the paper's Figures 1(a) and 1(b)).",
        (replace(TRAINING_LOSS, title="", label="training loss (nats/token)", log=True, mark_non_finite=True),),
    ),
    ReportFigure(
        "Loss ratio",
        "The step's loss over the best so far: over all positions, as in the paper; at the same positions; and of the "
        "moving average over 65,536 tokens. Dashed: 1.2.",
        (
            replace(_RATIO, title="All positions"),
            replace(_RATIO, title="Same positions", y="position_matched_loss_ratio"),
            replace(_RATIO, title="Smoothed", y="smoothed_loss_ratio"),
        ),
    ),
    ReportFigure(
        "Adam's state",
        "l1 norm and largest element of √v, and l1 norm of the momentum (as the paper's Figures 4(c), 4(d) and 7(b)).",
        (
            replace(VARIANCE_NORM, title="Variance, norm"),
            replace(VARIANCE_MAX, title="Variance, largest element"),
            Panel("Momentum, norm", "adam_momentum_norm", "‖m‖₁", log=True),
        ),
    ),
)
PANEL_INCHES = (4.0, 2.4)
"""Of a panel in a report. Its width is what a telephone has room for: the text stays readable there."""
CURVE_POINTS = 600
"""Points of a curve in a report, two for every point (1/72 inch) that a panel is wide."""
PANEL_POINTS = 7200
"""Points of all curves of a panel together: many runs share them, so that a report stays small."""

THEME = {INK: "ink", EDGE: "edge", GRID: "grid", TICK: "tick", FAINT: "faint"} | {
    colour: f"run{index}" for index, colour in enumerate(COLOURS)
}
"""Colour in a figure -> name of the CSS property that stands for it in a report, which has a light and a dark one."""


def report_svgs(description: ReportFigure, runs: Sequence[Run]) -> list[str]:
    """An <svg> element a panel, to stand in HTML: text as text, colours as the CSS properties of `THEME`, no outward
    link. Each is one by itself, so that the page can set them side by side or, where it is narrow, in one column."""
    points = max(100, min(CURVE_POINTS, PANEL_POINTS // len(runs)))
    images = []
    for panel in description.panels:
        with matplotlib.rc_context({**STYLE, "svg.fonttype": "none"}):
            figures = [Figure(figsize=PANEL_INCHES, layout=_spacing()) for _ in description.x]
            axes = [figure.subplots() for figure in figures]
            for axis, x in zip(axes, description.x, strict=True):
                draw_panel(axis, replace(panel, x=x), runs, points=points)
            _share_range(*axes)
            for figure, axis in zip(figures, axes, strict=True):
                label = ", ".join(filter(None, (description.title, panel.title, f"by {axis.get_xlabel()}")))
                images.append(_svg(figure, label))
    return images


def _spacing() -> ConstrainedLayoutEngine:
    return ConstrainedLayoutEngine(w_pad=0.04, h_pad=0.05)


def _svg(figure: Figure, label: str) -> str:
    output = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": label}):  # ids that stay the same, and differ from panel to panel
        figure.savefig(output, format="svg", transparent=True, metadata={"Date": None})
    return _inline(output.getvalue(), label)


def _inline(svg: str, label: str) -> str:
    """What matplotlib wrote, made fit to stand inside a page."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r"<svg [^>]*?(viewBox=\"[^\"]*\")[^>]*>", rf'<svg \1 role="img" aria-label="{label}">', svg, count=1)
    svg = re.sub(
        r'<g id="[^"]*">', "<g>", svg
    )  # ids of groups repeat from figure to figure, and nothing refers to them
    svg = svg.replace("xlink:href", "href")  # the prefix is declared in what was cut off
    # A tenth of a point is finer than a screen, and half the bytes.
    svg = re.sub(r'(?<= d=")[^"]*', lambda path: re.sub(r"(\.\d)\d+", r"\1", path[0]), svg)
    svg = re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, sans-serif", svg)
    themed = {colour.lower(): f"var(--{name})" for colour, name in THEME.items()}
    return re.sub(r"#[0-9a-f]{6}\b", lambda colour: themed.get(colour[0], colour[0]), svg).strip()


def _limit_loss(axis: Axes, runs: Sequence[Run]) -> None:
    """Cut off the few losses that would press the rest flat, of the first steps and of spikes, with a mark where: those
    that lie above the best 95% by more than a third of the range of these."""
    losses = np.concatenate([run.step("loss") for run in runs])
    losses = losses[np.isfinite(losses)]
    if not len(losses):
        return
    low, most, highest = losses.min(), float(np.quantile(losses, 0.95)), losses.max()
    high = min(highest, most + (most - low) / 3)
    if high > low:
        axis.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
        mark_cut(axis)


def _share_range(*axes: Axes) -> None:
    """One range for several panels, so that they can be compared by eye."""
    drawn = [axis.get_ylim() for axis in axes if axis.get_lines()]
    if drawn:
        for axis in axes:
            axis.set_ylim(min(low for low, _ in drawn), max(high for _, high in drawn))


def _legend(runs: Sequence[Run]) -> list[Line2D]:
    return [
        Line2D(
            [],
            [],
            color=colour_of(place),
            linestyle=dashes_of(place),
            marker=marker_of(place),
            markersize=4,
            label=name.replace("$", r"\$"),  # $...$ would be read as a formula
        )
        for place, name in legend_of(runs)
    ]


def _save(figure: Figure, path: Path) -> None:
    make_parent(path)
    try:
        figure.savefig(path, dpi=200, format=path.suffix[1:] or "png")  # else a name without an ending gets one
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot write the figure: {error}") from error
