"""The progress line: what it says, where it says it, and its estimate of the time left."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest

from megatron.console import ProgressLine, format_count, format_duration, repetition


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def step(iteration: int, tokens: int, **more: Any) -> dict[str, Any]:
    return {
        "iteration": iteration,
        "consumed_tokens": tokens,
        "loss": 5.1234,
        "seqlen": 120,
        "lr": 6e-4,
        "grad_norm": 0.52,
        **more,
    }


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"), (7, "7"), (999, "999"), (999.4, "999"), (999.6, "1.00K"), (1000, "1.00K"), (9_996, "10.0K"),
        (99_960, "100K"), (999_499, "999K"), (999_999, "1.00M"), (4_200_000, "4.20M"), (157_286_400_000, "157B"),
        (3e15, "3000T"), (-1500, "-1.50K"), (float("nan"), "nan"), (float("inf"), "inf"),
    ],
)  # fmt: skip
def test_format_count(number: float, text: str) -> None:
    assert format_count(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "00:00"), (151, "02:31"), (59.6, "01:00"), (3599.7, "1:00:00"), (3751, "1:02:31"), (90061, "1d 01:01:01"),
        (None, "--:--"), (float("inf"), "--:--"), (-3, "00:00"),
    ],
)  # fmt: skip
def test_format_duration(seconds: float | None, text: str) -> None:
    assert format_duration(seconds) == text


def test_plain_lines_every_log_interval() -> None:
    out, clock = io.StringIO(), Clock()
    line = ProgressLine("slw", target_tokens=10_000_000, log_interval=600, stream=out, clock=clock)
    line.last_step = 2858
    for iteration in range(1, 1251):
        clock.now = 3500 * iteration / 20_000
        line.update(step(iteration, 3500 * iteration))
    line.validation({"iteration": 1250, "consumed_tokens": 4_375_000, "loss": 5.0, "perplexity": 148.4132})
    line.close()
    assert out.getvalue().splitlines() == [
        "step 600/2,858 | 21% ETA 06:35 | loss 5.1234 | seqlen 120 | 20.0K tok/s | 2.10M/10.0M tokens"
        " | lr 6.00e-04 | grad norm 0.52 | 175 ms/step",
        "step 1,200/2,858 | 42% ETA 04:50 | loss 5.1234 | seqlen 120 | 20.0K tok/s | 4.20M/10.0M tokens"
        " | lr 6.00e-04 | grad norm 0.52 | 175 ms/step",
        "validation | step 1,250 | 4.38M tokens | loss 5.0000 | perplexity 148.41",
        "step 1,250/2,858 | 43% ETA 04:41 | loss 5.1234 | seqlen 120 | 20.0K tok/s | 4.38M/10.0M tokens"
        " | lr 6.00e-04 | grad norm 0.52 | 175 ms/step",
    ]


def test_eta_follows_a_change_of_speed() -> None:
    clock = Clock()
    line = ProgressLine("slw", target_tokens=1_000_000, stream=io.StringIO(), clock=clock)
    tokens = iteration = 0
    for speed in (100, 10_000):  # tokens a second: short steps are slow for each token
        for _ in range(600):
            clock.now, tokens, iteration = clock.now + 0.1, tokens + speed // 10, iteration + 1
            line.update(step(iteration, tokens))
    assert line.speed() == pytest.approx(10_000, rel=0.01)
    assert line.seconds_left() == pytest.approx((1_000_000 - tokens) / 10_000, rel=0.01)
    assert len(line._window) < 500


def test_evaluation_counts_for_the_eta_but_not_for_the_speed() -> None:
    clock = Clock()
    line = ProgressLine("slw", target_tokens=10_000, stream=io.StringIO(), clock=clock)
    for iteration in range(1, 101):
        clock.now += 0.1 + (5.0 if iteration == 50 else 0.0)
        line.update(step(iteration, 10 * iteration, seconds=0.1 * iteration))
    assert line.speed() == pytest.approx(100)
    assert line.seconds_left() == pytest.approx(9000 * (9.9 + 5) / 990, rel=1e-6)


@pytest.mark.parametrize("seconds", [0.1, 40.0], ids=["steps of 0.1 s", "steps of 40 s"])
def test_a_stalled_step_and_a_slow_checkpoint_hardly_change_the_eta(seconds: float) -> None:
    """Short steps, which cost more for a token, then long ones; then a stall in a step, then one between steps."""
    clock, tokens, training = Clock(), 0, 0.0
    line = ProgressLine("slw", target_tokens=1_000_000, stream=io.StringIO(), clock=clock)

    def train(steps: int, length: int, *, stall: float = 0.0) -> float:
        """The estimate after more steps of so many tokens, over the time that is really left at this pace."""
        nonlocal tokens, training
        for i in range(steps):
            tokens, taken = tokens + length, seconds * (0.5 + length / 1000) + (stall if i == steps - 1 else 0)
            training, clock.now = training + taken, clock.now + taken
            line.update(step(1, tokens, seconds=training))
        left = line.seconds_left()
        assert left is not None
        return left / ((1_000_000 - tokens) * seconds * (0.5 / length + 1 / 1000))

    assert train(100, 50) == pytest.approx(1)
    assert train(400, 1000) == pytest.approx(1)
    assert 1 <= train(1, 1000, stall=100 * seconds) < 1.1  # the time for a token of all steps of late: 2 and more
    clock.now += 10 * seconds
    assert 1 <= train(1, 1000) < 1.2
    assert train(100, 1000) == pytest.approx(1, rel=0.05)


def test_evaluations_are_counted_from_all_of_the_run() -> None:
    clock = Clock()
    line = ProgressLine("slw", target_tokens=100_000, stream=io.StringIO(), clock=clock)
    ratios = []
    for iteration in range(1, 6001):
        clock.now += 0.1 + (20.0 if iteration % 1000 == 500 else 0.0)  # a fifth of all
        line.update(step(iteration, 10 * iteration, seconds=0.1 * iteration))
        if iteration > 2000:
            ratios.append((line.seconds_left() or 0) / ((100_000 - 10 * iteration) * 0.012))
    assert min(ratios) > 0.9
    assert max(ratios) < 1.1


def test_a_rollback_leaves_a_speed_and_an_eta() -> None:
    clock = Clock()
    line = ProgressLine("slw", target_tokens=10_000, stream=io.StringIO(), clock=clock)
    for iteration in [*range(1, 51), *range(20, 51)]:
        clock.now += 0.1
        line.update(step(iteration, 10 * iteration, seconds=clock.now))
    assert line.speed() == pytest.approx(100)
    assert line.seconds_left() == pytest.approx(95)


def test_the_batch_is_shown_while_it_grows() -> None:
    out = io.StringIO()
    line = ProgressLine("slw", target_tokens=None, full_batch=512, log_interval=1, stream=out)
    for iteration, batch in ((1, 128), (2, 512)):
        line.update({"iteration": iteration, "consumed_tokens": 8, "seqlen": 8, "global_batch_size": batch})
    first, second = out.getvalue().splitlines()
    assert "| seqlen 8 | batch 128" in first
    assert "batch" not in second


def losses_shown(text: str) -> list[str]:
    return re.findall(r"loss (\S+)", text)


def test_the_loss_is_the_mean_over_the_log_interval() -> None:
    """Of fewer steps at the start and after a rollback; what is not finite is left out, and shown where it is due."""
    out = io.StringIO()
    line = ProgressLine("slw", target_tokens=None, log_interval=2, stream=out)
    for iteration, loss in enumerate((9.0, 7.0, 6.0, float("nan"), float("nan"), 4.0, 2.0), start=1):
        line.update(step(iteration, iteration, loss=loss))
    assert losses_shown(out.getvalue()) == ["8.0000", "nan", "4.0000"]
    line.print_last()
    line.update(step(6, 6, loss=1.0))
    assert losses_shown(out.getvalue())[3:] == ["3.0000", "1.0000"]
    line.update(step(7, 7, loss=None))
    line.close()
    assert out.getvalue().splitlines()[-1].startswith("step 7 | seqlen")


def test_skipped_steps_are_counted_from_the_first() -> None:
    out = io.StringIO()
    line = ProgressLine("slw", target_tokens=None, log_interval=1, stream=out)
    for iteration, skipped in ((1, False), (2, True), (3, True), (4, False), (3, False)):  # 3 after a rollback
        line.update(step(iteration, 8, skipped=skipped))
    shown = [re.findall(r"\| seqlen 120 \| (\d+ skipped)", text) for text in out.getvalue().splitlines()]
    assert shown == [[], ["1 skipped"], ["2 skipped"], ["2 skipped"], ["1 skipped"]]


def test_the_time_of_a_step_is_that_of_training() -> None:
    out, clock = io.StringIO(), Clock()
    line = ProgressLine("slw", target_tokens=None, log_interval=1, stream=out, clock=clock)
    for iteration, seconds in ((1, 0.01), (2, 0.02), (3, 0.04), (4, 1.51)):
        clock.now += 7
        line.update(step(iteration, iteration, seconds=seconds))
    assert re.findall(r"\S+ ms/step$", out.getvalue(), re.MULTILINE) == ["10.0 ms/step", "15.0 ms/step", "500 ms/step"]


def test_the_live_line_has_the_mean_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    out, clock = Terminal(), Clock()
    line = ProgressLine("slw", target_tokens=None, log_interval=3, stream=out, clock=clock)
    for iteration, loss in enumerate((9.0, 8.0, 4.0, 3.0), start=1):
        clock.now += 1
        line.update(step(iteration, iteration, loss=loss))
    assert losses_shown(out.getvalue()) == ["9.0000", "8.5000", "7.0000", "5.0000"]


def test_live_line_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "60")
    out, clock = Terminal(), Clock()
    line = ProgressLine("slw", target_tokens=1000, stream=out, clock=clock)
    for iteration in range(1, 101):
        clock.now += 0.01
        line.update(step(iteration, 10 * iteration))
    drawn = out.getvalue().split("\r\x1b[2K")[1:]
    assert 9 <= len(drawn) <= 12  # ten a second
    assert drawn[0] == "slw | 1% ETA --:-- | step 1 | loss 5.1234 | seqlen 120"
    assert all(len(text) <= 59 and "\n" not in text for text in drawn)
    line.message("saved")
    assert re.search(r"\r\x1b\[2Ksaved\nslw \| [^\n]*$", out.getvalue())
    line.close()
    assert "slw | 100% ETA 00:00" in out.getvalue().rpartition("\x1b[2K")[2]
    assert out.getvalue().endswith("\n")
    line.close()


@pytest.mark.parametrize(
    ("columns", "line"),
    [
        (8, "baselin"),
        (79, "baseline | 50% ETA 00:10 | step 20 | loss 5.1234 | seqlen 120 | 50 tok/s"),
        (99, "baseline | 50% ETA 00:10 | step 20 | loss 5.1234 | seqlen 120 | 50 tok/s | 500/1.00K tokens"),
        (300, "baseline | 50% ETA 00:10 | step 20 | loss 5.1234 | seqlen 120 | 50 tok/s | 500/1.00K tokens"
              " | lr 6.00e-04 | grad norm 0.52 | 500 ms/step"),
    ],
)  # fmt: skip
def test_a_narrow_terminal_goes_without_the_last_fields(
    monkeypatch: pytest.MonkeyPatch, columns: int, line: str
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(columns))
    out, clock = Terminal(), Clock()
    progress = ProgressLine("baseline", target_tokens=1000, stream=out, clock=clock)
    for iteration in (10, 20):
        clock.now = 5.0 * iteration / 10
        progress.update(step(iteration, 25 * iteration))
    assert out.getvalue().rpartition("\x1b[2K")[2] == line[: columns - 1]


def test_a_line_from_a_signal_handler_goes_past_the_buffer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "60")
    with (tmp_path / "screen").open("w") as stream:
        monkeypatch.setattr(stream, "isatty", lambda: True)
        line = ProgressLine("slw", target_tokens=None, stream=stream)
        line.update(step(1, 10))
        monkeypatch.setattr(stream, "write", None)
        line.message_at_once("stopping")
        monkeypatch.undo()
        drawn = "slw | step 1 | loss 5.1234 | seqlen 120 | 10 tokens"
        assert (tmp_path / "screen").read_bytes().decode() == f"\r\x1b[2K{drawn}\r\x1b[2Kstopping\n{drawn}"
    ProgressLine("slw", target_tokens=None, stream=io.StringIO()).message_at_once("there is no descriptor")


def test_dumb_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    out = Terminal()
    with ProgressLine("slw", target_tokens=None, log_interval=1, stream=out) as line:
        line.update({"iteration": 1, "consumed_tokens": 5, "loss": float("nan")})
    assert out.getvalue() == "step 1 | loss nan | 5 tokens\n"


def test_silent_on_other_ranks() -> None:
    out = Terminal()
    with ProgressLine("slw", target_tokens=10, silent=True, stream=out) as line:
        line.update(step(1, 10))
        line.message("hello")
        line.validation({"iteration": 1, "loss": 1.0})
    assert out.getvalue() == ""


def test_a_run_that_reads_its_corpus_again_and_again_says_so() -> None:
    assert repetition(1_999, 1_000) == repetition(9, 0) == []
    (note,) = repetition(2_000_000, 32_000)
    assert note.startswith("2.00M samples are 62 passes over the 32.0K of this corpus: watch the validation loss")
