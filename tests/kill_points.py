"""Kill a job, or fail it with a full disk, at each system call by which it changes its files; see what is left.

A warm process forks a child for every point, to which strace attaches itself and injects. The product is not changed,
and knows nothing of it. Run as a program it prints a JSON report, job -> what was found:

`python kill_points.py DIRECTORY SAMPLE JOB...`: SAMPLE points of each job, evenly spread; 0: all of them.
"""

from __future__ import annotations

import ctypes
import hashlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from checkpoint_ranks import LAYOUTS
from kill_jobs import JOBS, Job, Work, make_inputs
from small_training import newest_whole
from system_calls import NEVER_FULL, TRACE, Call, calls_in, is_final, order_faults

from megatron.checkpointing import saver
from megatron.checkpointing.commit import open_manifest
from megatron.checkpointing.manifest import check_digests
from megatron.distributed.world import World
from megatron.errors import EXIT_FAILURE, UserError, run

NO_TRACE = 77
"""Exit status where strace is not there or may not attach."""
SECONDS = 60.0
"""After which a process is taken to hang."""
TRIES = 10
"""Of a point, until the call that is meant is the one that is hit."""
_PR_SET_PTRACER = 0x59616D61


@dataclass
class Report:
    """What was found about a job."""

    calls: list[str] = field(default_factory=list)
    """The names of the calls it makes, over all ranks."""
    points: dict[str, int] = field(default_factory=dict)
    """Mode -> number of points that were tried."""
    missed: int = 0
    """Points of these that could not be hit."""
    faults: list[str] = field(default_factory=list)


class Child:
    """A forked process that does a job when it is let go, and ends as a program of this repository does.

    With `background` the thread in which a Saver is going to write is there before, and `thread` is its number.
    """

    def __init__(self, work: Work, directory: Path, rank: int = 0, ranks: int = 1, *, background: bool = False) -> None:
        self._errors = directory.parent / f"errors-{rank}"
        self._errors.write_text("")
        self._gate, gate = socket.socketpair()
        self.pid = os.fork()
        if self.pid == 0:
            self._gate.close()
            # Where the system lets only a parent trace, any process may now.
            ctypes.CDLL(None).prctl(_PR_SET_PTRACER, ctypes.c_ulong(-1), 0, 0, 0)
            os.dup2(os.open(self._errors, os.O_WRONLY), 2)
            sys.stderr = io.TextIOWrapper(io.FileIO(2, "w", closefd=False), write_through=True)
            os._exit(self._do(work, directory, rank, ranks, background, gate))
        self.thread = self.pid
        gate.close()

    @staticmethod
    def _do(work: Work, directory: Path, rank: int, ranks: int, background: bool, gate: socket.socket) -> int:
        try:
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks)}
            world = World() if ranks == 1 else connect(directory.parent / "store", rank, ranks)
            thread = os.getpid()
            if background:
                pool = ThreadPoolExecutor(1)
                thread = pool.submit(threading.get_native_id).result()
                saver.ThreadPoolExecutor = lambda *arguments, **named: pool  # type: ignore[assignment, misc]
            gate.send(thread.to_bytes(8))
            gate.recv(1)
            with redirect_stdout(io.StringIO()):
                run(lambda: work(directory, world))
        except SystemExit as ending:
            return int(ending.code or 0)
        except BaseException:
            traceback.print_exc()
            return 70

    def wait_until_ready(self) -> None:
        if not (told := self._gate.recv(8)):
            raise SystemExit(f"a rank did not come up: {self._errors.read_text()}")
        self.thread = int.from_bytes(told)

    def go(self) -> None:
        self._gate.send(b"!")
        self._gate.close()

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> tuple[int | str, str]:
        """How it ended, "hung" where it did not, and what it said."""
        deadline = time.monotonic() + SECONDS
        while os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            if time.monotonic() > deadline:
                self.kill()
                os.waitpid(self.pid, 0)
                return "hung", self._errors.read_text()
            time.sleep(0.001)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1]), self._errors.read_text()


def connect(store: Path, rank: int, ranks: int) -> World:
    """This process among `ranks`, over gloo."""
    timeout = timedelta(seconds=SECONDS / 2)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks, timeout=timeout)
    control, background = dist.new_group(timeout=timeout), dist.new_group(timeout=timeout)
    dist.barrier(group=control)
    return World(rank, LAYOUTS[ranks]["dp2"], control=control, background=background)


