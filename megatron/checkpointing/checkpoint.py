"""Save and load a whole checkpoint: tensors, a JSON of everything else, the configuration it was made with.

One road for one process and for many: every rank writes its pieces of the tensors, and rank 0 the rest, the manifest
and the name. A fault on any rank is a fault on all.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from megatron.checkpointing.commit import (
    Report,
    directory_name,
    named_checkpoints,
    older_than,
    open_manifest,
    publish,
    temporary_directory,
)
from megatron.checkpointing.manifest import (
    MANIFEST,
    FileEntry,
    Manifest,
    check_digests,
    check_sizes,
    describe,
    drop_cached,
    write_manifest,
)
from megatron.checkpointing.tensors import Piece, own_pieces, write_pieces
from megatron.distributed.world import ALONE, World
from megatron.errors import UserError
from megatron.files import file_errors, write_durable

STATE = "state.json"
CONFIG = "config.yaml"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on the disk that was found whole, without its tensors: `restore` reads those into their place."""

    path: Path
    iteration: int
    state: dict[str, Any]
    """What the trainer gave: progress, random states, versions, fingerprints."""
    config_text: str
    """The resolved configuration, as it can be run again."""


def save_checkpoint(
    directory: Path,
    *,
    iteration: int,
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
    config_text: str,
    world: World = ALONE,
) -> Path:
    """Save to `directory`/iter_NNNNNNN and return that path: on the disk, whole, when this returns. All ranks call it.

    `tensors` may be plain, alike on all ranks, or DTensors; `state` and `config_text` are rank 0's. `state` must be
    writable as JSON (inf and nan are; tuples come back as lists). Raises UserError, on every rank, such as for
    a full disk: what was written is deleted, and the checkpoints that were there are still there. Raises TypeError
    or ValueError for a `state` that JSON cannot hold, before anything is written.
    """
    texts = {STATE: to_text(state), CONFIG: config_text}
    return write_checkpoint(Path(directory), iteration, own_pieces(tensors, world), texts, world, world.control)


def to_text(state: Mapping[str, Any]) -> str:
    """`state` as it is written. Raises TypeError or ValueError for what JSON cannot hold."""
    return json.dumps(state, indent=1) + "\n"


def write_checkpoint(
    directory: Path,
    iteration: int,
    pieces: list[Piece],
    texts: Mapping[str, str],
    world: World,
    group: dist.ProcessGroup | None,
) -> Path:
    """`save_checkpoint` of this rank's `pieces` and of text files by name, the ranks agreeing over `group`."""
    name = world.on_main(lambda: temporary_directory(directory, iteration).name, group)
    temporary, final = directory / name, directory / directory_name(iteration)

    def write_shards() -> dict[str, FileEntry]:
        return describe(temporary, write_pieces(temporary, pieces, world.rank))

    def commit() -> None:
        for file, text in texts.items():
            with file_errors("write", temporary / file):
                write_durable(temporary / file, text.encode())
        files = {n: FileEntry(**entry) for rank in shards for n, entry in rank.items()} | describe(temporary, texts)
        manifest = Manifest(iteration, files)
        check_sizes(temporary, manifest)
        write_manifest(temporary, manifest)
        publish(temporary, final)

    try:
        written = world.everywhere(write_shards, group)
        shards = world.gather({n: asdict(entry) for n, entry in written.items()}, group)
        world.on_main(commit, group)
    except BaseException:
        if world.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def read_back(path: Path, world: World, group: dist.ProcessGroup | None) -> None:
    """Check a checkpoint that has just been written, from the disk and not from the system's cache of it.

    All ranks call it, agreeing over `group`; each reads its share once. Raises UserError, on every rank, that names the
    file that is not what was written.
    """

    def check() -> None:
        files = _share(open_manifest(path), world)
        drop_cached(path, files)
        check_digests(path, files)

    try:
        world.everywhere(check, group)
    except UserError as error:
        raise type(error)(
            f"{error}, just after it was written: check that disk, then go on from an older checkpoint with "
            "--load-fallback; none was deleted"
        ) from error


