"""tools/watch_run.py: runs followed while they are written, as they look on any terminal."""

from __future__ import annotations

import fcntl
import json
import math
import os
import pty
import re
import runpy
import select
import signal
import struct
import subprocess
import sys
import termios
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from synthetic_runs import write_losses, write_run

from megatron.errors import UserError
from megatron.instability import watching
from megatron.instability.dashboard import Dashboard, sparkline
from megatron.instability.watching import History, LogTail, WatchedRun
from megatron.metrics import MetricsLogger
from megatron.owner_file import own_entry

PROGRAM = Path(__file__).resolve().parents[1] / "tools" / "watch_run.py"


def looked_at(path: Path) -> WatchedRun:
    run = WatchedRun(path)
    run.look_through()
    return run


def shown(*runs: WatchedRun, width: int = 60, height: float = math.inf, ascii_only: bool = False) -> list[str]:
    return [line.plain.rstrip() for line in Dashboard(runs).lines(width, height, ascii_only=ascii_only)]


def append(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text)


class TestLogTail:
    def test_whole_lines_come_once_and_what_was_read_is_not_read_again(self, tmp_path: Path) -> None:
        log = tmp_path / "metrics.jsonl"
        tail = LogTail(log)
        assert tail.read() == (False, [], None)
        append(log, '{"iteration": 1}\n{"iteration": 2}\n{"iter')
        assert tail.read() == (False, [{"iteration": 1}, {"iteration": 2}], None)
        assert tail.read() == (False, [], None)
        with log.open("r+") as file:
            file.write("x" * 20)
        append(log, 'ation": 3, "loss": "nan"}\n')
        assert tail.read() == (False, [{"iteration": 3, "loss": "nan"}], None)
        assert not tail.behind

    def test_a_log_cut_back_by_a_resume_starts_again(self, tmp_path: Path) -> None:
        write_losses(tmp_path, [4.0, 3.0, 2.0, 1.0])
        tail = LogTail(tmp_path / "metrics.jsonl")
        assert len(tail.read()[1]) == 6
        with MetricsLogger(tmp_path) as logger:
            logger.truncate_to(1)
            for iteration in range(2, 9):  # beyond where it was before the next look
                logger.log_step({"iteration": iteration})
        restarted, entries, _ = tail.read()
        assert restarted and [entry["iteration"] for entry in entries] == list(range(1, 9))
        (tmp_path / "metrics.jsonl").unlink()
        assert tail.read() == (True, [], None)

    def test_a_long_log_is_read_in_parts(self, tmp_path: Path) -> None:
        write_losses(tmp_path, [1.0] * 50)
        tail = LogTail(tmp_path / "metrics.jsonl")
        found, looks = [], 0
        while not looks or tail.behind:
            found += tail.read(limit=700)[1]
            looks += 1
        assert [entry["iteration"] for entry in found if "event" not in entry] == list(range(1, 51))
        assert looks > 5
        assert len(LogTail(tmp_path / "metrics.jsonl").read(limit=1)[1]) == 1  # never less than a line

    def test_a_broken_line_is_named_and_passed_over(self, tmp_path: Path) -> None:
        log = tmp_path / "metrics.jsonl"
        log.write_bytes(b'{"iteration": 1}\n\xff\r\n[1]\n{"iteration": 4}\n')
        _, entries, fault = LogTail(log).read()
        assert [entry["iteration"] for entry in entries] == [1, 4]
        assert fault is not None and fault.startswith(f"{log}:2: not a JSON object")