def attempt(
    job: Job, directory: Path, work: Work, *, traced: int = 0, options: tuple[str, ...], mode: str
) -> list[tuple[int | str, str]]:
    """Do `work` in all ranks of `job`, strace holding on to the rank `traced`; how each rank ended.

    To disturb a thread strace holds on to that one alone, as it counts the calls of each; else to all.
    """
    scratch = directory.parent
    for old in (scratch / "store", *scratch.glob("trace*")):
        old.unlink(missing_ok=True)
    background = job.background and work is job.work
    children = [Child(work, directory, rank, job.ranks, background=background) for rank in range(job.ranks)]
    for child in children:
        child.wait_until_ready()
    tracer = None
    try:
        if options:
            target = children[traced]
            holding = ("-p", str(target.thread)) if mode != "none" else ("-ff", "-p", str(target.pid))
            tracer = attach(*holding, *options, "-o", str(scratch / "trace"))
        for child in children:
            child.go()
        first = children[traced].wait()
        if mode == "kill all":
            for child in children:
                if child is not children[traced]:
                    child.kill()
        endings = [first if rank == traced else child.wait() for rank, child in enumerate(children)]
    except BaseException:
        for child in children:
            with suppress(ProcessLookupError):
                child.kill()
        raise
    if tracer is not None:
        tracer.communicate(timeout=SECONDS)
    for log in (scratch / "trace", scratch / f"trace.{children[traced].thread}"):
        if log.exists():
            log.rename(scratch / "trace.main")
    return endings


def attach(*options: str) -> subprocess.Popen[str]:
    """strace, which has taken hold."""
    try:
        tracer = subprocess.Popen(["strace", "-y", *options], stderr=subprocess.PIPE, text=True)
        said = tracer.stderr.readline()  # type: ignore[union-attr]
    except FileNotFoundError:
        said = "strace is not installed"
    if "attached" not in said:
        print(said, file=sys.stderr)
        sys.exit(NO_TRACE)
    return tracer


