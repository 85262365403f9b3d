"""When a checkpoint counts as saved: publishing it, finding the newest, letting old ones go, clearing away remainders.

Names in a directory of checkpoints:

- `iter_0001000`            a checkpoint, whole if its manifest says so;
- `iter_0001000.tmp-<id>`   a save that is under way or died: never looked at;
- `iter_0001000.old-<id>`   what a save of the same iteration is replacing: used only if that save died in between;
- `iter_0001000.gone-<id>`  a checkpoint that is being deleted: never looked at;
- `latest`                  the name of the newest, for people and scripts: a hint that nothing here relies on.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from megatron.checkpointing.manifest import MANIFEST, Manifest, check_digests, check_sizes, read_manifest
from megatron.errors import UserError
from megatron.files import commit_directory, file_errors, fsync_directory, fsync_tree, write_atomic

CHECKPOINTS = "checkpoints"
"""Folder of the checkpoints in a run's directory."""
LATEST = "latest"
_NAME = re.compile(r"iter_(\d{7,})(?:\.(tmp|old|gone)-[0-9a-f]+)?")
_REMAINS = {"tmp": "a save that was not finished", "gone": "what is left of a deleted checkpoint"}
_LEFTOVER = re.compile(rf"\.{LATEST}\.tmp-[0-9a-f]+")
Report = Callable[[str], None]
"""Takes one line about something that was passed over."""


def directory_name(iteration: int) -> str:
    """The final name of the checkpoint of `iteration`."""
    return f"iter_{iteration:07d}"


def checkpoints_in(directory: Path) -> Path:
    """The checkpoints of the run `directory`, or `directory` itself where it is no run but what one looks for there."""
    inner = directory / CHECKPOINTS
    return inner if inner.is_dir() else directory


def temporary_directory(directory: Path, iteration: int) -> Path:
    """Create an empty directory in which to write the checkpoint of `iteration`."""
    temporary = directory / f"{directory_name(iteration)}.tmp-{secrets.token_hex(4)}"
    with file_errors("write", temporary):
        make_directory(directory)
        temporary.mkdir()
    return temporary


def make_directory(path: Path) -> None:
    """Make the directory `path` and what is missing above it, each name brought to the disk. Raises OSError."""
    if not path.is_dir():
        make_directory(path.parent)
        path.mkdir(exist_ok=True)
        fsync_directory(path.parent)


def publish(temporary: Path, final: Path) -> None:
    """Give the finished checkpoint `temporary` its name `final`, then let `latest` name it.

    A checkpoint that already stands there is left alone if it is the same and whole; otherwise it steps aside,
    and is deleted only when the new one has its name. Raises UserError; whatever fails, and wherever a crash
    comes, one of the two is found under `final` or its `.old-` name, whole.
    """
    surplus = None
    if not os.path.lexists(final):
        commit_directory(temporary, final)
    elif _same(temporary, final):
        surplus = temporary
    else:
        surplus = _replace(temporary, final)
    write_atomic(final.parent / LATEST, final.name + "\n")
    if surplus is not None:
        delete_checkpoint(surplus)


def delete_checkpoint(path: Path) -> None:
    """Delete a checkpoint: first its name, then its manifest, so that it is never taken for a whole one while it goes.

    What a crash leaves of it bears a name that `reap_temporary` clears away. Of a link only the link goes.
    """
    with file_errors("delete", path):
        if path.is_symlink():
            path.unlink()
            return
        match = _NAME.fullmatch(path.name)
        if match and match[2] not in _REMAINS:
            gone = path.with_name(f"{directory_name(int(match[1]))}.gone-{secrets.token_hex(4)}")
            os.rename(path, gone)
            fsync_directory(path.parent)
            path = gone
        with suppress(FileNotFoundError):
            os.unlink(path / MANIFEST)
        fsync_directory(path)
        shutil.rmtree(path)


def retain(directory: Path, saved: int, *, keep_last: int, keep_every: int | None, report: Report) -> None:
    """Delete the checkpoints in `directory` that are older than that of iteration `saved`, which was read back whole.

    The newest `keep_last` (2 or more) whole ones stay, `saved` among them, and all whose iteration is a multiple of
    `keep_every`. Of an older one a sound manifest and the sizes of its files are checked, not the digests, which would
    double what a save reads: the one before `saved` was read back too when it was written, or loaded, by this run.
    What is not whole counts for nothing and stays, and so does what is newer than `saved`. `report` gets a line for
    each that is not whole, for what was deleted, and for what could not be: that is no reason to end a run.
    """
    kept, deleted = 1, []
    for iteration, kind, path in _listed(directory):
        if kind is not None or iteration >= saved:
            continue
        if kept >= keep_last and keep_every is not None and iteration % keep_every == 0:
            continue
        try:
            open_manifest(path)
        except UserError as error:
            report(f"{path}: not deleted and not counted by --keep-last, it is not whole: {error}")
            continue
        if kept < keep_last:
            kept += 1
            continue
        try:
            delete_checkpoint(path)
            deleted.append(path.name)
        except UserError as error:
            report(f"--keep-last {keep_last}: {error}")
    if deleted:
        report(f"deleted {', '.join(deleted)} (--keep-last {keep_last})")


