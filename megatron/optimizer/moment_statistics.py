"""Norms of Adam's moments, the paper's measure of gradient variance."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron.distributed.world import World
from megatron.optimizer.adamw import local_parts, power_sum


@dataclass(frozen=True)
class MomentStatistics:
    """Norms over all parameters."""

    adam_variance_norm: float
    """l1 norm of sqrt(v_t), v_t the raw exp_avg_sq."""
    adam_variance_max: float
    """Largest element of sqrt(v_t)."""
    adam_momentum_norm: float
    """l1 norm of the momentum m_t."""


def moment_statistics(optimizer: torch.optim.AdamW, world: World) -> MomentStatistics | None:
    """Norms of the moments as they stand, of all ranks; None before the first step (Sections 3, A.2.2 of the paper)."""
    states = [s for s in optimizer.state.values() if "exp_avg_sq" in s]
    if not states:
        return None
    device = world.device
    sums = torch.zeros(2, dtype=torch.float64, device=device)  # variance, momentum
    largest = torch.zeros((), dtype=torch.float64, device=device)
    for copies, variances in local_parts(s["exp_avg_sq"] for s in states):
        largest = torch.maximum(largest, torch.stack(torch._foreach_max(variances)).max().double().to(device))
        sums[0] += power_sum(variances, 0.5).to(device) / copies
    for copies, momenta in local_parts(s["exp_avg"] for s in states):
        sums[1] += power_sum(momenta, 1).to(device) / copies
    largest = largest.sqrt()
    variance_norm, momentum_norm, variance_max = torch.cat([world.sum(sums), world.max(largest).reshape(1)]).tolist()
    return MomentStatistics(variance_norm, variance_max, momentum_norm)
