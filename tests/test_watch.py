"""Ranks that die, fail, hang or finish, as real processes: who leaves, how, and what is said."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron.distributed.watch import Watch

ROOT = Path(__file__).parents[1]
START = """
import os, sys, time
from pathlib import Path
from megatron.distributed import watch
from megatron.distributed.watch import Watch

rank, size, directory, timeout = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), float(sys.argv[4])
watch.TICK_SECONDS, watch.ANSWER_SECONDS = 0.1, 1.0
watch.FAILURE_SECONDS = watch.FLUSH_SECONDS = 0.5

class Store:
    "What the watch asks of a torch.distributed.Store, without the seconds that importing torch takes."

    def set(self, key, value):
        (directory / "new").write_text(value)
        (directory / "new").rename(directory / key)

    def wait(self, keys, limit):
        end = time.monotonic() + limit.total_seconds()
        while not (directory / keys[0]).exists():
            if time.monotonic() > end:
                raise RuntimeError("timeout")
            time.sleep(0.01)

    def get(self, key):
        return (directory / key).read_bytes()

def read_data():
    time.sleep(60)

def all_reduce():
    time.sleep(60)

def meet(name):
    (directory / f"{name}{rank}").touch()
    while len(list(directory.glob(f"{name}?"))) < size:
        time.sleep(0.01)

mine = Watch(rank, size, Store(), timeout=timeout)
mine.at("step 17")
"""
JOIN = "with mine:\n    meet('in')\n"
RUN = START + "meet('ready')\n" + JOIN
END = "; the run ends here; its last checkpoint stands\n"


class Ranks:
    """Processes of one run."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.processes: dict[int, subprocess.Popen[bytes]] = {}

    def start(self, rank: int, size: int, program: str, timeout: float = 60) -> None:
        command = [sys.executable, "-c", program, str(rank), str(size), str(self.directory), str(timeout)]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": ""}
        with (self.directory / f"err{rank}").open("wb") as errors:
            self.processes[rank] = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=errors)

    def run(self, body: str, size: int = 3, timeout: float = 60, program: str = RUN) -> None:
        """Start ranks that do `body` within the watch, and wait until all of them are there."""
        for rank in range(size):
            self.start(rank, size, program + "".join(f"    {line}\n" for line in body.splitlines()), timeout)
        wait_for(lambda: all((self.directory / f"in{rank}").exists() for rank in range(size)))
        time.sleep(0.3)  # for what they send first to arrive

    def signal(self, rank: int, number: signal.Signals) -> None:
        self.processes[rank].send_signal(number)

    def statuses(self, *ranks: int, within: float = 10) -> list[int]:
        end = time.monotonic() + within
        return [self.processes[rank].wait(max(0.1, end - time.monotonic())) for rank in ranks]

    def errors(self, rank: int) -> str:
        return (self.directory / f"err{rank}").read_text()

    def name(self, rank: int) -> str:
        return f"rank {rank} (host {socket.gethostname()}, pid {self.processes[rank].pid})"


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 40
    while not condition():
        assert time.monotonic() < end, "the ranks did not come"
        time.sleep(0.01)


@pytest.fixture()
def ranks(tmp_path: Path) -> Iterator[Ranks]:
    ranks = Ranks(tmp_path)
    yield ranks
    for process in ranks.processes.values():
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def test_a_rank_that_is_killed_ends_the_others_and_rank_0_names_it(ranks: Ranks) -> None:
    ranks.run("all_reduce()")
    ranks.signal(2, signal.SIGKILL)
    assert ranks.statuses(0, 1) == [1, 1]
    cause = "killed or crashed (dmesg there tells if memory ran out)"
    assert ranks.errors(0) == f"error: {ranks.name(2)} died, last seen at step 17: {cause}{END}"
    assert ranks.errors(1) == ""


def test_where_rank_0_is_killed_every_rank_names_it(ranks: Ranks) -> None:
    ranks.run("all_reduce()")
    ranks.signal(0, signal.SIGKILL)
    assert ranks.statuses(1, 2) == [1, 1]
    assert ranks.errors(1) == ranks.errors(2) == f"error: {ranks.name(0)} died: killed or crashed{END}"


def test_output_that_nobody_reads_does_not_hold_up_the_end(ranks: Ranks) -> None:
    ranks.run("print('x' * 200_000, flush=True)")
    ranks.signal(0, signal.SIGKILL)
    assert ranks.statuses(1) == [1]
    assert ranks.errors(1) == f"error: {ranks.name(0)} died: killed or crashed{END}"


