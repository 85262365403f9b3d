"""A comparison of runs as one HTML file that needs nothing beside it: no network, no script, no other file."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from megatron.files import make_parent, write_atomic
from megatron.instability.curves import COLOURS, legend_of, places_of
from megatron.instability.figures import REPORT_FIGURES, THEME, report_svg
from megatron.instability.summary import Run
from megatron.instability.tables import Table

_LIGHT = {"page": "#ffffff", "panel": "#f4f5f7", "ink": "#222222", "edge": "#888888", "grid": "#e6e6e6"} | {
    "tick": "#555555",
    "faint": "#767676",
}
_DARK = {"page": "#15171a", "panel": "#1f2226", "ink": "#e4e4e4", "edge": "#777777", "grid": "#31353a"} | {
    "tick": "#b0b0b0",
    "faint": "#8a8a8a",
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
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .87rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--grid); }
th { vertical-align: bottom; white-space: normal; background: var(--panel); }
.text { text-align: left; }
figure { margin: .4rem 0 0; }
figure svg { display: block; width: 100%%; height: auto; }
"""

_SWATCH_DASHES = ("none", "8 3", "2 2", "9 3 2 3")
"""As curves.DASHES."""
_TEXT_COLUMNS = {"run", "state", "target", "group"}
"""Headers of columns that are words, not numbers."""


def write_report(path: Path, runs: Sequence[Run], tables: Sequence[Table], sentences: str = "") -> None:
    """Write the report to `path`, whole or not at all. Raises UserError where it cannot be written."""
    make_parent(path)
    write_atomic(path, render(runs, tables, sentences))


def render(runs: Sequence[Run], tables: Sequence[Table], sentences: str = "") -> str:
    """The report: legend, `sentences` (one a line), tables and figures of the runs."""
    parts = [
        "<h1>Comparison of runs</h1>",
        _legend(runs),
        _verdict(sentences),
        *(_table(table, places_of(runs)) for table in tables),
        *(
            f'<h2>{escape(figure.title)}</h2>\n<p class="note">{escape(figure.caption)}</p>\n'
            f"<figure>{report_svg(figure, runs)}</figure>"
            for figure in REPORT_FIGURES
        ),
    ]
    # The policy makes browsers refuse to load anything, whatever a run is called.
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Comparison of runs</title>
<style>{_CSS % {"light": _properties(_LIGHT, COLOURS), "dark": _properties(_DARK, _DARK_COLOURS)}}</style>
</head>
<body>
{chr(10).join(parts)}
</body>
</html>
"""


def _properties(theme: dict[str, str], colours: Sequence[str]) -> str:
    values = theme | {f"run{index}": colour for index, colour in enumerate(colours)}
    return " ".join(f"--{name}: {values[name]};" for name in ("page", "panel", *THEME.values()))


def _verdict(sentences: str) -> str:
    """Open where it is short: of many runs there are many sentences."""
    lines = "\n".join(f"<p>{escape(sentence)}</p>" for sentence in sentences.splitlines())
    opened = " open" if len(sentences.splitlines()) <= 5 else ""
    return f"<details{opened}><summary>Each run against the first</summary>\n{lines}\n</details>" if lines else ""


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


def _table(table: Table, places: Sequence[int]) -> str:
    styles = [' class="text"' if title in _TEXT_COLUMNS else "" for title in table.header]
    header = "".join(
        f'<th scope="col"{style}>{escape(title)}</th>' for title, style in zip(table.header, styles, strict=True)
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
        f'<h2>{escape(table.title)}</h2>\n<p class="note">{escape(table.note)}</p>\n<div class="scroll"><table>\n'
        f"<thead><tr>{header}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>{footnotes}"
    )
