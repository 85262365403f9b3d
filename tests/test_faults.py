"""Losses that are not finite, spikes, stop files, time limits: whole runs in this process, with a poisoned forward."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from whole_runs import log_of, toy_corpus

from megatron.arguments import build_parser, parse_config
from megatron.errors import EXIT_FINISHED, EXIT_STOPPED, UserError
from megatron.training import stop
from megatron.training.pretrain import pretrain
from pretrain_gpt2 import forward_step, model_provider

BATCH = 16
FLAGS = (
    "--num-layers 1 --hidden-size 16 --num-attention-heads 2 --seq-length 16 --global-batch-size 16 --lr 1e-3 "
    "--lr-warmup-iters 2 --split 100,0,0 --no-tensorboard --hidden-dropout 0.1 --attention-dropout 0.1 "
    "--seqlen-warmup linear --seqlen-start 8 --seqlen-warmup-iters 10 --train-iters 20 --vocab-size 64 "
    "--save-interval 4 --fixed-micro-batch"
).split()


class Crash(Exception):
    """Ends a run as a kill would, without a save."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> str:
    return toy_corpus(tmp_path_factory.mktemp("corpus"), documents=200, tokens=50, vocabulary=64)


class Forward:
    """forward_step with faults: `change(step, rows)` gives what to multiply a micro-batch's losses by."""

    def __init__(self, change: Callable[[int, torch.Tensor], float]) -> None:
        self.change = change
        self.rows: list[tuple[int, ...]] = []
        self.calls = 0

    def __call__(self, model, batch, seqlen):
        losses, mask = forward_step(model, batch, seqlen)
        if model.training:
            self.calls += 1
            self.rows += [tuple(row) for row in batch.tokens.tolist()]
            losses = losses * self.change(math.ceil(self.calls * 4 / BATCH), batch.tokens)
        return losses, mask


def run(corpus: str, home: Path, forward=forward_step, *flags: str) -> int:
    argv = ["--data-path", corpus, "--save", str(home), "--load", str(home), *FLAGS, *flags]
    return pretrain(parse_config(build_parser(), argv)[0], model_provider, forward)


def poison(*steps: int) -> Forward:
    """The second micro-batch of these steps, counted from the start of the process, is NaN."""
    forward = Forward(lambda step, rows: 1.0)
    forward.change = lambda step, rows: math.nan if step in steps and forward.calls % 4 == 2 else 1.0
    return forward


def test_a_loss_that_is_not_finite_ends_the_run_before_the_update(corpus, tmp_path):
    home = tmp_path / "run"
    with pytest.raises(UserError, match=r"step 7: loss nan, .* on samples 96 to 111 .*faults/step_0000007") as fault:
        run(corpus, home, poison(7))
    assert fault.value.__notes__ == [f"start it again with --load {home}: it goes on from step 4"]
    entries = log_of(home)
    assert [e["iteration"] for e in entries] == list(range(1, 8))
    assert (entries[-1]["loss"], entries[-1]["skipped"]) == ("nan", True), "the step that diverged is in the log too"
    ended = json.loads((home / "exit.json").read_text())
    assert (ended["status"], ended["iteration"]) == ("diverged", 7) and ended["reason"].startswith("step 7: loss nan")
    written = json.loads((home / "faults/step_0000007.json").read_text())
    assert [entry["sample"] for entry in written["samples"]] == list(range(96, 112))
    assert all(sum(p["length"] for p in entry["pieces"]) == 17 for entry in written["samples"])
    tokens = np.load(home / "faults/step_0000007.npy", allow_pickle=False)
    assert tokens.shape == (16, 17)
    piece = written["samples"][3]["pieces"][0]
    from megatron.data.indexed_dataset import IndexedDataset

    corpus_tokens = IndexedDataset(piece["prefix"])
    start = int(corpus_tokens.document_starts[piece["document"]]) + piece["offset"]
    assert tokens[3, : piece["length"]].tolist() == corpus_tokens.tokens[start : start + piece["length"]].tolist()
    # The checkpoint of step 4 stands, and the run goes on from it once the fault is gone.
    assert run(corpus, home) == EXIT_FINISHED
    assert [e["iteration"] for e in log_of(home) if "lr" in e] == list(range(1, 21))


