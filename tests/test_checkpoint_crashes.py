"""A save that dies anywhere, or meets a full disk anywhere, leaves the previous checkpoint or the new one, whole."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from crash_points import save, value_of_newest
from full_disk import largest_file
from small_training import newest_whole

from megatron.checkpointing.checkpoint import save_checkpoint
from megatron.checkpointing.commit import reap_temporary
from megatron.errors import UserError

PROGRAM = Path(__file__).with_name("crash_points.py")
PATHS = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
ENVIRONMENT = os.environ | {"PYTHONPATH": PATHS}


def test_every_crash_point_and_full_disk_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(PROGRAM), "walk", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        env=ENVIRONMENT,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    reports = json.loads(done.stdout)
    assert list(reports) == ["first", "next", "replacing"]
    for name, report in reports.items():
        assert report["faults"] == [], name
        assert {"save_file", "write", "fsync", "rename", "replace"} <= set(report["operations"])
        assert len(report["messages"]) > 20
        assert all("disk full" in message and str(tmp_path) in message for message in report["messages"])
    assert sum(report["points"] for report in reports.values()) >= 190


def test_files_reach_the_disk_before_their_name_does(tmp_path: Path) -> None:
    log = strace(tmp_path, ["-e", "trace=openat,fsync,rename,renameat"])
    final, run = str(tmp_path / "run" / "iter_0000010"), str(tmp_path / "run")
    temporary = next(m[1] for m in re.finditer(r'rename\("([^"]+)", "([^"]+)"\)', log) if m[2] == final)
    before, after = log.split(f'rename("{temporary}", "{final}")')
    synced = [synced_paths(part) for part in (before, after)]
    files = [f"{temporary}/{path.name}" for path in Path(final).iterdir()]
    assert len(files) == 4
    for path in [*files, temporary]:
        assert path in synced[0], "synced before the name is given"
    assert max(map(synced[0].index, files)) < len(synced[0]) - 1 - synced[0][::-1].index(temporary)
    assert synced[1][0] == run, "the new name is synced before anything else happens"
    assert after.index("fsync") < after.index("latest")


@pytest.mark.parametrize("injection", ["rename:signal=KILL:when=1", "fsync:signal=KILL:when=5"])
def test_kill_in_a_system_call(tmp_path: Path, injection: str) -> None:
    save(tmp_path / "run", 5, 5.0)
    strace(tmp_path, ["-e", f"inject={injection}"], killed=True)
    assert value_of_newest(tmp_path / "run") == (5, 5.0)
    assert len(reap_temporary(tmp_path / "run")) == 1
    assert value_of_newest(tmp_path / "run") == (5, 5.0)


def test_disk_that_fills_up_while_a_shard_is_written(tmp_path: Path) -> None:
    save(tmp_path, 5, 5.0)
    with largest_file(1000), pytest.raises(UserError, match=r"cannot write .*iter_0000010.*: disk full"):
        save(tmp_path, 10, 10.0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["iter_0000005", "latest"]
    assert value_of_newest(tmp_path) == (5, 5.0)


def test_interrupt_while_a_shard_is_written_leaves_nothing_behind(tmp_path: Path, monkeypatch) -> None:
    def interrupt(*args: object, **named: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("megatron.checkpointing.tensors.save_file", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 10, 10.0)
    assert list(tmp_path.iterdir()) == []
    assert newest_whole(tmp_path) is None


def test_negative_control_a_mixture_is_seen(tmp_path: Path) -> None:
    tensors = {"x": torch.tensor([5.0, 10.0])}
    save_checkpoint(tmp_path, iteration=10, tensors=tensors, state={"value": 10.0}, config_text="lr: 10.0\n")
    with pytest.raises(SystemExit, match="a mixture"):
        value_of_newest(tmp_path)


def synced_paths(log: str) -> list[str]:
    """The path of each fsync in a log of strace -y."""
    return re.findall(r"fsync\(\d+<([^>]+)>\)", log)


def strace(tmp_path: Path, options: list[str], *, killed: bool = False) -> str:
    """Save under strace with `options`; its log. Skips where strace or ptrace is not to be had."""
    program = shutil.which("strace")
    if program is None or subprocess.run([program, "-o", os.devnull, "true"], check=False).returncode != 0:
        pytest.skip("strace is not installed or may not trace: the walk over Python's calls still ran")
    log = tmp_path / "strace.log"
    command = [program, "-f", "-y", "-o", str(log), *options]
    done = subprocess.run(
        [*command, sys.executable, str(PROGRAM), "save", str(tmp_path / "run")],
        check=False,
        env=ENVIRONMENT | {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"},
        timeout=120,
    )
    assert done.returncode == (-9 if killed else 0)
    return log.read_text()
