"""What a planned run will cost, for the planner to print. No torch."""

from __future__ import annotations

from typing import Any

from megatron.config import Config
from megatron.errors import UserError
from megatron.model.flops import parameter_count, training_flops
from megatron.pacing.plan import plan_run, sample_steps

GPT2_VOCAB_SIZE = 50257
ROWS = 12
"""Lines of the table over the run."""


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
    vocab_size = config.tokenizer.vocab_size or GPT2_VOCAB_SIZE
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
