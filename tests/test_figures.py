"""The figure shows the data it was given: axes are checked, not pixels."""

from __future__ import annotations

import re
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure
from synthetic_runs import write_run

from megatron.errors import UserError
from megatron.instability.curves import (
    COLOURS,
    Panel,
    draw_panel,
    envelope,
    legend_of,
    mark_cut,
    moving_average,
    places_of,
)
from megatron.instability.figures import PANELS, REPORT_FIGURES, figure_comparison, report_svgs
from megatron.instability.summary import Run, read_run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    home = tmp_path_factory.mktemp("runs")
    return [
        read_run(write_run(home / "baseline", tokens=2_000_000, spikes=(1e6,))),
        read_run(write_run(home / "slw", tokens=2_000_000, warmup_steps=100, seed=1)),
    ]


def test_png_is_there_and_not_blank(runs: list[Run], tmp_path: Path) -> None:
    figure_comparison(runs, tmp_path / "deep" / "figure.png")
    pixels = matplotlib.image.imread(tmp_path / "deep" / "figure.png")
    assert pixels.shape[1] == 1800
    assert 0.01 < (pixels[..., :3].min(axis=2) < 0.9).mean() < 0.3


def test_panels_hold_the_logged_values(runs: list[Run]) -> None:
    axes = figure_comparison(runs, None).axes
    assert [axis.get_title(loc="left") for axis in axes] == [panel.title for panel in PANELS]
    for axis, panel in zip(axes, PANELS, strict=True):
        assert axis.get_xlabel() and axis.get_ylabel()
        for index, run in enumerate(runs):
            line = next(line for line in axis.get_lines() if line.get_color() == COLOURS[index])
            column = run.validation if panel.validation else run.step
            x, y = column(panel.x), column(panel.y)
            known = np.isfinite(x) & np.isfinite(y)
            x_scale = 1e6 if panel.x == "consumed_tokens" else 1.0
            y_scale = 1e-3 if panel.y == "lr" else 1.0
            np.testing.assert_allclose(line.get_xdata(), x[known] / x_scale)
            np.testing.assert_allclose(line.get_ydata(), y[known] / y_scale)


