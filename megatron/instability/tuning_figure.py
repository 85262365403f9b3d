"""The figure of a search for start and T."""

from __future__ import annotations

import math
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from megatron.files import write_atomic
from megatron.instability.curves import COLOURS, STYLE
from megatron.instability.tuning import Choice, Outcome, SearchSpace

STABLE, FLUCTUATING = (COLOURS[0], "o"), (COLOURS[2], "X")
"""Colour and marker of a trial."""


def figure_tuning(
    outcomes: Mapping[tuple[int, int], Outcome], space: SearchSpace, choice: Choice, path: Path | None
) -> Figure:
    """Draw every trial's validation perplexity, and its verdict by start and T; save it as PNG unless `path` is None.

    Trials are numbered in the order of `outcomes`, by (start, T). Raises UserError if `path` cannot be written.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 4), layout="constrained")
        FigureCanvasAgg(figure)
        curves, verdicts = figure.subplots(1, 2)
        _draw_curves(curves, list(outcomes.values()), space)
        _draw_verdicts(verdicts, outcomes, space)
        labels = {"no significant fluctuation": STABLE, "fluctuates": FLUCTUATING}
        handles = [Line2D([], [], color=c, marker=m, markersize=5, label=text) for text, (c, m) in labels.items()]
        if choice.duration is not None:
            (ring,) = verdicts.plot(choice.duration, choice.start, "o", color="#333333", ms=13, fillstyle="none")
            ring.set_label(f"recommended: start {choice.start}, T = {choice.duration:,}")
            handles.append(ring)
        figure.legend(handles=handles, loc="outside upper center", ncols=len(handles))
        if path is not None:
            image = BytesIO()
            figure.savefig(image, format="png", dpi=200)
            write_atomic(path, image.getvalue())
    return figure


def _look(outcome: Outcome) -> tuple[str, str]:
    return STABLE if outcome.sign is None else FLUCTUATING


def _draw_curves(axis: Axes, outcomes: list[Outcome], space: SearchSpace) -> None:
    top = max((p for outcome in outcomes for _, p in outcome.validations if math.isfinite(p)), default=1.0)
    for number, outcome in enumerate(outcomes, start=1):
        if not outcome.validations:  # not finite before the first
            continue
        colour, marker = _look(outcome)
        steps, perplexities = np.array(outcome.validations, dtype=float).T
        shown = np.where(np.isfinite(perplexities), perplexities, top)
        axis.plot(steps, shown, color=colour, linewidth=1.2)
        axis.plot(steps[-1], shown[-1], color=colour, marker=marker, markersize=5)
        axis.annotate(
            str(number), (steps[-1], shown[-1]), (5, 0), textcoords="offset points", fontsize=8, color=colour,
            va="center",
        )  # fmt: skip
    axis.axvline(space.lr_warmup_iterations, color="#555555", linewidth=0.8, linestyle=(0, (4, 3)))
    axis.annotate(
        " end of learning rate warmup", (space.lr_warmup_iterations, 1), xycoords=("data", "axes fraction"),
        fontsize=7, color="#555555", va="top",
    )  # fmt: skip
    axis.set_yscale("log")
    low, high = axis.get_ylim()
    axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0) if high < 20 * low else (1.0, 3.0)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.4g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.set(title="Validation perplexity of the trials", xlabel="step", ylabel="perplexity")
    axis.set_xlim(0, 1.05 * space.trial_iterations)


def _draw_verdicts(axis: Axes, outcomes: Mapping[tuple[int, int], Outcome], space: SearchSpace) -> None:
    for number, ((start, duration), outcome) in enumerate(outcomes.items(), start=1):
        colour, marker = _look(outcome)
        axis.plot(duration, start, color=colour, marker=marker, markersize=6)
        axis.annotate(
            f"{number}: {outcome.value:.2f}", (duration, start), (0, 9), textcoords="offset points", fontsize=7,
            color=colour, ha="center",
        )  # fmt: skip
    axis.set_yscale("log", base=2)
    axis.set_yticks(space.starts, [str(start) for start in space.starts])
    axis.minorticks_off()
    axis.set(title="The trials, and what decided each (ratio)", xlabel="T (steps)", ylabel="start (tokens)")
    low, high = space.durations[0], space.durations[-1]
    margin = max(1.0, 0.1 * (high - low))
    axis.set_xlim(low - margin, high + margin)
    axis.set_ylim(space.starts[0] / 1.5, space.starts[-1] * 1.5)