def test_a_step_that_is_not_finite_is_skipped_and_counted(corpus, tmp_path):
    home = tmp_path / "run"
    assert run(corpus, home, poison(3, 7), "--on-nonfinite", "skip", "--nonfinite-limit", "2") == EXIT_FINISHED
    steps = [e for e in log_of(home) if "lr" in e]
    assert [e["iteration"] for e in steps if e["skipped"]] == [3, 7]
    assert [e["loss"] for e in steps if e["skipped"]] == ["nan", "nan"]
    assert steps[-1]["consumed_samples"] == 320, "a skipped step advances progress all the same"
    assert (home / "faults/step_0000003.json").exists()
    assert steps[7]["loss"] != "nan"


def test_so_many_skipped_steps_in_a_row_end_the_run(corpus, tmp_path):
    with pytest.raises(UserError, match=r"step 7: .*--nonfinite-limit 3 steps in a row"):
        run(corpus, tmp_path / "run", poison(2, 5, 6, 7), "--on-nonfinite", "skip", "--nonfinite-limit", "3")


def test_where_nothing_is_saved_yet_a_fault_says_nothing_of_going_on(corpus, tmp_path):
    with pytest.raises(UserError, match="step 3: loss nan") as fault:
        run(corpus, tmp_path / "run", poison(3))
    assert not hasattr(fault.value, "__notes__")


def spike_at(marked: tuple[int, ...], crash_at: int | None = None) -> Forward:
    """Losses are 4 times as large where a micro-batch holds the `marked` row; a crash at a call."""
    forward = Forward(lambda step, rows: 1.0)

    def change(step: int, rows: torch.Tensor) -> float:
        if crash_at is not None and forward.calls == crash_at:
            raise Crash
        return 4.0 if any(tuple(row[:8]) == marked for row in rows.tolist()) else 1.0

    forward.change = change
    return forward


@pytest.fixture(scope="module")
def plain(corpus, tmp_path_factory) -> tuple[Path, list[tuple[int, ...]]]:
    """A run without faults, and the rows that it read, cut to 8 tokens."""
    home = tmp_path_factory.mktemp("plain") / "run"
    forward = Forward(lambda step, rows: 1.0)
    assert run(corpus, home, forward) == EXIT_FINISHED
    return home, [row[:8] for row in forward.rows]


def test_a_spike_is_logged_once(corpus, plain, tmp_path):
    home, rows = tmp_path / "run", plain[1]
    assert run(corpus, home, spike_at(rows[9 * BATCH + 5])) == EXIT_FINISHED
    events = [e for e in log_of(home) if e.get("event") == "spike"]
    assert [(e["iteration"], e["samples"]) for e in events] == [(10, [144, 160])]
    assert float(events[0]["loss_ratio"]) > 1.5


def test_a_rollback_skips_the_samples_of_the_spike_and_nothing_else(corpus, plain, tmp_path):
    home, rows = tmp_path / "run", plain[1]
    forward = spike_at(rows[9 * BATCH + 5])
    assert run(corpus, home, forward, "--on-spike", "rollback") == EXIT_FINISHED
    log = log_of(home)
    rollback = next(e for e in log if e.get("event") == "rollback")
    assert (rollback["iteration"], rollback["spiked_at"], rollback["samples"]) == (9, 10, [144, 160])
    assert not [e for e in log if e.get("event") == "spike"], "what was undone is not in the log"
    steps = [e for e in log if "lr" in e]
    assert [e["iteration"] for e in steps] == list(range(1, 21))
    assert steps[:9] == [e for e in log_of(plain[0]) if "lr" in e][:9], "up to the spike nothing changed"
    assert steps[9] != [e for e in log_of(plain[0]) if "lr" in e][9]
    read = [row[:8] for row in forward.rows]
    # Steps 1 to 10, then 9 again, then on behind the samples that spiked.
    assert read[: 10 * BATCH] == rows[: 10 * BATCH]
    assert read[10 * BATCH : 11 * BATCH] == rows[8 * BATCH : 9 * BATCH]
    assert read[11 * BATCH : 12 * BATCH] == rows[10 * BATCH : 11 * BATCH]
    again = tmp_path / "again"
    assert run(corpus, again, spike_at(rows[9 * BATCH + 5]), "--on-spike", "rollback") == EXIT_FINISHED
    assert log_of(again) == log