@given(st.lists(st.one_of(st.floats(-9, 9), st.just(math.inf)), max_size=200), st.integers(1, 12))
def test_history_keeps_every_peak_in_little_room(values: list[float], count: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(watching, "HISTORY", 16)
        history = History()
        for value in values:
            history.append(value)
        kept = history.stretches(1000)
        coarse = history.stretches(count)
    # An oracle that has all values: stretches of the least power of two that leaves 16 or fewer.
    stretch = 1
    while math.ceil(len(values) / stretch) > 16:
        stretch *= 2
    assert kept == [max(values[i : i + stretch]) for i in range(0, len(values), stretch)]
    assert len(coarse) == min(count, len(kept))
    assert not kept or max(coarse) == max(values)
    finite = [value for value in values if math.isfinite(value)]
    assert (history.least, history.largest) == (min(finite, default=math.inf), max(finite, default=-math.inf))


def test_sparkline() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert sparkline([7.0, math.inf, 0.0], ascii_only=True) == "#x_"
    assert (sparkline([3.0, 3.0]), sparkline([math.inf]), sparkline([])) == ("▁▁", "x", "")


class TestRun:
    def test_from_nothing_to_the_end(self, tmp_path: Path) -> None:
        home = tmp_path / "slw"
        run = looked_at(home)
        assert run.state.word == "waiting"
        assert shown(run)[0].endswith("  waiting")
        home.mkdir()
        assert shown(run)[1:] == textwrap.wrap(f"waiting: there is no {home / 'metrics.jsonl'} yet", 60)
        with MetricsLogger(home) as logger:
            run.look()
            assert shown(run)[0].endswith("  starting") and shown(run)[1:] == ["starting: no step yet"]
            logger.log_step({"iteration": 1, "consumed_tokens": 64, "loss": 5.0, "seqlen": 8})
            run.look()
            assert run.state.word == "running"
            logger.log_event({"iteration": 1}, event="spike")
            logger.log_validation({"iteration": 1, "loss": 4.5})
            run.look()
        log = home / "metrics.jsonl"
        os.utime(log, (time.time(), time.time() - 185))
        assert run.state == ("silent", "last written 3 minutes ago")
        for hours, words in ((1, "1 hour"), (47, "1 day"), (72, "3 days")):
            os.utime(log, (time.time(), time.time() - 3600 * hours - 20))
            assert run.state.detail == f"last written {words} ago"
        os.utime(log, (time.time(), time.time() - 185))
        (home / "config.yaml").write_text("train-tokens: 1000\nlr: 1e-3\n")
        assert "tokens 6%" in shown(looked_at(home))[1] and "ETA" not in shown(looked_at(home))[1]
        lines = shown(run)
        assert lines[0].endswith("  last written 3 minutes ago")
        assert lines[1:] == ["64 tokens", "step 1  loss 5.0000  seqlen 8  validation loss 4.5000", "spikes 1"]
        for status, reason in (("stopped", "SIGTERM"), ("diverged", "step 2: the loss is nan"), ("finished", None)):
            (home / "exit.json").write_text(json.dumps({"status": status, "iteration": 1, "reason": reason}))
            assert run.state == (status, reason)
            assert (shown(run)[-1] == f"{status}: {reason}") == (reason is not None)
        (home / "exit.json").write_text("{")
        assert run.state.word == "unreadable"
        assert "exit.json: expected" in " ".join(shown(run))

    def test_a_killed_run_is_known_at_once_and_may_go_on(self, tmp_path: Path) -> None:
        (write_losses(tmp_path, [4.0, 3.0]) / "config.yaml").write_text("train-tokens: 1000\nlr: 1e-3\n")
        (tmp_path / "owner.json").write_text(json.dumps(own_entry()))
        run = looked_at(tmp_path)
        assert run.state.word == "running" and "ETA" in shown(run)[1]
        killed = subprocess.Popen(["true"])
        killed.wait()
        (tmp_path / "owner.json").write_text(json.dumps(own_entry() | {"pid": killed.pid}))
        lines = shown(run)
        assert lines[0].endswith("  died") and "ETA" not in lines[1]
        assert " ".join(lines).endswith(f"process {killed.pid} on {os.uname().nodename} was killed or crashed")
        (tmp_path / "owner.json").write_text(json.dumps(own_entry()))
        assert run.state.word == "running"
        (tmp_path / "owner.json").write_text("")
        assert run.state == ("died", "it ended by a fault or an interrupt; its output says which")
        (tmp_path / "exit.json").write_text('{"status": "stopped", "iteration": 2, "reason": "SIGTERM"}')
        assert run.state == ("stopped", "SIGTERM")

    def test_progress_follows_the_log_and_the_plan(self, tmp_path: Path) -> None:
        write_losses(tmp_path, [4.0, 3.0, 2.0, 1.5], tokens=100, seconds=0.5)  # a step a second, with all there is
        assert looked_at(tmp_path).goal is None
        (tmp_path / "config.yaml").write_text("train-tokens: 1000\nlr: 1e-3\n")
        run = looked_at(tmp_path)
        assert (run.goal, run.share, run.speed, run.seconds_left) == (1000, 0.4, 200.0, 6.0)
        assert "400/1.00K tokens 40%  ETA 00:06" in shown(run)[1]
        (tmp_path / "config.yaml").write_text(
            "train-iters: 10\nglobal-batch-size: 4\nseq-length: 32\nlr: 1e-3\nlr-warmup-iters: 0\n"
            "seqlen-warmup: linear\nseqlen-start: 8\nseqlen-warmup-iters: 4\nseqlen-multiple: 8\n"
        )
        # 8 + 24 * t/4 rounded down to a multiple of 8 at steps 1 to 3, then 32.
        assert looked_at(tmp_path).goal == 4 * (8 + 16 + 24 + 7 * 32)
        assert "batch" not in " ".join(shown(looked_at(tmp_path)))
        append(tmp_path / "metrics.jsonl", '{"iteration": 5, "consumed_tokens": 500, "global_batch_size": 3}\n')
        assert "step 5  batch 3" in " ".join(shown(looked_at(tmp_path)))
        append(tmp_path / "metrics.jsonl", '{"iteration": 6, "consumed_tokens": 600, "global_batch_size": 4}\n')
        assert "batch" not in " ".join(shown(looked_at(tmp_path)))
        (tmp_path / "config.yaml").write_text("no-such-flag: 1\n")
        assert looked_at(tmp_path).goal is None

    def test_a_resume_forgets_what_was_cut_off(self, tmp_path: Path) -> None:
        run = looked_at(write_losses(tmp_path, [4.0, 3.0, math.nan, 9.0]))
        assert shown(run)[-1].split()[:2] == ["loss", "▂▁x█"]
        with MetricsLogger(tmp_path) as logger:
            logger.truncate_to(2)
        run.look()
        assert run.step is not None and run.step["iteration"] == 2
        assert shown(run)[-1].split() == ["loss", "█▁", "3", "to", "4"]

    def test_numbers_that_are_none(self, tmp_path: Path) -> None:
        (tmp_path / "metrics.jsonl").write_text(
            '{"iteration": 1, "loss": "nan", "seqlen": null, "lr": [1], "grad_norm": "many", "consumed_tokens": {}}\n'
            '{"iteration": 2, "loss": "inf", "event": "validation"}\n'
        )
        assert shown(looked_at(tmp_path))[1:] == ["? tokens", "step 1  loss nan  validation loss inf"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[WatchedRun]:
    """Three runs under way, one of them with a plan, and one that does not exist."""
    home = tmp_path_factory.mktemp("a-directory-whose-name-is-rather-long-as-names-of-experiments-tend-to-be")
    for name, warmup in (("baseline", 0), ("slw", 40), ("spiky", 20)):
        write_run(home / name, warmup_steps=warmup, tokens=500_000, spikes=(200_000.0,) if name == "spiky" else ())
    (home / "slw" / "config.yaml").write_text("train-tokens: 1M\nlr: 1e-3\n")
    return [looked_at(home / name) for name in ("baseline", "slw", "spiky", "missing")]


@pytest.mark.parametrize("width", [20, 60, 61, 200])
@pytest.mark.parametrize("height", [math.inf, 40, 12, 8, 5])
def test_lines_fit_the_terminal(runs: list[WatchedRun], width: int, height: float) -> None:
    for ascii_only in (False, True):
        lines = shown(*runs, width=width, height=height, ascii_only=ascii_only)
        assert max(map(len, lines)) <= width
        assert len(lines) <= height
        assert not ascii_only or "\n".join(lines).isascii()


def test_small_screens_lose_curves_first_and_then_runs(runs: list[WatchedRun]) -> None:
    tall, low, lowest = (shown(*runs, width=80, height=height) for height in (40, 8, 5))
    assert sum(line.startswith("loss  ") for line in tall) == 3
    assert sum(line.startswith("seqlen") for line in tall) == 2, "one that has been the same throughout has no curve"
    assert "▁▁▂▂▃▃" in "\n".join(tall)
    assert [line.split()[-1] for line in low[::2]] == ["running"] * 3 + ["waiting"]
    assert all("slw" in line for line in lowest[2:3]) and lowest[-1] == "and 2 more"
    assert any(re.search(r"█+░+  5\d\dK/1.00M tokens 5\d%  ETA \d\d:\d\d  loss \d\.\d{4}$", line) for line in low)
    assert re.fullmatch(r"5\d\dK tokens  loss \d\.\d{4}", low[1])
    assert low[7].startswith("waiting: there is no directory ")
    assert low[0].startswith("..")  # of a long path the end is what tells runs apart


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """The tool, within this process."""

    def call(*arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", ["watch_run.py", *map(str, arguments)])
        runpy.run_path(str(PROGRAM))["main"]()

    return call


def test_into_a_pipe_it_prints_once_without_colours(
    tmp_path: Path, program: Callable[..., None], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    home = write_losses(tmp_path / "slw", [4.0, 3.0], seqlen=[8, 16])
    monkeypatch.chdir(tmp_path)
    program("slw/", home / "metrics.jsonl", "nowhere")
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == f"{'slw':53}running"
    assert lines[4].split() == ["loss", "█▁", "3", "to", "4"]
    assert lines[-1] == "waiting: there is no directory nowhere yet"
    assert not any("\x1b" in line for line in lines)


def test_a_run_that_is_not_there_is_a_fault_where_nothing_is_waited_for(program: Callable[..., None]) -> None:
    with pytest.raises(Exception, match="nowhere: no such directory yet; expected the --save directory of a run"):
        program("nowhere", "--once")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: RUN"),
        (["run", "--interval", "0"], "argument --interval: expected seconds from 0.05 to 3600, found '0'"),
        (["run", "--interval", "nan"], "found 'nan'"),
        (["run", "--onse"], "unknown flag --onse (did you mean --once?)"),
    ],
)
def test_wrong_flags(program: Callable[..., None], arguments: list[str], message: str) -> None:
    with pytest.raises(Exception, match=re.escape(message)) as found:
        program(*arguments)
    assert type(found.value).__name__ == "CommandLineError"


class Terminal:
    """The tool on a pseudo-terminal of 60 columns."""

    def __init__(self, *arguments: str, **environment: str) -> None:
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 20, 60, 0, 0))
        kept = {k: v for k, v in os.environ.items() if k not in {"COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR"}}
        self.process = subprocess.Popen(
            [sys.executable, str(PROGRAM), *arguments],
            stdin=slave, stdout=slave, stderr=slave, env=kept | {"TERM": "xterm-256color"} | environment,
        )  # fmt: skip
        os.close(slave)
        self.text = ""

    def read_until(self, wanted: str) -> str:
        """What was written since the last call, up to `wanted` and a little more; "" waits for the end."""
        start = len(self.text)
        while not wanted or wanted not in self.text[start:]:
            assert select.select([self.master], [], [], 60)[0], f"no {wanted!r} in {self.text[start:]!r}"
            try:
                data = os.read(self.master, 65536)
            except OSError:  # the other end is closed
                data = b""
            if not data:
                assert not wanted, f"no {wanted!r} in {self.text[start:]!r}"
                break
            self.text += data.decode(errors="replace")
        return self.text[start:]


