"""Which checkpoints a save deletes, and what a crash or a fault in between leaves."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.checkpointing import checkpoint as checkpoints
from megatron.checkpointing.checkpoint import find_whole, load_checkpoint, save_checkpoint
from megatron.checkpointing.commit import LATEST, delete_checkpoint, reap_temporary, retain
from megatron.checkpointing.manifest import MANIFEST
from megatron.checkpointing.saver import Saver
from megatron.checkpointing.verification import verify_checkpoint
from megatron.distributed.world import World
from megatron.errors import UserError

SHARD = "shard-00001-model-00001-of-00001.safetensors"
CHANGING = ("rename", "unlink", "rmdir", "fsync")


def write(directory: Path, *iterations: int) -> None:
    for iteration in iterations:
        tensors = {"model.x": torch.full((50,), float(iteration))}
        save_checkpoint(directory, iteration=iteration, tensors=tensors, state={"i": iteration}, config_text="lr: 1\n")


def saver(
    directory: Path, lines: list[str], *, background: bool = False, last: int | None = 2, every: int | None = None
) -> Saver:
    return Saver(directory, World(), background=background, report=lines.append, keep_last=last, keep_every=every)


def save(saver: Saver, *iterations: int) -> None:
    for iteration in iterations:
        tensors = {"model.x": torch.full((50,), float(iteration))}
        saver.save(iteration=iteration, tensors=tensors, state={"i": iteration}, config_text="lr: 1\n")


def kept(directory: Path) -> list[int]:
    """Iterations of what stands under a final name, all of it whole to the last bit, and nothing beside it."""
    names = sorted(path.name for path in directory.iterdir() if path.name != LATEST)
    found = [int(name.removeprefix("iter_")) for name in names]
    for name in names:
        assert verify_checkpoint(directory / name).faults == []
    return found


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize(
    ("last", "every", "expected"),
    [
        (2, None, [90, 100]),
        (3, None, [80, 90, 100]),
        (2, 30, [30, 60, 90, 100]),
        (2, 50, [50, 90, 100]),
        (20, 30, [*range(10, 101, 10)]),
        (None, None, [*range(10, 101, 10)]),
    ],
)
def test_newest_and_multiples_stay(
    tmp_path: Path, background: bool, last: int | None, every: int | None, expected: list[int]
) -> None:
    lines: list[str] = []
    with saver(tmp_path, lines, background=background, last=last, every=every) as keeper:
        save(keeper, *range(10, 101, 10))
    assert kept(tmp_path) == expected
    deleted = [line for line in lines if line.startswith("deleted")]
    assert deleted == [f"deleted iter_{n:07d} (--keep-last {last})" for n in range(10, 101, 10) if n not in expected]


def test_all_that_has_piled_up_goes_after_one_save(tmp_path: Path) -> None:
    write(tmp_path, 10, 20, 30, 40)
    lines: list[str] = []
    save(saver(tmp_path, lines), 50)
    assert kept(tmp_path) == [40, 50]
    assert lines[1:] == ["deleted iter_0000030, iter_0000020, iter_0000010 (--keep-last 2)"]


def test_what_is_newer_than_the_save_counts_for_nothing_and_stays(tmp_path: Path) -> None:
    write(tmp_path, 10, 20, 80, 90)
    save(saver(tmp_path, []), 30)
    assert kept(tmp_path) == [20, 30, 80, 90]


@pytest.mark.parametrize("damage", ["truncated", "without a manifest"])
def test_broken_one_is_not_counted_not_deleted_and_told_of(tmp_path: Path, damage: str) -> None:
    write(tmp_path, 10, 20, 30)
    broken = tmp_path / "iter_0000030"
    (tmp_path / "iter_0000025.tmp-0123abcd").mkdir()
    if damage == "truncated":
        (broken / SHARD).write_bytes(b"")
    else:
        (broken / MANIFEST).unlink()
    lines: list[str] = []
    save(saver(tmp_path, lines), 40)
    left = sorted(path.name for path in tmp_path.glob("iter_*"))
    assert left == ["iter_0000020", "iter_0000025.tmp-0123abcd", "iter_0000030", "iter_0000040"]
    assert len(lines) == 3
    assert lines[1].startswith(f"{broken}: not deleted and not counted by --keep-last, it is not whole: {broken}/")
    assert lines[2] == "deleted iter_0000010 (--keep-last 2)"


def test_with_fewer_whole_ones_nothing_goes(tmp_path: Path) -> None:
    write(tmp_path, 10, 20, 30)
    for name in ("iter_0000010", "iter_0000030"):
        (tmp_path / name / SHARD).write_bytes(b"")
    save(saver(tmp_path, [], last=3), 40)
    assert sorted(path.name for path in tmp_path.glob("iter_*")) == [f"iter_{n:07d}" for n in (10, 20, 30, 40)]


@pytest.mark.parametrize("background", [False, True])
def test_nothing_goes_when_the_new_one_does_not_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, background: bool
) -> None:
    write(tmp_path, 10, 20, 30)
    real = checkpoints.publish

    def spoil(temporary: Path, final: Path) -> None:
        real(temporary, final)
        content = bytearray((final / SHARD).read_bytes())
        content[-1] ^= 1
        (final / SHARD).write_bytes(content)

    monkeypatch.setattr(checkpoints, "publish", spoil)
    keeper = saver(tmp_path, [], background=background)
    told = rf"{SHARD}: damaged, expected crc32 .*, just after it was written: .*--load-fallback; none was deleted"
    with pytest.raises(UserError, match=told):
        save(keeper, 40)
        keeper.close()
    assert sorted(path.name for path in tmp_path.glob("iter_*")) == [f"iter_{n:07d}" for n in (10, 20, 30, 40)]
    with pytest.raises(UserError, match="iter_0000030: name it with --load; training also takes it"):
        find_whole(tmp_path, fallback=False)
    found = find_whole(tmp_path, fallback=True)
    assert found is not None and found.iteration == 30


def test_cached_pages_are_given_up_before_reading_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not hasattr(os, "posix_fadvise"):
        pytest.skip("the system cannot be asked to give up cached pages")
    given_up = []

    def advise(descriptor: int, offset: int, size: int, advice: int) -> None:
        assert (offset, size, advice) == (0, 0, os.POSIX_FADV_DONTNEED)
        given_up.append(os.readlink(f"/proc/self/fd/{descriptor}"))

    monkeypatch.setattr(os, "posix_fadvise", advise)
    save(saver(tmp_path, []), 10)
    assert sorted(Path(path).name for path in given_up) == ["config.yaml", SHARD, "state.json"]
    given_up.clear()
    save(saver(tmp_path, [], last=None), 20)
    assert given_up == []


def test_link_is_taken_away_and_what_it_leads_to_is_not(tmp_path: Path) -> None:
    write(tmp_path / "archive", 10)
    run = tmp_path / "run"
    run.mkdir()
    (run / "iter_0000010").symlink_to(tmp_path / "archive" / "iter_0000010")
    save(saver(run, []), 20, 30)
    assert kept(run) == [20, 30]
    assert load_checkpoint(tmp_path / "archive" / "iter_0000010").iteration == 10


class Crash(BaseException):
    """The end of the process, as far as the code under test can tell."""


class Disturbed:
    """Counts calls that change the directory; the one of number `point` raises in place of doing its work."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, point: int, error: BaseException) -> None:
        self.calls: list[str] = []
        self._point, self._error = point, error
        for name in CHANGING:
            monkeypatch.setattr(os, name, self._wrapped(name, getattr(os, name)))

    def _wrapped(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            self.calls.append(name)
            if len(self.calls) == self._point:
                raise self._error
            return real(*arguments, **named)

        return call


def disturb(template: Path, trial: Path, point: int, error: BaseException) -> tuple[list[str], list[str], bool]:
    """Retention on a copy of `template`, disturbed; the calls it made, what it told, whether it came to its end."""
    shutil.rmtree(trial, ignore_errors=True)
    shutil.copytree(template, trial)
    lines: list[str] = []
    with pytest.MonkeyPatch.context() as monkeypatch:
        disturbed = Disturbed(monkeypatch, point, error)
        try:
            retain(trial, 50, keep_last=2, keep_every=None, report=lines.append)
            return disturbed.calls, lines, True
        except Crash:
            return disturbed.calls, lines, False


def test_crash_at_every_point_leaves_whole_checkpoints_and_a_remainder_that_is_reaped(tmp_path: Path) -> None:
    template, trial = tmp_path / "template", tmp_path / "trial"
    write(template, 10, 20, 30, 40, 50)
    calls, _, ended = disturb(template, trial, 0, Crash())
    assert ended and kept(trial) == [40, 50]
    deletion = ["rename", "fsync", "unlink", "fsync", "unlink", "unlink", "unlink", "rmdir"]
    assert calls == deletion * 3
    seen = set()
    for point in range(1, len(calls) + 1):
        assert not disturb(template, trial, point, Crash())[2]
        lines: list[str] = []
        found = find_whole(trial, fallback=False, report=lines.append)
        assert found is not None and found.path == trial / "iter_0000050"
        remainders = [path for path in trial.iterdir() if ".gone-" in path.name]
        assert [line.split(":")[0] for line in lines] == list(map(str, remainders))
        assert reap_temporary(trial) == remainders
        seen.add(tuple(kept(trial)))
        write(trial, 60)
        retain(trial, 60, keep_last=2, keep_every=None, report=lines.append)
        assert kept(trial) == [50, 60]
    assert seen == {(10, 20, 30, 40, 50), (10, 20, 40, 50), (10, 40, 50), (40, 50)}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EIO])