def contents(directory: Path) -> dict[str, str]:
    """Relative path -> digest of every file below `directory`."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def torn(directory: Path, before: dict[str, str], after: dict[str, str]) -> list[str]:
    """What stands under a final name below `directory` and is not whole: neither as it was nor as it is to be."""
    faults = []
    now = {name: digest for name, digest in contents(directory).items() if is_final(Path(name))}
    for name, digest in now.items():
        if digest not in (before.get(name), after.get(name)):
            faults.append(f"{name} is neither the old one nor the new one")
    for path in directory.glob("iter_*"):
        inside = [{n: d for n, d in files.items() if Path(n).parts[0] == path.name} for files in (now, before)]
        if not is_final(path) or inside[0] == inside[1]:
            continue
        try:
            check_digests(path, open_manifest(path).files)
        except UserError as error:
            faults.append(str(error))
    for name in now:
        if name.endswith(".idx"):
            stem = name.removesuffix(".idx")
            trio = [{n: d for n, d in files.items() if n.startswith(stem)} for files in (now, before, after)]
            if trio[0] not in trio[1:]:
                faults.append(f"{name} stands beside files of another corpus")
    return faults


class Walk:
    """All points of a job."""

    def __init__(self, name: str, scratch: Path) -> None:
        self.job = JOBS[name]
        self.report = Report()
        self._name = name
        self._template, self._trial = scratch / "template", scratch / "trial"
        self._template.mkdir()
        self._undisturbed(self._template, self.job.before)
        self._before = contents(self._template)
        self._calls = [self._dry(rank) for rank in range(self.job.ranks)]
        self._after = contents(self._trial)
        self._newest = [self._find(self._template), self._find(self._trial)]

    def points(self) -> Iterator[tuple[str, int, Call]]:
        """Mode, rank and call of each."""
        modes = ["kill", "full"] if self.job.ranks == 1 else ["kill", "kill all", "full"]
        for mode in modes:
            for rank, calls in enumerate(self._calls):
                yield from ((mode, rank, call) for call in calls if mode != "full" or call.name not in NEVER_FULL)

    def walk(self, sample: int) -> Report:
        """Try `sample` points (0: all)."""
        points = list(self.points())
        if sample:
            count = min(sample, len(points))
            points = [points[n * len(points) // count] for n in range(count)]
        for mode, rank, call in points:
            self.report.points[mode] = self.report.points.get(mode, 0) + 1
            where = f"{self._name}, {mode}, rank {rank}, {call.name} {call.number} of {' '.join(call.paths)}"
            self.report.faults += [f"{where}: {fault}" for fault in self._try(mode, rank, call)]
        return self.report

    def _try(self, mode: str, rank: int, call: Call) -> Iterator[str]:
        endings = next((endings for _ in range(TRIES) if (endings := self._disturb(mode, rank, call))), None)
        if endings is None:
            self.report.missed += 1
            return
        yield from self._ending_faults("spared" if self._spared(mode, rank, call) else mode, rank, endings)
        yield from torn(self._trial, self._before, self._after)
        if self._find(self._trial) not in self._newest:
            yield f"the next start would find {self._find(self._trial)}"
        again = attempt(self.job, self._trial, self.job.work, options=(), mode="none")
        if any(status != 0 for status, _ in again):
            yield f"the next start ended with {again}"
        elif contents(self._trial) != self._after:
            yield f"the next start left {self._difference()}"

    def _disturb(self, mode: str, rank: int, call: Call) -> list[tuple[int | str, str]] | None:
        """How each rank ended; None where another call was hit: a process does not always open as many files."""
        self._reset()
        what = "error=ENOSPC" if mode == "full" else "signal=KILL"
        options = (*TRACE, "-e", f"inject={call.name}:{what}:when={call.number}")
        endings = attempt(self.job, self._trial, self.job.work, traced=rank, options=options, mode=mode)
        reached = calls_in(self._trial.parent / "trace.main", self._trial)
        hit = [found.place for found in reached if (found.name, found.number) == (call.name, call.number)]
        return endings if hit == [call.place] else None

    def _spared(self, mode: str, rank: int, call: Call) -> bool:
        """Whether what fails is the deletion of an old checkpoint."""
        calls = self._calls[rank]
        going = [number for number, other in enumerate(calls) if ".gone-" in other.paths[-1]]
        return self.job.deletes and mode == "full" and calls.index(call) >= min(going, default=len(calls))

    def _ending_faults(self, mode: str, rank: int, endings: list[tuple[int | str, str]]) -> Iterator[str]:
        statuses = [status for status, _ in endings]
        lines = "".join(text for _, text in endings)
        expected = [{0} if mode == "spared" else {EXIT_FAILURE}] * self.job.ranks
        if mode == "kill all":  # the others may have seen that one is gone before they are killed
            expected = [{EXIT_FAILURE, -signal.SIGKILL}] * self.job.ranks
        if mode.startswith("kill"):
            expected[rank] = {-signal.SIGKILL}
        if any(status not in allowed for status, allowed in zip(statuses, expected, strict=True)):
            yield f"expected exits {expected}, found {endings}"
        told = self.job.ranks - 1 if mode == "kill" else int(mode == "full")
        if mode != "kill all" and ("Traceback" in lines or lines.count("error: ") != told):
            yield f"expected {told} line that begins with error, found {lines!r}"
        if mode == "full" and not ("disk full" in lines and str(self._trial) in lines):
            yield f"expected 'disk full' and a path, found {lines!r}"

    def _undisturbed(self, directory: Path, work: Work, *, traced: int = 0, options: tuple[str, ...] = ()) -> None:
        endings = attempt(self.job, directory, work, traced=traced, options=options, mode="none")
        if any(ending != (0, "") for ending in endings):
            raise SystemExit(f"{self._name}: undisturbed it ended with {endings}")

    def _dry(self, rank: int) -> list[Call]:
        """The calls of a rank in an undisturbed run."""
        self._reset()
        self._undisturbed(self._trial, self.job.work, traced=rank, options=TRACE)
        scratch = self._trial.parent
        calls = calls_in(scratch / "trace.main", self._trial)
        others = [log for log in scratch.glob("trace.[0-9]*") if calls_in(log, self._trial)]
        self.report.calls += [call.name for call in calls]
        self.report.faults += [f"{self._name}, rank {rank}: {fault}" for fault in order_faults(calls)]
        self.report.faults += [f"{self._name}: a thread writes, whose calls are not counted: {log}" for log in others]
        return calls

    def _reset(self) -> None:
        shutil.rmtree(self._trial, ignore_errors=True)
        shutil.copytree(self._template, self._trial)

    def _difference(self) -> list[str]:
        now = contents(self._trial)
        return sorted(name for name in now.keys() | self._after if now.get(name) != self._after.get(name))

    @staticmethod
    def _find(directory: Path) -> str | None:
        found = newest_whole(directory)
        return found.name if found else None


def main(directory: Path, sample: int, names: list[str]) -> None:
    torch.set_num_threads(1)
    reports: dict[str, dict[str, Any]] = {}
    (directory / "inputs").mkdir(parents=True)
    maker = Child(make_inputs, directory / "inputs")
    maker.wait_until_ready()
    maker.go()
    if (ending := maker.wait()) != (0, ""):
        raise SystemExit(f"cannot make the inputs: {ending}")
    for name in names:
        (directory / name).mkdir()
        reports[name] = vars(Walk(name, directory / name).walk(sample))
    print(json.dumps(reports, indent=1))


if __name__ == "__main__":
    sys.dont_write_bytecode = True
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
