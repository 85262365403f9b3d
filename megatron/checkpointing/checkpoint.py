"""Save and load a whole checkpoint: tensors, a JSON of everything else, the configuration it was made with.

One road for one process and for many: every rank writes its pieces of the tensors, and rank 0 the rest, the manifest
and the name. A fault on any rank is a fault on all.

Retention is to build on `find_latest`'s order and `delete_checkpoint`, after a save has returned.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from megatron.checkpointing.commit import (
    directory_name,
    older_than,
    open_manifest,
    publish,
    temporary_directory,
)
from megatron.checkpointing.manifest import (
    FileEntry,
    Manifest,
    check_digests,
    check_sizes,
    describe,
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


def load_checkpoint(path: Path, *, world: World = ALONE, verify: bool = True) -> Checkpoint:
    """Check the checkpoint `path` and read all of it but the tensors. All ranks call it.

    Every rank checks the sizes of the files and, with `verify`, the digests of its share of them. Raises UserError,
    on every rank, that names the damaged file, what was expected and found, and an older checkpoint to use.
    """
    path = Path(path)

    def check() -> int:
        with _advice(path):
            manifest = open_manifest(path)
            if verify:
                by_size = sorted(manifest.files.items(), key=lambda item: (-item[1].size, item[0]))
                check_digests(path, dict(by_size[world.rank :: world.size]))
            _require_files(path, manifest)
            return manifest.iteration

    def read(iteration: int) -> Checkpoint:
        with _advice(path):
            return Checkpoint(path, iteration, json.loads(_read_text(path / STATE)), _read_text(path / CONFIG))

    iteration = world.everywhere(check)  # by itself: no rank may trust a file before the one that checks it has
    return world.everywhere(lambda: read(iteration))


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


@contextmanager
def _advice(path: Path) -> Iterator[None]:
    """Add to what is wrong with the checkpoint `path` which older one to use."""
    try:
        yield
    except (UserError, ValueError, RecursionError) as error:
        older = older_than(path)
        advice = f"go on from the older checkpoint {older}" if older else "there is no older whole checkpoint beside it"
        raise UserError(f"{error}; {advice}") from error


def _require_files(path: Path, manifest: Manifest) -> None:
    for name in (STATE, CONFIG):
        if name not in manifest.files:
            raise UserError(f"{path}: its manifest has no {name}, so it is not a checkpoint of a run")


def _read_text(path: Path) -> str:
    with file_errors("read", path):
        return path.read_text(encoding="utf-8")
