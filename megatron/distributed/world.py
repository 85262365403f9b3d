"""The processes of a run, and how they agree. In a single process everything here is trivial, and nothing waits."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from megatron.errors import SharedError, UserError
from megatron.layout import Layout

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among those of its run. `World()` is a process by itself, on the CPU."""

    rank: int = 0
    layout: Layout = field(default_factory=Layout)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    mesh: DeviceMesh | None = None
    """("replicate", "shard", "tp"); None for a process by itself."""
    control: dist.ProcessGroup | None = None
    """All ranks over gloo, for what is small and lives on the host."""
    background: dist.ProcessGroup | None = None
    """The same ranks again, for a thread that saves while training goes on."""

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.layout.world_size

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which prints, logs and commits."""
        return self.rank == 0

    @property
    def tp_rank(self) -> int:
        """Place among the ranks that share each layer."""
        return self.rank % self.layout.tp

    @property
    def dp_rank(self) -> int:
        """Place among the ranks that share the batch."""
        return self.rank // self.layout.tp

    def sum(self, values: Tensor) -> Tensor:
        """Add up `values` over all ranks, in place: the same bits everywhere."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def max(self, values: Tensor) -> Tensor:
        """The largest of `values` over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return values

    def total(self, value: int) -> int:
        """The sum of a number on the host over all ranks."""
        if self.size == 1:
            return value
        summed = torch.tensor([value])
        dist.all_reduce(summed, group=self.control)
        return int(summed.item())

    def any(self, flag: bool) -> bool:
        """Whether `flag` holds on some rank."""
        return self.total(int(flag)) > 0

    def gather(self, value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
        """`value` of every rank, in their order, on every rank; JSON values only. `group`: in place of `control`."""
        if self.size == 1:
            return [value]
        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        group = group or self.control
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(sizes, torch.tensor([len(data)]), group=group)
        longest = max(int(size) for size in sizes)
        rows = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.size)]
        dist.all_gather(rows, torch.nn.functional.pad(data, (0, longest - len(data))), group=group)
        return [json.loads(row[: int(size)].numpy().tobytes()) for row, size in zip(rows, sizes, strict=True)]

    def everywhere(self, function: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
        """Run `function` on every rank; where it fails on one it fails on all, and the first that failed says why.

        All ranks must call it. Raises that rank's UserError there, SharedError on the others. Other exceptions pass.
        """
        error: UserError | None = None
        try:
            result = function()
        except UserError as caught:
            error = caught
        faults = self.gather(None if error is None else str(error), group)
        first = next((rank for rank, fault in enumerate(faults) if fault is not None), None)
        if first is None:
            return result
        if error is not None and first == self.rank:
            raise error
        raise SharedError(f"rank {first}: {faults[first]}")

    def on_main(self, function: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
        """Run `function` on rank 0 alone and return its result, a JSON value, on every rank; as `everywhere`."""
        if self.size == 1:
            return function()
        result: T = self.gather(self.everywhere(lambda: function() if self.is_main else None, group), group)[0]
        return result

    def fault(self, message: str) -> UserError:
        """What to raise for a fault that all ranks have found alike, so that one of them reports it."""
        return UserError(message) if self.is_main else SharedError(message)


ALONE = World()
"""A process by itself, on the CPU."""
