"""The report as a browser reads it: whole, with the numbers in it, and loading nothing."""

from __future__ import annotations

import re
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import pytest
from synthetic_runs import write_losses, write_run

from megatron import __version__
from megatron.arguments import build_parser, parse_config, to_yaml
from megatron.errors import UserError
from megatron.instability import html_report
from megatron.instability.curves import COLOURS, DASHES
from megatron.instability.figures import REPORT_FIGURES, THEME
from megatron.instability.groups import group_runs
from megatron.instability.html_report import render, write_report
from megatron.instability.quality import time_to_quality
from megatron.instability.report import verdict
from megatron.instability.setup import setup_of
from megatron.instability.summary import Run, read_run, read_runs, summarise
from megatron.instability.tables import report_tables
from megatron.instability.words import WORDS

LOADING = {"src", "srcset", "data"}
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
    tables = report_tables(summaries, targets, group_runs(summaries, targets))
    return render(runs, tables, verdict(runs), setup_of(runs), "2026-01-02 03:04 UTC")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    home = tmp_path_factory.mktemp("runs")
    write_run(home / "base-seed1", tokens=1_000_000, spikes=(5e5,))
    write_run(home / "base-seed2", tokens=1_000_000, seed=2)
    write_run(home / "slw", tokens=1_000_000, warmup_steps=60, seed=3)
    for name, flags in {"base-seed1": [], "slw": ["--seqlen-warmup", "linear", "--seqlen-warmup-iters", "777"]}.items():
        argv = ["--train-tokens", "9M", "--seq-length", "256", "--seed", "4321", *flags]
        (home / name / "config.yaml").write_text(to_yaml(parse_config(build_parser(), argv)[0]))
    write_losses(home / "lost", [3.0, 2.0, float("nan")])
    write_losses(home / "new", [])
    names = ("base-seed1", "base-seed2", "slw", "new")
    return report([*read_runs([str(home / name) for name in names]), read_run(home / "lost", name=EVIL)])


@pytest.fixture(scope="module")
def page(text: str) -> Page:
    return Page(text)


def test_nothing_is_loaded_or_run(page: Page, text: str) -> None:
    assert not {"script", "link", "img", "iframe", "object", "embed", "base"} & set(page.tags)
    links = [(tag, value) for tag, name, value in page.attributes if name.endswith("href") or name in LOADING]
    # A link that a reader may follow loads nothing by itself.
    outward = [link for link in links if not link[1].startswith("#")]
    assert len(links) > 50 and outward == [("a", "https://arxiv.org/abs/2108.06084")]
    assert not re.search(r"url\((?!#)|@import|https?://", text.replace("http://x/y.js", "").replace(outward[0][1], ""))
    assert ("meta", "content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes


def test_references_within_the_page_hold(page: Page, text: str) -> None:
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids)) > 0
    links = [value[1:] for _, name, value in page.attributes if name == "href" and value.startswith("#")]
    used = re.findall(r"url\(#([^)]*)\)", text) + links
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
        # Each panel stands by itself, so that a narrow page can set them in one column.
        assert figure.count("</svg>") == len(description.panels) * len(description.x)
        for panel in figure.split("</svg>")[:-1]:
            assert f'aria-label="{description.title}, ' in panel
            assert all(f"stroke: var(--run{index})" in panel for index in range(2))  # two seeds, and a warmup
        assert not re.search(r"#[0-9a-f]{6}", figure)  # every colour is one of the page's
    words = page.words
    for label in ("validation perplexity", "training loss (nats/token)", "wall time (", "M tokens)", "length (tokens)"):
        assert label in words
    assert "steps" in words and "‖√v‖₁" in words and "learning rate (10⁻³)" in words


def test_each_colour_has_a_light_and_a_dark_value(text: str) -> None:
    light, dark = (dict(re.findall(r"--(\w+): (#\w{6});", block)) for block in re.findall(r":root \{(.*?)\}", text))
    assert set(light) == set(dark) == {*THEME.values(), "page", "shade"}
    assert len(set(THEME)) == len(THEME) and all(light[f"run{i}"] == colour for i, colour in enumerate(COLOURS))
    assert light["page"] != dark["page"] and len({dark[f"run{i}"] for i in range(len(COLOURS))}) == len(COLOURS)


def test_the_setup_stands_before_the_results(page: Page, text: str) -> None:
    assert text.index("<h2>Setup</h2>") < text.index("<h2>Runs</h2>")
    assert "12 layers, hidden size 768, 12 attention heads" in page.words and "4321" in page.words
    assert {"--seqlen-warmup-iters", "777"} <= set(page.cells)
    assert f"Made by megatron-slw {__version__} on 2026-01-02 03:04 UTC." in page.words


def test_words_that_the_page_uses_are_explained(page: Page, text: str) -> None:
    head, _, words = text.partition('<dl id="words">')
    terms = " ".join(re.findall(r"<dt>(.*?)</dt>", words)).lower()
    for word in ("slw", "loss", "perplexity", "token", "validation", "test", "same positions", "variance", "l1 norm"):
        assert word in terms and word in head.lower()
    for word in ("momentum", "clipped", "p", "seed", "spike", "learning rate", "smoothed", "baseline"):
        assert re.search(rf"\b{word}\b", terms)
    assert all(escape(explanation) in words for _, explanation in WORDS)
    assert "the threshold that the paper counts by" in page.words


def test_titles_name_the_paper(page: Page, text: str) -> None:
    for place in re.findall(r"<(?:h2|p)[^>]*>([^<]*(?:Table|Figures) \d[^<]*)<", text):
        assert "paper&#x27;s" in place, place
    assert "called the paper below" in page.words


def test_a_narrow_page_has_one_column_and_tables_that_show_how_they_go_on(page: Page, text: str) -> None:
    (narrow,) = re.findall(r"@media \(max-width: 700px\) \{(.*?)\n\}", text, re.DOTALL)
    assert "figure { grid-template-columns: minmax(0, 1fr); }" in narrow
    (scroll,) = re.findall(r"\.scroll \{(.*?)\}", text)
    assert "overflow-x: auto" in scroll and scroll.count("var(--shade), transparent") == 2
    scrolling = [value for tag, name, value in page.attributes if (tag, name) == ("div", "tabindex")]
    assert scrolling == ["0"] * page.tags.count("table")  # with the keyboard too


@pytest.mark.usefixtures("without_figures")
def test_headers_of_several_columns(tmp_path: Path) -> None:
    write_losses(tmp_path / "a", [2.0])
    text = report(read_runs([str(tmp_path / "a")]))
    assert '<th scope="colgroup" colspan="2">same positions</th>' in text
    for row in re.findall(r'<tr class="band">(.*?)</tr>', text):
        assert sum(map(int, re.findall(r'colspan="(\d)"', row))) == 8


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
