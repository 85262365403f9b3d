"""A comparison of runs as one HTML file that needs nothing beside it: no network, no script, no other file."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from megatron import __version__
from megatron.files import make_parent, write_atomic
from megatron.instability.curves import COLOURS, legend_of, places_of
from megatron.instability.figures import REPORT_FIGURES, THEME, report_svgs
from megatron.instability.summary import Run
from megatron.instability.tables import Table
from megatron.instability.words import WORDS

if TYPE_CHECKING:  # it reads configurations, which the page itself need not
    from megatron.instability.setup import Setup

_LIGHT = {"page": "#ffffff", "ink": "#222222", "edge": "#888888", "grid": "#e6e6e6"} | {
    "tick": "#555555",
    "faint": "#767676",
    "shade": "#b4b8bf",
}
_DARK = {"page": "#15171a", "ink": "#e4e4e4", "edge": "#777777", "grid": "#31353a"} | {
    "tick": "#b0b0b0",
    "faint": "#8a8a8a",
    "shade": "#5a6068",
}
_DARK_COLOURS = ("#6fa8ff", "#f0b840", "#f07f8c", "#ffffff", "#7fd0f0", "#a0a0a0", "#5fc96f", "#dd7fc0")
"""In the place of COLOURS, on a dark page."""

_CSS = """
:root { color-scheme: light dark; %(light)s }
@media (prefers-color-scheme: dark) { :root { %(dark)s } }
body { margin: 0 auto; padding: 0 1.2rem 3rem; max-width: 70rem; background: var(--page); color: var(--ink);
  font: 15px/1.45 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 1.2rem 0 .4rem; }
h2 { font-size: 1.15rem; margin: 2rem 0 .3rem; }
summary { margin-top: .8rem; cursor: pointer; }
p { margin: .3rem 0 .6rem; max-width: 55rem; }
.note { color: var(--tick); font-size: .9rem; }
.legend { position: sticky; top: 0; z-index: 1; display: grid; gap: .1rem 1rem; margin: 0; padding: .5rem 0;
  grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr)); max-height: 30vh; overflow: auto; list-style: none;
  background: var(--page); border-bottom: 1px solid var(--grid); font-size: .9rem; }
.legend li { overflow-wrap: anywhere; }
.swatch { width: 2.6em; height: .8em; margin-right: .5em; vertical-align: middle; }
a { color: var(--run0); }
.scroll { overflow-x: auto; width: fit-content; max-width: 100%%; background: %(edges)s; }
table { border-collapse: collapse; width: max-content; font-size: .87rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--grid); }
th { vertical-align: bottom; white-space: normal; max-width: 8rem; border-bottom-color: var(--edge); }
.band > * { border: 0; }
.band th { max-width: none; padding-bottom: 0; text-align: center; font-weight: normal; }
.text { text-align: left; }
.run { max-width: 16rem; white-space: normal; overflow-wrap: anywhere; min-width: 7rem; }
dl { margin: .5rem 0; max-width: 55rem; }
dt { font-weight: bold; }
dd { margin: 0 0 .5rem; }
.facts { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: .1rem 1.2rem; }
.facts dt { font-weight: normal; color: var(--tick); }
.facts dd { margin: 0; overflow-wrap: anywhere; }
figure { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: .4rem 1rem; margin: .4rem 0 0; }
figure svg { display: block; width: 100%%; height: auto; }
@media (max-width: 700px) {
  body { padding: 0 .8rem 2rem; }
  figure { grid-template-columns: minmax(0, 1fr); }
  th, td { padding: .25rem .5rem; }
}
"""

_EDGES = ", ".join(
    [
        *(f"linear-gradient(to {side}, var(--page) 40%, transparent) {place} / 3rem 100% no-repeat local"
          for side, place in (("right", "left"), ("left", "right"))),
        *(f"linear-gradient(to {side}, var(--shade), transparent) {place} / 1.1rem 100% no-repeat scroll"
          for side, place in (("right", "left"), ("left", "right"))),
    ]
)  # fmt: skip
"""A shadow at the side where a table goes on: the first two layers move with the table, and cover the shadows where it
ends."""
_PAPER = (
    'Tables and figures have the shapes of those in <a href="https://arxiv.org/abs/2108.06084">The '
    "Stability-Efficiency Dilemma</a> (Li, Zhang and He, 2022), called the paper below. "
    '<a href="#words">Words</a> at the end explains the terms.'
)
_SWATCH_DASHES = ("none", "8 3", "2 2", "9 3 2 3")
"""As curves.DASHES."""
_TEXT_COLUMNS = {"run", "state", "target", "group", "relation"}
"""Headers of columns that are words, not numbers."""


def write_report(
    path: Path, runs: Sequence[Run], tables: Sequence[Table], sentences: str = "", setup: Setup | None = None
) -> None:
    """Write the report to `path`, whole or not at all. Raises UserError where it cannot be written."""
    make_parent(path)
    write_atomic(path, render(runs, tables, sentences, setup, f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"))


def render(
    runs: Sequence[Run],
    tables: Sequence[Table],
    sentences: str = "",
    setup: Setup | None = None,
    made: str = "",
) -> str:
    """The report: legend, `sentences` (one a line), setup, tables and figures of the runs, and its words.

    `made` says when.
    """
    places = places_of(runs)
    parts = [
        "<h1>Comparison of runs</h1>",
        f'<p class="note">{_PAPER}</p>',
        _legend(runs),
        _verdict(sentences),
        _table(setup.table, places, _definitions(setup.facts, ' class="facts"')) if setup is not None else "",
        *(_table(table, places) for table in tables),
        *(
            f'<h2>{escape(figure.title)}</h2>\n<p class="note">{escape(figure.caption)}</p>\n'
            f"<figure>{chr(10).join(report_svgs(figure, runs))}</figure>"
            for figure in REPORT_FIGURES
        ),
        "<details><summary>Words</summary>\n" + _definitions(WORDS, ' id="words"') + "\n</details>",
        f'<p class="note">Made by megatron-slw {__version__}{escape(made and f" on {made}")}.</p>',
    ]
    values = {"light": _properties(_LIGHT, COLOURS), "dark": _properties(_DARK, _DARK_COLOURS), "edges": _EDGES}
    # The policy makes browsers refuse to load anything, whatever a run is called.
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Comparison of runs</title>
<style>{_CSS % values}</style>
</head>
<body>
{chr(10).join(parts)}
</body>
</html>
"""