@pytest.mark.parametrize("then", ["time.sleep(60)", "1 / 0"])
def test_what_ends_the_run_is_said_whatever_holds_up_the_rest(ranks: Ranks, then: str) -> None:
    ranks.run(f"mine.ends_with(lambda: {then})\nall_reduce()")
    ranks.signal(2, signal.SIGKILL)
    assert ranks.statuses(0, 1) == [1, 1]
    end = END if "/" in then else "; the run ends here"
    assert ranks.errors(0).startswith(f"error: {ranks.name(2)} died") and ranks.errors(0).endswith(end)


@pytest.mark.parametrize("failing", [0, 1])
def test_a_rank_that_fails_says_so_and_ends_the_others(ranks: Ranks, failing: int) -> None:
    ranks.run(f"if rank == {failing}: raise ValueError('no such layer\\nmore')\nall_reduce()")
    assert ranks.statuses(0, 1, 2) == [1, 1, 1]
    assert ranks.errors(failing).endswith("ValueError: no such layer\nmore\n")
    if failing != 0:
        assert ranks.errors(0) == f"error: {ranks.name(1)} failed at step 17: ValueError: no such layer{END}"
    assert ranks.errors(2) == ""


def test_a_rank_that_leaves_with_a_status_ends_the_others(ranks: Ranks) -> None:
    ranks.run("if rank == 1: sys.exit(3)\nall_reduce()")
    assert ranks.statuses(0, 1, 2) == [1, 3, 1]
    assert ranks.errors(0) == f"error: {ranks.name(1)} failed at step 17: SystemExit: 3{END}"


def test_a_failure_that_rank_0_hears_of_late_is_not_a_death(ranks: Ranks) -> None:
    ranks.run("if rank == 1: time.sleep(1)\nif rank == 1: raise OSError('disk')\nall_reduce()")
    ranks.signal(0, signal.SIGSTOP)
    assert ranks.statuses(1) == [1]
    ranks.signal(0, signal.SIGCONT)
    assert ranks.statuses(0, 2) == [1, 1]
    assert ranks.errors(0) == f"error: {ranks.name(1)} failed at step 17: OSError: disk{END}"


def test_ranks_that_all_fail_speak_for_themselves(ranks: Ranks) -> None:
    ranks.run("time.sleep(0.1 * rank)\nsys.exit(75)")
    assert ranks.statuses(0, 1, 2) == [75, 75, 75]
    assert [ranks.errors(rank) for rank in range(3)] == ["", "", ""]


def test_a_failure_that_a_death_has_caused_is_not_what_is_told(ranks: Ranks) -> None:
    """As gloo raises on the neighbours of a dead rank at once."""
    ranks.run(
        "dead = directory / 'dead'\n"
        "while not dead.exists() and rank < 2: time.sleep(0.01)\n"
        "if rank == 1: raise RuntimeError('connection closed by peer')\n"
        "if rank == 2: dead.touch()\n"
        "if rank == 2: time.sleep(0.2)\n"
        "if rank == 2: os.kill(os.getpid(), 9)\n"
        "all_reduce()"
    )
    assert ranks.statuses(0, 1, 2) == [1, 1, -9]
    assert ranks.errors(0).startswith(f"error: {ranks.name(2)} died, last seen at step 17")
    assert ranks.errors(1) == ""


def test_a_rank_that_is_stopped_is_named_after_the_timeout(ranks: Ranks) -> None:
    ranks.run("all_reduce()", timeout=1)
    ranks.signal(2, signal.SIGSTOP)
    assert ranks.statuses(0, 1) == [1, 1]
    expected = f"error: {ranks.name(2)} does not answer (stopped, or its node is gone), last seen at step 17{END}"
    assert ranks.errors(0) == expected
    assert ranks.errors(1) == ""
    assert ranks.processes[2].poll() is None


def test_where_rank_0_is_stopped_every_rank_names_it(ranks: Ranks) -> None:
    ranks.run("all_reduce()", timeout=1)
    ranks.signal(0, signal.SIGSTOP)
    assert ranks.statuses(1, 2) == [1, 1]
    expected = f"error: {ranks.name(0)} does not answer (stopped, or its node is gone){END}"
    assert ranks.errors(1) == ranks.errors(2) == expected


