"""Killed, or out of disk space, at any system call: nothing half-written is read, and the next start makes it good."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import test_pretrain
from test_pretrain import checkpoint_files, command, log_of

corpus = test_pretrain.corpus
PROGRAM = Path(__file__).with_name("kill_points.py")
PATHS = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
ENVIRONMENT = os.environ | {"PYTHONPATH": PATHS, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
NO_TRACE = 77
POINTS = {
    "save": 50,
    "save-next": 50,
    "save-replacing": 60,
    "retention": 60,
    "background": 60,
    "save-sharded": 80,
    "background-sharded": 80,
    "preprocess": 35,
    "preprocess-replacing": 35,
    "preprocess-in-parts": 80,
    "index": 30,
}
"""Job -> number of points that there are at least."""
KILLS = 50


def walk(tmp_path: Path, sample: int, *jobs: str, seconds: float) -> dict[str, Any]:
    """The harness's report on `jobs`. Skips where strace or ptrace is not to be had."""
    done = subprocess.run(
        [sys.executable, str(PROGRAM), str(tmp_path / "walk"), str(sample), *jobs],
        capture_output=True,
        text=True,
        check=False,
        env=ENVIRONMENT,
        timeout=seconds,
    )
    if done.returncode == NO_TRACE:
        pytest.skip(f"no kill points: {done.stderr.strip()}; the walk over Python's calls still runs")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_some_points_of_every_job_and_the_order_of_all_calls(tmp_path: Path) -> None:
    reports = walk(tmp_path, 3, *POINTS, "careless", seconds=240)
    careless = reports.pop("careless")["faults"]
    assert any("renamed.npy gets its name before" in fault for fault in careless), "the negative control"
    assert any("kill" in fault and "neither the old one nor the new one" in fault for fault in careless)
    assert any("full" in fault and "Traceback" in fault for fault in careless)
    assert list(reports) == list(POINTS)
    for name, report in reports.items():
        assert report["faults"] == [], name
        assert {"write", "fsync", "openat"} <= set(report["calls"])
        assert any(call.startswith("rename") for call in report["calls"])
        assert sum(report["points"].values()) == 3
        assert report["missed"] <= 1, name


@pytest.mark.faults
@pytest.mark.timeout(1300)
@pytest.mark.parametrize("job", POINTS)
def test_every_point(tmp_path: Path, job: str) -> None:
    report = walk(tmp_path, 0, job, seconds=1200)[job]
    assert report["faults"] == []
    tried = sum(report["points"].values())
    assert tried - report["missed"] >= POINTS[job]
    assert report["missed"] <= tried // 50, "a point that a busy machine's timing hides, here and there"


def size(log: Path) -> int:
    return log.stat().st_size if log.exists() else 0


def wait_for_a_step(log: Path, process: subprocess.Popen[bytes], seconds: float = 120) -> None:
    """Return when `log`, which a resume cuts back first, has grown, the process has ended, or after `seconds`."""
    deadline = time.monotonic() + seconds
    before = size(log)
    while process.poll() is None and time.monotonic() < deadline:
        now = size(log)
        if now > before:
            return
        before = now
        time.sleep(0.002)


def saved(home: Path) -> int:
    """The step of the newest checkpoint."""
    return max((int(path.name[5:]) for path in home.glob("checkpoints/iter_???????")), default=0)


def start(corpus: str, home: Path) -> subprocess.Popen[bytes]:
    arguments = "--train-iters 60 --lr-decay-iters 60 --save-interval 2 --keep-last 3".split()
    flags = [*arguments, "--save", str(home), "--load", str(home)]
    return subprocess.Popen(command(corpus, *flags), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=ENVIRONMENT)


def finish(process: subprocess.Popen[bytes]) -> None:
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors.decode()


def state_of(home: Path) -> dict[str, Any]:
    """All that the last checkpoint remembers but the tensors and wall times."""
    state = json.loads((home / "checkpoints/iter_0000060/state.json").read_text())
    return {name: value for name, value in state.items() if not name.endswith("_seconds")}


@pytest.mark.faults
@pytest.mark.timeout(1300)
def test_fifty_kills_at_random_times_change_nothing(corpus: str, tmp_path: Path) -> None:
    """With dropout, both warmups, validations and epoch boundaries (step 18, ...), saves at every second step and
    deletions. Some of the kills come while the program starts and loads, some while it trains and saves."""
    straight, home = tmp_path / "straight", tmp_path / "run"
    began = time.monotonic()
    process = start(corpus, straight)
    wait_for_a_step(straight / "metrics.jsonl", process)
    starting = time.monotonic() - began
    finish(process)
    step = (time.monotonic() - began - starting) / 60
    chance = random.Random(4)
    kills = ended = 0
    seen: set[int] = set()
    while kills < KILLS:
        process = start(corpus, home)
        if saved(home) * KILLS > 60 * kills:  # ahead of what makes the kills last to the end
            wait_for_a_step(home / "metrics.jsonl", process, chance.uniform(0, starting))
        else:
            wait_for_a_step(home / "metrics.jsonl", process)
            time.sleep(chance.uniform(0, 2.5 * step))
        process.kill()
        _, errors = process.communicate(timeout=60)
        assert process.returncode in (0, -signal.SIGKILL), errors.decode()
        ended += process.returncode == 0
        assert ended < 5, "the run comes to its end before it can be killed so often"
        kills += process.returncode == -signal.SIGKILL
        seen.add(size(home / "metrics.jsonl"))
    finish(start(corpus, home))
    assert log_of(home) == log_of(straight)
    assert checkpoint_files(home, 60) == checkpoint_files(straight, 60)
    assert state_of(home) == state_of(straight)
    names = [sorted(path.name for path in (run / "checkpoints").iterdir()) for run in (home, straight)]
    assert names[0] == names[1] == ["iter_0000056", "iter_0000058", "iter_0000060", "latest"]
    assert len(seen) > KILLS // 5, "kills at many steps"
    print(f"{kills} kills at {len(seen)} places of the log, {time.monotonic() - began:.0f} s")
