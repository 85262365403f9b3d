"""Runs on a terminal while they go on: a few lines each, drawn anew every second."""

from __future__ import annotations

import math
import textwrap
import time
from collections.abc import Sequence

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.text import Text

from megatron.console import format_count, format_duration
from megatron.instability.watching import History, WatchedRun, number

STYLES = {
    "waiting": "dim",
    "starting": "dim",
    "reading": "dim",
    "running": "green",
    "silent": "yellow",
    "finished": "cyan",
    "stopped": "yellow",
    "diverged": "bold red",
    "died": "bold red",
    "unreadable": "bold red",
}
BATCH = "global_batch_size"
FIELDS = (
    ("iteration", "step", ",.0f"),
    ("loss", "loss", ".4f"),
    ("loss_ratio", "loss ratio", ".3f"),
    ("seqlen", "seqlen", ".0f"),
    (BATCH, "batch", ".0f"),
    ("lr", "lr", ".2e"),
    ("grad_norm", "grad norm", ".2f"),
)
"""Field of a step, its name here, and how it is written; the batch while it is warmed up."""
BLOCKS, ASCII_BLOCKS = "▁▂▃▄▅▆▇█", "_.-=+*%#"
BRIEF = 2
"""Lines of a run in brief."""
LABEL, RANGE = 8, 18
"""Columns before a sparkline and behind it."""


class Dashboard:
    """All runs; where they do not fit the screen each is in brief, and then the last ones lose their place."""

    def __init__(self, runs: Sequence[WatchedRun], *, whole: bool = False) -> None:
        """`whole`: of any height, for a file or for what stays on the terminal."""
        self._runs = runs
        self._whole = whole

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """For rich."""
        height = math.inf if self._whole else console.height
        yield from self.lines(options.max_width, height, ascii_only=options.ascii_only)

    def lines(self, width: int, height: float, *, ascii_only: bool) -> list[Text]:
        """What is drawn on `width` columns and at most `height` lines, which may be infinite."""
        for brief in (False, True):
            blocks = [run_lines(run, width, brief=brief, ascii_only=ascii_only) for run in self._runs]
            gap = [] if brief else [Text()]
            lines = [line for i, block in enumerate(blocks) for line in [*(gap if i else []), *block]]
            if len(lines) <= height:
                return lines
        shown = int(height - 1) // BRIEF
        more = Text(f"and {len(blocks) - shown} more", style="dim")
        more.truncate(width)
        return [*(line for block in blocks[:shown] for line in block), more]


def run_lines(run: WatchedRun, width: int, *, brief: bool, ascii_only: bool) -> list[Text]:
    """One run, none of its lines longer than `width`; `brief`: two lines."""
    state, step = run.state, run.step
    word = state.detail if state.word == "silent" and state.detail else state.word
    room = max(8, width - len(word) - 2)
    name = run.name if len(run.name) <= room else ".." + run.name[2 - room :]
    lines = [Text.assemble((name, "bold"), " " * max(2, width - len(name) - len(word)), (word, STYLES[state.word]))]
    detail = f"{state.word}: {state.detail}" if state.detail and state.word != "silent" else ""
    if step is not None:
        lines.append(_progress(run, width, moving=state.word == "running", brief=brief, ascii_only=ascii_only))
    elif brief:
        lines.append(Text(detail, style=STYLES[state.word]))
    if not brief:
        lines += [Text(line) for line in _filled(_fields(run), width)] if step is not None else []
        for label, history in (("loss", run.loss), ("seqlen", run.seqlen)):
            lines += _curve(label, history, width, ascii_only=ascii_only)
        lines += [Text(line, style=STYLES[state.word]) for line in textwrap.wrap(detail, width)]
    for line in lines:
        line.no_wrap, line.overflow = True, "crop"
        line.truncate(width)
    return lines


def watch(runs: Sequence[WatchedRun], console: Console, *, interval: float) -> None:
    """Draw the runs every `interval` seconds until all have finished or diverged, or Ctrl-C; the end of it stays."""
    try:
        with Live(Dashboard(runs), console=console, screen=True, auto_refresh=False) as screen:
            going = True
            while going:
                for run in runs:
                    run.look()
                screen.refresh()
                states = {run.state.word for run in runs}
                going = not states <= {"finished", "diverged"}
                if going and "reading" not in states:
                    time.sleep(interval)
    except KeyboardInterrupt:
        pass
    console.print(Dashboard(runs, whole=True))


def sparkline(values: Sequence[float], *, ascii_only: bool = False) -> str:
    """A character for each value, from the least to the largest; x where one is infinite."""
    blocks = ASCII_BLOCKS if ascii_only else BLOCKS
    finite = [value for value in values if math.isfinite(value)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 0.0)
    scale = (len(blocks) - 1) / (high - low) if high > low else 0.0
    return "".join(blocks[round((value - low) * scale)] if math.isfinite(value) else "x" for value in values)


def _progress(run: WatchedRun, width: int, *, moving: bool, brief: bool, ascii_only: bool) -> Text:
    """The bar, tokens, and the time left while it goes on; in brief the loss too, which else stands below."""
    tokens, share, loss = number(run.step, "consumed_tokens"), run.share, number(run.step, "loss")
    words = format_count(tokens) if tokens is not None else "?"
    ending = f"  loss {loss:.4f}" if brief and loss is not None else ""
    if share is None or run.goal is None:
        return Text(f"{words} tokens{ending}")
    words = f"{words}/{format_count(run.goal)} tokens {math.floor(100 * share)}%"
    if moving:
        words += f"  ETA {format_duration(run.seconds_left)}"
    words += ending
    room = max(0, min(40, width - len(words) - 2))
    done = int(room * share)
    full, empty = ("#", ".") if ascii_only else ("█", "░")
    return Text.assemble((full * done, "green"), (empty * (room - done), "dim"), "  " if room else "", words)


def _fields(run: WatchedRun) -> list[str]:
    hidden = () if (number(run.step, BATCH) or math.inf) < (run.full_batch or 0) else (BATCH,)
    found = [(label, style, number(run.step, name)) for name, label, style in FIELDS if name not in hidden]
    parts = [f"{label} {value:{style}}" for label, style, value in found if value is not None]
    if run.speed is not None:
        parts.append(f"{format_count(run.speed)} tok/s")
    if (loss := number(run.validation, "loss")) is not None:
        parts.append(f"validation loss {loss:.4f}")
    if run.spikes:
        parts.append(f"spikes {run.spikes:,}")
    return parts


def _filled(parts: Sequence[str], width: int) -> list[str]:
    """The parts side by side, none of them broken."""
    text = "  ".join(part.replace(" ", "\xa0") for part in parts)
    return [line.replace("\xa0", " ") for line in textwrap.wrap(text, width)]


def _curve(label: str, history: History, width: int, *, ascii_only: bool) -> list[Text]:
    """A sparkline with the range of the values; nothing as long as they are all the same."""
    values = history.stretches(max(1, width - LABEL - RANGE))
    if len(set(values)) < 2:
        return []
    ends = dict.fromkeys(f"{value:.4g}" for value in (history.least, history.largest) if math.isfinite(value))
    curve = sparkline(values, ascii_only=ascii_only)
    return [Text.assemble((f"{label:<{LABEL}}", "dim"), curve, (f"  {' to '.join(ends)}", "dim"))]