@pytest.fixture
def terminal() -> Iterator[Callable[..., Terminal]]:
    """Starts the tool; it is gone at the end of the test."""
    started: list[Terminal] = []

    def start(*arguments: str, **environment: str) -> Terminal:
        started.append(Terminal(*arguments, **environment))
        return started[-1]

    yield start
    for one in started:
        one.process.kill()
        one.process.wait()
        os.close(one.master)


@pytest.mark.parametrize(("colour", "stop"), [({}, signal.SIGINT), ({"NO_COLOR": "1"}, signal.SIGTERM)])
def test_a_terminal_is_drawn_anew_and_left_as_it_was(
    tmp_path: Path, terminal: Callable[..., Terminal], colour: dict[str, str], stop: signal.Signals
) -> None:
    log = tmp_path / "metrics.jsonl"
    screen = terminal(str(tmp_path), "--interval", "0.05", **colour)
    screen.read_until("waiting")
    append(log, '{"iteration": 1, "consumed_tokens": 64, "loss": 7.25}\n{"iteration": 2, "lo')
    assert "64 tokens" in screen.read_until("loss 7.2500")
    append(log, 'ss": 6.5}\n')
    screen.read_until("loss 6.5000")
    screen.process.send_signal(stop)
    end = screen.read_until("")
    assert screen.process.wait() == 0
    assert end.index("\x1b[?1049l") < end.rindex("loss 6.5000")  # back from the other screen: the last state stays
    assert screen.text.rindex("\x1b[?25h") > screen.text.rindex("\x1b[?25l")  # the cursor is back
    assert "Traceback" not in screen.text
    assert bool(re.search(r"\x1b\[[0-9;]*3[0-9]m", screen.text)) == (not colour)


def test_it_ends_when_all_runs_have(tmp_path: Path, terminal: Callable[..., Terminal]) -> None:
    write_losses(tmp_path, [4.0, 3.0])
    screen = terminal(str(tmp_path), "--interval", "0.05")
    screen.read_until("running")
    (tmp_path / "exit.json").write_text('{"status": "finished", "iteration": 2, "reason": null}')
    assert "finished" in screen.read_until("")
    assert screen.process.wait() == 0


def test_the_dashboard_is_what_rich_draws(runs: list[WatchedRun]) -> None:
    console = Console(width=60, height=8, file=open(os.devnull, "w"), record=True)  # noqa: SIM115
    console.print(Dashboard(runs))
    assert [line.rstrip() for line in console.export_text().splitlines()] == shown(*runs, height=8)


def test_a_folder_of_runs_is_not_waited_for(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").touch()
    with pytest.raises(UserError, match=f"holds 2 runs, and is none itself: give {tmp_path}/a {tmp_path}/b"):
        WatchedRun(tmp_path)
