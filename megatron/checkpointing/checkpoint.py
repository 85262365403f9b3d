"""Save and load a whole checkpoint: tensors, a JSON of everything else, the configuration it was made with.

Retention is to build on `find_latest`'s order and `delete_checkpoint`, after a save has returned.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron.checkpointing.commit import (
    directory_name,
    older_than,
    open_manifest,
    publish,
    temporary_directory,
)
from megatron.checkpointing.manifest import Manifest, check_digests, write_manifest
from megatron.checkpointing.tensors import read_tensors, write_tensors
from megatron.errors import UserError
from megatron.files import file_errors, write_durable

STATE = "state.json"
CONFIG = "config.yaml"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory."""

    path: Path
    iteration: int
    tensors: dict[str, Tensor]
    """Name -> whole tensor on the CPU."""
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
) -> Path:
    """Save to `directory`/iter_NNNNNNN and return that path: on the disk, whole, when this returns.

    `state` must be writable as JSON (inf and nan are; tuples come back as lists). Raises UserError, such as for
    a full disk: what was written is deleted, and the checkpoints that were there are still there. Raises TypeError
    or ValueError for a `state` that JSON cannot hold, before anything is written.
    """
    directory = Path(directory)
    state_text = json.dumps(state, indent=1) + "\n"
    temporary = temporary_directory(directory, iteration)
    final = directory / directory_name(iteration)
    try:
        write_tensors(temporary, tensors)
        for name, text in ((STATE, state_text), (CONFIG, config_text)):
            with file_errors("write", temporary / name):
                write_durable(temporary / name, text.encode())
        write_manifest(temporary, iteration)
        publish(temporary, final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def load_checkpoint(path: Path, *, verify: bool = True) -> Checkpoint:
    """Load the checkpoint `path`, checking the sizes and, with `verify`, the digest of every file before use.

    Raises UserError that names the damaged file, what was expected and found, and an older checkpoint to use.
    """
    path = Path(path)
    try:
        manifest = open_manifest(path)
        if verify:
            check_digests(path, manifest)
        _require_files(path, manifest)
        state = json.loads(_read_text(path / STATE))
        config_text = _read_text(path / CONFIG)
        tensors = read_tensors(path)
    except (UserError, ValueError, RecursionError) as error:
        older = older_than(path)
        advice = f"go on from the older checkpoint {older}" if older else "there is no older whole checkpoint beside it"
        raise UserError(f"{error}; {advice}") from error
    return Checkpoint(path, manifest.iteration, tensors, state, config_text)


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


def _require_files(path: Path, manifest: Manifest) -> None:
    for name in (STATE, CONFIG):
        if name not in manifest.files:
            raise UserError(f"{path}: its manifest has no {name}, so it is not a checkpoint of a run")


def _read_text(path: Path) -> str:
    with file_errors("read", path):
        return path.read_text(encoding="utf-8")
