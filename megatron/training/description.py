"""What a run is about to do, in words."""

from __future__ import annotations

from typing import get_args

from megatron.config import Config, TrainingConfig
from megatron.console import format_count, repetition
from megatron.data.datasets import Datasets
from megatron.distributed.world import World
from megatron.growth import Growth
from megatron.in_words import batch_size_pacing, learning_rate, seqlen_pacing
from megatron.model.flops import parameter_count
from megatron.pacing.plan import Outlook
from megatron.progress import Progress
from megatron.training.home import layout_name


def warnings(config: Config, progress: Progress, outlook: Outlook) -> list[str]:
    """What a user may not have meant; `outlook` is that from `progress`."""
    notes = []
    if config.checkpoint.save is None:
        notes.append("no --save DIR: nothing of this run will be kept")
    files = config.tokenizer
    if not (files.vocab_file or files.merge_file or files.tokenizer_file or files.vocab_size):
        notes.append(
            "no tokenizer's files are named: give --vocab-file and --merge-file, or --tokenizer-file, for tools that "
            "evaluate or export the run to find"
        )
    if outlook.full_length_iteration is None:
        notes.append(f"the run ends before its sequence length reaches --seq-length {config.model.seq_length}")
    if config.seqlen_warmup.seqlen_warmup in get_args(Growth):
        planned = outlook.scheduled
        same_samples = progress.consumed_samples == planned.consumed_samples  # else some were skipped
        if same_samples and progress.consumed_tokens != planned.consumed_tokens:
            notes.append(
                f"the run has had {progress.consumed_tokens:,} tokens by step {progress.iteration:,} and would have "
                f"had {planned.consumed_tokens:,} with the pacing as it is now: its settings or its code have changed"
            )
    return notes


def describe(
    config: Config, datasets: Datasets, vocab_size: int, world: World, progress: Progress, outlook: Outlook
) -> str:
    """What is about to happen, in a few lines; `outlook` is that from `progress`."""
    per_epoch = datasets.train.num_samples_per_epoch
    repeated = repetition(outlook.end.consumed_samples, per_epoch, validated=datasets.validation is not None)
    parameters = parameter_count(config.model, vocab_size)
    padded = config.model.padded_vocab_size(vocab_size)
    padding = f" (padded to {padded:,})" if padded != vocab_size else ""
    ranks = str(world.device.type)
    if world.size > 1:
        ranks = f"{world.size} x {ranks} ({layout_name(config, world)})"
    lines = [
        f"model      {config.model.num_layers} layers, hidden {config.model.hidden_size}, "
        f"{config.model.num_attention_heads} heads, {format_count(parameters)} parameters, "
        f"vocabulary {vocab_size:,}{padding}",
        f"data       {datasets.num_tokens[0]:,} training tokens, {per_epoch:,} samples an epoch",
        f"length     {config.model.seq_length}, sequence length warmup: {seqlen_pacing(config)}"
        + (f", now {outlook.seqlen}" if outlook.seqlen not in (None, config.model.seq_length) else ""),
        f"rate       {learning_rate(config)}",
        f"batch      {config.training.global_batch_size} sequences a step{batch_size_pacing(config)}, on {ranks}, "
        f"{precision(config.training)}, from step {progress.iteration + 1:,}",
        f"until      {end(config, progress, outlook)}",
        *(f"note       {note}" for note in [*datasets.notes, *warnings(config, progress, outlook), *repeated]),
    ]
    return "\n".join(lines)


def precision(training: TrainingConfig) -> str:
    """In what the forward and backward passes compute."""
    if training.fp16:
        return f"fp16 (loss scale {training.loss_scale or 'dynamic'})"
    return "bf16 (autocast)" if training.bf16 else "fp32"


def last_step(config: Config, outlook: Outlook) -> int | None:
    """The step that the run ends with; None where an adaptive warmup decides what tokens the steps until then have."""
    adaptive = config.seqlen_warmup.seqlen_warmup == "adaptive"
    return None if adaptive and any(end.unit == "tokens" for end in config.training.ends()) else outlook.end.iteration


def end(config: Config, progress: Progress, outlook: Outlook) -> str:
    """Where the run ends and is at full length, as far as that is known, and what stops it before."""
    last, full, training = outlook.end, outlook.full_length_iteration, config.training
    words = f"step {last.iteration:,} ({format_count(last.consumed_tokens)} tokens)"
    if last.iteration == progress.iteration:
        return f"{words}, which is reached"
    if config.seqlen_warmup.seqlen_warmup == "adaptive":
        words += " if every validation lengthens, else more steps or fewer tokens"
    elif full is not None and full > 1:
        again = " for the first time" if config.seqlen_warmup.seqlen_warmup == "mixed" else ""
        words += f", full length from step {full:,}{again}"
    interval, minutes = training.exit_interval, training.exit_duration_in_mins
    if interval and (stop := (progress.iteration // interval + 1) * interval) < last.iteration:
        words += f"; stops at step {stop:,} (--exit-interval {interval})"
    return words if minutes is None else f"{words}; stops after {minutes:g} minutes (--exit-duration-in-mins)"
