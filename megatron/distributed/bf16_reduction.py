"""Gradients sent in bf16. Builds on a private module of torch, which nothing else should need."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultReduceScatter


class ReduceScatterInBf16(DefaultReduceScatter):
    """FSDP2's reduction of gradients through buffers of bf16, over which hybrid sharding's all-reduce goes as well.

    `MixedPrecisionPolicy(reduce_dtype=torch.bfloat16)` would send the same, but also add up in bf16 the micro-batches
    of stages 0 and 2, which are reduced together (FSDPParam.to_accumulated_grad_if_needed, torch 2.11 to 2.13).
    """

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A buffer for what is sent or received, of bf16 whatever `dtype` the gradients have."""
        return super().allocate(size, dtype=torch.bfloat16, device=device)
