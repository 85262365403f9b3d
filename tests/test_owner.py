"""One run a directory: a living owner is named, a dead one taken over."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron import owner_file
from megatron.errors import UserError
from megatron.owner_file import OWNER_FILE, how_ended
from megatron.training import owner
from megatron.training.owner import Owner

ROOT = Path(__file__).parents[1]
HOLD = (
    "import sys, time; from pathlib import Path; from megatron.training import owner\n"
    "owner.BEAT_SECONDS = 0.05\n"
    "with owner.Owner(Path(sys.argv[1]), print):\n    print('held', flush=True); time.sleep(60)\n"
)


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_run_is_refused_and_told_who_is_there(holder, tmp_path):
    with pytest.raises(UserError, match=rf"--save .* is in use by process {holder.pid} on .*: stop that run"):
        Owner(tmp_path, print).__enter__()
    holder.send_signal(signal.SIGSTOP)  # stopped is not dead
    with pytest.raises(UserError, match="is in use by"):
        Owner(tmp_path, print).__enter__()


def test_without_locks_a_living_owner_is_known_by_its_beat(holder, tmp_path, monkeypatch):
    def missing(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(owner.fcntl, "flock", missing)
    with pytest.raises(UserError, match=f"is in use by process {holder.pid}"):
        Owner(tmp_path, print).__enter__()


def test_a_dead_owner_is_taken_over_with_a_message(holder, tmp_path):
    holder.kill()
    holder.wait()
    said: list[str] = []
    with Owner(tmp_path, said.append):
        assert len(said) == 1
        assert f"taken over from process {holder.pid} on" in said[0]


def test_an_owner_that_left_leaves_nothing_to_say(tmp_path):
    said: list[str] = []
    for _ in range(2):
        with Owner(tmp_path, said.append):
            pass
    assert not said


def entry(host: str, beat: int) -> bytes:
    return json.dumps({"host": host, "pid": 7, "token": "theirs", "beat": beat}).ljust(256).encode()


def test_on_a_machine_that_shares_no_locks_silence_tells(tmp_path, monkeypatch):
    monkeypatch.setattr(owner, "SILENCE_SECONDS", 0.3)
    (tmp_path / OWNER_FILE).write_bytes(entry("elsewhere", 3))
    said: list[str] = []
    with Owner(tmp_path, said.append):
        assert "process 7 on elsewhere did not sign off; waiting" in said[0]
        assert "taken over from process 7 on elsewhere" in said[1]


def test_and_a_heartbeat_too(tmp_path, monkeypatch):
    monkeypatch.setattr(owner, "SILENCE_SECONDS", 5.0)
    path = tmp_path / OWNER_FILE
    path.write_bytes(entry("elsewhere", 3))
    beats = iter(range(4, 100))

    def beat(line: str) -> None:
        path.write_bytes(entry("elsewhere", next(beats)))

    with pytest.raises(UserError, match="is in use by process 7 on elsewhere"):
        Owner(tmp_path, beat).__enter__()


@pytest.mark.parametrize("theirs", [entry("elsewhere", 0), b""], ids=["at work", "signed off"])
def test_an_owner_that_was_taken_over_ends_its_process(holder, tmp_path, theirs):
    """As after a suspension that was longer than the silence that another machine waits for."""
    path = tmp_path / OWNER_FILE
    holder.send_signal(signal.SIGSTOP)
    path.write_bytes(theirs)
    holder.send_signal(signal.SIGCONT)
    _, errors = holder.communicate(timeout=30)
    assert holder.returncode == 1
    assert errors == (
        f"error: another run has taken {tmp_path} over, as this one did not move ({path}); the run ends here; its last "
        "checkpoint stands\n"
    )
    assert path.read_bytes() == theirs, "it is not ours to sign off"


def test_a_full_disk_is_one_line_and_lets_the_directory_go(tmp_path, monkeypatch):
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"cannot write .*owner\.json: disk full"):
        patch.setattr(os, "pwrite", full)
        Owner(tmp_path, print).__enter__()
    with Owner(tmp_path, print):
        pass


def test_a_beat_is_renewed(tmp_path, monkeypatch):
    monkeypatch.setattr(owner, "BEAT_SECONDS", 0.05)
    with Owner(tmp_path, print):
        time.sleep(0.5)
        assert json.loads((tmp_path / OWNER_FILE).read_bytes())["beat"] > 2
    assert (tmp_path / OWNER_FILE).read_bytes() == b""


class TestHowItEnded:
    """What those see who only look."""

    def test_a_living_owner_has_not_and_a_killed_one_has_at_once(self, holder, tmp_path):
        assert how_ended(tmp_path) is None
        holder.send_signal(signal.SIGSTOP)  # stopped is not dead
        assert how_ended(tmp_path) is None
        holder.kill()
        os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)  # nobody has asked how it ended: its number stays
        assert how_ended(tmp_path) == f"process {holder.pid} on {os.uname().nodename} was killed or crashed"
        holder.wait()
        assert how_ended(tmp_path) == f"process {holder.pid} on {os.uname().nodename} was killed or crashed"

    def test_another_process_with_its_number_is_not_the_owner(self, holder, tmp_path):
        found = json.loads((tmp_path / OWNER_FILE).read_bytes())
        holder.kill()
        holder.wait()
        (tmp_path / OWNER_FILE).write_text(json.dumps(found | {"pid": os.getpid()}))
        assert how_ended(tmp_path) == f"process {os.getpid()} on {os.uname().nodename} was killed or crashed"

    @pytest.mark.parametrize(
        "changed",
        [{"system": "another"}, {"system": None}, {"pid": None}, {"pid": 0}, {"pid": -1}, {"pid": 10**30}],
        ids=str,
    )
    def test_what_cannot_be_known_from_here_is_not_said(self, holder, tmp_path, changed):
        found = json.loads((tmp_path / OWNER_FILE).read_bytes())
        holder.kill()
        holder.wait()
        assert how_ended(tmp_path) is not None
        (tmp_path / OWNER_FILE).write_text(json.dumps(found | changed))
        assert how_ended(tmp_path) is None

    def test_another_users_process_that_proc_hides_is_alive(self, holder, tmp_path, monkeypatch):
        def hidden(*_: object) -> None:
            raise PermissionError

        with monkeypatch.context() as patch:
            patch.setattr(os, "kill", hidden)
            assert how_ended(tmp_path) is None
            patch.setattr(owner_file, "_process", hidden)
            assert how_ended(tmp_path) is None

    def test_one_that_signed_off_or_never_was(self, tmp_path):
        assert how_ended(tmp_path) is None
        with Owner(tmp_path, print):
            assert how_ended(tmp_path) is None
        assert how_ended(tmp_path) == "it ended by a fault or an interrupt; its output says which"