def named_checkpoints(directory: Path, report: Report = lambda line: None) -> list[Path]:
    """What stands in `directory` under a checkpoint's name, whole or not, newest first; `directory` may itself be one.

    `report` gets a line for each remainder of a save or of a deletion, and where `latest` names another one than the
    newest. Raises UserError where `directory` cannot be read.
    """
    if _NAME.fullmatch(directory.name) or (directory / MANIFEST).exists():
        return [directory]
    found = []
    for _, kind, path in _listed(directory):
        if kind in _REMAINS:
            report(f"{path}: ignored, {_REMAINS[kind]}")
        else:
            found.append(path)
    hint = _read_hint(directory)
    if hint is not None and (not found or hint != found[0].name):
        newest = found[0].name if found else None
        report(f"{directory / LATEST}: ignored, it names {hint!r}, the newest checkpoint there is {newest}")
    return found


def newest_iteration(directory: Path) -> int | None:
    """The iteration of the newest checkpoint in `directory`. Raises UserError where it cannot be read."""
    return next((iteration for iteration, kind, _ in _listed(directory) if kind not in _REMAINS), None)


def set_aside_newer(directory: Path, iteration: int, report: Report = lambda line: None) -> None:
    """Rename the checkpoints in `directory` that are newer than `iteration`: a run that goes on from an older one must
    not find them again. They are kept as abandoned_iter_NNNNNNN-<id>, which nothing takes for a checkpoint."""
    for other, kind, path in _listed(directory):
        if other > iteration and kind is None:
            aside = path.with_name(f"abandoned_{path.name}-{secrets.token_hex(4)}")
            with file_errors("rename", path):
                os.rename(path, aside)
                fsync_directory(directory)
            report(f"{path}: set aside as {aside.name}")


def older_than(path: Path) -> Path | None:
    """The newest whole checkpoint beside `path` of an earlier iteration, or None."""
    match = _NAME.fullmatch(path.name)
    for iteration, kind, other in _listed(path.parent) if match else ():
        if kind not in _REMAINS and match is not None and iteration < int(match[1]):
            with suppress(UserError):
                open_manifest(other)
                return other
    return None


def reap_temporary(directory: Path, report: Report = lambda line: None) -> list[Path]:
    """Clear away what dead saves and deletions left in `directory`; the paths that were deleted.

    Finishes an interrupted replacement: the old one goes where the new one stands whole, and gets its name back
    where nothing has it. To be called by the one owner of the directory while no save is under way.
    """
    deleted = {}
    for _, kind, path in _listed(directory):
        if kind == "old":
            final = path.with_name(path.name.partition(".")[0])
            if not os.path.lexists(final):
                with file_errors("rename", path):
                    os.rename(path, final)
                    fsync_directory(directory)
                report(f"{path}: renamed to {final.name}, its replacement was not finished")
                continue
            if not _whole(final):
                continue
        if kind is not None:
            delete_checkpoint(path)
            deleted[path] = _REMAINS.get(kind, "replaced by a newer save")
    if directory.is_dir():
        for path in sorted(directory.iterdir()):
            if _LEFTOVER.fullmatch(path.name):
                with file_errors("delete", path):
                    path.unlink()
                deleted[path] = _REMAINS["tmp"]
    for path, what in deleted.items():
        report(f"{path}: deleted, {what}")
    return list(deleted)


def open_manifest(path: Path) -> Manifest:
    """The manifest of the checkpoint `path`, its files being there with their sizes. Raises UserError."""
    manifest = named_manifest(path)
    check_sizes(path, manifest)
    return manifest


def named_manifest(path: Path) -> Manifest:
    """The manifest of the checkpoint `path`, of the iteration that its name says. Raises UserError."""
    if not path.is_dir():
        raise UserError(f"{path}: there is no such checkpoint")
    manifest = read_manifest(path)
    match = _NAME.fullmatch(path.name)
    if match and int(match[1]) != manifest.iteration:
        raise UserError(f"{path / MANIFEST}: expected iteration {int(match[1])}, found {manifest.iteration}")
    return manifest


def _replace(temporary: Path, final: Path) -> Path:
    """Put `temporary` in the place of `final`; where the replaced one is now."""
    aside = final.with_name(f"{final.name}.old-{secrets.token_hex(4)}")
    with file_errors("write", final):
        fsync_tree(temporary)
        os.rename(final, aside)
    try:
        commit_directory(temporary, final)
    except UserError:
        if not os.path.lexists(final):
            with suppress(OSError):
                os.rename(aside, final)
        raise
    return aside


def _same(temporary: Path, final: Path) -> bool:
    try:
        manifest = open_manifest(final)
        if manifest != read_manifest(temporary):
            return False
        check_digests(final, manifest.files)
    except UserError:
        return False
    return True


def _whole(path: Path) -> bool:
    """Whether the checkpoint is whole, its digests too."""
    try:
        check_digests(path, open_manifest(path).files)
    except UserError:
        return False
    return True


def _listed(directory: Path) -> list[tuple[int, str | None, Path]]:
    """(iteration, None or what the name ends in, path), newest iteration first, a final name before an old one."""
    with file_errors("read", directory):
        try:
            names = os.listdir(directory)
        except FileNotFoundError:
            return []
    matches = [match for match in map(_NAME.fullmatch, names) if match]
    found = [(int(match[1]), match[2], directory / match[0]) for match in matches]
    return sorted(found, key=lambda item: (-item[0], item[1] or "", item[2].name))


def _read_hint(directory: Path) -> str | None:
    """What `latest` says, or None where it is not there."""
    try:
        with open(directory / LATEST, "rb") as stream:
            return stream.read(256).decode(errors="replace").strip()
    except OSError:
        return None
