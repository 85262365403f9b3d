"""Model and optimizer as one flat table of named tensors, and back, bit for bit.

`model.<name>` is a parameter or a persistent buffer, `optim.<name>.<exp_avg|exp_avg_sq|step>` what AdamW remembers
of it. A tied weight is one parameter and stands here once. Where ranks share the model, all but `step` and buffers are
DTensors, and the table has the same names and whole shapes on every rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.optim import Optimizer

from megatron.checkpointing.tensors import read_into, stored_tensors
from megatron.distributed.world import ALONE, World
from megatron.errors import UserError

MOMENTS = ("exp_avg", "exp_avg_sq")
STEP = "step"
_LISTED = 8


def collect(model: nn.Module, optimizer: Optimizer | None = None) -> dict[str, Tensor]:
    """Name -> tensor of the model and, where given, of its AdamW: the live tensors themselves, not copies.

    Every parameter that the optimizer updates has its three entries. One that never got a gradient has zeros,
    which is what AdamW starts from, so that the table of names depends on the model alone.
    Raises ValueError for an optimizer state or a parameter that the table has no place for.
    """
    return _table(model, optimizer)[0]


def restore(model: nn.Module, optimizer: Optimizer | None, path: Path, *, world: World = ALONE) -> None:
    """Read the tensors of the checkpoint `path` into the model and its AdamW, which may be freshly built.

    All ranks call it, each reading what it has a part of; the layout that the checkpoint was saved in does not matter.
    With `optimizer` None the `optim.` entries are left aside. Raises UserError on every rank, before anything is
    changed, that lists the names which are missing, unexpected or of another shape or type.
    """
    table, fresh = _table(model, optimizer)

    def check() -> None:
        stored = stored_tensors(path)
        if optimizer is None:
            stored = {name: entry for name, entry in stored.items() if not name.startswith("optim.")}
        require_fit(table, stored)

    world.everywhere(check)
    world.everywhere(lambda: read_into(path, table))
    if optimizer is not None:
        _remember(optimizer, fresh)


def start_moments(model: nn.Module, optimizer: Optimizer) -> None:
    """Give AdamW the moments that it starts from, and would make in its first step."""
    _remember(optimizer, _table(model, optimizer)[1])


def _remember(optimizer: Optimizer, fresh: dict[nn.Parameter, dict[str, Tensor]]) -> None:
    for parameter, state in fresh.items():
        optimizer.state[parameter] = state


def require_fit(destination: Mapping[str, Tensor], stored: Mapping[str, TensorStorageMetadata]) -> None:
    """Raise UserError unless names, shapes and types of what is stored are exactly those of `destination`."""
    missing = [name for name in destination if name not in stored]
    unexpected = [name for name in stored if name not in destination]
    mismatched = []
    for name, tensor in destination.items():
        if name in stored:
            expected = _describe(tensor.shape, tensor.dtype)
            found = _describe(stored[name].size, stored[name].properties.dtype)
            if expected != found:
                mismatched.append(f"{name} (expected {expected}, found {found})")
    faults = [
        f"{len(names)} {kind}: {', '.join(names[:_LISTED])}{', ...' if len(names) > _LISTED else ''}"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("mismatched", mismatched))
        if names
    ]
    if faults:
        hint = ""
        if missing and all(name.startswith("optim.") for name in missing) and not unexpected:
            hint = " (saved without optimizer state? --no-load-optim or --finetune loads the weights only)"
        raise UserError(f"the checkpoint does not fit the model: {'; '.join(faults)}{hint}; check the model's flags")


def _table(
    model: nn.Module, optimizer: Optimizer | None
) -> tuple[dict[str, Tensor], dict[nn.Parameter, dict[str, Tensor]]]:
    """The flat table, and the states made for parameters of which the optimizer remembers nothing yet."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    table: dict[str, Tensor] = {f"model.{name}": parameter.detach() for parameter, name in names.items()}
    persistent = model.state_dict(keep_vars=True)
    for name, buffer in model.named_buffers():
        if name in persistent:
            table[f"model.{name}"] = buffer.detach()
    fresh: dict[nn.Parameter, dict[str, Tensor]] = {}
    for group in optimizer.param_groups if optimizer is not None else ():
        for parameter in group["params"]:
            if parameter not in names:
                raise ValueError(f"the optimizer updates a tensor of shape {tuple(parameter.shape)} not in the model")
            state = optimizer.state.get(parameter) if optimizer is not None else None
            if not state:
                state = fresh[parameter] = _first_state(parameter, group)
            if sorted(state) != sorted((*MOMENTS, STEP)):
                raise ValueError(f"the optimizer remembers {sorted(state)} of {names[parameter]}, which is not AdamW's")
            table |= {f"optim.{names[parameter]}.{key}": state[key] for key in (*MOMENTS, STEP)}
    return table, fresh


def _first_state(parameter: nn.Parameter, group: dict[str, object]) -> dict[str, Tensor]:
    """What torch's AdamW starts from at the first gradient of `parameter`."""
    on_device = bool(group.get("fused") or group.get("capturable"))
    step = torch.zeros((), dtype=torch.float32, device=parameter.device if on_device else "cpu")
    return {STEP: step} | {key: torch.zeros_like(parameter, requires_grad=False) for key in MOMENTS}


def _describe(shape: torch.Size, dtype: torch.dtype) -> str:
    return f"{tuple(shape)} {str(dtype).removeprefix('torch.')}"
