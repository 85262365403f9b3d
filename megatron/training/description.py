"""What a run is about to do, in words."""

from __future__ import annotations

from typing import get_args

from megatron.config import Config, TrainingConfig
from megatron.console import format_count, repetition
from megatron.data.datasets import Datasets
from megatron.distributed.world import World
from megatron.growth import Growth
from megatron.model.flops import parameter_count
from megatron.pacing.plan import Outlook, look_ahead
from megatron.progress import Duration, Progress
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


def describe(config: Config, datasets: Datasets, vocab_size: int, world: World, progress: Progress) -> str:
    """What is about to happen, in a few lines."""
    outlook = look_ahead(config, progress)
    repeated = repetition(outlook.end.consumed_tokens, datasets.num_tokens[0])
    parameters = parameter_count(config.model, vocab_size)
    padded = config.model.padded_vocab_size(vocab_size)
    padding = f" (padded to {padded:,})" if padded != vocab_size else ""
    per_epoch = datasets.train.num_samples_per_epoch
    ranks = str(world.device.type)
    if world.size > 1:
        ranks = f"{world.size} x {ranks} ({layout_name(config, world)})"
    lines = [
        f"model      {config.model.num_layers} layers, hidden {config.model.hidden_size}, "
        f"{config.model.num_attention_heads} heads, {format_count(parameters)} parameters, "
        f"vocabulary {vocab_size:,}{padding}",
        f"data       {datasets.num_tokens[0]:,} training tokens, {per_epoch:,} samples an epoch",
        f"length     {config.model.seq_length}, sequence length warmup: {seqlen_pacing(config)}",
        f"rate       {learning_rate(config)}",
        f"batch      {config.training.global_batch_size} sequences a step{batch_size_pacing(config)}, on {ranks}, "
        f"{precision(config.training)}, from step {progress.iteration + 1:,}",
        f"until      {end(config, progress, outlook)}",
        *(f"note       {note}" for note in [*datasets.notes, *warnings(config, progress, outlook), *repeated]),
    ]
    return "\n".join(lines)


def seqlen_pacing(config: Config) -> str:
    """The sequence length warmup in words."""
    warmup = config.seqlen_warmup
    words: str = warmup.seqlen_warmup
    if words in get_args(Growth):
        duration = warmup.duration()
        words += f" from {warmup.seqlen_start} over {duration.value:,} {duration.unit}"
    elif words in ("discrete", "mixed"):
        words += f" {warmup.seqlen_stages or warmup.seqlen_cycle} ({warmup.seqlen_stages_unit})"
    elif words == "adaptive":
        step = warmup.adaptive_step(config.model.seq_length)
        words += f" from {warmup.seqlen_start} by {step} after good validations"
    return words if warmup.seqlen_realisation == "truncate" else f"{words}, by {warmup.seqlen_realisation}"


def batch_size_pacing(config: Config) -> str:
    """The batch size warmup in words, as a clause."""
    warmup = config.batch_size_warmup
    if warmup.batch_size_warmup == "linear":
        duration = warmup.duration()
        return f" (from {warmup.batch_size_start} over {duration.value:,} {duration.unit})"
    return f" ({warmup.batch_size_stages})" if warmup.batch_size_warmup == "stages" else ""


def learning_rate(config: Config) -> str:
    """Peak, decay and warmup of the learning rate in words."""
    rate = config.learning_rate
    words, over = f"{_short(rate.lr)} {rate.lr_decay_style}", _span(rate.decay(config.training))
    if rate.lr_decay_style == "wsd":
        over = f"the last {100 * rate.lr_wsd_fraction:g}% of {over}"
    if rate.lr_decay_style != "constant":
        words += f" to {_short(rate.min_lr)} over {over}"
    warmup = rate.warmup(config.training)
    return f"{words}, warmup {_span(warmup)}" if warmup.value else f"{words}, no warmup"


def precision(training: TrainingConfig) -> str:
    """In what the forward and backward passes compute."""
    if training.fp16:
        return f"fp16 (loss scale {training.loss_scale or 'dynamic'})"
    return "bf16 (autocast)" if training.bf16 else "fp32"


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


def _span(duration: Duration) -> str:
    if duration.unit == "tokens":
        return f"{format_count(duration.value)} tokens"
    return f"{duration.value:,} {'steps' if duration.unit == 'iters' else duration.unit}"


def _short(rate: float) -> str:
    """As one would write it: 6e-4."""
    digits, _, power = f"{rate:.5e}".partition("e")
    return f"{float(digits):g}e{int(power)}" if rate else "0"
