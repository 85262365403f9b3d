"""Tensors of a checkpoint: safetensors shards, one set for each rank, that any layout of ranks can read again.

Each rank writes the pieces that it owns, with no word to the others: who owns what follows from how a tensor lies on
the mesh. The files are those of HuggingFaceStorageWriter of torch.distributed.checkpoint (DCP), and its reader reads
them. They are written straight from the tensors: DCP builds each file in memory first, through three copies, takes
three times as long, and could not write from copies made earlier. The stock storage of DCP keeps its metadata in a
pickle, which runs code when it is read: it is never used here.
"""

from __future__ import annotations

import json
import math
import os
import re
import warnings
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor

from megatron.distributed.world import World
from megatron.errors import UserError
from megatron.files import explain, fsync_file

FILE_BYTES = 1 << 30
"""A shard is closed when it has grown to this: it bounds the copies of GPU tensors that are held on the host."""
SUFFIX = ".safetensors"
SHARDING_NOTE = "DCP_SHARDING_INFO"
"""Metadata of a shard, from which DCP's reader learns where a piece lies in its whole tensor."""
_OS_ERROR = re.compile(r"os error (\d+)")


@dataclass(frozen=True)
class Piece:
    """A box cut out of a whole tensor."""

    name: str
    offsets: tuple[int, ...]
    """Where the box begins, one a dimension."""
    values: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return self.values.numel() * self.values.element_size()


def own_pieces(tensors: Mapping[str, Tensor], world: World) -> list[Piece]:
    """The pieces of `tensors`, plain or DTensor, that this rank writes: views, not copies.

    Every piece is some one rank's. What several ranks hold alike they share out by the name, so that each writes about
    as much. Raises ValueError for a DTensor on a mesh that is not all ranks.
    """
    pieces = []
    for name, tensor in tensors.items():
        turn = zlib.crc32(name.encode())
        if not isinstance(tensor, DTensor):
            if turn % world.size == world.rank:
                pieces.append(Piece(name, (0,) * tensor.dim(), tensor.detach()))
            continue
        mesh, values = tensor.device_mesh, tensor.to_local().detach()
        if mesh.size() != world.size:
            raise ValueError(f"{name} is spread over {mesh.size()} of {world.size} ranks")
        copies = [axis for axis, placement in enumerate(tensor.placements) if placement.is_replicate()]
        mine = all(mesh.get_local_rank(axis) == turn % mesh.size(axis) for axis in copies)
        if mine and (values.numel() or not tensor.numel()):
            (chunk,) = tensor.__create_chunk_list__()
            pieces.append(Piece(name, tuple(chunk.offsets), values))
    return pieces


def write_pieces(directory: Path, pieces: list[Piece], rank: int) -> list[str]:
    """Write `pieces` as this rank's shards into `directory`, each brought to the disk; their names.

    Raises UserError where the directory is not there or cannot be written, or the disk is full.
    """
    if not directory.is_dir():
        raise UserError(f"{directory}: made by rank 0 and not found by this one; save to a disk that all nodes share")
    files = _split(pieces)
    names = [f"shard-{rank + 1:05d}-model-{n:05d}-of-{len(files):05d}{SUFFIX}" for n in range(1, len(files) + 1)]
    with storage_errors("write", directory):
        for name, part in zip(names, files, strict=True):
            write_safetensors(
                directory / name,
                {piece.name: piece.values for piece in part},
                {SHARDING_NOTE: json.dumps({p.name: {"saved_offsets": list(p.offsets)} for p in part})},
            )
    return names


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], note: Mapping[str, str]) -> None:
    """Write `tensors` to the safetensors file `path`, and bring it to the disk. `note`: one entry of metadata.

    With more, safetensors writes them in random order, and equal states should be equal files.
    Raises OSError, or SafetensorError where it met one.
    """
    save_file({name: _own(tensor) for name, tensor in tensors.items()}, path, metadata=dict(note))
    os.chmod(path, path.parent.stat().st_mode & 0o666)  # save_file makes files that only their owner can read
    fsync_file(path)


def stored_tensors(directory: Path) -> dict[str, TensorStorageMetadata]:
    """What the shards of `directory` hold, by name: shape and type of each whole tensor, and its pieces.

    Raises UserError for unreadable shards, and for a tensor whose pieces do not make up the whole.
    """
    with storage_errors("read", directory):
        found = HuggingFaceStorageReader(str(directory)).read_metadata().state_dict_metadata
    stored = {name: entry for name, entry in sorted(found.items()) if isinstance(entry, TensorStorageMetadata)}
    for name, entry in stored.items():
        values, expected = sum(math.prod(chunk.sizes) for chunk in entry.chunks), math.prod(entry.size)
        if values != expected:
            raise UserError(f"{directory}: expected {expected:,} values of {name} in its shards, found {values:,}")
    return stored


def read_tensors(directory: Path, prefix: str = "") -> dict[str, Tensor]:
    """Every tensor in the shards of `directory` whose name begins with `prefix`, whole, on the CPU.

    Raises UserError for unreadable shards.
    """
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in stored_tensors(directory).items()
        if name.startswith(prefix)
    }
    read_into(directory, tensors)
    return tensors


def read_into(directory: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fill `tensors`, plain or DTensor, in place and by name from the shards of `directory`, whatever their layout.

    Each rank reads what it needs, without waiting for others. Raises UserError for unreadable shards.
    """
    with storage_errors("read", directory), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        dcp.load(dict(tensors), storage_reader=HuggingFaceStorageReader(str(directory)), no_dist=True)


def _own(tensor: Tensor) -> Tensor:
    """`tensor` on the CPU in storage of its own, as safetensors wants it; not copied if it is so already."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size():
        tensor = tensor.clone()
    return tensor


def _split(pieces: list[Piece]) -> list[list[Piece]]:
    """`pieces` in order, cut into files: a new one when the last has reached FILE_BYTES."""
    files: list[list[Piece]] = []
    size = FILE_BYTES
    for piece in pieces:
        if size >= FILE_BYTES:
            files.append([])
            size = 0
        files[-1].append(piece)
        size += piece.nbytes
    return files


@contextmanager
def storage_errors(action: str, directory: Path) -> Iterator[None]:
    """Name `directory` in what DCP and safetensors raise."""
    try:
        yield
    except CheckpointException as error:  # a BaseException: it would pass through every `except Exception`
        cause = next(iter(error.failures.values()))[0]
        if not isinstance(cause, Exception):
            raise cause from error
        raise _named(cause, action, directory) from error
    except (OSError, SafetensorError, KeyError, ValueError, RuntimeError, TypeError) as error:
        raise _named(error, action, directory) from error


def _named(error: Exception, action: str, directory: Path) -> UserError:
    if isinstance(error, UserError):
        return error
    code = _OS_ERROR.search(str(error)) if isinstance(error, SafetensorError) else None
    if code:
        error = OSError(int(code[1]), os.strerror(int(code[1])))
    if isinstance(error, OSError):
        return explain(error, action, directory)
    return UserError(f"cannot {action} the tensors of {directory}: {type(error).__name__}: {error}")
