"""A model spread over the ranks of a world: tensor parallel, then compiled, then checkpointed, then sharded.

The order matters: the compiler sees local arithmetic, activation checkpointing stands outside of it, and FSDP2's hooks
around both. A process by itself takes the same road; only the first and the last step are left out.
"""

from __future__ import annotations

import os
import shutil
import sysconfig
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config
import torch.fx.experimental._config
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from megatron.config import ParallelConfig, TrainingConfig
from megatron.distributed.tensor_parallel import Region, split_model
from megatron.distributed.world import World
from megatron.model.gpt2 import GPT2Model

Report = Callable[[str], None]
SELECTIVE_MEMORY_BUDGET = 0.5
"""Share of a compiled block's activations that the compiler may keep under selective recomputation: it then recomputes
what is cheap, by its own estimate of run times."""


def parallelize(
    model: GPT2Model, world: World, parallel: ParallelConfig, training: TrainingConfig, report: Report
) -> None:
    """Spread `model`, on the meta device as yet, over `world` in place, and give it storage on the world's device."""
    if world.layout.tp > 1 and world.mesh is not None:
        split_model(model, Region(world.mesh["tp"], parallel.sequence_parallel))
    compiled = compile_model(model, world.device, training, report)
    recompute(model, training.recompute_granularity, compiled=compiled)
    if world.mesh is not None:
        shard(model, world, world.mesh, parallel)
    model.to_empty(device=torch.device("cpu") if parallel.optimizer_cpu_offload else world.device)
    model.computes_on = world.device


def compile_model(model: GPT2Model, device: torch.device, training: TrainingConfig, report: Report) -> bool:
    """Compile each block and the loss, for any length, where --compile asks for it or a GPU makes it pay.

    All blocks share their code, so that this costs a few compilations a run, whatever the depth and the lengths.
    """
    on_gpu = device.type == "cuda"
    if training.compile == "off" or (training.compile == "auto" and not on_gpu):
        return False
    if lacking := missing_for_compile(on_gpu=on_gpu):
        where = "a GPU" if on_gpu else "a CPU"
        report(f"--compile {training.compile}: no {lacking}, which torch.compile needs on {where}; running eagerly")
        return False
    # Without this a number of tokens that happens to equal the hidden size is taken for it, and compiled for anew.
    torch.fx.experimental._config.use_duck_shape = False
    selective = training.recompute_granularity == "selective"
    torch._functorch.config.activation_memory_budget = SELECTIVE_MEMORY_BUDGET if selective else 1.0
    from megatron.distributed.keep_random import keep_random  # noqa: PLC0415  (a second's import, for those who compile)

    keep_random(selective)
    if hasattr(torch._functorch.config, "unsafe_treat_script_objects_as_zero_size"):
        # The budget asks for the size of all inputs; those that are no tensors are process groups.
        torch._functorch.config.unsafe_treat_script_objects_as_zero_size = True
    # Dropout of attention under tensor parallelism swaps the generator, which cannot be traced.
    whole = "attend" not in vars(model.blocks[0].attention)
    if not whole:
        report(
            "attention dropout with tensor parallelism is left out of the compiled graphs: --sequence-parallel, or no "
            "--attention-dropout, is faster"
        )
    for block in model.blocks:
        block.forward = torch.compile(block.forward, dynamic=True, fullgraph=whole)
    model.head.loss = torch.compile(model.head.loss, dynamic=True, fullgraph=True)  # type: ignore[method-assign]
    return True


def missing_for_compile(*, on_gpu: bool) -> str | None:
    """What of a compiler's tool chain this machine lacks for torch.compile, in words; None where all is there."""
    if on_gpu and not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "C compiler found (gcc)"
    if not on_gpu and not (shutil.which("g++") or shutil.which("clang++")):
        return "C++ compiler found (g++)"
    headers = Path(sysconfig.get_path("include"))
    return None if (headers / "Python.h").is_file() else f"Python.h found in {headers} (python3-dev)"


def recompute(model: GPT2Model, granularity: str, *, compiled: bool) -> None:
    """Keep less of each block for its backward pass, as --recompute-granularity says."""
    if granularity == "none" or (granularity == "selective" and compiled):  # which is then the compiler's affair
        return
    contexts: dict[str, Any] = {}
    if granularity == "selective":
        contexts["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_products)
    for block in model.blocks:
        block.forward = _checkpointed(block, block.forward, contexts)


def _checkpointed(block: nn.Module, forward: Callable[..., Tensor], contexts: dict[str, Any]) -> Callable[..., Tensor]:
    def recomputing(*arguments: Any) -> Tensor:
        if not block.training:
            return forward(*arguments)
        return checkpoint(forward, *arguments, use_reentrant=False, **contexts)

    return recomputing


_PRODUCTS = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.megatron.causal_attention.default,
}


def _keep_products(context: Any, op: Any, *arguments: Any, **keywords: Any) -> CheckpointPolicy:
    """Keep what is dear to compute again, matrix products and attention, and what has passed between ranks."""
    dear = op in _PRODUCTS or op.namespace in ("c10d", "_c10d_functional")
    return CheckpointPolicy.MUST_SAVE if dear else CheckpointPolicy.PREFER_RECOMPUTE


def shard(model: GPT2Model, world: World, mesh: DeviceMesh, parallel: ParallelConfig) -> None:
    """Shard each block, and the rest with the root, over the data parallel ranks (FSDP2); gradients are summed."""
    if parallel.grad_reduce_in_bf16:
        from megatron.distributed.bf16_reduction import ReduceScatterInBf16  # noqa: PLC0415  (needs a private module)
    one_axis = world.layout.replicate == 1
    options: dict[str, Any] = {
        "mesh": mesh["shard"] if one_axis else mesh["replicate", "shard"],
        "offload_policy": CPUOffloadPolicy() if parallel.optimizer_cpu_offload else OffloadPolicy(),
    }
    for block in model.blocks:
        fully_shard(block, reshard_after_forward=parallel.zero_stage == 3, **options)
    fully_shard(model, **options)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # The loss is divided by the tokens of all ranks already.
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)
            if parallel.grad_reduce_in_bf16:
                module.set_custom_reduce_scatter(ReduceScatterInBf16())


def place(parameter: Tensor, values: Tensor) -> None:
    """Copy a whole tensor's values into a parameter, or its part of them into one that is spread over ranks."""
    if isinstance(parameter, DTensor):
        spread = distribute_tensor(values, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.to_local().copy_(spread.to_local())
    else:
        parameter.copy_(values)


def before_backward(model: nn.Module, parallel: ParallelConfig, *, last: bool) -> None:
    """Tell a sharded model whether the coming micro-batch is the `last` of its step.

    Up to there stages 0 and 2 keep weights gathered and add up gradients on each rank; stage 3 has not the memory, and
    reduces every micro-batch.
    """
    if not isinstance(model, FSDPModule):
        return
    model.set_is_last_backward(last)
    if parallel.zero_stage != 3:
        model.set_requires_gradient_sync(last)
        model.set_reshard_after_backward(last)


def reshard(model: nn.Module) -> None:
    """Free the weights that forward passes without a backward pass have gathered."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