def load_checkpoint(path: Path, *, world: World = ALONE, tensors: bool = True) -> Checkpoint:
    """Check the checkpoint `path` and read all of it but the tensors. All ranks call it.

    Every rank checks the sizes of the files, and the digests of its share of them; without `tensors` of those alone
    that are read here, which is quick, and for a caller who checks the rest before using it. Raises UserError, on every
    rank, that names the damaged file, what was expected and found, and an older checkpoint to use.
    """
    path = Path(path)
    try:
        return _open(path, world, tensors=tensors)
    except UserError as error:
        older = older_than(path)
        advice = (
            f"the newest older whole checkpoint is {older}: name it with --load; training also takes it with "
            "--load-fallback"
            if older
            else "there is no older whole checkpoint beside it"
        )
        raise type(error)(f"{error}; {advice}") from error


def find_whole(
    directory: Path,
    *,
    fallback: bool,
    world: World = ALONE,
    report: Report = lambda line: None,
    tensors: bool = True,
) -> Checkpoint | None:
    """The newest checkpoint in `directory`, or `directory` itself, read and checked as by `load_checkpoint`; `tensors`
    is for it, where there is no `fallback`.

    All ranks call it. A directory without a manifest was never finished: it is passed over, with a line to `report` on
    rank 0, as are remainders. One that is damaged is refused; with `fallback` it is left behind, with a line that says
    why, for the next older one.

    Returns:
        None where there is nothing under a checkpoint's name.

    Raises:
        UserError: on every rank, where the newest one is damaged, with `fallback` where all are; and where there are
            checkpoints and none was ever finished.
    """

    def finished() -> list[str]:
        named = named_checkpoints(directory, report)
        found = [path for path in named if path == directory or (path / MANIFEST).exists()]
        for path in named:
            if path not in found:
                report(f"{path}: ignored, never finished: it has no {MANIFEST}")
        if named and not found:
            raise UserError(
                f"{directory}: none of its {len(named)} checkpoints is whole (newest: {named[0].name}, without a "
                f"{MANIFEST}); name another one, or move the directory away to start from scratch"
            )
        return [str(path) for path in found]

    paths = [Path(path) for path in world.on_main(finished)]
    if not fallback or len(paths) <= 1:
        return load_checkpoint(paths[0], world=world, tensors=tensors) if paths else None
    for path in paths:
        try:
            return _open(path, world)
        except UserError as error:
            if world.is_main:
                report(f"--load-fallback: {path} is damaged and left behind: {error}")
    raise world.fault(
        f"--load-fallback: none of the {len(paths)} checkpoints in {directory} is whole (newest: {paths[0].name}); "
        "repair one, or move the directory away to start from scratch"
    )


def check_space(directory: Path, tensors: Mapping[str, Tensor]) -> None:
    """Before the first step: raise UserError unless `directory` can be written and holds one more checkpoint."""
    directory = Path(directory)
    needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    probe = temporary_directory(directory, 0)
    try:
        with file_errors("write", directory):
            write_durable(probe / "probe", b"\0" * 4096)
            free = shutil.disk_usage(directory).free
    finally:
        shutil.rmtree(probe, ignore_errors=True)
    if free < needed:
        raise UserError(
            f"disk full: a checkpoint in {directory} takes {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free; "
            "free some space there or choose another --save"
        )


def _open(path: Path, world: World, *, tensors: bool = True) -> Checkpoint:
    """`load_checkpoint` without its advice."""

    def check() -> int:
        manifest = open_manifest(path)
        for name in (STATE, CONFIG):
            if name not in manifest.files:
                raise UserError(f"{path}: its manifest has no {name}, so it is not a checkpoint of a run")
        own = _share(manifest, world) if tensors else {name: manifest.files[name] for name in (STATE, CONFIG)}
        check_digests(path, own)
        return manifest.iteration

    def read() -> Checkpoint:
        try:
            return Checkpoint(path, iteration, json.loads(_read_text(path / STATE)), _read_text(path / CONFIG))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: cannot read its {STATE} and {CONFIG}: {error}") from error

    iteration = world.everywhere(check)  # by itself: no rank may trust a file before the one that checks it has
    return world.everywhere(read)


def _share(manifest: Manifest, world: World) -> dict[str, FileEntry]:
    """The files whose digests this rank checks: about as many bytes as each other one."""
    by_size = sorted(manifest.files.items(), key=lambda item: (-item[1].size, item[0]))
    return dict(by_size[world.rank :: world.size])


def _read_text(path: Path) -> str:
    with file_errors("read", path):
        return path.read_text(encoding="utf-8")
