"""What a run is about to do, in words."""

from __future__ import annotations

from typing import get_args

from megatron.config import Config
from megatron.console import format_count
from megatron.data.datasets import Datasets
from megatron.distributed.world import World
from megatron.growth import Growth
from megatron.model.flops import parameter_count
from megatron.pacing.plan import plan_run, target_tokens
from megatron.progress import Progress
from megatron.training.home import layout_name


def warnings(config: Config, progress: Progress) -> list[str]:
    """What a user may not have meant."""
    notes = []
    if config.checkpoint.save is None:
        notes.append("no --save DIR: nothing of this run will be kept")
    files = config.tokenizer
    if not (files.vocab_file or files.merge_file or files.tokenizer_file or files.vocab_size):
        notes.append(
            "no tokenizer's files are named: give --vocab-file and --merge-file, or --tokenizer-file, for tools that "
            "evaluate or export the run to find"
        )
    if plan_run(config).full_length_iteration is None:
        notes.append(f"the run ends before its sequence length reaches --seq-length {config.model.seq_length}")
    if config.seqlen_warmup.seqlen_warmup in get_args(Growth):
        planned = plan_run(config, at=progress.iteration).progress
        same_samples = progress.consumed_samples == planned.consumed_samples  # else some were skipped
        if same_samples and progress.consumed_tokens != planned.consumed_tokens:
            notes.append(
                f"the run has had {progress.consumed_tokens:,} tokens by step {progress.iteration:,} and would have "
                f"had {planned.consumed_tokens:,} with the pacing as it is now: its settings or its code have changed"
            )
    return notes


def repetition(trained: int | None, corpus: int) -> list[str]:
    """A note where a run of `trained` tokens reads a corpus of `corpus` training tokens twice or more."""
    if not trained or trained < 2 * corpus:
        return []
    return [
        f"{format_count(trained)} tokens are {format_count(trained / corpus)} passes over the {format_count(corpus)} "
        "of this corpus: watch the validation loss, which rises once they are learnt by heart"
    ]


def describe(config: Config, datasets: Datasets, vocab_size: int, world: World, progress: Progress) -> str:
    """What is about to happen, in a few lines."""
    repeated = repetition(target_tokens(config), datasets.num_tokens[0])
    parameters = parameter_count(config.model, vocab_size)
    per_epoch = datasets.train.num_samples_per_epoch
    ranks = str(world.device.type)
    if world.size > 1:
        ranks = f"{world.size} x {ranks} ({layout_name(config, world)})"
    lines = [
        f"model      {config.model.num_layers} layers, hidden {config.model.hidden_size}, "
        f"{config.model.num_attention_heads} heads, {format_count(parameters)} parameters, vocabulary {vocab_size:,}",
        f"data       {datasets.num_tokens[0]:,} training tokens, {per_epoch:,} samples an epoch",
        f"length     {config.model.seq_length}, sequence length warmup: {seqlen_pacing(config)}",
        f"batch      {config.training.global_batch_size} sequences a step{batch_size_pacing(config)}, on {ranks}, "
        f"from step {progress.iteration + 1:,}",
        *(f"note       {note}" for note in [*datasets.notes, *warnings(config, progress), *repeated]),
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