def _properties(theme: dict[str, str], colours: Sequence[str]) -> str:
    values = theme | {f"run{index}": colour for index, colour in enumerate(colours)}
    return " ".join(f"--{name}: {values[name]};" for name in ("page", "shade", *THEME.values()))


def _verdict(sentences: str) -> str:
    """Open where it is short: of many runs there are many sentences."""
    lines = "\n".join(f"<p>{escape(sentence)}</p>" for sentence in sentences.splitlines())
    opened = " open" if len(sentences.splitlines()) <= 5 else ""
    return (
        f"<details{opened}><summary>Result: each run against the first</summary>\n{lines}\n</details>" if lines else ""
    )


def _definitions(pairs: Sequence[tuple[str, str]], style: str = "") -> str:
    lines = "\n".join(f"<dt>{escape(term)}</dt><dd>{escape(text)}</dd>" for term, text in pairs)
    return f"<dl{style}>\n{lines}\n</dl>" if lines else ""


def _legend(runs: Sequence[Run]) -> str:
    items = "\n".join(f"<li>{_swatch(place)}{escape(name)}</li>" for place, name in legend_of(runs))
    return f'<ul class="legend">\n{items}\n</ul>'


def _swatch(index: int) -> str:
    colour = f"var(--run{index % len(COLOURS)})"
    dashes = _SWATCH_DASHES[index // len(COLOURS) % len(_SWATCH_DASHES)]
    return (
        f'<svg class="swatch" viewBox="0 0 36 10" aria-hidden="true"><path d="M0 5H36" stroke="{colour}" '
        f'stroke-width="3" stroke-dasharray="{dashes}"/></svg>'
    )


def _table(table: Table, places: Sequence[int], before: str = "") -> str:
    """The table under its title; `before` stands between the two."""
    styles = [
        ' class="run text"' if title == "run" else ' class="text"' if title in _TEXT_COLUMNS else ""
        for title in table.header
    ]
    header = "".join(
        f'<th scope="col"{style}>{escape(title)}</th>' for title, style in zip(table.header, styles, strict=True)
    )
    bands = "".join(
        f'<th scope="colgroup" colspan="{span}">{escape(title)}</th>' if title else f'<td colspan="{span}"></td>'
        for title, span in table.bands
    )
    rows = []
    for row in table.rows:
        cells = [escape(cell) for cell in row.cells]
        if row.run is not None:
            name = table.header.index("run")
            cells[name] = _swatch(places[row.run]) + cells[name]
        rows.append("".join(f"<td{style}>{cell}</td>" for cell, style in zip(cells, styles, strict=True)))
    body = "\n".join(f"<tr>{row}</tr>" for row in rows)
    footnotes = "".join(f'\n<p class="note">{escape(line)}</p>' for line in table.footnotes)
    return (
        f'<h2>{escape(table.title)}</h2>\n{before}\n<p class="note">{escape(table.note)}</p>\n'
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(table.title)}"><table>\n<thead>'
        + (f'<tr class="band">{bands}</tr>\n' if bands else "")
        + f"<tr>{header}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>{footnotes}"
    )