def test_a_stopped_rank_is_named_before_the_failure_that_it_causes(ranks: Ranks) -> None:
    """As a collective's own timeout fails on the healthy ranks."""
    ranks.run("if rank == 1: time.sleep(1)\nif rank == 1: raise RuntimeError('timed out')\nall_reduce()")
    ranks.signal(2, signal.SIGSTOP)
    assert ranks.statuses(0, 1) == [1, 1]
    silent = f"{ranks.name(2)} does not answer (stopped, or its node is gone), last seen at step 17"
    failed = f"{ranks.name(1)} failed at step 17: RuntimeError: timed out"
    assert ranks.errors(0) == f"error: {silent}; {failed}{END}"


@pytest.mark.parametrize("late", [0, 2])
def test_a_rank_that_is_behind_is_named_with_what_it_does(ranks: Ranks, late: int) -> None:
    ranks.run(f"if rank == {late}: read_data()\nmine.at('step 18')\nall_reduce()", timeout=1)
    assert ranks.statuses(0, 1, 2) == [1, 1, 1]
    there = r"is still at step 17 after \d s, in read_data \(<string>:\d+\); others are at step 18"
    assert re.fullmatch(re.escape(f"error: {ranks.name(late)} ") + there + re.escape(END), ranks.errors(0))


def test_a_standstill_at_one_place_tells_what_the_ranks_do(ranks: Ranks) -> None:
    ranks.run("if rank == 1: read_data()\nall_reduce()", timeout=1)
    assert ranks.statuses(0, 1, 2) == [1, 1, 1]
    doing = re.escape(ranks.name(1)) + r" in read_data \(<string>:\d+\); 2 ranks in all_reduce \(<string>:\d+\)"
    expected = rf"error: all ranks are still at step 17 after \d s \({doing}\): .*--distributed-timeout-minutes.*"
    assert re.fullmatch(expected + re.escape(END), ranks.errors(0))


def test_ranks_that_move_after_all_do_not_hang(ranks: Ranks) -> None:
    """Both times they are being asked already."""
    ranks.run("for _ in range(2): time.sleep(1.5) or mine.at('validation')", timeout=1)
    assert ranks.statuses(0, 1, 2) == [0, 0, 0]
    assert [ranks.errors(rank) for rank in range(3)] == ["", "", ""]


def test_all_wait_for_a_rank_that_is_given_patience(ranks: Ranks) -> None:
    ranks.run("if rank == 1:\n    with mine.patient(): time.sleep(3)\nelse: time.sleep(3)", timeout=1)
    assert ranks.statuses(0, 1, 2) == [0, 0, 0]
    assert [ranks.errors(rank) for rank in range(3)] == ["", "", ""]


def test_patience_goes_for_rank_0_too(ranks: Ranks) -> None:
    ranks.run("with mine.patient(): time.sleep(4)", timeout=1)
    ranks.signal(0, signal.SIGSTOP)
    time.sleep(3)
    ranks.signal(0, signal.SIGCONT)
    assert ranks.statuses(0, 1, 2) == [0, 0, 0]


def test_a_whole_job_may_be_suspended(ranks: Ranks) -> None:
    """As by `scontrol suspend`, for longer than the timeout, in a step longer than an inquiry."""
    ranks.run("for _ in range(50): time.sleep(0.05)", timeout=3)
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for rank in range(3):
            ranks.signal(rank, number)
        time.sleep(3 if number == signal.SIGSTOP else 0)
    assert ranks.statuses(0, 1, 2) == [0, 0, 0]


@pytest.mark.parametrize("order", ["0, 1, 2", "2, 1, 0"])
def test_ranks_may_finish_in_any_order(ranks: Ranks, order: str) -> None:
    ranks.run(f"time.sleep([{order}][rank] * 0.4)\nsys.exit(0)")
    assert ranks.statuses(0, 1, 2) == [0, 0, 0]
    assert [ranks.errors(rank) for rank in range(3)] == ["", "", ""]


def test_a_rank_that_dies_after_others_have_finished_is_named(ranks: Ranks) -> None:
    ranks.run("if rank == 2: all_reduce()")
    assert ranks.statuses(1) == [0]
    with pytest.raises(subprocess.TimeoutExpired):
        ranks.processes[0].wait(2.5)
    ranks.signal(2, signal.SIGKILL)
    assert ranks.statuses(0) == [1]
    assert ranks.errors(0).startswith(f"error: {ranks.name(2)} died, last seen at step 17")


