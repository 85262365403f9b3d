"""What a planned run will cost, for the planner to print. No torch."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

from megatron.config import Config, require
from megatron.errors import UserError
from megatron.layout import Layout, layout_of
from megatron.model.flops import parameter_count, training_flops
from megatron.model.memory import estimate_memory, largest_micro_batch
from megatron.pacing.plan import plan_run, sample_steps

GPT2_VOCAB_SIZE = 50257
ROWS = 12
"""Lines of the table over the run."""
GB = 10**9
ADAPTIVE = (
    "adaptive pacing      planned as if every validation lengthened; with any that does not the run has more steps"
)


def plan_totals(config: Config, at: int | None = None) -> dict[str, Any]:
    """The totals of the run, or of its first `at` steps, as JSON values.

    FLOPs are for --vocab-size, or GPT-2's 50,257 where it is not given.
    """
    if at is not None and at < 0:
        raise UserError(f"--at {at} must not be negative")
    planned = plan_run(config, at)
    progress = planned.progress
    if at is not None and progress.iteration < at:
        raise UserError(f"--at {at:,}: the run ends after {progress.iteration:,} iterations")
    vocab_size = _vocab_size(config)
    return {
        "iterations": progress.iteration,
        "consumed_tokens": progress.consumed_tokens,
        "consumed_samples": progress.consumed_samples,
        "discarded_share": planned.discarded_share,
        "full_length_iteration": planned.full_length_iteration,
        "lengthens_at_every_validation": config.seqlen_warmup.seqlen_warmup == "adaptive",
        "lr_warmup_iterations": planned.lr_warmup_iterations,
        "lr_anchor_tokens": progress.lr_anchor_tokens,
        "vocab_size": vocab_size,
        "vocab_size_assumed": config.tokenizer.vocab_size is None,
        "parameters": parameter_count(config.model, vocab_size),
        "flops": training_flops(
            config.model,
            vocab_size,
            tokens=progress.consumed_tokens,
            token_seqlen_sum=planned.token_seqlen_sum,
            recompute=config.training.recompute_granularity == "full",
        ),
    }


def plan_table(config: Config, totals: dict[str, Any]) -> str:
    """The totals in words, and a few steps over the run."""
    full = totals["full_length_iteration"]
    assumed = ", assumed: give --vocab-size, the tokenizer or --data-path" if totals["vocab_size_assumed"] else ""
    when = f"step {full:,}" if full else "never"
    if full and config.seqlen_warmup.seqlen_warmup == "mixed":
        when += f" for the first time: {config.seqlen_warmup.seqlen_cycle}, again and again"
    lines = [
        f"iterations           {totals['iterations']:,}",
        f"tokens trained on    {totals['consumed_tokens']:,}",
        f"samples drawn        {totals['consumed_samples']:,}",
        f"discarded            {totals['discarded_share']:.1%} of the tokens drawn, by truncation",
        f"full length from     {when}",
        f"LR warmup ends       after step {totals['lr_warmup_iterations']:,}",
        f"parameters           {totals['parameters']:,} (vocabulary {totals['vocab_size']:,}{assumed})",
        f"FLOPs                {totals['flops']:.4g}",
        *([ADAPTIVE] if totals["lengthens_at_every_validation"] else []),
        "",
        f"{'step':>12}{'seqlen':>9}{'batch':>9}{'tokens before':>20}{'lr':>12}",
    ]
    lines += [
        f"{before.iteration + 1:>12,}{step.seqlen:>9,}{step.global_batch_size:>9,}"
        f"{before.consumed_tokens:>20,}{step.lr:>12.3e}"
        for before, step in sample_steps(config, totals["iterations"], ROWS, full)
    ]
    return "\n".join(lines)


def plan_memory(config: Config, world_size: int, gpu_memory: float | None = None) -> dict[str, Any]:
    """Memory of each of `world_size` GPUs in bytes, as JSON values.

    With `gpu_memory`, in GB, also whether it fits, and where not, what each change would make of the total, and the
    fewest changes that are enough.

    Raises:
        UserError: where the ranks cannot be laid out, or a number makes no sense.
    """
    require(world_size >= 1, f"--world-size {world_size} must be at least 1")
    require(
        gpu_memory is None or 0 < gpu_memory < float("inf"), f"--gpu-memory {gpu_memory} must be a number of GB above 0"
    )
    layout = layout_of(config, world_size)
    estimate = estimate_memory(config, layout, _vocab_size(config))
    memory: dict[str, Any] = {
        "world_size": world_size,
        "data_parallel_size": layout.dp,
        "tensor_model_parallel_size": layout.tp,
        "micro_batch_tokens": largest_micro_batch(config, layout),
        **asdict(estimate),
        "tensors": estimate.total,
        "overhead": estimate.overhead,
        "total": estimate.total + estimate.overhead,
    }
    if gpu_memory is not None:
        memory["gpu_memory"] = round(gpu_memory * GB)
        memory["fits"] = memory["total"] <= memory["gpu_memory"]
        memory["changes"], memory["enough"] = (
            ({}, None) if memory["fits"] else _cure(config, layout, memory["gpu_memory"])
        )
    return memory


def _vocab_size(config: Config) -> int:
    return config.tokenizer.vocab_size or GPT2_VOCAB_SIZE


def _cure(config: Config, layout: Layout, limit: int) -> tuple[dict[str, int], str | None]:
    """What each change by itself, of those that help, would make of the total; and the fewest changes that together
    bring it down to `limit` bytes, None where none do."""
    axes = _changes(config, layout)
    before = _total(config, layout) or 0
    single: dict[str, int] = {}
    best: tuple[int, int, str] | None = None
    for choice in itertools.product(*axes):
        changes = [change for change in choice if change is not None]
        flags = " ".join(flag for flag, _ in changes)
        changed = config
        for _, change in changes:
            changed = change(changed)
        total = _total(changed, layout)
        if total is None:
            continue
        if len(changes) == 1 and total < before:
            single[flags] = total
        if total <= limit and (best is None or (len(changes), total) < best[:2]):
            best = (len(changes), total, flags)
    return single, best and best[2]


def _total(config: Config, layout: Layout) -> int | None:
    """Bytes of a GPU, None where these ranks cannot be laid out so."""
    try:
        estimate = estimate_memory(config, layout_of(config, layout.world_size), _vocab_size(config))
    except UserError:
        return None
    return estimate.total + estimate.overhead


Change = tuple[str, Callable[[Config], Config]]
"""A flag, and what it makes of a configuration."""


def _changes(config: Config, layout: Layout) -> list[list[Change | None]]:
    """What may be changed to need less memory: of each list one, or nothing."""
    training, parallel, seq_length = config.training, config.parallel, config.model.seq_length

    def train(flag: str, **values: Any) -> Change:
        return flag, lambda c: replace(c, training=replace(c.training, **values))

    def spread(flag: str, **values: Any) -> Change:
        return flag, lambda c: replace(c, parallel=replace(c.parallel, **values))

    axes: list[list[Change | None]] = [[None], [None], [None], [None], [None], [None]]
    smaller = largest_micro_batch(config, layout) // 2
    while smaller >= seq_length and not training.fixed_micro_batch:
        axes[0].append(train(f"--micro-batch-tokens {smaller}", micro_batch_size=None, micro_batch_tokens=smaller))
        smaller //= 2
    if not (training.bf16 or training.fp16):
        axes[1].append(train("--bf16", bf16=True))
    if training.recompute_granularity != "full":
        axes[2].append(train("--recompute-granularity full", recompute_granularity="full"))
    if layout.dp > 1 and parallel.zero_stage != 3:
        axes[3].append(spread("--zero-stage 3", zero_stage=3))
    if not parallel.optimizer_cpu_offload:
        axes[4].append(spread("--optimizer-cpu-offload", optimizer_cpu_offload=True))
    heads = config.model.num_attention_heads
    for tp in (n for n in range(layout.tp, heads + 1) if heads % n == 0):
        flag = f"--tensor-model-parallel-size {tp}"
        if tp > layout.tp:
            axes[5].append(spread(flag, tensor_model_parallel_size=tp))
        if tp > 1 and not parallel.sequence_parallel:
            flag = "--sequence-parallel" if tp == layout.tp else f"{flag} --sequence-parallel"
            axes[5].append(spread(flag, tensor_model_parallel_size=tp, sequence_parallel=True))
    return axes


MEMORY_ROWS = {
    "weights": "fp32",
    "gradients": "fp32",
    "optimizer": "AdamW's two moments, fp32",
    "gathered": "weights put together for use by FSDP2",
    "copies": "16-bit copies of matrices",
    "activations": "kept for the backward pass",
    "loss": "logits and loss",
    "block": "one block in its backward pass; of this and the line above the larger counts",
}


def memory_table(memory: dict[str, Any]) -> str:
    """What `plan_memory` found, in GB (10^9 bytes)."""
    lines = [
        f"memory a GPU, GB     dp {memory['data_parallel_size']} x tp {memory['tensor_model_parallel_size']}, "
        f"micro-batches of up to {memory['micro_batch_tokens']:,} tokens, at every length",
        *(f"  {name:<14}{memory[name] / GB:>10.2f}  {what}" for name, what in MEMORY_ROWS.items()),
        f"  {'overhead':<14}{memory['overhead'] / GB:>10.2f}  assumed: CUDA context, libraries, allocator",
        f"  {'total':<14}{memory['total'] / GB:>10.2f}",
    ]
    if "fits" not in memory:
        return "\n".join(lines)
    verdict = "fits" if memory["fits"] else "does not fit"
    lines.append(f"{verdict} in {memory['gpu_memory'] / GB:g} GB")
    lines += [f"  {flag} would take {total / GB:.2f}" for flag, total in memory["changes"].items()]
    if memory["enough"]:
        lines.append(f"enough: {memory['enough']}")
    elif not memory["fits"]:
        lines.append("no combination of these is enough: take more GPUs, or a smaller model")
    return "\n".join(lines)
