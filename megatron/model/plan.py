"""What a planned run will cost, for the planner to print. No torch."""

from __future__ import annotations

from collections.abc import Iterator
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
        "lr_warmup_iterations": planned.lr_warmup_iterations,
        "lr_anchor_tokens": progress.lr_anchor_tokens,
        "vocab_size": vocab_size,
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
    lines = [
        f"iterations           {totals['iterations']:,}",
        f"tokens trained on    {totals['consumed_tokens']:,}",
        f"samples drawn        {totals['consumed_samples']:,}",
        f"discarded            {totals['discarded_share']:.1%} of the tokens drawn, by truncation",
        f"full length from     {f'step {full:,}' if full else 'never'}",
        f"LR warmup ends       after step {totals['lr_warmup_iterations']:,}",
        f"parameters           {totals['parameters'] / 1e6:,.1f}M (vocabulary {totals['vocab_size']:,})",
        f"FLOPs                {totals['flops']:.4g}",
        "",
        f"{'step':>12}{'seqlen':>9}{'batch':>9}{'tokens before':>20}{'lr':>12}",
    ]
    lines += [
        f"{before.iteration + 1:>12,}{step.seqlen:>9,}{step.global_batch_size:>9,}"
        f"{before.consumed_tokens:>20,}{step.lr:>12.3e}"
        for before, step in sample_steps(config, totals["iterations"], ROWS)
    ]
    return "\n".join(lines)


def plan_memory(config: Config, world_size: int, gpu_memory: float | None = None) -> dict[str, Any]:
    """Memory of each of `world_size` GPUs in bytes, as JSON values.

    With `gpu_memory`, in GB, also whether it fits, and where not, what each change would make of the total.

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
        memory["changes"] = {} if memory["fits"] else _savings(config, layout, memory["total"])
    return memory


def _vocab_size(config: Config) -> int:
    return config.tokenizer.vocab_size or GPT2_VOCAB_SIZE


def _savings(config: Config, layout: Layout, total: int) -> dict[str, int]:
    """Flags that would lower `total`, each by itself, and what the total would be."""
    savings = {}
    for flag, changed in _changes(config, layout):
        try:
            estimate = estimate_memory(changed, layout_of(changed, layout.world_size), _vocab_size(config))
        except UserError:  # these ranks cannot be laid out so
            continue
        if estimate.total + estimate.overhead < total:
            savings[flag] = estimate.total + estimate.overhead
    return savings


def _changes(config: Config, layout: Layout) -> Iterator[tuple[str, Config]]:
    training, parallel, seq_length = config.training, config.parallel, config.model.seq_length
    half = largest_micro_batch(config, layout) // 2
    if half >= seq_length and not training.fixed_micro_batch:
        smaller = replace(training, micro_batch_size=None, micro_batch_tokens=half)
        yield f"--micro-batch-tokens {half}", replace(config, training=smaller)
    if not (training.bf16 or training.fp16):
        yield "--bf16", replace(config, training=replace(training, bf16=True))
    if training.recompute_granularity != "full":
        full = replace(training, recompute_granularity="full")
        yield "--recompute-granularity full", replace(config, training=full)
    if layout.dp > 1 and parallel.zero_stage != 3:
        yield "--zero-stage 3", replace(config, parallel=replace(parallel, zero_stage=3))
    for tp in range(layout.tp + 1, config.model.num_attention_heads + 1):
        if config.model.num_attention_heads % tp == 0:
            split = replace(parallel, tensor_model_parallel_size=tp)
            yield f"--tensor-model-parallel-size {tp}", replace(config, parallel=split)


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
    return "\n".join(lines)
