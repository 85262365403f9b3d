"""metrics.jsonl and TensorBoard: what is written is what is read, after any crash."""

from __future__ import annotations

import builtins
import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from full_disk import largest_file

from megatron import metrics
from megatron.errors import UserError
from megatron.metrics import MetricsLogger, read_lines


def entries(directory: Path) -> list[dict[str, Any]]:
    return [entry for _, entry in read_lines(directory / "metrics.jsonl")]


def test_floats_come_back_exactly(tmp_path: Path) -> None:
    values = [0.1 + 0.2, 1e-300, 5e-324, float(np.float32(1) / 3), -0.0, 1.7976931348623157e308]
    with MetricsLogger(tmp_path) as logger:
        for iteration, value in enumerate(values):
            logger.log_step({"iteration": iteration, "loss": value, "lr": None, "clipped": True})
    found = entries(tmp_path)
    assert [entry["loss"].hex() for entry in found] == [value.hex() for value in values]
    assert found[0]["lr"] is None and found[0]["clipped"] is True


def test_non_finite_values_are_strings_in_standard_json(tmp_path: Path) -> None:
    with MetricsLogger(tmp_path) as logger:
        logger.log_step(
            {"iteration": 1, "loss": math.nan, "lr": -math.inf, "loss_by_position": {"0-7": math.inf, "8-15": 2.0}}
        )
        logger.log_step({"iteration": 2, "loss": np.float32("nan"), "clipped": np.bool_(True)})

    def refuse(token: str) -> None:
        raise AssertionError(token)

    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    first, second = (json.loads(line, parse_constant=refuse) for line in lines)
    assert (first["loss"], first["lr"], first["loss_by_position"]) == ("nan", "-inf", {"0-7": "inf", "8-15": 2.0})
    assert (second["loss"], second["clipped"]) == ("nan", True)


def test_a_line_is_there_as_soon_as_it_is_logged(tmp_path: Path) -> None:
    logger = MetricsLogger(tmp_path)
    logger.log_step({"iteration": 1})
    logger.log_validation({"iteration": 1, "loss": 2.0})
    logger.log_validation({"iteration": 1, "loss": 3.0}, event="test")
    assert [entry.get("event") for entry in entries(tmp_path)] == [None, "validation", "test"]
    logger.close()
    logger.close()


def test_truncate_to_keeps_each_step_once(tmp_path: Path) -> None:
    with MetricsLogger(tmp_path) as logger:
        for iteration in range(1, 8):
            logger.log_step({"iteration": iteration, "loss": 0.1})
            logger.log_validation({"iteration": iteration, "loss": 1.0})
    path = tmp_path / "metrics.jsonl"
    kept = path.read_text().splitlines()[:10]
    path.write_text(path.read_text() + '{"iteration": 8, "lo')
    with MetricsLogger(tmp_path) as logger:
        logger.truncate_to(5)
        assert path.read_text().splitlines() == kept
        logger.log_step({"iteration": 6, "loss": 0.1})
    assert [entry["iteration"] for entry in entries(tmp_path)] == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]
    with MetricsLogger(tmp_path) as logger:
        logger.truncate_to(-1)
    assert path.read_text() == ""


def test_truncate_that_fails_leaves_the_old_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with MetricsLogger(tmp_path) as logger:
        for iteration in range(3):
            logger.log_step({"iteration": iteration})
        before = (tmp_path / "metrics.jsonl").read_bytes()

        def full(descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match=r"metrics\.jsonl: .*No space left"):
            logger.truncate_to(1)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_kill_leaves_whole_lines_and_at_most_a_part(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from megatron.metrics import MetricsLogger\n"
        "logger = MetricsLogger(Path(sys.argv[1])); i = 0\n"
        "while True:\n"
        "    i += 1; logger.log_step({'iteration': i, 'loss': i / 3})\n"
        "    if i == 1000: print('there', flush=True)\n"
    )
    root = Path(metrics.__file__).parent.parent
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, cwd=root)
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    found = entries(tmp_path)
    assert [entry["iteration"] for entry in found] == list(range(1, len(found) + 1))
    assert len(found) >= 1000


@pytest.mark.parametrize("line", ["not json", "[1]", '{"loss": 1}', "", '{"iteration": "3"}', "\xff"])
def test_broken_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"iteration": 1}\n' + line.encode("latin-1") + b'\n{"iteration": 2}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:2: "):
        list(read_lines(path))