@pytest.mark.parametrize("steps_taken", [11, 14])
def test_a_crash_after_a_rollback_changes_nothing(corpus, plain, tmp_path, steps_taken):
    """Before the first checkpoint after it, and behind that one."""
    marked = plain[1][9 * BATCH + 5]
    straight, home = tmp_path / "straight", tmp_path / "run"
    assert run(corpus, straight, spike_at(marked), "--on-spike", "rollback") == EXIT_FINISHED
    with pytest.raises(Crash):
        run(corpus, home, spike_at(marked, crash_at=4 * steps_taken + 1), "--on-spike", "rollback")
    assert run(corpus, home, spike_at(marked), "--on-spike", "rollback") == EXIT_FINISHED
    assert log_of(home) == log_of(straight)


def test_rollbacks_are_bounded(corpus, tmp_path):
    """Every sample after step 6 spikes: two rollbacks, then the run goes on as it is."""
    home = tmp_path / "run"
    seen: set[tuple[int, ...]] = set()
    forward = Forward(lambda step, rows: 1.0)

    def change(step: int, rows: torch.Tensor) -> float:
        if forward.calls <= 24:
            seen.update(tuple(row[:8]) for row in rows.tolist())
        return 1.0 if all(tuple(row[:8]) in seen for row in rows.tolist()) else 4.0

    forward.change = change
    assert run(corpus, home, forward, "--on-spike", "rollback", "--max-rollbacks", "2") == EXIT_FINISHED
    log = log_of(home)
    assert [(e["spiked_at"], e["skipped_samples"]) for e in log if e.get("event") == "rollback"] == [
        (7, [[96, 112], [112, 128]])
    ]
    assert [e["samples"] for e in log if e.get("event") == "spike"] == [[128, 144]]
    assert [e["iteration"] for e in log if "lr" in e] == list(range(1, 21))


def test_a_stop_file_saves_stops_and_is_taken_away(corpus, plain, tmp_path, monkeypatch):
    monkeypatch.setattr(stop, "POLL_SECONDS", 0.0)
    home = tmp_path / "run"
    forward = Forward(lambda step, rows: (home / "STOP").touch() or 1.0 if step == 6 else 1.0)
    assert run(corpus, home, forward) == EXIT_STOPPED
    assert json.loads((home / "exit.json").read_text()) | {"reason": ""} == {
        "status": "stopped", "iteration": 6, "reason": "",
    }  # fmt: skip
    assert not (home / "STOP").exists()
    assert run(corpus, home) == EXIT_FINISHED
    assert log_of(home) == log_of(plain[0])


def test_a_time_limit_saves_and_stops(corpus, plain, tmp_path, capsys):
    home = tmp_path / "run"
    assert run(corpus, home, forward_step, "--exit-duration-in-mins", "1e-9") == EXIT_STOPPED
    said = capsys.readouterr().out
    assert "stopped by --exit-duration-in-mins 1e-09; saved at step 1" in said and "\nstep 1/20 | " in said
    assert run(corpus, home) == EXIT_FINISHED
    assert log_of(home) == log_of(plain[0])


def test_rollback_needs_a_home():
    with pytest.raises(UserError, match="--on-spike rollback goes back to checkpoints: give --save"):
        parse_config(build_parser(), ["--train-iters", "1", "--on-spike", "rollback"])
