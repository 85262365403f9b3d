"""W&B as an onlooker: it gets every number under the run's one id, and no fault of it is the run's."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from megatron import metrics
from megatron.arguments import build_parser, flat, parse_config
from megatron.config import LoggingConfig
from megatron.errors import UserError
from megatron.metrics import MetricsLogger
from megatron.wandb_sink import open_wandb

CONFIG = LoggingConfig(wandb_project="warmup", wandb_entity="team", wandb_mode="offline")


class FakeRun:
    """The few calls of a wandb.Run that are used, noted; what is asked for in `failing` raises."""

    offline = False
    url = "https://wandb.example/team/warmup/runs/1"

    def __init__(self, failing: str) -> None:
        self.failing = failing
        self.lines: list[dict[str, Any]] = []
        self.x_axis: dict[str, str] = {}
        self.exit_code: int | None = None

    def define_metric(self, name: str, *, step_metric: str) -> None:
        self.x_axis[name] = step_metric

    def log(self, line: dict[str, Any]) -> None:
        if self.failing == "log":
            raise RuntimeError("the service\nhas gone")
        self.lines.append(line)

    def finish(self, exit_code: int) -> None:
        if self.failing == "finish":
            raise TimeoutError
        self.exit_code = exit_code


class FakeWandb(ModuleType):
    """The package: its runs, and what each was started with."""

    Settings = SimpleNamespace

    def __init__(self) -> None:
        super().__init__("wandb")
        self.failing = ""
        self.started: list[dict[str, Any]] = []
        self.runs: list[FakeRun] = []

    def setup(self, *, settings: Any) -> None:
        assert settings.silent

    def init(self, **settings: Any) -> FakeRun:
        if self.failing == "start":
            raise ValueError("No API key configured.")
        self.started.append(settings)
        self.runs.append(FakeRun(self.failing))
        return self.runs[-1]


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(metrics, "WANDB_SECONDS", 0.0)
    return fake


def log_run(home: Path, *, steps: int = 2, fault: type[BaseException] | None = None) -> list[str]:
    """Log a run of some steps and a validation; what it says of W&B."""
    said: list[str] = []
    with MetricsLogger(home, wandb=open_wandb(CONFIG, home, {"seed": 7}, said.append)) as logger:
        logger.truncate_to(0)
        for iteration in range(1, steps + 1):
            place = {"iteration": iteration, "consumed_tokens": 64 * iteration}
            logger.log_step(place | {"loss": math.nan, "seqlen": 8, "lr": None, "loss_by_position": {"0-7": 2.5}})
        logger.log_validation(place | {"loss": 3.0, "perplexity": 20.0})
        if fault is not None:
            raise fault
    return said


def test_every_number_arrives_and_a_resume_goes_on_with_the_run(tmp_path: Path, wandb: FakeWandb) -> None:
    home = tmp_path / "slw"
    said = log_run(home)
    with pytest.raises(KeyError):
        log_run(home, steps=1, fault=KeyError)
    log_run(tmp_path / "other")
    first, second, other = wandb.started
    assert (first["project"], first["entity"], first["name"], first["mode"]) == ("warmup", "team", "slw", "offline")
    assert (first["dir"], first["config"], first["resume"]) == (home, {"seed": 7}, "allow")
    assert first["id"] == second["id"] != other["id"]
    assert said == [f"W&B: {FakeRun.url}"]
    run = wandb.runs[0]
    assert run.x_axis == {"*": "iteration"}
    assert str(run.lines[1]) == str({
        "iteration": 2, "consumed_tokens": 128,
        "loss/training": math.nan, "slw/seqlen": 8.0, "loss_by_position/training/0-7": 2.5,
    })  # fmt: skip
    assert run.lines[2] == {
        "iteration": 2, "consumed_tokens": 128, "loss/validation": 3.0, "loss/validation_perplexity": 20.0,
    }  # fmt: skip
    assert [run.exit_code for run in wandb.runs] == [0, 1, 0]


def test_the_start_waits_for_20_seconds_or_as_the_environment_says(
    tmp_path: Path, wandb: FakeWandb, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_INIT_TIMEOUT", raising=False)
    log_run(tmp_path)
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "300")
    log_run(tmp_path)
    assert [getattr(one["settings"], "init_timeout", None) for one in wandb.started] == [20.0, None]


def test_steps_are_thinned_and_validations_are_not(
    tmp_path: Path, wandb: FakeWandb, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "WANDB_SECONDS", math.inf)
    log_run(tmp_path, steps=5)
    assert [(line["iteration"], "loss/validation" in line) for line in wandb.runs[0].lines] == [(1, False), (5, True)]


@pytest.mark.parametrize(
    ("failing", "warning"),
    [
        ("start", "W&B cannot start (No API key configured.)"),
        ("log", "W&B cannot log (the service has gone)"),
        ("finish", "W&B cannot finish (TimeoutError)"),
    ],
)
def test_a_fault_of_wandb_is_one_line_and_the_log_is_whole(
    tmp_path: Path, wandb: FakeWandb, failing: str, warning: str
) -> None:
    wandb.failing = failing
    warnings = [line for line in log_run(tmp_path) if line.startswith("warning")]
    assert warnings == [f"warning: {warning}; the run goes on without it"]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


def test_missing_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A directory of that name, as W&B makes, can be imported too: it has nothing in it.
    for found in (None, ModuleType("wandb")):
        monkeypatch.setitem(sys.modules, "wandb", found)
        with pytest.raises(UserError, match=r"--wandb-project needs .* pip install 'megatron-slw\[wandb\]', or drop"):
            open_wandb(CONFIG, tmp_path, {}, print)


def test_nothing_is_imported_without_a_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert open_wandb(LoggingConfig(), tmp_path, {}, print) is None


@pytest.mark.parametrize("flag", ["--wandb-entity=team", "--wandb-name=mine", "--wandb-mode=offline"])
def test_flags_of_wandb_need_its_project(flag: str) -> None:
    required = ["--train-tokens", "1M", "--lr", "1e-3"]
    with pytest.raises(UserError, match=f"{flag.replace('=', ' ')} needs --wandb-project NAME"):
        parse_config(build_parser(), [*required, flag])
    config, _ = parse_config(build_parser(), [*required, flag, "--wandb-project", "warmup"])
    assert flat(config)["wandb_project"] == "warmup"


def logged_offline(file: Path) -> list[dict[str, Any]]:
    """The lines in the file of an offline run: records of protobuf in one block of a LevelDB log."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, lines = file.read_bytes(), 7, []
    assert len(data) < 32768
    while place < len(data):
        end = place + 7 + int.from_bytes(data[place + 4 : place + 6], "little")
        record = Record.FromString(data[place + 7 : end])
        if record.WhichOneof("record_type") == "history":
            lines.append(
                {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            )
        place = end
    return lines


def test_the_real_package_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setattr(metrics, "WANDB_SECONDS", 0.0)
    home = tmp_path / "slw"
    said = [*log_run(home), *log_run(home, steps=5)]
    wandb.teardown()  # waits for its process, which writes the files
    directories = [Path(line.removeprefix("W&B: offline; to send it: wandb sync ")) for line in said]
    assert len(set(directories)) == 2
    name = f"run-{(home / 'wandb-id').read_text().strip()}.wandb"
    first, second = (logged_offline(directory / name) for directory in directories)
    assert [line["consumed_tokens"] for line in first] == [64, 128, 128]
    assert [line["iteration"] for line in second] == [1, 2, 3, 4, 5, 5]
    assert [line.get("loss_by_position/training/0-7") for line in first] == [2.5, 2.5, None]
    assert math.isnan(first[1]["loss/training"]) and first[2]["loss/validation_perplexity"] == 20.0