def test_directory_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the run's log"):
        MetricsLogger(tmp_path / "file" / "run")


def test_other_ranks_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with MetricsLogger(None) as logger:
        logger.log_step({"iteration": 1})
        logger.truncate_to(0)
    assert list(tmp_path.iterdir()) == []


def read_events(directory: Path) -> Any:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(directory))
    events.Reload()
    return events


def test_tensorboard_by_iteration_and_by_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "TENSORBOARD_SECONDS", 0.0)
    step = {"loss": 2.5, "seqlen": 8, "lr": None, "loss_by_position": {"0-7": 2.5}}
    for resumed_at, last in ((0, 6), (4, 5)):
        with MetricsLogger(tmp_path, tensorboard=True) as logger:
            logger.truncate_to(resumed_at)
            for iteration in range(resumed_at + 1, last + 1):
                logger.log_step({"iteration": iteration, "consumed_tokens": 64 * iteration, **step})
            logger.log_validation({"iteration": last, "consumed_tokens": 64 * last, "loss": 3.0})
    by_iteration = read_events(tmp_path / "tensorboard")
    by_tokens = read_events(tmp_path / "tensorboard" / "by_tokens")
    tags = {"loss/training", "loss/validation", "slw/seqlen", "loss_by_position/training/0-7"}
    assert set(by_iteration.Tags()["scalars"]) == tags
    assert set(by_tokens.Tags()["scalars"]) == {f"{tag}_by_tokens" for tag in tags}
    assert [s.step for s in by_iteration.Scalars("loss/training")] == [1, 2, 3, 4, 5]
    assert [s.step for s in by_tokens.Scalars("loss/training_by_tokens")] == [64, 128, 192, 256, 320]
    assert by_tokens.Scalars("loss/validation_by_tokens")[-1].value == 3.0


def test_every_chart_of_the_tensorboard_layout_has_its_curves_by_steps_and_by_tokens(tmp_path: Path) -> None:
    layout_pb2 = pytest.importorskip("tensorboard.plugins.custom_scalar.layout_pb2")
    place = {"iteration": 3, "consumed_tokens": 192}
    with MetricsLogger(None, tensorboard=True, tensorboard_dir=tmp_path) as logger:
        logger.truncate_to(0)
        logger.log_step(place | dict.fromkeys(metrics.STEP_TAGS, 1.0))
        logger.log_validation(place | {"loss": 3.0, "perplexity": 20.0})
    by_iteration = read_events(tmp_path)
    written = by_iteration.Tags()["scalars"] + read_events(tmp_path / "by_tokens").Tags()["scalars"]
    (event,) = by_iteration.Tensors("custom_scalars__config__")
    assert by_iteration.SummaryMetadata("custom_scalars__config__").plugin_data.plugin_name == "custom_scalars"
    charts = [
        chart
        for category in layout_pb2.Layout.FromString(event.tensor_proto.string_val[0]).category
        for chart in category.chart
    ]
    shown = {
        chart.title: [[tag for tag in written if re.search(pattern, tag)] for pattern in chart.multiline.tag]
        for chart in charts
    }
    assert shown["training loss by steps"] == [["loss/training"]]
    assert shown["training loss by tokens"] == [["loss/training_by_tokens"]]
    assert shown["norm by tokens"] == [["gradient/norm_by_tokens"]]  # the last of that name
    assert {len(tags) for found in shown.values() for tags in found} == {1}
    assert len(charts) == len({(*chart.multiline.tag,) for chart in charts}) >= 20


def test_full_disk_for_tensorboard_is_a_user_error_and_comes_after_what_ended_the_run(tmp_path: Path) -> None:
    def log(error: type[BaseException] | None, steps: int) -> None:
        with MetricsLogger(None, tensorboard=True, tensorboard_dir=tmp_path) as logger:
            for iteration in range(steps):
                logger.log_validation({"iteration": iteration, "loss": 3.0, "perplexity": 20.0})
            if error is not None:
                raise error

    with largest_file(1000):
        for steps in (20, 500):  # at the end, and at once
            with pytest.raises(UserError, match=rf"cannot write the run's log {tmp_path}: disk full"):
                log(None, steps)
        with pytest.raises(KeyError):
            log(KeyError, 20)


def test_missing_tensorboard_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name.startswith("tensorboard"):
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match="pip install tensorboard, or give --no-tensorboard"):
        MetricsLogger(tmp_path, tensorboard=True)