def test_deletion_that_fails_is_told_of_and_ends_nothing(tmp_path: Path, number: int) -> None:
    template, trial = tmp_path / "template", tmp_path / "trial"
    write(template, 10, 20, 30, 40, 50)
    points = len(disturb(template, trial, 0, Crash())[0])
    for point in range(1, points + 1):
        _, lines, ended = disturb(template, trial, point, OSError(number, os.strerror(number)))
        assert ended and len(lines) == 2
        assert lines[0].startswith(f"--keep-last 2: cannot delete {trial}/iter_00000")
        reap_temporary(trial)
        assert set(kept(trial)) <= {10, 20, 30, 40, 50} and {40, 50} <= set(kept(trial))


def test_deletion_takes_the_name_first_and_the_manifest_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 10)
    order: list[str] = []

    def note(name: str) -> Callable[..., Any]:
        real = getattr(os, name)

        def call(path: Any, *rest: Any, **named: Any) -> Any:
            order.append(f"{name} {Path(path).name.partition('-')[0]}")
            return real(path, *rest, **named)

        return call

    for name in ("rename", "unlink", "rmdir"):
        monkeypatch.setattr(os, name, note(name))
    delete_checkpoint(tmp_path / "iter_0000010")
    assert order[:2] == ["rename iter_0000010", f"unlink {MANIFEST}"]
    assert order[-1] == "rmdir iter_0000010.gone"
    assert os.listdir(tmp_path) == [LATEST]


def test_remainder_of_a_deletion_is_named_as_such_when_reaped(tmp_path: Path) -> None:
    write(tmp_path, 10, 20)
    os.rename(tmp_path / "iter_0000010", tmp_path / "iter_0000010.gone-0123abcd")
    lines: list[str] = []
    assert reap_temporary(tmp_path, lines.append) == [tmp_path / "iter_0000010.gone-0123abcd"]
    assert lines == [f"{tmp_path / 'iter_0000010.gone-0123abcd'}: deleted, what is left of a deleted checkpoint"]
    assert kept(tmp_path) == [20]