@pytest.mark.parametrize("here", [[0], [0, 1]])
def test_ranks_that_do_not_come_are_named(ranks: Ranks, here: list[int]) -> None:
    for rank in here:
        ranks.start(rank, 3, START + JOIN, timeout=1)
    assert ranks.statuses(*here, within=20) == [1] * len(here)
    absent = "; ".join(f"rank {rank}" for rank in range(3) if rank not in here)
    assert ranks.errors(0) == f"error: {absent} did not come within 1 s: see why it has not started{END}"


def test_a_rank_without_rank_0_says_so(ranks: Ranks) -> None:
    ranks.start(1, 3, START + JOIN, timeout=0.2)
    assert ranks.statuses(1, within=20) == [1]
    assert "UserError: rank 0 did not come within 0 s" in ranks.errors(1)


def test_strangers_are_ignored(ranks: Ranks) -> None:
    program = START + JOIN + "    time.sleep(0.5)\n"
    for rank in (0, 1):
        ranks.start(rank, 3, program)
    wait_for((ranks.directory / "in1").exists)
    port = json.loads((ranks.directory / "watch").read_text())[3]
    forged = json.dumps({"token": "guessed", "rank": 2, "host": "elsewhere", "pid": 1}).encode()
    strange = [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x00\xff\n",
        b"[1]\n",
        b"[" * 50_000 + b"\n",
        b"x" * 300_000,
        forged + b"\n",
    ]
    for text in strange:
        with socket.create_connection(("127.0.0.1", port), 10) as stranger:
            stranger.settimeout(10)
            assert stranger.recv(1000).startswith(b'{"greeting"')
            try:
                stranger.sendall(text)
                assert stranger.recv(1000) == b""
            except (ConnectionResetError, BrokenPipeError):
                pass
    with socket.create_connection(("127.0.0.1", port), 10), socket.create_connection(("127.0.0.1", port), 10) as mute:
        mute.sendall(b'{"tok')
        ranks.start(2, 3, program)
        assert ranks.statuses(0, 1, 2, within=20) == [0, 0, 0]
    assert [ranks.errors(rank) for rank in range(3)] == ["", "", ""]


def test_a_program_at_the_port_that_is_not_rank_0_is_not_taken_for_it(ranks: Ranks) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        (ranks.directory / "watch").write_text(json.dumps(["far", 1, ["127.0.0.1", "127.0.0.2"], port, "hello", "key"]))
        ranks.start(1, 2, START + JOIN)
        connection, _ = other.accept()
        connection.sendall(b'{"greeting": "another"}\n')
        assert ranks.statuses(1) == [1]
        assert connection.recv(1000) == b"", "the token is for rank 0 alone"
        connection.close()
    found = ranks.errors(1)
    assert f"rank 1 on {socket.gethostname()} cannot reach rank 0 on far at port {port} (127.0.0.1: another" in found
    assert "127.0.0.2: [Errno" in found and "--master-addr" in found


def test_a_process_by_itself_watches_nothing() -> None:
    with Watch(0, 1, None, timeout=1) as watch, watch.patient():  # type: ignore[arg-type]
        watch.at("step 1")
    with pytest.raises(ValueError, match="as ever"), watch:
        raise ValueError("as ever")


GLOO = """
import os, sys, time
from datetime import timedelta
import torch, torch.distributed as dist
from megatron.distributed.watch import Watch

rank, size = int(sys.argv[1]), int(sys.argv[2])
store = dist.TCPStore("127.0.0.1", int(os.environ["PORT"]), is_master=False, timeout=timedelta(seconds=60))
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=60))
with Watch(rank, size, store, timeout=60) as mine:
    for step in range(10**9):
        mine.at(f"step {step}")
        dist.all_reduce(torch.ones(10))
        if step == 20 and rank == 2:
            os.kill(os.getpid(), 9)
"""


def test_beside_real_collectives(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gloo raises on the others at once: what is told all the same is who died, without tracebacks."""
    import torch.distributed as dist

    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("PORT", str(store.port))
    for rank in range(3):
        ranks.start(rank, 3, GLOO)
    assert ranks.statuses(2, within=60) == [-9]
    assert ranks.statuses(0, 1) == [1, 1]
    assert re.fullmatch(re.escape(f"error: {ranks.name(2)} died, last seen at ") + r".*\n", ranks.errors(0))
    assert "Traceback" not in ranks.errors(1)
