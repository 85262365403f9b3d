"""AdamW with its decay groups, and the norm of the gradients."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from megatron.config import OptimizerConfig

CPU_PIECE = 1 << 17
"""Elements, 512 KB."""
GPU_PIECES = 1 << 26
"""Elements, 256 MB: what statistics may take beside the model."""


def decay_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, object]]:
    """Matrices decay, biases and layer norms do not; embeddings as --decay-embeddings says."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    decayed: list[Tensor] = []
    plain: list[Tensor] = []
    for parameter in model.parameters():
        decays = parameter.ndim >= 2 and (config.decay_embeddings or id(parameter) not in embeddings)
        (decayed if decays else plain).append(parameter)
    return [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Fused AdamW over the decay groups. Its learning rate is set before every step."""
    return torch.optim.AdamW(
        decay_groups(model, config),
        lr=0.0,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_eps,
        fused=True,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Use `lr` in every group from the next step on."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def gradients(parameters: Iterable[Tensor]) -> list[Tensor]:
    """The gradients that are there."""
    return [p.grad for p in parameters if p.grad is not None]


def squared_norm(tensors: list[Tensor]) -> Tensor:
    """This rank's summand of the squared l2 norm of all `tensors`, which may be spread over ranks: float64 scalar."""
    return torch.stack([power_sum(locals_, 2) / copies for copies, locals_ in local_parts(tensors)]).sum()


def power_sum(tensors: list[Tensor], order: float) -> Tensor:
    """Sum of |x|^order over all elements, for order 0.5 (of none below zero), 1 or 2: float64 scalar."""
    # The norms of a CPU add in fp32 one after the other, and go wrong; its sums go pairwise.
    return (sum_of_sums if tensors[0].device.type == "cpu" else sum_of_norms)(tensors, order)


def sum_of_sums(tensors: list[Tensor], order: float) -> Tensor:
    """`power_sum` piece by piece, each in the cache."""
    power = {0.5: Tensor.sqrt, 1: Tensor.abs, 2: Tensor.square}[order]
    sums = [power(piece).sum() for group in in_pieces(tensors) for piece in group]
    return torch.stack(sums).double().sum()


def sum_of_norms(tensors: list[Tensor], order: float) -> Tensor:
    """`power_sum` by few kernels, each over many tensors."""
    if order == 0.5:
        groups = [torch._foreach_norm(torch._foreach_sqrt(group), 1) for group in in_pieces(tensors)]
        return torch.stack([norm for group in groups for norm in group]).double().sum()
    return torch.stack(torch._foreach_norm(tensors, order)).double().pow_(order).sum()


def in_pieces(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """The elements of all `tensors`, flat, in lists of as many as are worked on at a time: on a CPU, what its cache
    holds."""
    limit = CPU_PIECE if tensors[0].device.type == "cpu" else GPU_PIECES
    group: list[Tensor] = []
    elements = 0
    for tensor in tensors:
        for piece in tensor.detach().flatten().split(limit):
            if group and elements + piece.numel() > limit:
                yield group
                group, elements = [], 0
            group.append(piece)
            elements += piece.numel()
    yield group


def scale_and_clip(grads: list[Tensor], norm: Tensor, *, loss_scale: float, max_norm: float) -> None:
    """Divide gradients by `loss_scale` and limit their global l2 norm to `max_norm` (0: no limit), in place.

    `norm` is what it is before clipping, after unscaling. Where it is not finite the gradients are of no use, and the
    caller skips the step.
    """
    factor = torch.full_like(norm, 1.0 / loss_scale)
    if max_norm > 0:
        factor = factor * torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    if max_norm > 0 or loss_scale != 1.0:
        for _, locals_ in local_parts(grads):
            torch._foreach_mul_(locals_, factor.to(locals_[0]))


def local_parts(tensors: Iterable[Tensor]) -> list[tuple[int, list[Tensor]]]:
    """The local tensors, empty ones left out, in lists by the number of ranks that hold a copy of each."""
    lists: dict[int, list[Tensor]] = {1: []}
    for tensor in tensors:
        copies, local = 1, tensor
        if isinstance(tensor, DTensor):
            sizes = zip(tensor.device_mesh.shape, tensor.placements, strict=True)
            copies = math.prod(size for size, placement in sizes if placement.is_replicate())
            local = tensor.to_local()
        if local.numel():
            lists.setdefault(copies, []).append(local)
    return [(copies, group) for copies, group in lists.items() if group]
