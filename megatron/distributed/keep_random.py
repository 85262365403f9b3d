"""What a compiled backward pass may not compute again."""

from __future__ import annotations

import torch
from torch._inductor import config
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.utils.checkpoint import CheckpointPolicy


def keep_random(on: bool) -> None:
    """Whether code that is compiled from now on keeps what its forward pass drew for the backward pass.

    With an activation memory budget torch.compile would draw again, other numbers than the forward pass, so that
    dropout's masks would differ between the two.
    """
    config.joint_custom_post_pass = _KeepRandom() if on else None


class _KeepRandom(CustomGraphPass):
    def __call__(self, graph: torch.fx.Graph) -> None:
        for node in graph.nodes:
            if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
                node.meta["recompute"] = CheckpointPolicy.MUST_SAVE

    def uuid(self) -> str:
        """The name of this pass to the cache of compiled code."""
        return "megatron: random numbers are kept"
