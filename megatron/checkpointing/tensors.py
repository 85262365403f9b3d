"""Tensors of a checkpoint, through torch.distributed.checkpoint (DCP) with safetensors storage.

One code path for one process and many: DCP runs without a process group, and what one layout wrote any other
can read. The stock storage of DCP keeps its metadata in a pickle, which runs code when it is read: it is never
used here. The files are those of DCP's HuggingFaceStorageWriter, and its reader reads them, but they are written
straight from the tensors: DCP builds each file in memory first, through three copies, and takes three times as long.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from megatron.errors import UserError
from megatron.files import explain, fsync_file

FILE_BYTES = 1 << 30
"""A shard is closed when it has grown to this: it bounds the copies of GPU tensors that are held on the host."""
SUFFIX = ".safetensors"
_OS_ERROR = re.compile(r"os error (\d+)")


def write_tensors(directory: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write `tensors` as safetensors shards into the existing, empty `directory`, each brought to the disk.

    Raises UserError where the directory cannot be written or the disk is full.
    """
    if not tensors:
        raise ValueError("a checkpoint needs at least one tensor")
    with _storage_errors("write", directory):
        dcp.save({name: tensor.detach() for name, tensor in tensors.items()}, storage_writer=_ShardWriter(directory))


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """Every tensor in the shards of `directory`, whole, on the CPU. Raises UserError for unreadable shards."""
    with _storage_errors("read", directory):
        described = HuggingFaceStorageReader(str(directory)).read_metadata().state_dict_metadata
        tensors = {
            name: torch.empty(entry.size, dtype=entry.properties.dtype)
            for name, entry in sorted(described.items())
            if isinstance(entry, TensorStorageMetadata)
        }
    read_into(directory, tensors)
    return tensors


def read_into(directory: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fill `tensors` by name from the shards of `directory`. Raises UserError for unreadable shards."""
    with _storage_errors("read", directory):
        dcp.load(dict(tensors), storage_reader=HuggingFaceStorageReader(str(directory)))


class _ShardWriter(HuggingFaceStorageWriter):
    """Each process writes its own shards: files `shard-<process>-model-<i>-of-<n>.safetensors`."""

    def __init__(self, directory: Path) -> None:
        super().__init__(str(directory), save_distributed=True)
        self.directory = directory

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return [replace(plan, storage_data=process) for process, plan in enumerate(plans, start=1)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        files = _split(plan.items)
        results = []
        for index, items in enumerate(files, start=1):
            path = self.directory / f"shard-{plan.storage_data:05d}-model-{index:05d}-of-{len(files):05d}{SUFFIX}"
            results += _write_shard(path, items, planner)
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done


def _write_shard(path: Path, items: list[WriteItem], planner: SavePlanner) -> list[WriteResult]:
    """One safetensors file, with the note from which DCP's reader learns where a piece lies in its whole tensor."""
    tensors: dict[str, Tensor] = {}
    offsets: dict[str, dict[str, list[int]]] = {}
    results = []
    for item in items:
        name = item.index.fqn
        if item.tensor_data is None or name in tensors:
            raise ValueError(f"{name} is not one piece of a tensor")
        value = planner.resolve_data(item)
        if not isinstance(value, Tensor):
            raise ValueError(f"{name} is not a tensor")
        tensors[name] = _own(value)
        offsets[name] = {"saved_offsets": list(item.tensor_data.chunk.offsets)}
        results.append(WriteResult(item.index, _bytes_of(item), path.name))
    # One entry only: safetensors writes several in random order, and equal states should be equal files.
    save_file(tensors, path, metadata={"DCP_SHARDING_INFO": json.dumps(offsets)})
    os.chmod(path, path.parent.stat().st_mode & 0o666)  # save_file makes files that only their owner can read
    fsync_file(path)
    return results


def _own(tensor: Tensor) -> Tensor:
    """`tensor` on the CPU in storage of its own, as safetensors wants it; not copied if it is so already."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size():
        tensor = tensor.clone()
    return tensor


def _split(items: list[WriteItem]) -> list[list[WriteItem]]:
    """`items` in order, cut into files: a new one when the last has reached FILE_BYTES."""
    files: list[list[WriteItem]] = []
    size = FILE_BYTES
    for item in items:
        if size >= FILE_BYTES:
            files.append([])
            size = 0
        files[-1].append(item)
        size += _bytes_of(item)
    return files


def _bytes_of(item: WriteItem) -> int:
    if item.tensor_data is None:
        return 0
    return item.tensor_data.chunk.sizes.numel() * item.tensor_data.properties.dtype.itemsize


@contextmanager
def _storage_errors(action: str, directory: Path) -> Iterator[None]:
    """Name `directory` in what DCP raises, and silence its notice that there is no process group."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
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
