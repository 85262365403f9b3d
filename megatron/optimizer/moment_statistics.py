"""Norms of Adam's moments, the paper's measure of gradient variance."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 26
"""Square roots of so many elements are held at a time (256 MB)."""


@dataclass(frozen=True)
class MomentStatistics:
    """Norms over all parameters."""

    adam_variance_norm: float
    """l1 norm of sqrt(v_t), v_t the raw exp_avg_sq."""
    adam_variance_max: float
    """Largest element of sqrt(v_t)."""
    adam_momentum_norm: float
    """l1 norm of the momentum m_t."""


def moment_statistics(optimizer: torch.optim.AdamW) -> MomentStatistics | None:
    """Norms of the moments as they stand; None before the first step (Sections 3 and A.2.2 of the paper)."""
    states = [s for s in optimizer.state.values() if "exp_avg_sq" in s]
    if not states:
        return None
    variance_norm: list[Tensor] = []
    variance_max: list[Tensor] = []
    momentum_norm: list[Tensor] = []
    for chunk in _chunks(states):
        roots = torch._foreach_sqrt([s["exp_avg_sq"] for s in chunk])
        variance_norm += torch._foreach_norm(roots, 1)
        variance_max += torch._foreach_max(roots)
        momentum_norm += torch._foreach_norm([s["exp_avg"] for s in chunk], 1)
    totals = torch.stack(
        [torch.stack(variance_norm).double().sum(), torch.stack(variance_max).double().max(),
         torch.stack(momentum_norm).double().sum()]
    ).tolist()  # fmt: skip
    return MomentStatistics(*totals)


def _chunks(states: list[dict[str, Tensor]]) -> Iterator[list[dict[str, Tensor]]]:
    """States in groups of at most CHUNK_ELEMENTS elements, at least one each."""
    chunk: list[dict[str, Tensor]] = []
    elements = 0
    for state in states:
        size = state["exp_avg_sq"].numel()
        if chunk and elements + size > CHUNK_ELEMENTS:
            yield chunk
            chunk, elements = [], 0
        chunk.append(state)
        elements += size
    yield chunk
