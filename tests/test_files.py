"""Small files are replaced whole or not at all, and failures say which file and why."""

from __future__ import annotations

import errno
import os
import zlib
from pathlib import Path

import pytest

from megatron.errors import UserError
from megatron.files import commit_directory, crc32_of, explain, fsync_directory, write_atomic


def test_write_atomic_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "latest"
    write_atomic(path, "ä")
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new"
    assert [p.name for p in tmp_path.iterdir()] == ["latest"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_write_atomic_keeps_the_old_content_when_it_fails(tmp_path: Path, monkeypatch, call: str) -> None:
    def fail(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "latest"
    write_atomic(path, "old")
    monkeypatch.setattr(os, call, fail)
    with pytest.raises(UserError, match=r"cannot write .*latest: disk full"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["latest"]


def test_write_atomic_into_a_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot write .*missing/file: No such file"):
        write_atomic(tmp_path / "missing" / "file", "x")


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (errno.ENOSPC, "disk full"),
        (errno.EDQUOT, "disk full"),
        (errno.EACCES, "Permission denied; change its permissions"),
        (errno.EROFS, "Read-only file system; change its permissions or choose another directory"),
        (errno.EIO, "Input/output error"),
    ],
)
def test_failures_are_explained(code: int, said: str) -> None:
    message = str(explain(OSError(code, os.strerror(code)), "write", Path("/run/x")))
    assert message.startswith("cannot write /run/x: ") and said in message


def test_commit_directory_renames_whole_trees(tmp_path: Path) -> None:
    temporary = tmp_path / "a.tmp"
    (temporary / "inner").mkdir(parents=True)
    (temporary / "inner" / "file").write_text("x")
    commit_directory(temporary, tmp_path / "a")
    assert (tmp_path / "a" / "inner" / "file").read_text() == "x"
    temporary.mkdir()
    with pytest.raises(UserError, match=r"cannot write .*/a: Directory not empty"):
        commit_directory(temporary, tmp_path / "a")


def test_directories_that_cannot_be_synced_are_passed_over(tmp_path: Path, monkeypatch) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", refuse)
    fsync_directory(tmp_path)


@pytest.mark.parametrize("size", [0, 1, 4 << 20, (4 << 20) + 1])
def test_digests(tmp_path: Path, size: int) -> None:
    data = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
    (tmp_path / "file").write_bytes(data)
    assert crc32_of(tmp_path / "file") == f"{zlib.crc32(data):08x}"
    with pytest.raises(UserError, match=r"cannot read .*nothing: No such file"):
        crc32_of(tmp_path / "nothing")


def test_a_pipe_is_written_to_and_stays(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_atomic(pipe, "text")
    assert os.read(reader, 9) == b"text"
    os.close(reader)
    assert pipe.is_fifo() and [path.name for path in tmp_path.iterdir()] == ["pipe"]
