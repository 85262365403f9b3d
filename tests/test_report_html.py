"""The report as a browser reads it: whole, with the numbers in it, and loading nothing."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from synthetic_runs import write_losses, write_run

from megatron.errors import UserError
from megatron.instability import html_report
from megatron.instability.curves import COLOURS, DASHES
from megatron.instability.figures import REPORT_FIGURES, THEME
from megatron.instability.groups import group_runs
from megatron.instability.html_report import render, write_report
from megatron.instability.quality import time_to_quality
from megatron.instability.report import verdict
from megatron.instability.summary import Run, read_run, read_runs, summarise
from megatron.instability.tables import report_tables

EVIL = "<script src=http://x/y.js>&\"'"


class Page(HTMLParser):
    """Elements that are open, attributes met, and the text of cells; fails where an end matches no beginning."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.cells: list[str] = []
        self.words = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag != "meta":
            self.open.append(tag)
        if tag in {"td", "th"}:
            self.cells.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data
        if {"td", "th"} & set(self.open):
            self.cells[-1] += data


def report(runs: list[Run]) -> str:
    summaries, targets = [summarise(run) for run in runs], time_to_quality(runs)
    return render(runs, report_tables(summaries, targets, group_runs(summaries, targets)), verdict(runs))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    home = tmp_path_factory.mktemp("runs")
    write_run(home / "base-seed1", tokens=1_000_000, spikes=(5e5,))
    write_run(home / "base-seed2", tokens=1_000_000, seed=2)
    write_run(home / "slw", tokens=1_000_000, warmup_steps=60, seed=3)
    write_losses(home / "lost", [3.0, 2.0, float("nan")])
    write_losses(home / "new", [])
    names = ("base-seed1", "base-seed2", "slw", "new")
    return report([*read_runs([str(home / name) for name in names]), read_run(home / "lost", name=EVIL)])


@pytest.fixture(scope="module")
def page(text: str) -> Page:
    return Page(text)


def test_nothing_is_loaded_or_run(page: Page, text: str) -> None:
    assert not {"script", "link", "img", "iframe", "object", "embed", "base"} & set(page.tags)
    links = [value for _, name, value in page.attributes if name.endswith("href") or name in {"src", "srcset", "data"}]
    assert links and all(link.startswith("#") for link in links)
    assert not re.search(r"url\((?!#)|@import|https?://", text.replace("http://x/y.js", ""))
    assert ("meta", "content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes


def test_references_within_the_page_hold(page: Page, text: str) -> None:
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids)) > 0
    used = re.findall(r"url\(#([^)]*)\)", text) + [v[1:] for _, name, v in page.attributes if name == "href"]
    assert len(used) > 50 and "xlink" not in text
    assert set(used) <= set(ids)


def test_names_are_escaped(page: Page) -> None:
    assert EVIL in page.cells


@pytest.fixture
def without_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take most of the time."""
    monkeypatch.setattr(html_report, "REPORT_FIGURES", ())


@pytest.mark.usefixtures("without_figures")
def test_numbers_of_the_summaries_stand_in_the_tables(tmp_path: Path) -> None:
    losses = [4.0, 2.0, 2.5, 3.2, 2.0, 2.4, 1.0, 1.3, 1.1, 1.0]
    write_losses(tmp_path / "spiky", losses, seconds=60.0)
    cells = Page(report(read_runs([str(tmp_path / "spiky")]))).cells
    assert {"spiky", "3 (30.00%)", "1 (10.00%)", "1.600", "10:00", "20:00", "7.39", "1.00K"} <= set(cells)


def test_a_figure_of_each_kind_with_each_run_in_its_colour(page: Page, text: str) -> None:
    figures = re.findall(r"<figure>(.*?)</figure>", text, re.DOTALL)
    assert len(figures) == len(REPORT_FIGURES) == page.tags.count("figure")
    for figure, description in zip(figures, REPORT_FIGURES, strict=True):
        assert f'aria-label="{description.title}"' in figure
        assert all(f"stroke: var(--run{index})" in figure for index in range(2))  # two seeds, and a warmup
        assert not re.search(r"#[0-9a-f]{6}", figure)  # every colour is one of the page's
    words = page.words
    for label in ("validation perplexity", "training loss (nats/token)", "wall time (", "M tokens)", "length (tokens)"):
        assert label in words
    assert "steps" in words and "‖√v‖₁" in words and "learning rate (10⁻³)" in words


def test_each_colour_has_a_light_and_a_dark_value(text: str) -> None:
    light, dark = (dict(re.findall(r"--(\w+): (#\w{6});", block)) for block in re.findall(r":root \{(.*?)\}", text))
    assert set(light) == set(dark) == {*THEME.values(), "page", "panel"}
    assert len(set(THEME)) == len(THEME) and all(light[f"run{i}"] == colour for i, colour in enumerate(COLOURS))
    assert light["page"] != dark["page"] and len({dark[f"run{i}"] for i in range(len(COLOURS))}) == len(COLOURS)


@pytest.mark.usefixtures("without_figures")
def test_24_runs_can_be_told_apart(tmp_path: Path) -> None:
    write_losses(tmp_path / "a", [2.0])
    names = [f"run-{index}=" + str(tmp_path / "a") for index in range(24)]
    legend = re.findall(r"<li>(.*?)</li>", report(read_runs(names)))
    assert len(legend) == len({re.sub("run-.*", "", item) for item in legend}) == 24 <= len(COLOURS) * len(DASHES)


def test_a_report_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot create .*file: "):
        write_report(tmp_path / "file" / "report.html", [], [])
