"""Stop a save at every file operation it makes, and see what is left. Run as a program it prints a JSON report.

The file operations of Python and of safetensors are wrapped and counted in a forked child, which dies at the K-th
(before it, or halfway through a write), or in which the K-th fails with a full disk. K runs over all.

`python crash_points.py walk DIRECTORY`: walks all points; `python crash_points.py save DIRECTORY`: saves once.
"""

from __future__ import annotations

import builtins
import errno
import io
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from small_training import newest_whole

import megatron.checkpointing.tensors as shards
from megatron.checkpointing.checkpoint import load_checkpoint, save_checkpoint
from megatron.checkpointing.commit import reap_temporary
from megatron.errors import UserError

CRASHED, FAILED, SAVED = 9, 3, 0
WRAPPED = ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir", "chmod")


def save(directory: Path, iteration: int, value: float) -> None:
    tensors = {"x": torch.full((300,), value), "y": torch.full((5, 7), value), "step": torch.tensor(value)}
    save_checkpoint(
        directory, iteration=iteration, tensors=tensors, state={"value": value}, config_text=f"lr: {value}\n"
    )


class Faults:
    """Counts file operations; at number `point` does what `mode` says: before, torn or full."""

    def __init__(self, point: int, mode: str) -> None:
        self.point, self.mode = point, mode
        self.names: list[str] = []

    def install(self) -> None:
        for name in WRAPPED:
            setattr(os, name, self.wrap(name, getattr(os, name)))
        shards.save_file = self.wrap("save_file", shards.save_file, self.tear_shard)
        plain = io.open

        def opened(file: Any, mode: str = "r", *rest: Any, **named: Any) -> Any:
            if not set(mode) & set("wxa"):
                return plain(file, mode, *rest, **named)
            stream = self.wrap("open", plain)(file, mode, *rest, **named)
            return Stream(stream, self)

        builtins.open = io.open = opened  # type: ignore[assignment]

    def wrap(self, name: str, real: Callable[..., Any], tear: Callable[..., Any] | None = None) -> Callable[..., Any]:
        def wrapped(*args: Any, **named: Any) -> Any:
            self.names.append(name)
            here = len(self.names) == self.point
            if here and self.mode == "full":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if here and self.mode == "torn" and tear is not None:
                tear(real, *args, **named)
            if here and self.mode in ("before", "torn"):
                os._exit(CRASHED)
            return real(*args, **named)

        return wrapped

    @staticmethod
    def tear_shard(real: Callable[..., Any], tensors: Any, path: Path, metadata: Any) -> None:
        real(tensors, path, metadata=metadata)
        os.truncate(path, path.stat().st_size // 2)


class Stream:
    """A file open for writing, whose writes count."""

    def __init__(self, stream: Any, faults: Faults) -> None:
        self.stream = stream
        self.write = faults.wrap("write", stream.write, self.tear)

    def tear(self, real: Callable[..., Any], data: bytes) -> None:
        real(data[: len(data) // 2])
        self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stream.close()


def child(work: Callable[[], None], point: int, mode: str) -> tuple[int, list[str], str]:
    """Fork, do `work` under faults; exit status, the names of the operations if it came to an end, the error."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        faults = Faults(point, mode)
        status, message = SAVED, ""
        try:
            faults.install()
            work()
        except UserError as error:
            status, message = FAILED, str(error)
        except BaseException as error:
            status, message = 1, repr(error)
        os.write(writing, json.dumps([faults.names, message]).encode())
        os._exit(status)
    os.close(writing)
    with os.fdopen(reading) as stream:
        told = stream.read()
    _, status = os.waitpid(pid, 0)
    names, message = json.loads(told) if told else ([], "")
    return os.waitstatus_to_exitcode(status), names, message


def value_of_newest(directory: Path) -> tuple[int, float] | None:
    path = newest_whole(directory)
    if path is None:
        return None
    checkpoint = load_checkpoint(path)
    value = checkpoint.state["value"]
    whole = all(bool((tensor == value).all()) for tensor in shards.read_tensors(path).values())
    if not whole or checkpoint.config_text != f"lr: {value}\n":
        raise SystemExit(f"a mixture under {path}")
    return checkpoint.iteration, value


def walk(scratch: Path, name: str, before: list[tuple[int, float]], new: tuple[int, float]) -> dict[str, Any]:
    """All points of the save of `new` into a directory that holds the checkpoints `before`."""
    template = scratch / f"{name}-template"
    template.mkdir()
    for iteration, value in before:
        save(template, iteration, value)
    allowed = [before[-1] if before else None, new]
    trial = scratch / name

    def attempt(point: int, mode: str) -> tuple[int, list[str], str]:
        shutil.rmtree(trial, ignore_errors=True)
        shutil.copytree(template, trial)
        return child(lambda: save(trial, *new), point, mode)

    status, names, message = attempt(0, "none")
    if status != SAVED:
        raise SystemExit(f"the undisturbed save failed: {message}")
    report: dict[str, Any] = {"operations": names, "points": 0, "faults": [], "messages": []}
    for mode in ("before", "torn", "full"):  # after one operation is before the next
        for point, operation in enumerate(names, start=1):
            if mode == "torn" and operation not in ("write", "save_file"):
                continue
            status, _, message = attempt(point, mode)
            report["points"] += 1
            where = f"{name}: {mode} {operation} {point}"
            expected = (FAILED, SAVED) if mode == "full" else (CRASHED,)
            if status not in expected:
                report["faults"].append(f"{where}: exit {status}: {message}")
            if mode == "full" and status == FAILED:
                report["messages"].append(message)
            report["faults"] += [f"{where}: {fault}" for fault in examine(trial, allowed, mode, status)]
    return report


def examine(trial: Path, allowed: list[tuple[int, float] | None], mode: str, status: int) -> list[str]:
    """What is wrong with the directory that a disturbed save left, in words."""
    faults = []
    if value_of_newest(trial) not in allowed:
        faults.append(f"found {value_of_newest(trial)}")
    if status == FAILED and any(".tmp-" in path.name for path in trial.iterdir()):
        faults.append("a failed save left its temporary directory behind")
    reap_temporary(trial)
    if value_of_newest(trial) not in allowed:
        faults.append(f"found after reaping: {value_of_newest(trial)}")
    left = [path.name for path in trial.iterdir() if ".tmp-" in path.name or ".old-" in path.name]
    if left:
        faults.append(f"left behind after reaping: {left}")
    new = allowed[-1]
    if mode == "before" and new is not None:
        save(trial, *new)
        if value_of_newest(trial) != new:
            faults.append(f"the next save left {value_of_newest(trial)}")
    return faults


def main(command: str, directory: Path) -> None:
    torch.set_num_threads(1)
    if command == "save":
        save(directory, 10, 10.0)
        return
    reports = {
        "first": walk(directory, "first", [], (10, 10.0)),
        "next": walk(directory, "next", [(5, 5.0)], (10, 10.0)),
        "replacing": walk(directory, "replacing", [(10, 5.0)], (10, 10.0)),
    }
    print(json.dumps(reports))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