def test_lengths_and_batches_are_stairs_also_where_they_are_thinned_out() -> None:
    steps = np.arange(1.0, 5_001.0)
    growing = 8 * np.minimum(1 + steps // 100, 32)
    columns = {"iteration": steps, "consumed_tokens": 100 * steps, "lr": 1e-3 * steps}
    run = Run("slw", columns | {"seqlen": growing, "global_batch_size": growing}, {})
    slopes = []
    for svg in report_svgs(REPORT_FIGURES[0], [run]):
        curves = re.findall(r'<path d="([^"]*)"[^>]*stroke: var\(--run0\)', svg)
        points = [np.array(re.findall(r"[ML] (\S+) (\S+)", curve), dtype=float) for curve in curves]
        slopes.append(any((np.diff(line, axis=0) != 0).all(axis=1).any() for line in points))
        assert max(map(len, points)) > 10 or slopes[-1]
    assert slopes == [False] * 4 + [True] * 2  # length and batch size, then the learning rate, each over two axes


def test_the_report_begins_with_the_schedules_as_its_document_says() -> None:
    document = (Path(__file__).parents[1] / "docs/metrics.md").read_text(encoding="utf-8")
    paragraph = document.partition("**Figures** ")[2].partition("\n\n")[0]
    assert re.findall(r"\*([^*]+)\*", paragraph) == [figure.title for figure in REPORT_FIGURES]


def spiked() -> Run:
    """Losses near 2, a spike to 9 at step 50, and validations in the last fifth."""
    loss = 2 + 0.1 * np.sin(np.arange(100.0))
    loss[49] = 9.0
    steps = {"iteration": np.arange(1.0, 101.0), "consumed_tokens": np.arange(1.0, 101.0), "loss": loss}
    at = np.array([80.0, 90.0, 100.0])
    validations = {"consumed_tokens": at, "seconds": at, "loss": np.array([2.2, 2.15, 2.1])}
    return Run("spiked", steps, validations)


def test_a_spike_that_is_cut_off_is_marked() -> None:
    axis = figure_comparison([spiked()], None).axes[0]
    assert axis.get_ylim()[1] < 3
    marks = [line for line in axis.get_lines() if line.get_marker() == "^"]
    assert [(list(mark.get_xdata()), mark.get_color()) for mark in marks] == [([50.0], COLOURS[0])]
    assert [text.get_text() for text in axis.texts] == ["▲ cut off here, up to 9"]
    assert np.isclose(axis.get_xlim()[0], 0)


def test_nothing_is_marked_where_nothing_is_cut_off() -> None:
    axis = Figure().subplots()
    draw_panel(axis, Panel("", "loss", ""), [spiked()])
    mark_cut(axis)
    assert not axis.texts and len(axis.get_lines()) == 1


def test_validations_have_their_own_axes() -> None:
    for axis in figure_comparison([spiked()], None).axes[1:3]:
        low, high = axis.get_ylim()
        assert 2.05 < low < 2.1 and 2.2 < high < 2.25
        left, right = axis.get_xlim()
        assert 75 < left < 80 and 100 < right < 105


def test_units_follow_the_size_of_the_run(runs: list[Run]) -> None:
    axes = figure_comparison(runs, None).axes
    assert axes[0].get_xlabel() == "trained on (M tokens)"
    assert axes[2].get_xlabel() == "training time (seconds)"
    assert axes[4].get_ylabel() == "learning rate (10⁻³)"


def test_one_legend_names_each_run_once(runs: list[Run]) -> None:
    figure = figure_comparison(runs, None)
    assert [text.get_text() for legend in figure.legends for text in legend.get_texts()] == ["baseline", "slw"]
    assert all(axis.get_legend() is None for axis in figure.axes)


def test_logs_without_some_fields_and_with_nan(tmp_path: Path) -> None:
    steps = {
        "iteration": np.arange(1.0, 6.0),
        "consumed_tokens": np.arange(1.0, 6.0),
        "loss": np.array([3.0, 2.0, np.nan, np.inf, 1.0]),
    }
    figure = figure_comparison([Run("odd", steps, {})], tmp_path / "figure.png")
    assert [text.get_text() for text in figure.axes[1].texts] == ["not in the logs"]


def test_a_figure_that_cannot_be_written(runs: list[Run], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot create .*file: "):
        figure_comparison(runs[:1], tmp_path / "file" / "figure.png")
    with pytest.raises(UserError, match="cannot write the figure"):
        figure_comparison(runs[:1], tmp_path / "figure.nonsense")


def test_a_figure_is_written_under_the_very_name_that_is_given(runs: list[Run], tmp_path: Path) -> None:
    figure_comparison(runs[:1], tmp_path / "new" / "figure")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["figure"]


def test_moving_average_is_centred_and_skips_holes() -> None:
    line = np.arange(50.0)
    np.testing.assert_allclose(moving_average(line, 9), line)  # a straight line stays where it is, ends included
    values = np.array([1.0, np.nan, 3.0, 5.0, np.inf])
    np.testing.assert_allclose(moving_average(values, 3), [1.0, np.nan, 4.0, 4.0, np.nan])
    np.testing.assert_allclose(moving_average(line, 1), line)


def test_envelope_keeps_every_extreme_in_its_place() -> None:
    random = np.random.default_rng(5)
    x, y = np.arange(10_000.0), random.normal(size=10_000)
    y[[777, 5_432]] = 50.0, -40.0
    y[7_000:7_100] = np.nan
    thin_x, thin_y = envelope(x, y, 200)
    assert 150 <= len(thin_x) <= 210 and (np.diff(thin_x) > 0).all()
    np.testing.assert_array_equal(thin_y, y[thin_x.astype(int)])
    assert {0, 777, 5_432, 9_999} <= set(thin_x) and np.isnan(thin_y).any()
    for stretch in np.array_split(np.arange(10_000), 100):
        inside = np.isin(thin_x, stretch)
        if not np.isnan(y[stretch]).all():
            assert np.nanmax(thin_y[inside]) == np.nanmax(y[stretch])
            assert np.nanmin(thin_y[inside]) == np.nanmin(y[stretch])
    assert envelope(x, y, 10_000) == (x, y)


def test_perplexity_and_the_cross_where_a_run_breaks() -> None:
    steps = {"iteration": np.arange(1.0, 6.0), "loss": np.array([3.0, 2.0, np.inf, np.nan, 1.0])}
    run = Run("lost", steps, {"iteration": np.array([2.0, 4.0]), "loss": np.array([1.0, 2.0])})
    axes = Figure().subplots(2)
    draw_panel(axes[0], Panel("", "perplexity", "", x="iteration", validation=True), [run])
    draw_panel(axes[1], Panel("", "loss", "", x="iteration", mark_non_finite=True), [run])
    (line,) = axes[0].get_lines()
    np.testing.assert_allclose(line.get_xydata(), [[2, np.e], [4, np.e**2]])
    crosses = [line for line in axes[1].get_lines() if line.get_marker() == "x"]
    assert [list(cross.get_xdata()) for cross in crosses] == [[3.0]]


def test_names_are_no_formulas(tmp_path: Path) -> None:
    runs = [Run(name, {"iteration": np.ones(1), "loss": np.ones(1)}, {}) for name in ("a$b$", "$\\oops$", "_x")]
    (legend,) = figure_comparison(runs, tmp_path / "figure.png").legends
    assert [text.get_text() for text in legend.get_texts()] == [r"a\$b\$", r"\$\oops\$", "_x"]


def test_a_report_of_many_long_runs_is_small() -> None:
    """The longest figure of 24 runs of 2,000 steps; the report has five and is to stay below 3 MB."""
    random = np.random.default_rng(1)
    steps = np.arange(1.0, 2_001.0)
    names = ("loss", "loss_ratio", "position_matched_loss_ratio")
    columns = {"iteration": steps, "consumed_tokens": 65_536 * steps}
    runs = [Run(str(index), columns | {name: 1 + random.random(2_000) for name in names}, {}) for index in range(24)]
    assert sum(map(len, report_svgs(REPORT_FIGURES[3], runs))) < 1_000_000


def test_seeds_of_a_setting_share_a_colour_and_an_entry() -> None:
    runs = [Run(name, {}, {}) for name in ("slw-seed1", "baseline", "slw-seed2", "slw", "other_seed7")]
    assert places_of(runs) == [0, 1, 0, 0, 2]
    assert legend_of(runs) == [(0, "slw (3 seeds)"), (1, "baseline"), (2, "other_seed7")]


def test_there_are_no_half_steps() -> None:
    axis = Figure().subplots()
    steps = np.arange(1.0, 21.0)
    draw_panel(axis, Panel("", "loss", "", x="iteration"), [Run("a", {"iteration": steps, "loss": steps}, {})])
    assert len(axis.get_xticks()) > 2 and not any(tick % 1 for tick in axis.get_xticks())
