"""Draw the figures of docs/how-it-works.md from the planner: python docs/figures.py

Nothing is trained: every curve is what `tools/plan_run.py` plans for a recipe of the paper.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a source tree, installed or not

from megatron.arguments import build_parser, parse_config
from megatron.errors import run
from megatron.instability.curves import COLOURS, STYLE
from megatron.pacing.plan import walk

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "docs/images"
DPI = 200
POINTS = 1500
"""Steps that are drawn of a run."""

LENGTHS = {
    "117M, batch 512, SLW from 8 over 60K steps": "gpt2-117m-b512-slw60k",
    "1.5B, batch 4096, SLW from 64 over 45K steps": "gpt2-1.5b-b4k-slw45k",
}
RATES = {
    "baseline": "gpt2-1.5b-b512",
    "SLW, decay over tokens": "gpt2-1.5b-b512-slw270k",
    "SLW, decay over 435K steps": "gpt2-1.5b-b512-slw270k-step-decay",
}
DISCARDED = {
    "GPT-3 125M, batch 2048, T = 11.5K": "gpt3-125m-30b-40x-slw11.5k",
    "1.5B, batch 4096, two stages": "gpt2-1.5b-b4k-two-stage",
    "1.5B, batch 4096, T = 45K": "gpt2-1.5b-b4k-slw45k",
    "1.5B, batch 512, T = 270K": "gpt2-1.5b-b512-slw270k",
    "117M, batch 512, T = 60K": "gpt2-117m-b512-slw60k",
}
"""Label -> recipe, from the bottom to the top."""


def planned(recipe: str) -> dict[str, np.ndarray]:
    """Columns of a recipe's plan, one row a step: its number, tokens before it, sequence length, learning rate, and
    the tokens drawn (at full length) and trained on until its end."""
    config, _ = parse_config(build_parser(), ["--config", str(ROOT / "recipes" / f"{recipe}.yaml")])
    rows = [
        (before.iteration + 1, before.consumed_tokens, step.seqlen, step.lr, before.consumed_samples)
        for before, step in walk(config)
    ]
    names = ("step", "tokens", "seqlen", "lr", "samples")
    columns = {name: np.array(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}
    return columns | {"drawn": columns["samples"] * config.model.seq_length}


def draw(axis: Axes, columns: dict[str, np.ndarray], x: str, y: str, colour: str, label: str, dashes: str) -> None:
    """One curve, of at most POINTS of its steps."""
    shown = np.unique(np.linspace(0, len(columns[x]) - 1, POINTS).astype(int))
    scale = {"step": 1e3, "tokens": 1e9}[x]
    axis.plot(columns[x][shown] / scale, columns[y][shown], color=colour, label=label, linestyle=dashes)
    axis.set_xlabel({"step": "step (thousands)", "tokens": "tokens trained on (billions)"}[x])


def figure(columns: int, height: float = 2.6) -> tuple[Figure, list[Axes]]:
    """An empty figure with a row of panels."""
    drawn = Figure(figsize=(9, height), layout="constrained")
    FigureCanvasAgg(drawn)
    return drawn, list(np.ravel(drawn.subplots(1, columns)))


def lengths() -> Figure:
    """Sequence length over steps and over tokens."""
    drawn, axes = figure(2)
    for colour, (label, recipe) in zip(COLOURS, LENGTHS.items(), strict=False):
        columns = planned(recipe)
        for axis, x in zip(axes, ("step", "tokens"), strict=True):
            draw(axis, columns, x, "seqlen", colour, label, "solid")
    axes[0].set(title="Sequence length by steps", ylabel="tokens", ylim=(0, None))
    axes[1].set(title="The same by tokens", ylim=(0, None))
    drawn.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return drawn


def rates() -> Figure:
    """Learning rate over steps and over tokens: what a decay over steps does to SLW."""
    drawn, axes = figure(2)
    for colour, dashes, (label, recipe) in zip(COLOURS, ("solid", "dashed", "solid"), RATES.items(), strict=False):
        columns = planned(recipe)
        for axis, x in zip(axes, ("step", "tokens"), strict=True):
            draw(axis, columns, x, "lr", colour, label, dashes)
    axes[0].set(title="Learning rate by steps", ylabel="learning rate", ylim=(0, None))
    axes[1].set(title="The same by tokens", ylim=(0, None))
    for axis in axes:
        axis.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    drawn.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return drawn


def discarded() -> Figure:
    """Tokens that were drawn and dropped, of all that were drawn."""
    drawn, (axis,) = figure(1, 2.2)
    for place, recipe in enumerate(DISCARDED.values()):
        columns = planned(recipe)
        trained, drawn_tokens = columns["tokens"][-1], columns["drawn"][-1]  # but for the last step
        axis.barh(place, trained / 1e9, color=COLOURS[0], height=0.62)
        axis.barh(place, (drawn_tokens - trained) / 1e9, left=trained / 1e9, color=COLOURS[1], height=0.62)
        axis.text(drawn_tokens / 1e9, place, f" {1 - trained / drawn_tokens:.0%} dropped", va="center", fontsize=8)
    axis.set_yticks(range(len(DISCARDED)), list(DISCARDED))
    axis.set(title="Tokens drawn from the corpus: trained on, and dropped by truncation", xlabel="billions")
    axis.margins(x=0.12)
    axis.grid(visible=False, axis="y")
    return drawn


FIGURES = {"lengths": lengths, "learning-rates": rates, "discarded": discarded}


def main() -> None:
    """Write every figure to docs/images, and say so."""
    with matplotlib.rc_context(STYLE):
        for name, drawer in FIGURES.items():
            path = IMAGES / f"how-it-works-{name}.png"
            drawer().savefig(path, dpi=DPI)
            print(path.relative_to(ROOT))


if __name__ == "__main__":
    run(main)
